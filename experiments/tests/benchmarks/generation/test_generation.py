import json

import pytest
import torch
from typer.testing import CliRunner

import topk_attention
from topk_experiments.benchmarks.generation import measure, report
from topk_experiments.benchmarks.generation.benchmark import GenerationBenchmark
from topk_experiments.benchmarks.generation.methods import METHODS, Method, why_not
from topk_experiments.benchmarks.generation.report import SCHEMA, summaries
from topk_experiments.cli import app
from topk_experiments.models.generation import greedy, new_cache, num_equal, read, stepwise
from topk_experiments.models.pretrained import find_model, load_model_to_run
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()
PROMPT = list(range(2, 14)) * 6
POINT = {"method": "topk-dynamic", "k": 3, "backend": "chunked"}


@pytest.fixture
def model(tiny_model):
    return load_model_to_run(find_model(str(tiny_model)))


@pytest.mark.parametrize("kind", ["dynamic", "static", "topk"])
def test_greedy_tokens_are_those_of_generate(model, kind):
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert greedy(model, PROMPT, new_cache(kind, model, 90), 9) == expected[0, len(PROMPT) :].tolist()


def test_reading_in_parts_gives_the_logits_of_reading_at_once(model):
    cache = new_cache("dynamic", model, len(PROMPT))
    read(model, PROMPT[:20], cache)
    parts = read(model, torch.tensor([PROMPT[20:]]), cache)
    torch.testing.assert_close(parts, read(model, PROMPT, new_cache("dynamic", model, len(PROMPT))))


def test_a_cache_that_is_not_there_is_named(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not("hqq", None) == (
        "the package hqq is not installed; pip install --no-deps -r requirements-generation.txt"
    )
    with pytest.raises(ValueError, match="cache 'quanto' is not there: the package optimum-quanto is not installed"):
        new_cache("quanto", model, 8)
    with pytest.raises(ValueError, match="cache must be among dynamic, static, quanto, hqq, fp8, topk, got 'paged'"):
        new_cache("paged", model, 8)


def test_the_check_leaves_the_model_converted_with_the_k_of_the_point(model):
    found = measure.check(model, METHODS["topk-dynamic"], PROMPT, POINT)
    assert found["logits_error"] < 1e-4
    assert found["equal_tokens"] == found["of_tokens"] == 8
    few = read(model, PROMPT, new_cache("dynamic", model, 80))
    topk_attention.unconvert(model)
    full = read(model, PROMPT, new_cache("dynamic", model, 80))
    topk_attention.convert(model, attention_k=3)
    torch.testing.assert_close(few, read(model, PROMPT, new_cache("dynamic", model, 80)))
    assert not torch.allclose(few, full, rtol=1e-3, atol=1e-3)


def test_the_check_refuses_a_model_that_computes_something_else(model, monkeypatch):
    def convert_too_far(model, method, k, backend):
        topk_attention.convert(model, attention_k=1, backend=backend)

    monkeypatch.setattr(measure, "convert_for", convert_too_far)
    with pytest.raises(CheckFailedError, match="topk-dynamic: after 64 tokens the logits differ from full attention's"):
        measure.check(model, METHODS["topk-dynamic"], PROMPT, POINT)


def test_the_check_refuses_an_exact_method_with_other_tokens(model, monkeypatch):
    wrong = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(measure, "greedy", lambda *_: next(wrong))
    with pytest.raises(CheckFailedError, match=r"static: generates \[1, 3\], the ordinary cache \[1, 2\]"):
        measure.check(model, METHODS["static"], PROMPT, POINT | {"method": "static"})


class Llama:
    """Stands in for llama.cpp."""

    def __init__(self, text):
        self.text_of = lambda token_ids: text


def test_llama_cpp_must_read_the_same_prompt():
    request = {"prompt": [1, 2], "prompt_text": "two words"}
    assert measure._check_llama(Llama("two words"), request) == {"prompt_text": "equal"}
    with pytest.raises(CheckFailedError, match=r"llama\.cpp reads another prompt from byte 4 on: 'other'"):
        measure._check_llama(Llama("two other"), request)


def test_reading_on_predicts_what_one_pass_over_the_text_predicts(model):
    request = {"prompt": PROMPT[:50], "following": PROMPT[50:60], "point": {"short_length": 9, "num_tokens": 10}}
    reader = lambda: measure._reader(model, METHODS["sdpa"], 90)  # noqa: E731
    result = measure._measure(reader, request, lambda _: None)
    assert result["tokens"] == model(input_ids=torch.tensor([PROMPT[:59]])).logits[0, 49:].argmax(-1).tolist()


def test_llama_cpp_reads_on_after_a_prompt():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = find_model(None)
    assert why_not("llama-f16", source.gguf_file) is None
    point = {
        "method": "llama-q8_0",
        "num_tokens": 2,
        "short_length": 4,
        "k": 0,
        "backend": None,
        "threads": 1,
        "seed": 0,
    }
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    request = {"point": point, "prompt": prompt, "following": [7042, 30], "model": vars(source)}
    request |= {"prompt_text": "The capital of France is"}
    result = measure.measure_point(request, lambda _: None)
    assert result["tokens"][0] == 7042  # " Paris"
    assert result["prefill_s"] > 0 < result["token_s"]


def test_llama_cpp_is_named_where_it_cannot_take_its_turn():
    assert why_not("llama-f16", None) == "llama.cpp reads GGUF files, and this model is none"
    assert why_not("sdpa", None) is None


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    options = {"model": tiny_model, "text": text_file, "out": tmp_path / "out", "lengths": "80", "threads": 1}
    options |= {"methods": "sdpa,topk-dynamic,llama-f16", "k": 4, "repetitions": 1, "tokens": 4, "short-length": 16}
    return ["benchmark", "generation", *(str(part) for name, one in options.items() for part in (f"--{name}", one))]


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(arguments, tmp_path):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    full, few, llama = records = read_json_lines(tmp_path / "out" / "generation.jsonl")
    assert (full["point"]["k"], few["point"]["k"]) == (None, 4)
    assert llama["outcome"] == "not there"
    for record in (full, few):
        assert record["outcome"] == "finished"
        assert len(record["tokens"]) == 4
        assert 0 < record["fastest_token_s"] <= record["token_s"] <= record["slowest_token_s"]
        assert record["total_peak_mib"] >= record["peak_mib"] >= 0
        assert record["check"]["equal_tokens"] == 8
    assert str(tmp_path) not in (tmp_path / "out" / "generation.jsonl").read_text()
    assert (tmp_path / "out" / "generation.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "generation.md").read_text()
    assert "**tiny-llama: a prompt of 80 tokens, then 4 one by one**" in table
    assert "llama.cpp, f16 cache: not there (llama.cpp reads GGUF files, and this model is none)." in table
    again = runner.invoke(app, arguments)
    assert again.output.count("on file, of ") == 3
    assert read_json_lines(tmp_path / "out" / "generation.jsonl") == records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--lengths", "510"],
            "error: lengths must be at most 508, the longest input of tiny-llama less the tokens after",
        ),
        (["--lengths", "16"], "error: lengths must be above short-length, 16, got 16"),
        (["--methods", "vllm"], "error: methods must be among sdpa, sdpa-bfloat16"),
        (["--methods", "sdpa,sdpa"], "error: methods must not hold a method twice, got sdpa, sdpa"),
        (["--k", "0"], "error: k must be at least 1 and below 2^31, got 0"),
        (["--tokens", "0"], "error: tokens must be at least 1, got 0"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output


def record(method, number, token_s, tokens, **changes):
    point = {
        "method": method,
        "round": number,
        "length": 80,
        "num_tokens": 3,
        "short_length": 16,
        "k": 4 if METHODS[method].keeps_k else None,
        "threads": 2,
        "model": ["m", "1"],
        "text": ["t", "1"],
    }
    result = {
        "schema": SCHEMA,
        "point": point,
        "outcome": "finished",
        "prefill_s": 2.0,
        "token_s": token_s,
        "short_token_s": 0.01,
        "peak_mib": 100.0,
        "total_peak_mib": 600.0,
        "tokens": tokens,
        "environment": {"cpu": "a", "torch": "2", "date": "2026-11-30", "commit": None, "num_cpus": 2},
    }
    return result | changes


def test_the_report_takes_medians_over_rounds_and_counts_equal_tokens(tmp_path):
    records = [record("sdpa", number, seconds, [5, 6, 7]) for number, seconds in enumerate((0.1, 0.2, 0.12), 1)]
    records += [record("topk", number, 0.03, [4, 6, 7]) for number in (1, 2, 3)]
    records.append(record("hqq", 1, 0.1, [], outcome="not there", message="the package hqq is not installed"))
    full, few = summaries(records)
    assert full["token_s"] == 0.12
    assert full["attention_s"] == pytest.approx(0.11)
    assert full["range_s"] == [0.1, 0.2]
    assert (few["method"], few["equal_tokens"]) == ("topk", 2)
    (tmp_path / "generation.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = report(tmp_path)[0].read_text()
    assert "| top-k, k = 4 | 2.0 | 30.0 (30.0 to 30.0) | 10.0 | 20.0 | 100 | 600 | 2 |" in table
    assert "SDPA, 4-bit cache (HQQ): not there (the package hqq is not installed)." in table


def test_rounds_alternate_between_methods():
    benchmark = GenerationBenchmark(lengths=[100], methods=["sdpa", "topk"], repetitions=2)
    points = list(benchmark.points(("m", "1"), ("t", "1")))
    assert [(point.round, point.method) for point in points] == [(1, "sdpa"), (1, "topk"), (2, "sdpa"), (2, "topk")]


def test_every_method_says_what_it_is():
    assert len({method.description for method in METHODS.values()}) == len(METHODS)
    assert METHODS["topk-completed"] == Method("top-k, completed", cache="topk", keeps_k=True, completed=True)
    assert num_equal([1, 2], [1, 2, 3]) == 2


def test_only_single_tokens_are_compiled_and_read_without_one_dnn(monkeypatch):
    calls, compiled = [], []

    def model(input_ids, **arguments):
        calls.append((input_ids.shape[1], torch.backends.mkldnn.enabled, arguments))

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    before = torch.backends.mkldnn.enabled
    called = stepwise(model, compiled=True, one_dnn=False)
    for length in (3, 1):
        called(torch.ones(1, length), use_cache=True)
    stepwise(model)(torch.ones(1, 1))
    assert calls == [(3, before, {"use_cache": True}), (1, False, {"use_cache": True}), (1, before, {})]
    assert compiled == [{"dynamic": True}]
    assert torch.backends.mkldnn.enabled == before
