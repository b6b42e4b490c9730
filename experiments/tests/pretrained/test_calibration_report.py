import base64

import pytest
import torch

from topk_attention import Calibration
from topk_attention.calibrate.statistics import Curves, k_grid
from topk_experiments.pretrained import calibration_pictures as pictures
from topk_experiments.pretrained.calibration_measures import Perplexity
from topk_experiments.pretrained.calibration_report import html_page, recommendation, run_name, table_rows
from topk_experiments.show.plots import png_of


def run(kind, mean_k, perplexity, feed_forward_mean_k=None):
    return {
        "kind": kind,
        "mean_k": mean_k,
        "feed_forward_mean_k": feed_forward_mean_k,
        "perplexity": perplexity,
        "elapsed_s": 2.0,
        "peak_mib": 1234.0,
    }


@pytest.fixture
def record():
    on = {"text": "<script>alert(1)</script>.txt", "num_tokens": 4096, "start": 60000}
    return {
        "config": {"dtype": "float32", "threads": 2, "backend": "cpu"},
        "model": {"name": "<tiny> & co", "revision": "1", "num_parameters": 135e6},
        "calibrated_on": on | {"start": 0, "windows": 2, "target": "MeanK(mean_k=64.0)"},
        "evaluated_on": on | {"overlaps_calibration": False},
        "measurement": {"elapsed_s": 60.0, "peak_mib": 3000.0},
        "environment": {"topk_attention": "0.1.0", "commit": None, "cpu": 'a "fast" <one>'},
        "runs": [
            run("full", None, 30.0),
            run("calibrated", 32.0, 32.0),
            run("calibrated", 63.9, 30.6),
            run("calibrated", 128.0, 30.1),
            run("uniform", 64, 35.0),
            run("uniform", 256, 30.7),
        ],
    }


def curves(num_heads, largest=256):
    ks = k_grid(largest)
    lost = torch.tensor([[k**-power - largest**-power for k in ks] for power in torch.linspace(0.5, 2, num_heads)])
    return Curves(ks, lost.double(), lost.double(), torch.zeros(2, *lost.shape).double(), 10)


@pytest.fixture
def calibration():
    return Calibration(
        {"first": (1, 8, 64, 256), "second": (16, 16)},
        {"mlp": 7},
        {"first": curves(4), "second": curves(2)},
        {"mlp": curves(1, 48)},
    )


def test_calibrated_k_are_recommended_where_they_need_fewer_keys(record):
    assert recommendation(record) == (
        "Use the calibrated k with a mean of 64: its perplexity is 30.60 against 30.00 in full (+2.0 %), where one k = "
        "64 for every head gives 35.00 (+16.7 %), and the smallest single k tried that comes as close is 256."
    )


def test_that_no_single_k_comes_as_close_is_told(record):
    del record["runs"][-1]
    assert recommendation(record).endswith("gives 35.00 (+16.7 %), and no single k tried comes as close.")
    del record["runs"][-1]
    assert recommendation(record).endswith("in full (+2.0 %), and no single k was tried beside it.")


def test_one_k_is_recommended_where_it_does_as_well(record):
    record["runs"][4]["perplexity"] = 30.6
    assert recommendation(record) == (
        "Use k = 64 for every head: its perplexity is 30.60 against 30.00 in full (+2.0 %), and calibrating gains "
        "nothing over that here (calibrated, mean k = 64 gives 30.60)."
    )


def test_one_k_is_recommended_where_it_needs_fewer_keys(record):
    record["runs"][4:] = [run("uniform", 16, 30.9)]
    assert recommendation(record).startswith("Use k = 16 for every head: its perplexity is 30.90")


def test_at_the_same_k_the_better_perplexity_wins(record):
    record["runs"][4]["perplexity"] = 30.8
    assert recommendation(record).startswith("Use the calibrated k with a mean of 64")


def test_full_attention_is_recommended_where_nothing_comes_close(record):
    record["runs"] = [run("full", None, 30.0), run("calibrated", 64.0, 32.0), run("uniform", 64, 35.0)]
    assert recommendation(record) == (
        "Use a larger k or full attention: of the k tried none comes within 3 % of full attention's 30.00, the closest "
        "being calibrated, mean k = 64 with a perplexity of 32.00 against 30.00 in full (+6.7 %)."
    )


def embedding_run(kind, mean_k, error):
    return run(kind, mean_k, None) | {"embedding_error": error, "cosine": 1 - error**2 / 2}


def test_an_encoder_is_recommended_a_k_by_its_embeddings(record):
    record["measure"] = "embedding_error"
    record["runs"] = [
        embedding_run("full", None, 0.0),
        embedding_run("calibrated", 16, 0.08),
        embedding_run("calibrated", 32, 0.04),
        embedding_run("uniform", 32, 0.06),
    ]
    assert recommendation(record) == (
        "Use the calibrated k with a mean of 32: its embedding error is 4.0 % (cosine 0.9992 to full attention's), "
        "where one k = 32 for every head gives 6.0 %, and no single k tried comes as close."
    )
    headings, full, first, *_ = table_rows(record)
    assert headings[1:3] == ["embedding error", "cosine to full"]
    assert full[1:3] == ["0.0 %", ""]
    assert first[1:3] == ["8.0 %", "0.9968"]
    record["runs"][2:] = [embedding_run("uniform", 32, 0.06)]
    assert recommendation(record) == (
        "Use a larger k or full attention: of the k tried none comes within 5 % of full attention's embeddings, the "
        "closest being k = 32 with an embedding error of 6.0 % (cosine 0.9982 to full attention's)."
    )


def test_neurons_have_a_sentence_of_their_own(record):
    neurons = [run("calibrated", None, 31.0, 768.0), run("uniform", None, 31.5, 768)]
    record["runs"] += [*neurons, run("calibrated", 64.0, 33.0, 768.0)]
    assert recommendation(record).endswith(
        "For feed-forward layers calibrating helps: with 768 neurons on average the perplexity is 31.00 (+3.3 %) "
        "calibrated and 31.50 (+5.0 %) with the same k in every layer."
    )
    neurons[0]["perplexity"] = 31.6
    assert "calibrating does not help, so use one k for all layers" in recommendation(record)


def test_nothing_to_compare_is_told(record):
    record["runs"] = record["runs"][:1]
    assert recommendation(record) == "There is nothing to compare yet."


def test_runs_are_called_by_what_they_keep():
    assert run_name(run("full", None, 1)) == "full attention"
    assert run_name(run("uniform", 64, 1)) == "k = 64"
    assert run_name(run("calibrated", 63.96, 1)) == "calibrated, mean k = 64"
    assert run_name(run("calibrated", 2.5, 1)) == "calibrated, mean k = 2.5"
    assert run_name(run("uniform", None, 1, 768)) == "k = 768 neurons"
    assert run_name(run("calibrated", 64, 1, 768.2)) == "calibrated, mean k = 64, mean k = 768 neurons"


def test_the_table_compares_with_full_attention(record):
    headings, full, first, *rest = table_rows(record)
    assert headings == ["", "perplexity", "over full", "time [s]", "peak memory [MiB]"]
    assert full == ["full attention", "30.00", "", "2.0", "1,234"]
    assert first == ["calibrated, mean k = 32", "32.00", "+6.7 %", "2.0", "1,234"]
    assert len(rest) == 4


def test_the_page_needs_no_other_file_and_escapes_what_comes_from_outside(record, calibration):
    page = html_page(record, calibration, "<k>.json")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.txt" in page
    assert "&lt;tiny&gt; &amp; co" in page
    assert "a &quot;fast&quot; &lt;one&gt;" in page
    assert "<k>" not in page
    assert "://" not in page  # "http" alone may be part of a picture
    assert page.count("data:image/png;base64,") == 4
    assert base64.b64encode(b"\x89PNG\r\n").decode()[:7] in page
    assert "gives each of 6 heads between 1 and 256 keys" in page
    assert "2 windows of 4,096 tokens" in page
    assert "none of which was calibrated on" in page


def test_the_page_tells_that_texts_overlap(record, calibration):
    record["evaluated_on"]["overlaps_calibration"] = True
    assert "which flatters the calibrated k" in html_page(record, calibration, "k.json")


def test_lost_mass_is_read_off_the_curve_at_each_heads_k(calibration):
    lost = pictures.lost_mass_at(calibration, "first")
    curve = calibration.curves["first"]
    assert lost[0] == curve.lost_mass[0, 0]
    assert lost[1] == curve.lost_mass[1, curve.ks.index(8)]
    assert lost[3] == 0


@pytest.mark.parametrize("ks", [(1, 1), (5, 5), (3, 1000)])
def test_pictures_can_be_drawn_of_any_k(ks):
    calibration = Calibration({"only": ks}, {}, {"only": curves(2)}, {})
    assert png_of(pictures.heat_maps(calibration)).startswith(b"\x89PNG")
    assert png_of(pictures.mass_against_k(calibration)).startswith(b"\x89PNG")
    quality = pictures.quality_against_k([run("full", None, 2), run("calibrated", ks[0], 3)], Perplexity())
    assert png_of(quality).startswith(b"\x89PNG")


def test_a_large_model_can_be_drawn():
    calibration = Calibration(
        {f"{layer}": tuple(range(1, 33)) for layer in range(32)},
        {},
        {f"{layer}": curves(32) for layer in range(32)},
        {},
    )
    assert png_of(pictures.heat_maps(calibration)).startswith(b"\x89PNG")
