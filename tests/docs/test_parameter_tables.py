"""Aligned parameter blocks of docstrings become tables."""

import inspect
import re

import pytest

import topk_attention
from pages import SITE
from parameter_tables import escape, rewrite


def rows(lines):
    """The cells of the tables in reStructuredText, a list for each row."""
    found = []
    for line in lines:
        if line.startswith("   * - "):
            found.append([line[7:]])
        elif line.startswith("     - "):
            found[-1].append(line[7:])
        elif line == "     -":
            found[-1].append("")
    return found


def test_names_shapes_and_meanings_become_columns():
    lines = rewrite(
        ["Attend.", "", "query      [B, N]  float32", "attn_mask  bool, True = may attend", "", "Returns x."]
    )
    assert rows(lines) == [
        ["Name", "Shape", "Meaning"],
        ["``query``", "``[B, N]``", "float32"],
        ["``attn_mask``", "", "bool, True = may attend"],
    ]
    assert lines[0] == "Attend."
    assert lines[-1] == "Returns x."


def test_further_lines_of_a_meaning_are_joined():
    lines = rewrite(["scale  factor on the scores,", "       1 by default", "backend  a name"])
    assert rows(lines)[1:] == [["``scale``", "factor on the scores, 1 by default"], ["``backend``", "a name"]]


def test_a_block_without_shapes_has_no_column_for_them():
    assert rows(rewrite(["k  keys kept per query"]))[0] == ["Name", "Meaning"]


def test_several_names_share_a_row():
    assert rows(rewrite(["b_in, b_gate  [F]"]))[1] == ["``b_in``, ``b_gate``", "``[F]``", ""]


def test_a_shape_alone_has_an_empty_meaning():
    assert rows(rewrite(["value  [B, M]"]))[1] == ["``value``", "``[B, M]``", ""]


def test_an_example_stays_as_it_is():
    example = [">>> f(x,  y) * 2  # |x|", "name  value"]
    assert rewrite(example) == example


def test_a_sentence_stays_a_sentence():
    assert rewrite(["The softmax runs over the kept scores alone."]) == ["The softmax runs over the kept scores alone."]


def test_no_character_of_a_sentence_is_markup():
    assert escape("the largest |act(gate) * in| of w_in, see `x * y`") == (
        "the largest \\|act(gate) \\* in\\| of w_in, see ``x * y``"
    )


@pytest.mark.parametrize("name", ["topk_attention", "topk_feed_forward", "convert", "calibrate", "TopKAttention"])
def test_every_argument_without_an_obvious_meaning_has_a_row(name):
    public = getattr(topk_attention, name)
    lines = inspect.cleandoc(public.__doc__).splitlines()
    table = {cell.strip("`") for row in rows(rewrite(lines)) for cell in row[0].split(", ")}
    arguments = set(inspect.signature(public).parameters)
    # The layer says of its other options that they are those of the function.
    described_elsewhere = set(inspect.signature(topk_attention.topk_attention).parameters)
    missing = arguments - table
    assert not missing - (described_elsewhere | {"num_heads", "num_key_heads"} if name == "TopKAttention" else set())


def test_a_signature_that_a_page_writes_out_is_that_of_the_code():
    written = re.compile(r"^\.\. auto\w+:: topk_attention\.(\w+)\((.*?)\)(?: ->.*)?$", re.MULTILINE)
    found = [match.groups() for page in SITE for match in written.finditer(page.read_text(encoding="utf-8"))]
    assert {name for name, _ in found} == {"convert", "Calibration", "StandIns"}
    for name, arguments in found:
        names = [argument.partition("=")[0].strip() for argument in arguments.split(",")]
        assert [n for n in names if n != "*"] == list(inspect.signature(getattr(topk_attention, name)).parameters)
