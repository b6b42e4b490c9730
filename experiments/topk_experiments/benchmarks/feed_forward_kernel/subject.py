"""The feed-forward operation as a subject of `kernel_benchmark`."""

from __future__ import annotations

from ...rivals.names import check_method, kept
from ..kernel_benchmark.benchmark import Result
from ..kernel_benchmark.subject import Subject
from . import measure
from .methods import PAPERS, RIVALS, why_not
from .works import GOALS, PAPER, Work

# Less is a matter of whole pages and of what the C library keeps.
_LEAST_MIB = 4.0
_PAPER_NAMES = {name: f"{name}, quoted" for name in PAPER}


def _memory(ours: str, result: Result) -> list[str]:
    """Memory as a share of the dense layer's, in the first pass and in later ones."""
    mine, dense = result.peak_mib(ours), result.peak_mib("dense")
    if mine is None or dense is None or dense < _LEAST_MIB:
        return []
    share, goal = mine / dense, GOALS.get(result.work)
    words = f"Memory: {ours} needs {share:.3f} of dense's"
    if goal is not None and goal.peak is not None:
        words += f", goal {goal.peak:g}: {'reached' if share <= goal.peak else 'missed'}"
    later, dense_later = (result.memory[method]["peak_of_second_pass_mib"] for method in (ours, "dense"))
    return [
        f"{words}. Adding to gradients that are there before, {later:.1f} MiB against dense's {dense_later:.1f}; the "
        f"weights' gradients are {result.work.gradients_mib:.1f} MiB."
    ]


def _title(work: Work, swept: str) -> str:
    return (
        f"Feed-forward layer, d_model {work.d_model}, k = {work.k}, {work.tokens:,} tokens (quoted: Gupta et al. 2021, "
        "GPU, 262,144 tokens)"
    )


SUBJECT = Subject(
    schema="topk_attention/feed-forward-kernel/1",
    measure=measure.__name__,
    check_method=lambda method: check_method(method, (*RIVALS, *PAPERS)),
    why_not=why_not,
    keeps_all=lambda method, work: kept(method, work.k) is None,
    size=("d_ff", 1.0),
    rival=("dense", "the dense layer of plain F.linear"),
    goals=GOALS,
    floor="the first product x @ w_in.T alone (both first products of a gated layer), in blocks, in the same rounds; "
    "its share of the forward pass is 100 % when choosing neurons and everything after it cost nothing",
    memory_note="It counts beyond x, the weights, the gradient of the output, and the weights' gradients, which come "
    "into being in it and are taken off in full; output, gradient of x and all between do count.",
    below=_memory,
    sweeps={"d_ff": "d_ff, neurons of the layer"},
    title=_title,
    quoted={
        "d_ff": {
            "peak_mib": {
                _PAPER_NAMES[name]: {d_ff: 1024 * gib for d_ff, (gib, _) in points.items()}
                for name, points in PAPER.items()
            },
            "forward_backward_s": {
                _PAPER_NAMES[name]: {d_ff: seconds for d_ff, (_, seconds) in points.items()}
                for name, points in PAPER.items()
            },
        }
    },
)
