import json
from dataclasses import replace

import pytest

from topk_experiments.benchmarks.attention import ROUNDS
from topk_experiments.benchmarks.attention.works import TABLE, Work
from topk_experiments.benchmarks.rounds import RoundBenchmark, run_and_show_rounds
from topk_experiments.runs.process import WorkerError

WORK = Work(num_heads=2, length=64, k=5, head_dim=4)
METHODS = ("topk-chunked", "sdpa", "query-chunks")


@pytest.fixture
def report(measurements, console, tmp_path, unpainted_pictures):
    """Runs a benchmark with the given plan and returns its markdown."""

    def run(plan, name="table", **settings):
        run_and_show_rounds(RoundBenchmark(ROUNDS, name, plan, out=tmp_path, step_limit_s=1e9, **settings), console)
        return (tmp_path / f"{name}.md").read_text()

    return run


@pytest.mark.parametrize(("sdpa_s", "verdict"), [(5.5, "reached"), (1.5, "missed")])
def test_the_goal_stands_beside_our_ratio_alone(report, measurements, sdpa_s, verdict):
    measurements.seconds = {"sdpa": sdpa_s}
    page = report({TABLE["plain"]: METHODS})
    ours, sdpa, chunks = (line for line in page.splitlines() if line.startswith(("| topk", "| sdpa", "| query")))
    assert f"| {sdpa_s:.2f}, goal 4.5: {verdict} |" in ours
    assert f"| {sdpa_s:.2f}, goal 10: missed |" in ours
    assert "| 1.00 |" in sdpa
    assert "goal" not in sdpa + chunks


def test_a_work_without_a_goal_has_ratios_alone(report):
    page = report({WORK: METHODS})
    assert "| topk-chunked | 1 (0.9 to 1.2) | 1.00 | 2 (1.8 to 2.4) | 1.00 | 12.0 |" in page
    assert "goal" not in page


def test_memory_above_sdpas_stands_beside_what_is_allowed(report):
    page = report({WORK: METHODS, replace(WORK, length=64 * 1024, k=512): METHODS})
    assert "topk-chunked needs +2.0 MiB against sdpa; allowed are 0.0 MiB" in page
    assert "allowed are 512.0 MiB, the saved indices and weights: kept." in page


def test_the_share_of_the_floor_is_of_our_forward_pass(report, measurements):
    measurements.seconds = {"topk-chunked": 2.0}
    assert "Floor: 0.5 s, 25% of topk-chunked's forward pass." in report({WORK: METHODS})


def test_a_forward_pass_far_below_the_floor_is_explained(report, measurements):
    measurements.seconds = {"topk-chunked": 0.45}
    assert "Above 100 %" not in report({WORK: METHODS})
    measurements.seconds = {"topk-chunked": 0.25}
    page = report({replace(WORK, k=6): METHODS})
    assert "Floor: 0.5 s, 200% of topk-chunked's forward pass." in page
    assert "Above 100 %: keys are screened by 8-bit products first" in page


def test_a_page_with_other_numbers_than_float32_says_where(report):
    page = report({WORK: METHODS, replace(WORK, dtype="bfloat16"): METHODS})
    assert "float32 unless said, PyTorch" in page
    assert "H = 2, L = 64, k = 5, D = 4, bfloat16" in page


def test_without_sdpa_there_is_no_ratio(report, measurements):
    measurements.failed = {"sdpa"}
    page = report({TABLE["dropout"]: METHODS})
    assert "| sdpa | out of memory |  | out of memory |  | 10.0 |" in page
    assert "| goal 25 |" in page


def test_a_work_that_was_given_up_is_shown_as_such(report, measurements):
    measurements.errors["time_methods"] = WorkerError("time limit", "not finished after 5 s")
    assert "| topk-chunked | time limit |  | time limit |  | 12.0 |" in report({WORK: METHODS})


def test_who_is_left_out_is_named_with_the_reason(report):
    causal = replace(WORK, is_causal=True)
    assert "- performer left out: performer-pytorch's causal attention" in report({causal: (*METHODS, "performer")})


@pytest.mark.parametrize("name", ["length", "k"])
def test_a_sweep_is_drawn_from_two_points_on(report, tmp_path, name):
    plan = {replace(WORK, **{name: size}): METHODS for size in (8, 16)}
    report(dict(list(plan.items())[:1]), name)
    assert not (tmp_path / f"{name}.png").exists()
    report(plan, name)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_shown_and_its_files_named(report, console, tmp_path):
    report({TABLE["plain"]: METHODS})
    text = console.export_text()
    assert "H = 4, L = 8,192, k = 64" in text
    assert "goal 10: missed" in text
    for name in ("table.jsonl", "table.md"):
        assert f"Written: {tmp_path / name}" in text


def test_the_report_is_drawn_again_from_records_alone(report, tmp_path):
    causal = replace(WORK, is_causal=True)
    page = report({WORK: METHODS, causal: (*METHODS, "performer")})
    (tmp_path / "table.md").unlink()
    assert ROUNDS.report(tmp_path, "table") == [tmp_path / "table.md"]
    assert (tmp_path / "table.md").read_text() == page


def test_records_that_do_not_say_who_was_left_out_get_the_reason_when_they_are_drawn(report, measurements, tmp_path):
    measurements.seconds = {"sdpa": 50.0}
    lengths = [replace(WORK, length=length) for length in (64, 128, 256)]
    report(dict.fromkeys(lengths[:2], METHODS[:2]) | {lengths[2]: METHODS[:1]}, "length")
    lines = (tmp_path / "length.jsonl").read_text().splitlines()
    records = [{name: value for name, value in json.loads(line).items() if name != "left_out"} for line in lines]
    (tmp_path / "length.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    page, _ = ROUNDS.report(tmp_path, "length")
    assert "- sdpa left out: a forward and backward pass would take about 1600 s." in page.read_text()
