"""The tables and pictures of feed-forward layers, from their records. Nothing here measures."""

from __future__ import annotations

from ...rivals.names import TOPK
from ...runs.records import Json
from ...show.quoted import FEED_FORWARD_LAYER, FEED_FORWARD_LAYER_TOKENS
from ..round_tables import Result, RoundTable, Sweep
from ..tables import Numbers, PointTable, Quoted, computed_on
from .methods import why_not
from .works import D_FFS, GOALS, LAYER_METHODS, TABLE, Work

_OPERATION = f"{__package__}.methods"
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
_TOKENS = f"{FEED_FORWARD_LAYER_TOKENS:,} tokens"


def _memory_line(result: Result, ours: str, mine: float, denses: float) -> str | None:
    """As a share of the dense layer's, in the first pass and in later ones."""
    if denses < _LEAST_MIB:
        return None
    share, goal = mine / denses, GOALS.get(result.work)
    words = f"Memory: {ours} needs {share:.3f} of dense's"
    if goal is not None and goal.peak is not None:
        words += f", goal {goal.peak:g}: {'reached' if share <= goal.peak else 'missed'}"
    later, dense_later = (result.memory[method]["peak_of_second_pass_mib"] for method in (ours, "dense"))
    return (
        f"{words}. Adding to gradients that are there before, {later:.1f} MiB against dense's {dense_later:.1f}; "
        f"the weights' gradients are {result.work.gradients_mib:.1f} MiB."
    )


# Methods in turns.
ROUNDS = RoundTable(
    schema="topk_attention/feed-forward-kernel/1",
    operation=_OPERATION,
    new_work=Work,
    methods=("dense", "topk-chunked", "token-chunks", "dense-chunks", "topk-torch-sparse"),
    rows=TABLE,
    goals=GOALS,
    rivals=("dense", "topk-chunked"),
    rival_is="the dense layer of plain F.linear",
    size=("d_ff", 1.0),
    sweeps={
        "d_ff": Sweep(
            "d_ff, neurons of the layer",
            D_FFS,
            ("dense", "topk-chunked", "token-chunks"),
            quoted={
                f"{_PAPER_NAMES[name]}, quoted": Quoted(FEED_FORWARD_LAYER[name])
                for name in ("topk", "vanilla", "query-chunks")
            },
        )
    },
    floor="the first product x @ w_in.T alone (both first products of a gated layer), in blocks, in the same rounds; "
    "its share of the forward pass is 100 % when choosing neurons and everything after it cost nothing",
    memory_note="It counts beyond x, the weights, the gradient of the output, and the weights' gradients, which come "
    "into being in it and are taken off in full; output, gradient of x and all between do count.",
    why_not=why_not,
    title=lambda work, _: (
        f"Feed-forward layer, d_model {work.d_model}, k = {work.k}, {work.tokens:,} tokens (quoted: Gupta et al. 2021, "
        f"GPU, {_TOKENS})"
    ),
    memory_line=_memory_line,
)


def _title(point: Json) -> str:
    sizes = f"d_model {point['d_model']}, {point['tokens']:,} tokens"
    return f"One feed-forward layer, {sizes}, forward and backward, float32, {computed_on(point)}"


def _label(point: Json) -> str:
    name = _label_over_k(point)
    return name if point["k"] is None else f"{name}, k = {point['k']}"


def _label_over_k(point: Json) -> str:
    return LAYER_METHODS.get(point["method"], f"top-k ({point['method'].removeprefix(TOPK)})")


def _paper(point: Json) -> tuple[str, Numbers]:
    name = _PAPERS_CURVES.get(point["method"], "")
    label = f"{_PAPER_NAMES.get(name)}, Gupta et al. 2021 (quoted, GPU, {_TOKENS})"
    is_papers = point["d_model"] == 768 and point["k"] in (None, 512)
    return label, FEED_FORWARD_LAYER.get(name, {}) if is_papers else {}


def _paper_rows(point: Json) -> dict[str, Numbers]:
    curves = FEED_FORWARD_LAYER.items() if point["d_model"] == 768 else ()
    return {f"paper, {_PAPER_NAMES[name]}, {_TOKENS}, quoted": numbers for name, numbers in curves}


# One layer against its number of neurons.
LAYERS = PointTable(
    name="feed-forward",
    schema="topk_attention/feed-forward-layer/1",
    operation=_OPERATION,
    settings=("tokens", "d_model", "device", "threads"),
    size=("d_ff", "d_ff", "d_ff, neurons of the layer"),
    title=_title,
    label=_label,
    order=lambda point: point["d_ff"],
    over_k=("k, neurons kept per token", _label_over_k),
    paper=_paper,
    paper_rows=_paper_rows,
    paper_note="Quoted: Gupta et al. 2021, read off the figure, on a GPU.",
)
