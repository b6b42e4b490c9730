"""The operations against the best forms that PyTorch has for them on a CPU: time in turns, and peak memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import KeyIndex, RelativeBias
from topk_attention import topk_attention as attend

from ...runs.checks import CheckFailedError
from ...runs.memory import PeakMeter, available_mib
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Times
from ...runs.turns import TOLERANCES

_HEADS, _HEAD_DIM, _DROPOUT = 4, 64, 0.1
# Of decoding: the shape of Llama 3 8B.
_DECODE_HEADS, _DECODE_KEY_HEADS, _DECODE_HEAD_DIM = 32, 8, 128
# PyTorch's dropout holds about this many matrices of all weights at its peak.
_MATRICES = 5
_CHECK_LENGTH = 300
# A turn takes at least this long. Rounds that take long are fewer, and the first call, which allocates all memory anew
# as every later one does, is one of them.
_TURN_S, _LONG_S, _FEWEST_ROUNDS = 0.02, 4.0, 2
Call = Callable[[], Tensor]


class Operation(NamedTuple):
    """One thing to do, in several forms.

    name    of the operation in tables
    theirs  form of PyTorch -> one call
    ours    the same by this library
    """

    name: str
    theirs: dict[str, Call]
    ours: Call


def measure(request: Json, send: Send) -> Json:
    """
    request  num_keys of decoding, length of training, k, backend, rounds, threads and seed

    For each operation: the fastest of PyTorch's forms by its median, and ours, with fastest, slowest and peak memory.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    k, backend = request["k"], request["backend"]
    length = _length_that_fits(request["length"])
    check(k, backend)
    found = []
    for make in (
        lambda: decoding(request["num_keys"], k, backend),
        lambda: training("training step", length, k, backend),
        lambda: training("training step with dropout", length, k, backend, dropout_p=_DROPOUT),
        lambda: training("training step with learned bias", length, k, backend, has_bias=True),
    ):
        operation = make()
        send({"doing": operation.name})
        found.append(_measured(operation, request["rounds"]))
    busy = [one["other_cores"] for one in found if one["other_cores"] is not None]
    return {"operations": found, "length": length, "other_cores": max(busy, default=None)}


def decoding(num_keys: int, k: int, backend: str) -> Operation:
    """One query for each of 32 heads on 8 heads of keys."""
    with torch.no_grad():
        key, value = (torch.randn(1, _DECODE_KEY_HEADS, num_keys, _DECODE_HEAD_DIM) for _ in range(2))
        query = torch.randn(1, _DECODE_HEADS, 1, _DECODE_HEAD_DIM)
    options: dict[str, Any] = {"k": k, "enable_gqa": True, "backend": backend, "key_index": KeyIndex(key)}
    rows = query.view(1, _DECODE_KEY_HEADS, -1, _DECODE_HEAD_DIM)
    return Operation(
        f"decoding, {num_keys:,} keys",
        {
            "enable_gqa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
            "heads of a group as rows": lambda: F.scaled_dot_product_attention(rows, key, value).view(query.shape),
        },
        lambda: attend(query, key, value, **options),
    )


def training(
    name: str, length: int, k: int, backend: str, *, dropout_p: float = 0.0, has_bias: bool = False
) -> Operation:
    """Forward and backward of attention over a sequence, 4 heads of 64."""
    query, key, value = (torch.randn(1, _HEADS, length, _HEAD_DIM, requires_grad=True) for _ in range(3))
    table = torch.randn(_HEADS, 2 * length - 1, requires_grad=True)
    wanted = [query, key, value, *([table] if has_bias else [])]
    gradient = torch.randn(1, _HEADS, length, _HEAD_DIM)

    def theirs() -> Tensor:
        # Windows of the table are the cheapest way to write the bias out.
        mask = table.unfold(1, length, 1).flip(1)[None] if has_bias else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)

    def ours() -> Tensor:
        bias = RelativeBias(table) if has_bias else None
        return attend(query, key, value, k=k, bias=bias, dropout_p=dropout_p, backend=backend)

    def step(forward: Call) -> Call:
        return lambda: torch.autograd.grad(forward(), wanted, gradient)[0]

    return Operation(f"{name}, {length:,} tokens", {"": step(theirs)}, step(ours))


def check(k: int, backend: str) -> None:
    """Compare ours with PyTorch's where every key is kept, at a small size: what each returns when it is called.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = [
        decoding(_CHECK_LENGTH, _CHECK_LENGTH, backend),
        training("training step", _CHECK_LENGTH, _CHECK_LENGTH, backend),
        training("training step with learned bias", _CHECK_LENGTH, _CHECK_LENGTH, backend, has_bias=True),
    ]
    for operation in small:
        ours = operation.ours()
        for theirs in operation.theirs.values():
            right = theirs()
            error = ((ours - right).abs().max() / right.abs().max()).item()
            if not error <= TOLERANCES[torch.float32]:
                raise CheckFailedError(f"{operation.name}: ours differs from PyTorch's by {error:.1e} of the largest")


def _measured(operation: Operation, rounds: int) -> Json:
    forms = {f"theirs {name}": call for name, call in operation.theirs.items()} | {"ours": operation.ours}
    peaks, times = {}, {name: Times("cpu") for name in forms}
    for name, call in forms.items():
        with PeakMeter() as meter:
            times[name].take(call)
        peaks[name] = meter.read().peak_mib
    if sum(of.seconds for of in times.values()) < _LONG_S:  # the first calls only warmed up
        times = {name: Times("cpu", calls=math.ceil(_TURN_S / of.seconds)) for name, of in times.items()}
    else:  # they were the first round
        rounds = min(rounds, _FEWEST_ROUNDS) - 1
    for _ in range(rounds):
        for name, call in forms.items():
            times[name].take(call)
    records = {name: of.as_record() for name, of in times.items()}
    best = min(
        (name for name in forms if name != "ours"),
        key=lambda name: records[name]["elapsed_s"],
    )

    def shown(name: str) -> Json:
        of = records[name]
        return {"median_s": of["elapsed_s"], "fastest_s": of["fastest_s"], "slowest_s": of["slowest_s"]} | {
            "peak_mib": peaks[name]
        }

    busy = [of["other_cores"] for of in records.values() if of["other_cores"] is not None]
    return {
        "name": operation.name,
        "form": best.removeprefix("theirs").strip(),
        "theirs": shown(best),
        "ours": shown("ours"),
        "other_cores": max(busy, default=None),
    }


def _length_that_fits(length: int) -> int:
    """The length, halved until PyTorch's dropout fits into memory."""
    while length > 1024 and _MATRICES * 4 * _HEADS * length**2 / 2**20 > 0.8 * available_mib():
        length //= 2
    return length
