"""The tables and pictures of feed-forward layers, from their records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...rivals.names import TOPK
from ...runs.records import Json
from ...show.quoted import FEED_FORWARD_LAYER, FEED_FORWARD_LAYER_TOKENS
from ..round_tables import Result, RoundTable, Sweep
from ..tables import PointTable, computed_on, quoted_by_field
from .methods import why_not
from .works import D_FFS, LAYER_METHODS, TABLE, Work

_OPERATION = f"{__package__}.measure"
# Less is a matter of whole pages and of what the C library keeps.
_LEAST_MIB = 4.0
# Of the paper's curves: what tables and pictures call them, and what computes the same here.
_PAPER_NAMES = {
    "vanilla": "vanilla",
    "query-chunks": "query chunks",
    "topk": "top-k",
    "topk-sparse": "top-k, torch.sparse",
}
_PAPERS_CURVES = {
    "vanilla": "vanilla",
    "vanilla-chunks": "query-chunks",
    "topk-cpu": "topk",
    "topk-chunked": "topk",
    "topk-torch-sparse": "topk-sparse",
}


class Rounds(RoundTable):
    """Methods in turns."""

    schema = "topk_attention/feed-forward-kernel/1"
    operation = _OPERATION
    new_work = Work
    methods = ("dense", "topk-chunked", "token-chunks", "dense-chunks", "topk-torch-sparse")
    rows = TABLE
    rivals = ("dense", "topk-chunked")
    rival_is = "the dense layer of plain F.linear"
    size = ("d_ff", 1.0)
    sweeps: ClassVar = {"d_ff": Sweep("d_ff, neurons of the layer", D_FFS, ("dense", "topk-chunked", "token-chunks"))}
    floor = (
        "the first product x @ w_in.T alone (both first products of a gated layer), in blocks, in the same rounds; "
        "its share of the forward pass is 100 % when choosing neurons and everything after it cost nothing"
    )
    memory_note = (
        "It counts beyond x, the weights, the gradient of the output, and the weights' gradients, which come into "
        "being in it and are taken off in full; output, gradient of x and all between do count."
    )
    quoted: ClassVar = {
        "d_ff": quoted_by_field(
            {
                f"{_PAPER_NAMES[name]}, quoted": {
                    d_ff: (1024 * gib, seconds) for d_ff, (gib, seconds) in FEED_FORWARD_LAYER[name].items()
                }
                for name in ("topk", "vanilla", "query-chunks")
            },
            ("peak_mib", "forward_backward_s"),
        )
    }

    def why_not(self, method: str, work: Any) -> str | None:
        return why_not(method, work)

    def title(self, work: Any, swept: str) -> str:
        quoted = f"(quoted: Gupta et al. 2021, GPU, {FEED_FORWARD_LAYER_TOKENS:,} tokens)"
        return f"Feed-forward layer, d_model {work.d_model}, k = {work.k}, {work.tokens:,} tokens {quoted}"

    def memory_lines(self, ours: str, result: Result) -> list[str]:
        """As a share of the dense layer's, in the first pass and in later ones."""
        mine, dense = result.peak_mib(ours), result.peak_mib("dense")
        if mine is None or dense is None or dense < _LEAST_MIB:
            return []
        share, goal = mine / dense, result.work.goal
        words = f"Memory: {ours} needs {share:.3f} of dense's"
        if goal is not None and goal.peak is not None:
            words += f", goal {goal.peak:g}: {'reached' if share <= goal.peak else 'missed'}"
        later, dense_later = (result.memory[method]["peak_of_second_pass_mib"] for method in (ours, "dense"))
        return [
            f"{words}. Adding to gradients that are there before, {later:.1f} MiB against dense's {dense_later:.1f}; "
            f"the weights' gradients are {result.work.gradients_mib:.1f} MiB."
        ]


class Layers(PointTable):
    """One layer against its number of neurons."""

    name = "feed-forward"
    schema = "topk_attention/feed-forward-layer/1"
    operation = _OPERATION
    settings = ("tokens", "d_model", "device", "threads")
    size = ("d_ff", "d_ff", "d_ff, neurons of the layer")
    k_axis = "k, neurons kept per token"
    paper_note = "Quoted: Gupta et al. 2021, read off the figure, on a GPU."

    def title(self, point: Json) -> str:
        sizes = f"d_model {point['d_model']}, {point['tokens']:,} tokens"
        return f"One feed-forward layer, {sizes}, forward and backward, float32, {computed_on(point)}"

    def label(self, point: Json) -> str:
        name = LAYER_METHODS.get(point["method"], f"top-k ({point['method'].removeprefix(TOPK)})")
        return name if point["k"] is None else f"{name}, k = {point['k']}"

    def paper(self, point: Json) -> tuple[str, Mapping[int, tuple[float, float]]]:
        name = _PAPERS_CURVES.get(point["method"], "")
        label = f"{_PAPER_NAMES.get(name)}, Gupta et al. 2021 (quoted, GPU, {FEED_FORWARD_LAYER_TOKENS:,} tokens)"
        is_papers = point["d_model"] == 768 and point["k"] in (None, 512)
        return label, FEED_FORWARD_LAYER.get(name, {}) if is_papers else {}

    def paper_rows(self, point: Json) -> list[tuple[str, ...]]:
        tokens = f"{FEED_FORWARD_LAYER_TOKENS:,} tokens, quoted"
        rows: list[tuple[str, ...]] = [
            (f"paper, {_PAPER_NAMES[name]}, {tokens}", f"{d_ff:,}", f"{gib:.2f}", f"{seconds:.2f}", "")
            for name, numbers in FEED_FORWARD_LAYER.items()
            for d_ff, (gib, seconds) in numbers.items()
        ]
        return rows if point["d_model"] == 768 else []


ROUNDS, LAYERS = Rounds(), Layers()
