import pytest

from topk_experiments.benchmarks.error.measure import METHODS as ERROR_METHODS
from topk_experiments.rivals.names import METHODS
from topk_experiments.show.plots import STYLES, styles


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("top-k (cpu), k = 64", "topk"),
        ("topk-cpu", "topk"),
        ("top-k, k = 64 (cpu), every neuron in token chunks", "topk"),
        ("attention k = 32", "topk"),
        ("k = 128", "topk"),
        ("topk-chunked", "topk-chunked"),
        ("top-k, completed (cpu)", "topk-completed"),
        ("attention k = 64, completed", "topk"),
        ("top-k attention, k = 128 (reference)", "topk-reference"),
        ("top-k, torch.sparse, k = 512", "topk-sparse"),
        ("attention calibrated by novel, mean k = 64", "calibrated"),
        ("every key, in query chunks (chunked)", "query-chunks"),
        ("token-chunks", "query-chunks"),
        ("vanilla, a sixteenth of the tokens at a time", "vanilla-chunks"),
        ("vanilla (eager)", "vanilla"),
        ("dense", "vanilla"),
        ("PyTorch's SDPA", "full"),
        ("full", "full"),
        ("RFA, each head with its best sigma", "rfa"),
    ],
)
def test_a_method_has_its_style_under_every_name(name, method):
    assert styles([name])[name] == STYLES[method]


@pytest.mark.parametrize("name", [*METHODS, *(method.description for method in METHODS.values())])
def test_every_method_of_the_one_table_has_a_style(name):
    assert styles([name])[name] in STYLES.values()


def test_colours_do_not_depend_on_the_company():
    alone = styles(["Performer"])["Performer"]
    assert styles(["sdpa", "topk-cpu", "something new", "Performer"])["Performer"] == alone
    names = [method.description for method in ERROR_METHODS.values()]
    assert {styles(names)[name].colour for name in names if name.startswith("Performer")} == {alone.colour}


def test_no_two_methods_share_colour_or_marker():
    for field in ("colour", "marker"):
        assert len({getattr(style, field) for style in STYLES.values()}) == len(STYLES)


def test_curves_of_one_method_differ_in_marker_and_line_and_unknown_ones_in_colour():
    first, second, third = styles([f"top-k (cpu), k = {k}" for k in (64, 128, 256)]).values()
    assert first.colour == second.colour == third.colour
    assert len({style.marker for style in (first, second, third)}) == 3
    assert len({style.line for style in (first, second, third)}) == 3
    one, other = styles(["something", "something else"]).values()
    assert one.colour != other.colour
    assert {one.colour, other.colour}.isdisjoint(style.colour for style in STYLES.values())
