"""How the operations are computed. Backends never import one another; this file imports them and chooses."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from . import cpu, sdpa, triton
from .calls import AttentionCall, FeedForwardCall

BACKENDS = {
    "cpu": "compiled kernels for CPU tensors, memory linear in length",
    "triton": "Triton kernels for tensors on a GPU, memory linear in length",
    "chunked": "plain PyTorch in query chunks and key blocks, memory linear in length, any device",
    "reference": "dense scores, memory quadratic in length: the specification that the others are tested against",
}


class Choice(NamedTuple):
    name: str
    reason: str


def choose_backend(requested: str, call: AttentionCall | FeedForwardCall | None = None) -> Choice:
    """The backend that runs a call, and why; without a call, the backend that runs most calls.

    Only "auto" chooses; a named backend runs or raises. In addition to the names in BACKENDS "auto" may choose "sdpa",
    PyTorch's own attention. If NaN or inf in a key or value would spread there, which only the numbers show, "chunked"
    computes the call.

    Raises:
        ValueError: there is no backend of this name, or it does not take the call's device.
        RuntimeError: the backend cannot run on this machine.
    """
    if requested == "auto":
        return _choose(call)
    if requested not in BACKENDS:
        names = ", ".join(f'"{name}"' for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {requested!r}")
    if requested == "cpu":
        _check_cpu(call)
        if _selects_nothing(call):
            return Choice("chunked", "k=None is chunking alone: it selects nothing, so there is nothing to save")
        if _caps_before_it_adds(call):
            return Choice("chunked", _CAPS_ALL)
    if requested == "triton":
        _check_triton(call)
        if not isinstance(call, AttentionCall):
            return Choice("chunked", _NO_FEED_FORWARD) if call is not None else Choice(requested, "asked for by name")
        obstacle = triton.obstacle(call)
        if obstacle is not None:
            return Choice("chunked", obstacle)
    return Choice(requested, "asked for by name")


def _selects_nothing(call: AttentionCall | FeedForwardCall | None) -> bool:
    """Whether the call selects nothing. The kernels would save every key or neuron for its backward pass."""
    if isinstance(call, AttentionCall):
        return call.head_k is None and not call.return_selection
    return isinstance(call, FeedForwardCall) and call.k is None


_CAPS_ALL = (
    "a soft cap with something added to what it gives: every score is capped, and the kernels cap kept ones alone"
)


_NO_FEED_FORWARD = "the Triton kernels are for attention alone"


def _caps_before_it_adds(call: AttentionCall | FeedForwardCall | None) -> bool:
    return isinstance(call, AttentionCall) and call.softcap is not None and call.adds_to_scores()


def _choose(call: AttentionCall | FeedForwardCall | None) -> Choice:
    if isinstance(call, AttentionCall) and call.is_full_attention():
        obstacle = sdpa.obstacle(call)
        if obstacle is None:
            return Choice("sdpa", "full attention, over every visible key: PyTorch's own computes the same, and faster")
        if not call.return_selection:
            return Choice(
                "chunked", f"full attention, over every visible key, selects nothing; not PyTorch's: {obstacle}"
            )
    if isinstance(call, FeedForwardCall) and (call.k is None or call.k >= call.w_in.shape[0]):
        return Choice("chunked", "every neuron is kept: dense products")
    if _device(call) == "cuda":  # ROCm's devices have this name too
        return _choose_for_gpu(call)
    if _device(call) != "cpu":
        return Choice("chunked", "the compiled kernels are for CPU tensors")
    problem = cpu.problem()
    if problem is not None:
        return Choice("chunked", problem)
    if _caps_before_it_adds(call):
        return Choice("chunked", _CAPS_ALL)
    return Choice("cpu", f"the fastest for CPU tensors; kernels for {cpu.cpu_target()}")


def _choose_for_gpu(call: AttentionCall | FeedForwardCall | None) -> Choice:
    if not isinstance(call, AttentionCall):
        return Choice("chunked", _NO_FEED_FORWARD)
    obstacle = triton.problem() or triton.too_old(call.query.device) or triton.obstacle(call)
    if obstacle is not None:
        return Choice("chunked", obstacle)
    return Choice("triton", "top-k attention on a GPU, within the range that the Triton kernels are tested for")


def _warn_of_missing_kernels() -> None:
    """Where the kernels are missing the library says so when it is imported: otherwise it would silently be slow."""
    problem = cpu.problem()
    if problem is not None:
        warnings.warn(
            f"topk_attention runs without its compiled kernels, on a CPU several times slower: {problem}. Install a "
            "wheel that holds them or, where torch and a C++ compiler are there, the source again: "
            "pip install --force-reinstall --no-deps --no-build-isolation . in a clone. If slower is meant, "
            'warnings.filterwarnings("ignore", message="topk_attention runs without") before the import hides this',
            stacklevel=2,
        )


def _check_cpu(call: AttentionCall | FeedForwardCall | None) -> None:
    problem = cpu.problem()
    if problem is not None:
        raise RuntimeError(f'backend="cpu" cannot run here: {problem}; use backend="auto"')
    device = _device(call)
    if device != "cpu":
        raise ValueError(f'backend="cpu" needs CPU tensors, got {device}; move them or use backend="auto"')


def _check_triton(call: AttentionCall | FeedForwardCall | None) -> None:
    problem = triton.problem()
    if problem is not None:
        raise RuntimeError(f'backend="triton" cannot run here: {problem}; use backend="auto"')
    device = _device(call)
    if call is not None and device != "cuda" and not (device == "cpu" and triton.IS_INTERPRETED):
        raise ValueError(f'backend="triton" needs tensors on a GPU, got {device}; move them or use backend="auto"')


def _device(call: AttentionCall | FeedForwardCall | None) -> str:
    if call is None:
        return "cpu"
    return call.x.device.type if isinstance(call, FeedForwardCall) else call.query.device.type


_warn_of_missing_kernels()
