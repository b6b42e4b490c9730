import pytest
from rich.console import Console

from topk_attention.environment import environment
from topk_experiments.benchmarks.error.report import as_markdown, equal_cost, report, show
from topk_experiments.runs.records import append_json_line


def record(method, size, error, seconds=1.0, mib=10.0, length=64, **more):
    point = {"method": method, "size": size, "length": length, "model": ["tiny", "1"], "text": ["story", "2"]}
    point |= {"layers": [0, 1], "draws": 3 if size else None, "device": "cpu", "threads": 1, "seed": 0}
    times = {"elapsed_s": seconds, "fastest_s": seconds, "slowest_s": seconds, "repetitions": 3, "other_cores": None}
    result = {"schema": "topk_attention/attention-error/1", "point": point, "environment": environment()}
    result |= {
        "outcome": "finished",
        "relative_error": error,
        "worst_relative_error": 2 * error,
        "largest_error": error,
    }
    result |= {"forward": times, "forward_backward": times}
    return result | {"forward_peak_mib": mib, "forward_backward_peak_mib": mib} | more


RECORDS = [
    record("topk", 8, 0.5, seconds=1.0, mib=10.0),
    record("topk", 32, 0.2, seconds=2.0, mib=20.0),
    record("performer", 32, 0.9, seconds=0.5, mib=30.0),
    record("performer", 64, 0.8, seconds=2.0, mib=40.0),
    record("rfa", 32, 0.7, seconds=3.0, mib=15.0),
    record("uniform", None, 1.5),
    record("sdpa", None, 1e-7),
]


def test_rivals_are_compared_at_no_higher_cost():
    assert equal_cost(RECORDS, "forward time") == [
        ("k = 8", "1", "0.5", "0.9 (32 features)", "none", "none"),
        ("k = 32", "2", "0.2", "0.8 (64 features)", "none", "none"),
    ]
    assert equal_cost(RECORDS, "memory of forward and backward") == [
        ("k = 8", "10", "0.5", "none", "none", "none"),
        ("k = 32", "20", "0.2", "none", "none", "0.7 (32 features)"),
    ]


def test_completed_attention_has_a_column_and_rows_where_it_was_measured():
    completed = [
        record("topk-completed", 8, 0.3, seconds=1.5, mib=12.0),
        record("topk-completed", 16, 0.1, seconds=3.0),
    ]
    assert equal_cost([*RECORDS, *completed], "forward time") == [
        ("k = 8", "1", "0.5", "none", "0.9 (32 features)", "none", "none"),
        ("k = 32", "2", "0.2", "0.3 (k = 8)", "0.8 (64 features)", "none", "none"),
        ("k = 8, completed", "1.5", "0.3", "", "0.9 (32 features)", "none", "none"),
        ("k = 16, completed", "3", "0.1", "", "0.8 (64 features)", "none", "0.7 (32 features)"),
    ]
    page = as_markdown([*RECORDS, *completed])
    assert "| top-k | forward time | its error | top-k attention, completed | Performer |" in page
    assert "| top-k attention, completed | 8 | 0.3 |" in page


def test_variants_of_the_same_work_cost_what_the_cheaper_one_did():
    slow = record("performer-tuned", 64, 0.6, seconds=2.1, mib=40.0)
    assert equal_cost([*RECORDS, slow], "forward time")[1][4] == "0.6 (64 features)"


def test_all_dates_and_commits_are_named():
    later = record("topk", 64, 0.1)
    later["environment"] |= {"date": "2031-01-02T00:00:00+00:00", "commit": "abc1234"}
    assert " to 2031-01-02, commit abc1234, " in as_markdown([later, *RECORDS])


def test_a_point_that_was_given_up_stays_in_the_table(tmp_path):
    lost = record("rfa", 64, 0.0) | {"outcome": "out of memory", "message": "cannot allocate memory"}
    for name in ("relative_error", "forward", "forward_peak_mib"):
        del lost[name]
    page = as_markdown([*RECORDS, lost])
    assert "| RFA, each head with its best sigma | 64 | out of memory |" in page
    assert "| top-k attention | 8 | 0.5 | 1 | 0.5 | 1 | 1 | 10 | 10 |" in page


def test_table_page_and_picture_are_made_from_records_alone(tmp_path):
    records = [*RECORDS, *(record("topk", 8, error, length=128) for error in (0.3, 0.1))]
    console = Console(width=200, record=True)
    show(records, console)
    for one in records:
        append_json_line(tmp_path / "error.jsonl", one)
    written = report(tmp_path)
    assert [path.name for path in written] == ["error.md", "error.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    page = written[0].read_text()
    assert "## 128 tokens" in page
    assert "| top-k attention | 8 | 0.1 |" in page
    assert "| 8 | 0.3 |" not in page  # measured again since
    text = console.export_text()
    assert "128 tokens" in text
    assert "Causal attention of all heads of layers 0, 1" in text


def test_records_of_another_machine_are_drawn_again(tmp_path):
    for one in RECORDS:
        elsewhere = one["environment"] | {"cpu": "another processor"}
        append_json_line(tmp_path / "attention-error" / "error.jsonl", one | {"environment": elsewhere})
    assert [path.name for path in report(tmp_path / "attention-error")] == ["error.md", "error.png"]
    assert "another processor, 1 threads" in (tmp_path / "attention-error" / "error.md").read_text()


@pytest.mark.parametrize("cost", ["forward time", "memory of forward"])
def test_without_topk_attention_there_is_nothing_to_compare_with(cost):
    assert equal_cost(RECORDS[2:], cost) == []
