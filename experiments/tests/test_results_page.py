import shutil
from pathlib import Path

import pytest
from rich.console import Console

from topk_attention.environment import environment
from topk_experiments.benchmarks import figures
from topk_experiments.benchmarks.attention import CHUNKS
from topk_experiments.benchmarks.figures import FULL, QUICK, run_figures
from topk_experiments.benchmarks.tables import how_measured
from topk_experiments.results_page import SECTIONS, write_page
from topk_experiments.runs import steps
from topk_experiments.runs.ledger import newest, on_file
from topk_experiments.runs.records import append_json_line
from topk_experiments.show.quoted import ATTENTION_LAYER, CHUNK_SIZE


def chunk_record(chunk_size, gib=1.0, **changes):
    point = {"method": "vanilla-chunks", "chunk_size": chunk_size, "length": 4096, "k": None, "num_heads": 12}
    point |= {"head_dim": 64, "is_causal": False, "device": "cpu", "threads": 2, "seed": 0}
    numbers = {"peak_mib": 1024 * gib, "elapsed_s": 2.0, "fastest_s": 1.5, "slowest_s": 3.0, "repetitions": 3}
    made = {
        "schema": CHUNKS.schema,
        "point": point,
        "environment": environment(),
        "outcome": "finished",
        "other_cores": None,
    }
    return made | numbers | changes


def test_of_each_point_the_newest_record_counts_and_only_from_the_last_machine(tmp_path):
    lines = tmp_path / "chunk-size.jsonl"
    elsewhere = environment() | {"cpu": "another one"}
    for record in (
        chunk_record(64, environment=elsewhere),
        chunk_record(128, gib=1.0),
        chunk_record(256, gib=2.0),
        chunk_record(128, gib=3.0),
        {"schema": "another"},
    ):
        append_json_line(lines, record)
    found = newest(on_file(lines, CHUNKS.schema), lambda record: str(record["point"]))
    assert [(record["point"]["chunk_size"], record["peak_mib"] / 1024) for record in found] == [(128, 3.0), (256, 2.0)]


def test_the_page_holds_pictures_tables_and_what_is_missing(tmp_path):
    for size in (128, 256):
        append_json_line(tmp_path / "chunk-size" / "chunk-size.jsonl", chunk_record(size))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bert-base.md").write_text("| L | step |\n| --- | --- |\n| 64 | <b>1 & 2</b> |\n")
    (tmp_path / "something-else").mkdir()
    (tmp_path / "something-else" / "a.md").write_text("words\n")
    page = write_page(tmp_path).read_text()
    assert page.count('src="data:image/png;base64,') == 1
    assert "<td>vanilla, a chunk of queries at a time</td>" in page
    assert "<td>&lt;b&gt;1 &amp; 2&lt;/b&gt;</td>" in page
    assert '<a href="#chunk-size">' in page
    assert "<td>accuracy on Long Range Arena</td><td>not recorded</td>" in page
    assert "chunk-size/chunk-size.jsonl (2 records, commit" in page
    assert "<h2>Something else</h2>" in page
    assert (tmp_path / "chunk-size" / "chunk-size.png").exists()
    assert str(tmp_path) not in page


def test_every_table_and_picture_is_drawn_again_unless_that_is_left_out(tmp_path):
    """From copies of the records that are kept with the code; nothing is measured."""
    kept = Path(__file__).parents[2] / "results"
    for folder in ("lra", "whisper", "language-model", "feed-forward-curve", "demo"):
        (tmp_path / folder).mkdir()
        for path in [*(kept / folder).glob("*.json"), *(kept / folder).glob("*.jsonl")]:
            shutil.copy(path, tmp_path / folder)
    records = {path.name for path in tmp_path.glob("*/*")}
    write_page(tmp_path, redraw=False)
    assert {path.name for path in tmp_path.glob("*/*")} == records
    page = write_page(tmp_path).read_text()
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*") if path.name not in records}
    assert drawn == {
        "lra/table.md",
        "lra/curves.png",
        "lra/curves.narrow.png",
        "whisper/transcripts.md",
        "language-model/input-bytes.png",
        "language-model/input-bytes.narrow.png",
        "feed-forward-curve/feed-forward-curve.png",
        "feed-forward-curve/feed-forward-curve.narrow.png",
        "demo/demo.png",
        "demo/demo.narrow.png",
        "demo/demo.html",
    }
    assert page.index("What to conclude") < page.index("Every picture and table")
    for name in ("lra/table.md", "whisper/transcripts.md"):
        assert (tmp_path / name).read_text() == (kept / name).read_text()


def test_a_page_of_no_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="out must be a folder with results"):
        write_page(tmp_path / "nowhere")


def test_how_much_memory_was_allowed_is_said_where_it_ran_out():
    lost = chunk_record(64, outcome="out of memory", message="", memory_limit_gib=8.0)
    assert "Out of memory: the process was allowed 8 GiB." in how_measured([chunk_record(128), lost])


class Measurements:
    def __init__(self):
        self.points = []

    def __call__(self, function, request, **options):
        self.points.append((request["operation"].split(".")[-2], request["point"]["mode"]))
        assert request["memory_limit_gib"] == 2.0
        numbers = {"elapsed_s": 2.0, "fastest_s": 1.5, "slowest_s": 3.0, "repetitions": 3, "peak_mib": 512.0}
        return numbers | {"baseline_mib": 200.0, "total_peak_mib": 712.0, "other_cores": None}


def test_the_figures_are_measured_once_and_end_in_a_page(tmp_path, monkeypatch):
    measurements = Measurements()
    monkeypatch.setattr(steps, "run_in_fresh_process", measurements)
    benchmarks = []
    monkeypatch.setattr(figures, "run_error_benchmark", lambda benchmark, console: benchmarks.append(benchmark))

    def run(only=None):
        console = Console(width=160, record=True)
        settings = {"memory_gib": 2.0, "out": tmp_path, "device": "cpu", "threads": 1, "console": console}
        run_figures(is_full=False, only=only, **settings)
        return write_page(tmp_path).read_text(), console.export_text()

    page, told = run()
    measured = list(measurements.points)
    assert set(measured) == {
        ("attention", "forward_backward"),
        ("feed_forward", "forward_backward"),
        ("attention", "forward"),
    }
    assert [benchmark.lengths for benchmark in benchmarks] == [asked["lengths"] for asked in QUICK.error]
    assert benchmarks[0].out == tmp_path / "attention-error"
    for section in ("attention", "feed-forward", "chunk-size"):
        assert f'<a href="#{section}">' in page
    assert "Benchmark 4 of 4: error" in told
    _, told = run(["chunk-size"])
    assert measurements.points == measured
    assert "on file, of" in told
    assert "Benchmark 1 of 1: chunk-size" in told
    with pytest.raises(ValueError, match=r"only must be among attention, .*, got 'model'"):
        run(["model"])


def test_full_sizes_reach_the_papers():
    lengths = {length for sweep in FULL.attention for length in sweep.sizes}
    assert set(ATTENTION_LAYER["topk"]) - lengths == {6144, 10240}
    assert set(CHUNK_SIZE) <= set(FULL.chunk_sizes)
    assert {2048, 6144, 16384, 32768, 65536} == {d_ff for sweep in FULL.feed_forward for d_ff in sweep.sizes}
    assert {section.folder for section in SECTIONS} >= {"attention", "feed-forward", "chunk-size", "attention-error"}
