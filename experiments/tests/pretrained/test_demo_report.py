import base64

import pytest

from topk_experiments.pretrained.demo_report import draw, html_page, run_name, summary, table_rows, write_report
from topk_experiments.show.plots import png_of


def run(k, perplexity, elapsed_s=2.0, peak_mib=100.0, completed=False):
    return {
        "k": k,
        "completed": completed,
        "perplexity": perplexity,
        "elapsed_s": elapsed_s,
        "peak_mib": peak_mib,
        "total_peak_mib": 900 + peak_mib,
    }


@pytest.fixture
def record():
    return {
        "config": {"num_tokens": 4096, "dtype": "float32", "threads": 2, "backend": "chunked"},
        "model": {"name": "<tiny> & co", "revision": "1", "num_parameters": 135e6},
        "text": {"source": "<script>alert(1)</script>.txt", "sha256": "ab" * 32},
        "environment": {"topk_attention": "0.1.0", "commit": None, "cpu": 'a "fast" <one>'},
        "runs": [run(None, 20.0), run(16, 30.0, 3.0, 150.0), run(64, 20.8, 4.0, 120.0), run(256, 20.2, 5.0, 110.0)],
    }


def test_the_summary_names_the_smallest_k_that_is_close(record):
    assert "k = 64 is the smallest k tried whose perplexity is within 5 %" in summary(record)
    assert "(20.80 against 20.00, +4.0 %)" in summary(record)


def test_the_summary_admits_that_no_k_is_close(record):
    record["runs"] = record["runs"][:2]
    assert "No k tried comes within 5 % of full attention's perplexity; k = 16 comes closest" in summary(record)
    assert "(30.00 against 20.00, +50.0 %)" in summary(record)


def test_the_summary_says_what_completion_gives_back(record):
    record["runs"] = [*record["runs"][:2], run(16, 20.5, completed=True)]
    words = summary(record)
    assert words.startswith(
        "Without completion no k tried comes within 5 % of full attention's perplexity; k = 16 comes closest (30.00 "
        "against 20.00, +50.0 %). With completion k = 16 is the smallest k tried whose perplexity is within 5 % of "
        "full attention's (20.50 against 20.00, +2.5 %)."
    )
    assert words.endswith("(1.00 to 1.50 times full attention's peak memory, over 1 round).")


def test_completed_runs_are_told_from_those_of_topk_alone(record):
    record["runs"].append(run(16, 20.5, 3.5, 150.0, completed=True))
    names = [row[0] for row in table_rows(in_rounds(record, 1.0, 1.1, 1.2))]
    assert names == ["attention", "full attention", "k = 16", "k = 16, completed", "k = 64", "k = 256"]
    record["runs"] = [run for run in record["runs"] if run["k"] in (None, 16)]
    for one in record["runs"]:
        if one["completed"]:
            one["elapsed_s"] = 9.0
    assert "Time: slower at every k" in summary(record)
    record["runs"] = [run | {"elapsed_s": 2.0} if not run["completed"] else run for run in record["runs"]]
    assert "Time: slower at k = 16 completed; no difference beyond noise at the other k" in summary(record)
    labels = draw(record).axes[0].get_legend_handles_labels()[1]
    assert labels == ["full attention", "top-k attention", "completed"]


def in_rounds(record, *slower_by):
    """The same runs in rounds whose times are longer by these factors, full attention's too."""
    runs = record["runs"]
    record["runs"] = [
        run | {"round": number, "elapsed_s": factor * run["elapsed_s"]}
        for number, factor in enumerate(slower_by, 1)
        for run in runs
    ]
    return record


def test_the_summary_admits_that_topk_was_slower(record):
    words = summary(in_rounds(record, 1.0, 1.1, 1.2))
    assert "Time: slower at every k (1.25 to 3.00 times full attention's time, over 3 rounds)." in words
    assert "Peak memory: larger at every k (1.10 to 1.50 times full attention's peak memory, over 3 rounds)." in words


def test_the_summary_says_at_which_k_topk_was_slower_or_faster(record):
    record["runs"][1]["elapsed_s"] = 1.0
    words = summary(in_rounds(record, 1.0, 1.1, 1.2))
    assert "Time: faster at k = 16; slower at k = 64, 256 (0.42 to 3.00 times" in words
    record["runs"] = [run for run in record["runs"] if run["k"] in (None, 16)]
    assert "Time: faster at every k (0.42 to 0.60 times full attention's time, over 3 rounds)." in summary(record)


def test_noise_cannot_make_the_summary_claim_a_difference(record):
    """Each k is faster in the median, but the rounds of full attention alone differ by as much."""
    for run_of_record in record["runs"][1:]:
        run_of_record["elapsed_s"] = 1.9
    assert "Time: no difference beyond noise (0.79 to 1.14 times" in summary(in_rounds(record, 1.0, 1.1, 1.2))
    record["runs"] = record["runs"][:4]
    record["runs"][3]["elapsed_s"] = 3.0
    words = summary(in_rounds(record, 1.0, 1.1))
    assert "Time: slower at k = 256; no difference beyond noise at the other k" in words


def test_a_record_of_one_round_claims_no_difference_and_still_has_a_page(record, tmp_path):
    """As records of the first schema are, which did not say whether a run is completed."""
    for one in record["runs"]:
        del one["completed"]
    words = summary(record)
    assert (
        "One round cannot tell a difference in time from noise (1.50 to 2.50 times full attention's time, over 1 "
        "round)." in words
    )
    for path in write_report(record | {"schema": "topk_attention/demo/1"}, tmp_path):
        assert path.exists()


def test_the_page_escapes_what_comes_from_outside(record):
    page = html_page(record)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.txt" in page
    assert "&lt;tiny&gt; &amp; co" in page
    assert "a &quot;fast&quot; &lt;one&gt;" in page


def test_the_page_needs_no_other_file_and_has_a_row_for_each_run(record):
    page = html_page(record)
    assert base64.b64encode(png_of(draw(record))).decode() in page
    assert "://" not in page  # "http" alone may be part of a picture
    assert page.count("<tr><td>") == 4
    assert "<td>full attention</td><td>20.00</td><td>2.0</td><td>one round</td><td>100</td><td>1,000</td>" in page


def test_runs_are_called_by_their_k():
    names = run_name(None), run_name(64), run_name(64, completed=True)
    assert names == ("full attention", "k = 64", "k = 64, completed")


@pytest.mark.parametrize("num_runs", [1, 2, 4])
def test_the_picture_can_be_drawn_after_any_run(record, num_runs):
    record["runs"] = record["runs"][:num_runs]
    assert png_of(draw(record)).startswith(b"\x89PNG")
