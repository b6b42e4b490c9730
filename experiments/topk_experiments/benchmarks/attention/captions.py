"""The tables and pictures of attention, from its records. Nothing here measures."""

from __future__ import annotations

from ...rivals.names import METHODS
from ...runs.records import Json
from ...show.quoted import ATTENTION_LAYER, CHUNK_SIZE, CHUNK_SIZE_LENGTH
from ..round_tables import Result, RoundTable, Sweep
from ..tables import Numbers, PointTable, computed_on
from .methods import why_not
from .works import CHUNK_METHODS, GOALS, KS, LAYER_METHODS, LENGTHS, TABLE, new_work

_OPERATION = f"{__package__}.methods"


def _memory_line(result: Result, ours: str, mine: float, sdpas: float) -> str:
    more, allowed = mine - sdpas, result.work.saved_mib
    verdict = "kept" if more <= allowed else "exceeded"
    return (
        f"Memory: {ours} needs {more:+.1f} MiB against sdpa; allowed are {allowed:.1f} MiB, the saved indices and "
        f"weights: {verdict}."
    )


# The operation alone, methods in turns.
ROUNDS = RoundTable(
    schema="topk_attention/attention-kernel/2",
    operation=_OPERATION,
    new_work=new_work,
    methods=("sdpa", "topk-completed", "topk-chunked", "query-chunks", "performer"),
    rows=TABLE,
    goals=GOALS,
    rivals=("sdpa", "topk-chunked", "query-chunks", "performer"),
    rival_is="PyTorch's scaled_dot_product_attention",
    size=("length", 2.0),
    sweeps={
        # What plain PyTorch does at longer inputs is known well enough.
        "length": Sweep(
            "L, length of the sequence", LENGTHS, ("sdpa", "topk-chunked", "performer"), {"topk-chunked": 16384}
        ),
        "k": Sweep("k, keys kept per query", KS, ("sdpa", "topk-chunked", "performer")),
    },
    floor="the score product q @ k.T alone, in tiles, in the same rounds; its share of the forward pass is 100 % when "
    "selecting, softmax and values cost nothing",
    beaten="keys are screened by 8-bit products first, and only some scores are computed in float32",
    memory_note="Inputs and the gradient of the output do not count; output, gradients of the inputs and all between "
    "do.",
    why_not=why_not,
    title=lambda work, swept: (
        f"Attention, {work.num_heads} heads of {work.head_dim}, "
        f"{f'k = {work.k}' if swept == 'length' else f'L = {work.length:,}'}"
    ),
    memory_line=_memory_line,
)


def _layer_title(point: Json) -> str:
    layer = "One causal self-attention layer"
    parts = [layer if point["projections"] else "Causal attention alone, without projections"]
    parts.append(f"{point['num_heads']} heads of {point['head_dim']}")
    parts += [] if point["bias"] == "none" else ["a learned bias for each head and distance"]
    parts += [f"dropout {point['dropout_p']:g}"] if point["dropout_p"] else []
    return f"{', '.join(parts)}, forward and backward, float32"


def _layer_label(point: Json) -> str:
    method = METHODS[point["implementation"]]
    if method.keeps_k:
        return f"{method.description}, k = {point['k']} ({point['backend']})"
    if method.is_ours:
        return f"{method.description} ({point['backend']})"
    return f"{method.description}, {point['num_features']} features" if method.is_random else method.description


def _layer_curve(point: Json) -> int:
    return LAYER_METHODS.index(point["implementation"])


def _layer_label_over_k(point: Json) -> str:
    if point["k"]:
        completed = ", completed" if METHODS[point["implementation"]].is_completed else ""
        return f"top-k{completed} ({point['backend']})"
    return _layer_label(point) if point["implementation"] in ("sdpa", "performer", "rfa", "vanilla-chunks") else ""


def _layer_of_paper(point: Json) -> tuple[str, Numbers]:
    method = point["implementation"]
    # The paper's query chunking is written out, with all heads at a time.
    name = {"vanilla-chunks": "query-chunks", "query-chunks": None}.get(method, method)
    settings = (point["num_heads"], point["head_dim"], point["bias"], point["projections"])
    has_its_size = {"topk": point["k"] == 128, "performer": point["num_features"] == 256}.get(method, True)
    is_papers = settings == (12, 64, "none", True) and has_its_size
    label = f"{METHODS[method].description}, Gupta et al. 2021 (quoted, GPU)"
    return label, ATTENTION_LAYER.get(str(name), {}) if is_papers else {}


# One layer against its length.
LAYERS = PointTable(
    name="attention",
    schema="topk_attention/attention-layer/2",
    operation=_OPERATION,
    settings=("num_heads", "head_dim", "bias", "dropout_p", "projections", "device", "threads"),
    size=("length", "L", "L, length of the sequence"),
    title=_layer_title,
    picture_adds=lambda point: f", {computed_on(point)}",
    label=_layer_label,
    order=lambda point: (point["length"], _layer_curve(point), point["backend"] or "", point["k"] or 0),
    curve_order=_layer_curve,
    over_k=("k, keys kept per query", _layer_label_over_k),
    methods="implementation",
    paper=_layer_of_paper,
    paper_headings=("paper [GiB], quoted", "paper [s], quoted"),
    paper_note="Quoted: Gupta et al. 2021, read off the figure, on a GPU and with dropout 0.1; its query chunking "
    "stands beside vanilla-chunks.",
)


def _chunks_title(point: Json) -> str:
    mask = "causal" if point["is_causal"] else "no mask"
    heads = f"{point['num_heads']} heads of {point['head_dim']}"
    return f"Attention, forward pass, L = {point['length']:,}, {heads}, {mask}, float32"


def _chunks_label(point: Json) -> str:
    description = CHUNK_METHODS[point["method"]]
    return description if point["k"] is None else f"{description}, k = {point['k']}"


def _chunks_of_paper(point: Json) -> Numbers:
    return CHUNK_SIZE if (point["num_heads"], point["head_dim"], point["is_causal"]) == (12, 64, False) else {}


# Forward passes against the chunk size.
CHUNKS = PointTable(
    name="chunk-size",
    schema="topk_attention/chunk-size/1",
    operation=_OPERATION,
    settings=("length", "num_heads", "head_dim", "is_causal", "device", "threads"),
    size=("chunk_size", "chunk", "C, queries in a chunk"),
    title=_chunks_title,
    label=_chunks_label,
    order=lambda point: (list(CHUNK_METHODS).index(point["method"]), point["chunk_size"] or 0),
    memory_note="Memory is the peak above query, key and value; time: median.",
    panels=(("peak_mib", "Peak memory of a forward pass [GiB]", 1 / 1024), ("elapsed_s", "Forward [s]", 1.0)),
    paper=lambda point: (
        f"query chunks, L = {CHUNK_SIZE_LENGTH:,}, Gupta et al. 2021 (quoted, GPU)",
        _chunks_of_paper(point) if point["method"] == "vanilla-chunks" else {},
    ),
    paper_rows=lambda point: {f"paper, L = {CHUNK_SIZE_LENGTH:,}, quoted": _chunks_of_paper(point)},
)
