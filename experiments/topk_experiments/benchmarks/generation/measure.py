"""One method after one prompt, in a process of its own: its answer, then times and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from topk_attention import Completion
from topk_attention.convert import convert, unconvert

from ...models.generation import greedy, new_cache, num_equal, read, stepwise
from ...models.pretrained import ModelSource, load_model_to_run
from ...runs.checks import CheckFailedError
from ...runs.memory import PeakMeter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import start_point
from ...runs.timing import Stopwatch
from .llama import LlamaModel
from .methods import METHODS, Method

# Of the check: tokens of the prompt, and tokens generated.
_CHECK_TOKENS, _CHECK_NEW_TOKENS = 64, 8
# Of a difference in logits, as a fraction of the largest. In bfloat16, thirty layers of SmolLM2 came to 0.02.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
Read = Callable[[Sequence[int]], int]


def measure_point(request: Json, send: Send) -> Json:
    """Check a method, then let it read a prompt and further tokens one by one, and the same after a short prompt.

    The further tokens are those that follow in the text, so that every method has the same before it when it says which
    comes next.

    request  point: method, num_tokens, short_length, k, backend and threads
             prompt, following: token ids
             model: as `ModelSource`
             prompt_text: what llama.cpp must understand the prompt as

    Memory is the peak of reading and generating above the loaded model; total_peak_mib includes that.
    """
    start_point(request)
    point, prompt = request["point"], request["prompt"]
    method, source = METHODS[point["method"]], ModelSource(**request["model"])
    length = len(prompt) + point["num_tokens"]
    send({"doing": "loading the model"})
    result: Json = {}
    if method.is_llama:
        assert source.gguf_file is not None
        packed = Path(source.location) / source.gguf_file
        # Its cache is of a fixed size and is made with the model, so that it is made within the measurement.
        with PeakMeter() as meter:
            llama = LlamaModel(packed, length, method.cache, point["threads"])
            result["check"] = _check_llama(llama, request)
            result |= _measure(lambda: _fresh(llama), request, send)
        result["llama_cpp_python"] = llama.version
    else:
        model = load_model_to_run(source, dtype=method.dtype)
        send({"doing": "checking the answer"})
        result["check"] = check(model, method, prompt, point)
        with PeakMeter() as meter:
            result |= _measure(lambda: _reader(model, method, length), request, send)
    return result | meter.read().as_record()


def convert_for(model: Any, method: Method, k: int, backend: str) -> None:
    """Convert a model as a method asks."""
    if method.keeps_k:
        convert(model, attention_k=k, completion=Completion() if method.completed else None, backend=backend)


def check(model: Any, method: Method, prompt: Sequence[int], point: Json) -> Json:
    """Compare a method with the unconverted model and the ordinary cache on a short prompt, and leave it converted.

    A converted model is compared with as many k as there are tokens, where it must compute full attention.

    Returns how far the first logits are off, as a fraction of the largest, and how many greedy tokens agree.

    Raises:
        CheckFailedError: the logits differ by more than rounding, or an exact method gives other tokens.
    """
    short = prompt[:_CHECK_TOKENS]
    length = len(short) + _CHECK_NEW_TOKENS
    right = read(model, short, new_cache("dynamic", model, length))
    right_tokens = greedy(model, short, new_cache("dynamic", model, length), _CHECK_NEW_TOKENS)
    convert_for(model, method, max(length, point["k"]), point["backend"])
    called = _called(model, method)
    found = read(called, short, new_cache(method.cache, model, length))
    tokens = greedy(called, short, new_cache(method.cache, model, length), _CHECK_NEW_TOKENS)
    error = ((found - right).abs().max() / right.abs().max()).item()
    if not error <= _TOLERANCES[method.dtype]:
        raise CheckFailedError(
            f"{point['method']}: after {len(short)} tokens the logits differ from full attention's by {error:.1e} of "
            "the largest"
        )
    if method.is_exact and tokens != right_tokens:
        raise CheckFailedError(f"{point['method']}: generates {tokens}, the ordinary cache {right_tokens}")
    if method.keeps_k:
        unconvert(model)
        convert_for(model, method, point["k"], point["backend"])
    return {"logits_error": error, "equal_tokens": num_equal(tokens, right_tokens), "of_tokens": _CHECK_NEW_TOKENS}


def _check_llama(llama: LlamaModel, request: Json) -> Json:
    """Compare what the prompt's tokens mean.

    Raises:
        CheckFailedError: llama.cpp reads another text in them.
    """
    text = llama.text_of(request["prompt"])
    if text != request["prompt_text"]:
        agree = num_equal(text.encode(), request["prompt_text"].encode())
        rest = text.encode()[agree : agree + 40].decode("utf-8", "replace")
        raise CheckFailedError(f"llama.cpp reads another prompt from byte {agree} on: {rest!r}")
    return {"prompt_text": "equal"}


def _fresh(llama: LlamaModel) -> Read:
    llama.forget()
    return llama.read


def _reader(model: Any, method: Method, length: int) -> Read:
    cache, called = new_cache(method.cache, model, length), _called(model, method)
    return lambda token_ids: int(read(called, token_ids, cache).argmax())


def _called(model: Any, method: Method) -> Callable[..., Any]:
    return stepwise(model, compiled=method.compiled, one_dnn=method.one_dnn)


def _measure(new_reader: Callable[[], Read], request: Json, send: Send) -> Json:
    """Read on after the first few tokens of the prompt, which also warms up, then after all of it."""
    point, prompt, following = request["point"], request["prompt"], request["following"]
    start = point["short_length"]
    send({"doing": f"tokens after {start}"})
    _, _, short = _read_on(new_reader(), prompt[:start], (prompt[start:] + following)[: len(following)])
    send({"doing": "reading the prompt"})
    prefill, tokens, long = _read_on(new_reader(), prompt, following)
    return {
        "prefill_s": prefill.elapsed_s,
        "token_s": statistics.median(long),
        "fastest_token_s": min(long),
        "slowest_token_s": max(long),
        "short_token_s": statistics.median(short),
        "tokens": tokens,
        "other_cores": prefill.other_cores,
    }


def _read_on(
    read_tokens: Read, prompt: Sequence[int], following: Sequence[int]
) -> tuple[Stopwatch, list[int], list[float]]:
    """What is most likely after a prompt and after each token that follows; the times of reading these."""
    with Stopwatch() as prefill:
        tokens = [read_tokens(prompt)]
    times = []
    for token in following:
        with Stopwatch() as stopwatch:
            tokens.append(read_tokens([token]))
        times.append(stopwatch.elapsed_s)
    return prefill, tokens[:-1], times
