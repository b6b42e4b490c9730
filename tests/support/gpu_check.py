"""What a machine with a GPU should show of the Triton backend, in at most ten minutes: `make gpu-check`.

Right first, then the same twice, then how fast and with how much memory. Each result is one line of JSON, written at
once to the file that is named and to the terminal, the longest last, so that little is lost where time runs out. Ends
with 1 if something is wrong. With --tiny it runs a few small calls and nothing else, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/support/gpu_check.py build/gpu/tiny.jsonl --tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from topk_attention import ALiBi, RelativeBias, topk_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Two scores closer than this, in units of the largest product of a query and a key, may stand in either order.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


class Report:
    def __init__(self, path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._end = time.monotonic() + seconds
        self.failed = False

    def write(self, what: str, *, ok: bool = True, **numbers: Any) -> None:
        line = json.dumps({"what": what, "ok": ok, **numbers})
        self.failed |= not ok
        for file in (self._file, sys.stdout):
            print(line, file=file, flush=True)

    def attempt(self, what: str, function: Callable[[], dict[str, Any]]) -> None:
        """Write what a function returns, or its error; nothing once the time is over."""
        if time.monotonic() > self._end:
            self.write(what, skipped="no time left")
            return
        try:
            found = function()
        except Exception as error:  # one failure must not hide the other results
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        self.write(what, **found)


def inputs(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 8,
    key_heads: int = 2,
    queries: int = 300,
    keys: int = 1000,
    dim: int = 64,
) -> list[Tensor]:
    shapes = ((batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim))
    return [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]


def is_right(tensors: list[Tensor], k: Any, options: dict[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """Selection, output and gradients against the reference in float64."""

    def run(backend: str, to: torch.dtype) -> tuple[Any, list[Tensor]]:
        leaves = [x.detach().to(to).requires_grad_() for x in tensors]
        given = {name: option(to) if callable(option) else option for name, option in options.items()}
        torch.manual_seed(7)
        output, selection = topk_attention(
            *leaves, k=k, enable_gqa=True, backend=backend, return_selection=True, **given
        )
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        return selection, [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    (kept, _), actual = run("triton", dtype)
    (expected_kept, _), expected = run("reference", torch.float64)
    differs = (kept != expected_kept).any(-1)
    rows = differs.nonzero()
    worst = 0.0
    scale = tensors[0].shape[-1] ** -0.5
    group = tensors[0].shape[1] // tensors[1].shape[1]
    plain = not any(name in options for name in ("bias", "attn_mask"))
    for b, h, n in rows[:200].tolist() if plain else []:
        scores = tensors[1][b, h // group].double() @ tensors[0][b, h, n].double() * scale
        mine, theirs = ({j for j in x[b, h, n].tolist() if j >= 0} for x in (kept, expected_kept))
        gap = max(scores[list(theirs - mine)].tolist(), default=0) - min(
            scores[list(mine - theirs)].tolist(), default=0
        )
        size = tensors[0][b, h, n].double().norm() * tensors[1][b, h // group].double().norm(dim=-1).max() * scale
        worst = max(worst, gap / size.item())
    same = ~differs.unsqueeze(-1)
    if rows.numel() == 0:
        errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    else:  # the rows that keep other keys differ, and so do the gradients of these
        a, e = (x.double() * same for x in (actual[0], expected[0]))
        errors = [((a - e).abs().max() / e.abs().max()).item()]
    return {
        "ok": worst <= ROUNDING[dtype] and max(errors) <= TOLERANCE[dtype] and rows.shape[0] <= 0.02 * differs.numel(),
        "rows_that_differ": rows.shape[0],
        "of_rows": differs.numel(),
        "largest_gap": worst,
        "errors": [float(f"{x:.2g}") for x in errors],
    }


def check_right(report: Report) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for k, dim in ((16, 64), (64, 128), (256, 256), (64, 80)):
            tensors = inputs(dtype, dim=dim, queries=200)
            report.attempt(
                f"right {dtype} k {k} D {dim} causal",
                lambda t=tensors, k=k, d=dtype: is_right(t, k, {"is_causal": True}, dtype=d),
            )
    variants: dict[str, dict[str, Any]] = {
        "padding mask": {"attn_mask": torch.arange(1000, device="cuda") < 700},
        "bool mask": {"attn_mask": torch.rand(1, 8, 300, 1000, device="cuda") < 0.5},
        "float mask": {"attn_mask": lambda to: torch.linspace(-1, 1, 1000, device="cuda").to(to)},
        "relative bias": {
            "bias": lambda to: RelativeBias(torch.linspace(-2, 2, 8 * 1299, device="cuda").view(8, 1299).to(to))
        },
        "alibi": {"bias": lambda to: ALiBi((2.0 ** -torch.arange(1, 9, device="cuda")).to(to)), "is_causal": True},
        "dropout": {"dropout_p": 0.3},
        "sinks": {"sinks": lambda to: torch.linspace(-1, 1, 8, device="cuda").to(to)},
        "soft cap": {"softcap": 2.0},
        "more queries than keys": {"is_causal": True},
    }
    for name, options in variants.items():
        keys = 200 if name == "more queries than keys" else 1000
        tensors = inputs(torch.float32, keys=keys)
        report.attempt(f"right {name}", lambda t=tensors, o=options: is_right(t, 16, o, dtype=torch.float32))
    per_head = [1, 3, 16, 40, 64, 8, 100, 2]
    report.attempt(
        "right k per head", lambda: is_right(inputs(torch.float32), per_head, {"is_causal": True}, dtype=torch.float32)
    )
    for queries in (1, 4):
        report.attempt(
            f"right {queries} queries, 40,000 keys",
            lambda n=queries: is_right(
                inputs(torch.bfloat16, queries=n, keys=40_000, dim=128), 64, {"is_causal": True}, dtype=torch.bfloat16
            ),
        )

    def ties() -> dict[str, Any]:
        tensors = [x.sign() for x in inputs(torch.float32, dim=16, keys=3000)]
        found = is_right(tensors, 32, {}, dtype=torch.float32)
        return {**found, "ok": found["ok"] and found["rows_that_differ"] == 0}

    report.attempt("right among ties, with more candidates than there is room for", ties)

    def broken() -> dict[str, Any]:
        query, key, value = inputs(torch.float32)
        clean = topk_attention(query, key, value, k=16, is_causal=True, enable_gqa=True, backend="triton")
        key[:, :, 900], value[:, :, 900] = float("nan"), float("inf")
        output = topk_attention(query, key, value, k=16, is_causal=True, enable_gqa=True, backend="triton")
        seen = torch.arange(300, device="cuda") + 700 >= 900
        same = torch.equal(output[:, :, ~seen], clean[:, :, ~seen])
        return {"ok": same and bool(output[:, :, seen].isnan().all())}

    report.attempt("NaN of a key reaches the queries that see it, and no others", broken)


def check_same(report: Report) -> None:
    def twice() -> dict[str, Any]:
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            leaves = [x.requires_grad_() for x in inputs(torch.bfloat16, queries=2000, keys=2000, dim=128)]
            values = torch.randn(8, 3999, device="cuda").requires_grad_()
            output = topk_attention(
                *leaves,
                k=64,
                is_causal=True,
                enable_gqa=True,
                bias=RelativeBias(values),
                dropout_p=0.1,
                backend="triton",
            )
            runs.append([output, *torch.autograd.grad(output.float().square().sum(), [*leaves, values])])
        return {"ok": all(torch.equal(a, b) for a, b in zip(*runs, strict=True))}

    report.attempt("two runs give the same bits", twice)

    def without_waiting() -> dict[str, Any]:
        leaves = [x.requires_grad_() for x in inputs(torch.bfloat16, queries=1000)]
        for _ in range(2):
            torch.cuda.set_sync_debug_mode("error" if _ else "default")
            try:
                output = topk_attention(*leaves, k=64, enable_gqa=True, backend="triton")
                torch.autograd.grad(output.sum(), leaves)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return {}

    report.attempt("the host waits for nothing", without_waiting)

    def in_a_graph() -> dict[str, Any]:
        query, key, value = inputs(torch.bfloat16, queries=1, keys=5000)
        options = {"k": 64, "enable_gqa": True, "backend": "triton"}
        topk_attention(query, key, value, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = topk_attention(query, key, value, **options)
        query.copy_(torch.randn_like(query))
        graph.replay()
        return {"ok": torch.equal(output, topk_attention(query, key, value, **options))}

    report.attempt("a CUDA graph replays it", in_a_graph)


def milliseconds(function: Callable[[], Any], runs: int = 5) -> dict[str, Any]:
    for _ in range(3):
        function()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": round(statistics.median(times), 3), "spread": [round(min(times), 3), round(max(times), 3)]}


def attend(kind: str, tensors: list[Tensor], k: int, is_causal: bool) -> Tensor:
    if kind in ("triton", "chunked"):
        return topk_attention(*tensors, k=k, is_causal=is_causal, backend=kind)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if kind == "flash" else SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*tensors, is_causal=is_causal)


def measure(kind: str, length: int, k: int, is_causal: bool, backward: bool) -> dict[str, Any]:
    tensors = [torch.randn(1, 32, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.randn_like(tensors[0])
    leaves = [x.requires_grad_(backward) for x in tensors]

    def step() -> None:
        output = attend(kind, leaves, k, is_causal)
        if backward:
            torch.autograd.grad(output, leaves, grad)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = milliseconds(step, runs=1 if kind == "chunked" else 5)
    return {**found, "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20)}


def check_speed(report: Report) -> None:
    for length in (8192, 16384, 32768, 65536):
        for is_causal in (True, False):
            for backward in (False, True):
                what = "forward and backward" if backward else "forward"
                words = f"L {length} {'causal' if is_causal else 'full'} {what}"
                for kind in ("flash", "cudnn"):
                    report.attempt(
                        f"time {kind} {words}",
                        lambda a=(kind, length, 0, is_causal, backward): measure(*a),
                    )
                for k in (64, 256):
                    report.attempt(
                        f"time triton k {k} {words}",
                        lambda a=("triton", length, k, is_causal, backward): measure(*a),
                    )
    for keys in (8192, 131072):

        def decode(keys: int = keys, kind: str = "triton") -> dict[str, Any]:
            query, key, value = inputs(torch.bfloat16, heads=32, key_heads=8, queries=1, keys=keys, dim=128)
            if kind == "triton":
                return milliseconds(lambda: topk_attention(query, key, value, k=64, enable_gqa=True, backend="triton"))
            return milliseconds(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True))

        report.attempt(f"time triton one query, {keys} keys", decode)
        report.attempt(f"time sdpa one query, {keys} keys", lambda n=keys: decode(n, "sdpa"))
    report.attempt("time chunked L 8192 causal forward", lambda: measure("chunked", 8192, 64, True, False))


def check_tiny(report: Report) -> None:
    for options in ({"is_causal": True}, {"dropout_p": 0.3}):
        tensors = inputs(torch.bfloat16, queries=20, keys=300)
        report.attempt(f"right {options}", lambda t=tensors, o=options: is_right(t, 16, o, dtype=torch.bfloat16))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="file for the results, one line of JSON each")
    parser.add_argument("--tiny", action="store_true", help="a few small calls alone")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after this time")
    arguments = parser.parse_args()
    report = Report(arguments.path, arguments.seconds)
    if not torch.cuda.is_available():
        report.write("environment", ok=False, error="there is no GPU, or torch was built without CUDA and ROCm")
        return 1
    import triton

    report.write(
        "environment",
        device=torch.cuda.get_device_name(),
        capability=list(torch.cuda.get_device_capability()),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        triton=triton.__version__,
    )
    torch.manual_seed(0)
    if arguments.tiny:
        check_tiny(report)
    else:
        check_right(report)
        check_same(report)
        check_speed(report)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
