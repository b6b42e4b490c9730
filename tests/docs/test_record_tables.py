"""Tables of the site come from records, and the README's numbers agree with them."""

import json

import pytest

import record_tables
from pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", record_tables.TABLES)
def test_every_table_has_rows_of_equal_length(name):
    lines = record_tables.markdown(name).splitlines()
    assert len(lines) > 3
    assert len({line.count(" | ") for line in lines}) == 1


def test_a_table_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no table 'speed'; there are attention-layer"):
        record_tables.markdown("speed")


def column(name, header):
    """The cells of a column of a table, by the first cell of their row."""
    names, rows = record_tables.TABLES[name]()
    at = list(names).index(header)
    return {row[0]: row[at] for row in rows}


def test_the_speeds_of_the_readme_are_those_of_the_records():
    both = column("attention-speed", "forward + backward")
    plain = both["H = 4, L = 8,192, k = 64"]
    bias, dropout = (
        round(float(both[f"H = 4, L = 8,192, k = 64, {name}"])) for name in ("learned relative bias", "dropout 0.1")
    )
    assert f"**{plain} times as fast**" in README
    assert f"**{bias} and {dropout} times as fast**" in README
    assert f"{both['H = 12, L = 2,048, k = 64']} times as fast at 2,048 tokens (12 heads)" in README
    assert f"{both['H = 4, L = 32,768, k = 64']} times at 32,768" in README
    theirs = column("attention-speed", "peak memory, PyTorch")
    assert theirs["H = 4, L = 8,192, k = 64, learned relative bias"] == "3.3 GiB"
    assert theirs["H = 4, L = 8,192, k = 64, dropout 0.1"] == "4.0 GiB"
    assert "takes 3.3 and 4.0 GiB" in README


def test_the_forward_speeds_of_the_readme_are_the_extremes_without_bias_and_dropout():
    forward = column("attention-speed", "forward")
    plain = [float(ratio) for work, ratio in forward.items() if "bias" not in work and "dropout" not in work]
    assert f"{min(plain)} to {max(plain)} times as fast" in README
    assert f"{forward['H = 4, L = 8,192, k = 64']} times in the forward pass alone" in README


def test_the_speeds_on_real_queries_in_the_readme_are_those_of_the_records():
    forward, both = zip(
        *(
            record_tables._ratios(one["methods"], "sdpa", "topk-cpu")
            for one in record_tables._timings("attention-kernel/layers.jsonl")
        ),
        strict=True,
    )
    words = f"{min(both):.1f} to {max(both):.1f} and {min(forward):.1f} to {max(forward):.1f} times"
    assert words in README.replace("\n", " ")


def test_the_speeds_of_a_decoding_step_in_the_readme_are_those_of_the_records():
    ratios = {}
    for record in record_tables._lines("decode/decode.jsonl"):
        work, methods = record["request"]["work"], record["methods"]
        if work["num_keys"] == 32768:
            times = {name: of["median_s"] for name, of in methods.items()}
            best = min(times["sdpa"], times["sdpa-rows"])
            ratios[work["dtype"]] = best / times["topk-index"], times["sdpa"] / times["topk-index"]
    (best, gqa), (best_half, gqa_half) = ratios["float32"], ratios["bfloat16"]
    assert f"**{best:.0f} and {best_half:.0f} times as fast**" in README
    assert f"{gqa:.0f} and {gqa_half:.0f} times as its `enable_gqa`" in README


def test_the_feed_forward_numbers_of_the_readme_are_the_extremes_of_the_large_works():
    header, rows = record_tables.TABLES["feed-forward-speed"]()
    both = list(header).index("forward + backward")
    speeds = [float(row[both]) for row in rows if float(row[3].replace(",", "")) > 8]
    assert f"{min(speeds):.1f} to {max(speeds):.1f} times as fast in training" in README


def test_the_perplexities_of_the_readme_are_those_of_the_records():
    runs = json.loads((record_tables.RESULTS / "calibration/smollm2-moby-dick.record.json").read_text())["runs"]
    found = {(run["kind"], run["mean_k"]): f"{run['perplexity']:.2f}" for run in runs}
    completed = column("completion", "completed")
    assert f"**{completed['k = 64 for every head']} against {found['full', None]}**" in README
    assert f"({completed['k = 16 for every head']} with 16 keys)" in README
    assert f"{found['uniform', 64]} at k = 64 against {found['full', None]} in full" in README


def test_the_completed_perplexities_of_the_readme_are_those_of_the_records():
    alone, completed = column("completion", "top-k alone"), column("completion", "completed")
    k64, k16 = "k = 64 for every head", "k = 16 for every head"
    assert f"{completed[k64]} at k = 64 and {completed[k16]} at k = 16" in README
    assert f"({alone[k64]} and {alone[k16]} without" in README


def test_the_readme_fits_in_130_lines():
    assert len(README.splitlines()) <= 130
