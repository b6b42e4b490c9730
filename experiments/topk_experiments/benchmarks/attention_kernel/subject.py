"""The attention operation as a subject of `kernel_benchmark`."""

from __future__ import annotations

from ...rivals.names import check_method, kept
from ..kernel_benchmark.benchmark import Result
from ..kernel_benchmark.subject import Subject
from . import measure
from .methods import RIVALS, why_not
from .works import GOALS, Work


def _memory(ours: str, result: Result) -> list[str]:
    """Memory against what is allowed."""
    mine, sdpa = result.peak_mib(ours), result.peak_mib("sdpa")
    if mine is None or sdpa is None:
        return []
    allowed = result.work.saved_mib
    verdict = "kept" if mine - sdpa <= allowed else "exceeded"
    return [
        f"Memory: {ours} needs {mine - sdpa:+.1f} MiB against sdpa; allowed are {allowed:.1f} MiB, the saved indices "
        f"and weights: {verdict}."
    ]


def _title(work: Work, swept: str) -> str:
    fixed = f"k = {work.k}" if swept == "length" else f"L = {work.length:,}"
    return f"Attention, {work.num_heads} heads of {work.head_dim}, {fixed}"


SUBJECT = Subject(
    schema="topk_attention/attention-kernel/2",
    measure=measure.__name__,
    check_method=lambda method: check_method(method, RIVALS),
    why_not=why_not,
    keeps_all=lambda method, work: kept(method, work.k) is None,
    size=("length", 2.0),
    rival=("sdpa", "PyTorch's scaled_dot_product_attention"),
    goals=GOALS,
    floor="the score product q @ k.T alone, in tiles, in the same rounds; its share of the forward pass is 100 % when "
    "selecting, softmax and values cost nothing",
    memory_note="Inputs and the gradient of the output do not count; output, gradients of the inputs and all between "
    "do.",
    below=_memory,
    sweeps={"length": "L, length of the sequence", "k": "k, keys kept per query"},
    title=_title,
)
