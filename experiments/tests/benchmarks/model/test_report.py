import importlib
from dataclasses import replace

import pytest

from topk_attention.environment import environment
from topk_experiments.benchmarks.model import grid, redraw, report
from topk_experiments.benchmarks.model.points import settings
from topk_experiments.runs.records import append_json_line


@pytest.fixture
def written(tmp_path, console, unpainted_pictures):
    """Writes records of points and returns the report's markdown and the files."""

    def run(points, records):
        lines = tmp_path / "name.jsonl"
        for point, changes in records:
            record = {"point": point.as_record(), "environment": environment(), "outcome": "finished"}
            append_json_line(lines, record | _finished(point) | changes)
        files = report(lines, settings(points[0].as_record()), console)
        return (tmp_path / "name.md").read_text(), [file.name for file in files]

    return run


def _finished(point):
    compared = None if point.method == "vanilla" else "eager attention: loss and all gradients"
    return {
        "elapsed_s": 8.0,
        "fastest_s": 7.0,
        "slowest_s": 9.0,
        "forward_s": 2.0,
        "backward_s": 6.0,
        "repetitions": 3,
        "other_cores": 0.0,
        "peak_mib": 1536.0,
        "held_after_forward_mib": 1024.0,
        "weights_mib": 512.0,
        "check": {"length": 96, "compared_with": compared, "loss_error": 1e-6, "gradient_error": 2e-5},
    }


def points_of(**changes):
    return grid([2048, 4096], ["topk", "vanilla"], **{"shape": "bert-base", "backend": "chunked"} | changes)


def test_the_papers_numbers_stand_beside_a_model_of_its_settings_alone(written):
    points = points_of()
    page, files = written(points, [(point, {}) for point in points])
    assert files == ["name.md", "name.png"]
    assert "| 2,048 | top-k, k = 64 (chunked) | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 | 1.4 | 0.44 |" in page
    assert "| 4,096 | vanilla (eager) | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 |  |  |" in page
    assert "Gupta et al. 2021" in page
    assert "on a GPU" in page


def test_a_single_step_is_not_called_a_median(written):
    point = points_of()[0]
    page, _ = written([point], [(point, {"repetitions": 1})])
    assert "| 1.50 | 1.00 | 8.0 (one step, the first) | 2.0 | 6.0 |" in page


@pytest.mark.parametrize("changes", [{"dropout_p": 0.0}, {"checkpointing": True}, {"shape": "t5-base"}])
def test_other_settings_are_compared_with_nobody(written, changes):
    points = points_of(**changes)
    page, _ = written(points, [(points[0], {})])
    assert "paper" not in page
    assert "Gupta" not in page


def test_another_k_has_no_number_of_the_papers(written):
    (point,) = grid([2048], ["topk"], shape="bert-base", k=128, backend="chunked")
    page, _ = written([point], [(point, {})])
    assert "| 2,048 | top-k, k = 128 (chunked) | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 |\n" in page


def test_another_number_of_features_has_no_number_of_the_papers(written):
    (point,) = grid([2048], ["performer"], shape="bert-base", num_features=128)
    page, _ = written([point], [(point, {})])
    assert "| 2,048 | Performer, 128 features | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 |\n" in page


def test_performer_stands_beside_the_papers_and_tells_which_dropout_it_does_without(written, monkeypatch):
    drawn = {}
    tables = importlib.import_module("topk_experiments.benchmarks.tables")
    monkeypatch.setattr(tables, "draw_memory_and_time", lambda curves, path, **options: drawn.update(options))
    points = grid([2048], ["performer", "rfa", "vanilla"], shape="bert-base")
    page, _ = written(points, [(point, {}) for point in points])
    assert "| 2,048 | Performer, 256 features | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 | 3.48 | 0.51 |" in page
    assert (
        "| 2,048 | Random Feature Attention, 256 features | 1.50 | 1.00 | 8.0 (7.0 to 9.0) | 2.0 | 6.0 |  |  |" in page
    )
    assert (
        page.count("no dropout of attention weights, which it never forms; every other dropout of the model acts") == 2
    )
    assert "vanilla (eager): no dropout" not in page
    performer = "Performer, Gupta et al. 2021 (quoted, GPU)"
    assert drawn["quoted"]["peak_mib"][performer][2048] == 3.48
    assert drawn["quoted_like"][performer] == "Performer, 256 features"


def test_without_dropout_there_is_none_to_do_without(written):
    (point,) = grid([2048], ["performer"], shape="bert-base", dropout_p=0.0)
    page, _ = written([point], [(point, {})])
    assert "no dropout of attention weights" not in page


def test_what_did_not_finish_is_in_the_table_with_the_reason_below(written):
    points = points_of()
    out_of_memory = {"outcome": "out of memory", "message": "can't allocate memory", "memory_limit_mib": 2048.0}
    left_out = {"outcome": "left out", "message": "a step would take about 900 s, more than 600 s"}
    page, _ = written(points, [(points[0], {}), (points[1], out_of_memory), (points[2], left_out)])
    assert "| 2,048 | vanilla (eager) | out of memory |" in page
    assert "- L = 2,048, vanilla (eager): out of memory, of 2.0 GiB (can't allocate memory)." in page
    assert "- L = 4,096, top-k, k = 64 (chunked): left out (a step would take about 900 s, more than 600 s)." in page


def test_a_file_without_a_finished_point_has_a_table_and_no_picture(written):
    point = points_of()[0]
    _, files = written([point], [(point, {"outcome": "time limit", "message": "not finished after 1 s"})])
    assert files == ["name.md"]


def test_the_page_says_what_was_checked(written):
    point = points_of()[0]
    check = {
        "k": 24,
        "compared_with_below_length": "the reference backend, with this k: loss",
        "loss_error_below_length": 4e-7,
    }
    page, _ = written([point], [(point, {"check": _finished(point)["check"] | check})])
    assert (
        "top-k, k = 64 (chunked): checked at 96 tokens without dropout against eager attention: loss and all "
        "gradients; largest errors 1e-06 and 2e-05 of a gradient's largest entry; with k = 24 against the reference "
        "backend, with this k: loss, 4e-07." in page
    )


def test_the_newest_record_of_a_point_counts_and_other_settings_do_not(written):
    points = points_of()
    other = replace(points[0], dropout_p=0.0)
    page, _ = written(points, [(points[0], {}), (points[0], {"peak_mib": 3072.0}), (other, {"peak_mib": 9999.0})])
    assert page.count("| 2,048 |") == 1
    assert "| 3.00 |" in page


def test_points_of_other_code_stay_and_are_named_and_those_of_other_packages_go(written):
    points = points_of()
    older = environment() | {"commit": "abc1234", "product_sha256": "older"}
    page, _ = written(points, [(point, {"environment": older}) for point in points])
    assert "top-k" in page
    assert "commit abc1234." in page
    newer = environment() | {"torch": "another", "commit": "def5678"}
    page, _ = written(points, [(points[1], {"environment": newer})])
    assert "top-k" not in page
    assert "commit def5678." in page


def test_records_of_another_machine_are_drawn_again_in_the_settings_of_the_last_one(tmp_path):
    (tmp_path / "model").mkdir()
    lines = tmp_path / "model" / "name.jsonl"
    for point in (*points_of(dropout_p=0.0), *points_of()):
        record = {"point": point.as_record(), "environment": environment() | {"cpu": "another"}, "outcome": "finished"}
        append_json_line(lines, record | _finished(point))
    assert redraw(tmp_path) == [lines.with_suffix(".md"), lines.with_suffix(".png")]
    assert "dropout 0.1" in lines.with_suffix(".md").read_text()
