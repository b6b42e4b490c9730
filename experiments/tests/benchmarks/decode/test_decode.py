import json

import pytest
import torch
from typer.testing import CliRunner

from topk_experiments.benchmarks.decode import report
from topk_experiments.benchmarks.decode.measure import check, new_call, new_tensors
from topk_experiments.benchmarks.decode.works import METHODS, Work
from topk_experiments.cli import app
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


@pytest.fixture(params=["float32", "bfloat16"])
def work(request):
    return Work(6, 2, 16, 301, k=7, dtype=request.param)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_the_check(method, work, kernels):
    tensors = new_tensors(work)
    with torch.no_grad():
        assert check(method, new_call(method, work, tensors)(), work, tensors) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_the_check_refuses_another_number_of_keys(method, work):
    tensors = new_tensors(work)
    other = Work(**work.as_record() | {"k": 4})
    output = new_call("topk" if method.startswith("sdpa") else method, other, tensors)()
    with pytest.raises(CheckFailedError, match="the output differs from the float64 reference by"):
        check(method, output, work, tensors)


@pytest.fixture
def arguments(tmp_path):
    options = {"out": tmp_path / "out", "works": "smollm2-bfloat16", "keys": 200, "k": 8, "threads": 1}
    return ["benchmark", "decode", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(arguments, tmp_path):
    arguments += ["--repetitions", "3", "--methods", "sdpa,sdpa-rows,topk"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "out" / "decode.jsonl")
    assert [record["request"]["work"]["dtype"] for record in records] == ["bfloat16"]
    for record in records:
        assert record["outcome"] == "finished"
        assert record["rounds"] == 3
        assert list(record["methods"]) == ["sdpa", "sdpa-rows", "topk"]
        for of in (*record["methods"].values(), record["floor"]):
            assert 0 < of["fastest_s"] <= of["median_s"] <= of["slowest_s"]
    assert (tmp_path / "out" / "decode.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "decode.md").read_text()
    assert "**One decoding step: 9 heads on 3, D = 64, 200 keys, k = 8, bfloat16**" in table
    assert "| reading the keys |" in table
    again = runner.invoke(app, arguments)
    assert again.output.count("(on file, of ") == 1
    assert read_json_lines(tmp_path / "out" / "decode.jsonl") == records


def test_a_method_that_ran_out_of_memory_has_a_row_and_a_note(tmp_path):
    median = {"median_s": 1e-3, "fastest_s": 1e-3, "slowest_s": 2e-3}
    record = {
        "schema": "topk_attention/decode/1",
        "outcome": "finished",
        "request": {"work": Work(9, 3, 64, 200).as_record(), "threads": 2, "seed": 0},
        "methods": {
            "sdpa": median | {"outcome": "finished", "median_s": 8e-3},
            "sdpa-rows": median | {"outcome": "finished", "median_s": 4e-3},
            "topk": median | {"outcome": "finished"},
            "topk-index": {"outcome": "out of memory", "message": "cannot allocate memory"},
        },
        "floor": median | {"median_s": 5e-4},
        "environment": {"cpu": "a", "torch": "2", "date": "2026-11-30", "commit": None, "num_cpus": 2},
    }
    (tmp_path / "decode.jsonl").write_text(json.dumps(record))
    table = report(tmp_path)[0].read_text()
    assert "| top-k | 1.00 | 1.00 to 2.00 | 2.00 | 8.0 | 4.0 |" in table
    assert "| top-k, kept index | out of memory |" in table
    assert "top-k, kept index: out of memory (cannot allocate memory)." in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--works", "gpt"], "error: works must be among llama, llama-bfloat16, smollm2, smollm2-bfloat16, got 'gpt'"),
        (["--methods", "flash"], "error: methods must be among sdpa, sdpa-rows, topk, topk-index, topk-index-append"),
        (["--methods", "topk,topk"], "error: methods must not hold a method twice, got topk, topk"),
        (["--keys", "0"], "error: keys must be at least 1, got 0"),
        (["--k", "0"], "error: k must be at least 1 and below 2^31, got 0"),
        (["--repetitions", "0"], "error: repetitions must be at least 1, got 0"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output
