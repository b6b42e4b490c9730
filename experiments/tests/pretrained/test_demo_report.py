import base64

import pytest

from topk_experiments.pretrained.demo_report import html_page, run_name, summary
from topk_experiments.show.plots import draw_demo


def run(k, perplexity, elapsed_s=2.0, peak_mib=100.0):
    return {
        "k": k,
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


def test_the_summary_admits_that_topk_was_slower(record):
    assert "slower than full attention at every k (1.50 to 2.50 times its time)" in summary(record)
    assert "needed 1.10 to 1.50 times its memory" in summary(record)


def test_the_summary_tells_where_topk_was_slower_at_some_k_or_none(record):
    record["runs"][1]["elapsed_s"] = 1.0
    assert "slower than full attention at 2 of 3 k (0.50 to 2.50 times its time)" in summary(record)
    record["runs"] = record["runs"][:2]
    assert "faster than full attention at every k (0.50 times its time)" in summary(record)


def test_the_page_escapes_what_comes_from_outside(record):
    page = html_page(record, b"picture")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.txt" in page
    assert "&lt;tiny&gt; &amp; co" in page
    assert "a &quot;fast&quot; &lt;one&gt;" in page


def test_the_page_needs_no_other_file_and_has_a_row_for_each_run(record):
    page = html_page(record, b"picture")
    assert base64.b64encode(b"picture").decode() in page
    assert "://" not in page  # "http" alone may be part of a picture
    assert page.count("<tr><td>") == 4
    assert "<td>full attention</td><td>20.00</td><td>2.0</td><td>100</td><td>1,000</td>" in page


def test_runs_are_called_by_their_k():
    assert (run_name(None), run_name(64)) == ("full attention", "k = 64")


@pytest.mark.parametrize("num_runs", [1, 2, 4])
def test_the_picture_can_be_drawn_after_any_run(record, tmp_path, num_runs):
    record["runs"] = record["runs"][:num_runs]
    draw_demo(record, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
