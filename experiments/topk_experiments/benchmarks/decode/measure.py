"""One work in a process of its own: every answer is checked, then the methods take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import KeyIndex
from topk_attention import topk_attention as attend

from ...runs.checks import NEAR_TIE, CheckFailedError
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import start_point
from ...runs.turns import TOLERANCES, take_turns
from .works import METHODS, Work

Call = Callable[[], Tensor]
_MODE = "forward"
_FLOOR = ("", _MODE)


def time_methods(request: Json, send: Send) -> Json:
    """Check every method of the request, then time them, and one reading of all keys, in turns.

    Returns for each method its outcome with median, fastest and slowest, and the same of the reading.
    """
    start_point(request)
    work = Work(**request["work"])
    tensors = new_tensors(work)
    outcomes: Json = {}
    turns: dict[tuple[str, str], Callable[[], object]] = {_FLOOR: reading(tensors[1])}
    send({"doing": "checking the answers"})
    with torch.no_grad():
        for name in request["methods"]:
            call = new_call(name, work, tensors)
            outcomes[name] = {"outcome": "finished", "largest_error_in_check": check(name, call(), work, tensors)}
            turns[name, _MODE] = call
        times, failures = take_turns(turns, request, send)
    outcomes |= {name: {"outcome": "out of memory", "message": message} for name, message in failures.items()}

    def summary(name: str) -> Json:
        record = times[name, _MODE].as_record()
        spread = {"fastest_s": record["fastest_s"], "slowest_s": record["slowest_s"]}
        return {"median_s": record["elapsed_s"], **spread, "calls_per_round": times[name, _MODE].calls}

    for name, outcome in outcomes.items():
        if outcome["outcome"] == "finished":
            outcome |= summary(name)
    busy = [of_turn.other_cores for of_turn in times.values() if of_turn.other_cores is not None]
    return {
        "methods": outcomes,
        "floor": summary(""),
        "rounds": times[_FLOOR].as_record()["repetitions"],
        "other_cores": max(busy, default=None),
    }


def new_tensors(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [1, H, 1, D] and key and value [1, G, M, D]."""
    dtype = getattr(torch, work.dtype)
    key, value = (torch.randn(1, work.num_key_heads, work.num_keys, work.head_dim).to(dtype) for _ in range(2))
    return torch.randn(1, work.num_heads, 1, work.head_dim).to(dtype), key, value


def new_call(method: str, work: Work, tensors: tuple[Tensor, Tensor, Tensor]) -> Call:
    """One step of the method -> [1, H, 1, D]."""
    query, key, value = tensors
    rows = query.view(1, work.num_key_heads, -1, work.head_dim)  # [1, G, H / G, D]
    options: dict[str, Any] = {"k": work.k, "enable_gqa": work.num_heads != work.num_key_heads}
    match method:
        case "sdpa":
            return lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=options["enable_gqa"])
        case "sdpa-rows":
            # A single query sees every key, so that the heads of a group may stand as queries of one head.
            return lambda: F.scaled_dot_product_attention(rows, key, value).view(query.shape)
        case "topk":
            return lambda: attend(query, key, value, **options)
    index = KeyIndex(key)
    options["key_index"] = index

    def step() -> Tensor:
        return attend(query, key, value, **options)

    def step_with_new_key() -> Tensor:
        index.crop(work.num_keys - 1)
        index.append(key)
        return step()

    if method == "topk-index":
        return step
    if method == "topk-index-append":
        return step_with_new_key
    raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")


def reading(key: Tensor) -> Callable[[], object]:
    """One reading of all keys and nothing else: the floor of every method that looks at the keys themselves."""
    numbers = key.view(torch.float32)  # pairs of 16-bit numbers are not unpacked, which would take longer than reading
    return numbers.sum


def check(method: str, output: Tensor, work: Work, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """The largest difference from a dense computation in float64, as a fraction of the largest entry.

    Heads whose k-th best score is close to the next are left out.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    query, key, value = (tensor[0].double() for tensor in tensors)
    rows = query.view(work.num_key_heads, -1, work.head_dim)
    scores = rows @ key.mT / work.head_dim**0.5  # [G, H / G, M]
    clear = torch.ones(scores.shape[:2], dtype=torch.bool)
    if method.startswith("topk") and work.k < work.num_keys:
        best = scores.topk(work.k + 1).values
        clear = best[..., -2] - best[..., -1] > NEAR_TIE
        scores = scores.masked_fill(scores < best[..., -2:-1], -torch.inf)
    right = (scores.softmax(-1) @ value)[clear]
    found = output.view(rows.shape).double()[clear]
    error = ((found - right).abs().max() / right.abs().max()).item()
    if not error <= TOLERANCES[output.dtype]:
        raise CheckFailedError(
            f"{method}, {work}: the output differs from the float64 reference by {error:.1e} of its largest entry"
        )
    return error
