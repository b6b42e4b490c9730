"""The tables and pictures of attention, from its records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...rivals.names import METHODS
from ...runs.records import Json
from ...show.quoted import ATTENTION_LAYER, CHUNK_SIZE, CHUNK_SIZE_LENGTH
from ..round_tables import Result, RoundTable, Sweep
from ..tables import PointTable, computed_on
from .methods import why_not
from .works import CHUNK_METHODS, KS, LAYER_METHODS, LENGTHS, TABLE, Work

_OPERATION = f"{__package__}.measure"


class Rounds(RoundTable):
    """The operation alone, methods in turns."""

    schema = "topk_attention/attention-kernel/2"
    operation = _OPERATION
    new_work = Work
    rows = TABLE
    rivals = methods = ("sdpa", "topk-chunked", "query-chunks", "performer")
    rival_is = "PyTorch's scaled_dot_product_attention"
    size = ("length", 2.0)
    sweeps: ClassVar = {
        # What plain PyTorch does at longer inputs is known well enough.
        "length": Sweep(
            "L, length of the sequence", LENGTHS, ("sdpa", "topk-chunked", "performer"), {"topk-chunked": 16384}
        ),
        "k": Sweep("k, keys kept per query", KS, ("sdpa", "topk-chunked", "performer")),
    }
    floor = (
        "the score product q @ k.T alone, in tiles, in the same rounds; its share of the forward pass is 100 % when "
        "selecting, softmax and values cost nothing"
    )
    memory_note = (
        "Inputs and the gradient of the output do not count; output, gradients of the inputs and all between do."
    )

    def why_not(self, method: str, work: Any) -> str | None:
        return why_not(method, work)

    def title(self, work: Any, swept: str) -> str:
        fixed = f"k = {work.k}" if swept == "length" else f"L = {work.length:,}"
        return f"Attention, {work.num_heads} heads of {work.head_dim}, {fixed}"

    def memory_lines(self, ours: str, result: Result) -> list[str]:
        mine, sdpa = result.peak_mib(ours), result.peak_mib("sdpa")
        if mine is None or sdpa is None:
            return []
        allowed = result.work.saved_mib
        verdict = "kept" if mine - sdpa <= allowed else "exceeded"
        return [
            f"Memory: {ours} needs {mine - sdpa:+.1f} MiB against sdpa; allowed are {allowed:.1f} MiB, the saved "
            f"indices and weights: {verdict}."
        ]


class Layers(PointTable):
    """One layer against its length."""

    name = "attention"
    schema = "topk_attention/attention-layer/2"
    operation = _OPERATION
    settings = ("num_heads", "head_dim", "bias", "dropout_p", "projections", "device", "threads")
    size = ("length", "L", "L, length of the sequence")
    k_axis = "k, keys kept per query"
    methods = "implementation"
    paper_headings = ("paper [GiB], quoted", "paper [s], quoted")
    paper_note = (
        "Quoted: Gupta et al. 2021, read off the figure, on a GPU and with dropout 0.1; its query chunking stands "
        "beside vanilla-chunks."
    )

    def title(self, point: Json) -> str:
        layer = "One causal self-attention layer"
        parts = [layer if point["projections"] else "Causal attention alone, without projections"]
        parts.append(f"{point['num_heads']} heads of {point['head_dim']}")
        parts += [] if point["bias"] == "none" else ["a learned bias for each head and distance"]
        parts += [f"dropout {point['dropout_p']:g}"] if point["dropout_p"] else []
        return f"{', '.join(parts)}, forward and backward, float32"

    def picture_title(self, point: Json) -> str:
        return f"{self.title(point)}, {computed_on(point)}"

    def label(self, point: Json) -> str:
        method = METHODS[point["implementation"]]
        if method.keeps_k:
            return f"{method.description}, k = {point['k']} ({point['backend']})"
        if method.is_ours:
            return f"{method.description} ({point['backend']})"
        return f"{method.description}, {point['num_features']} features" if method.is_random else method.description

    def k_label(self, point: Json) -> str:
        if point["k"]:
            return f"top-k ({point['backend']})"
        return self.label(point) if point["implementation"] in ("sdpa", "performer", "rfa", "vanilla-chunks") else ""

    def order(self, point: Json) -> Any:
        return (point["length"], self.curve_order(point), point["backend"] or "", point["k"] or 0)

    def curve_order(self, point: Json) -> int:
        return LAYER_METHODS.index(point["implementation"])

    def paper(self, point: Json) -> tuple[str, Mapping[int, tuple[float, float]]]:
        method = point["implementation"]
        # The paper's query chunking is written out, with all heads at a time.
        name = {"vanilla-chunks": "query-chunks", "query-chunks": None}.get(method, method)
        settings = (point["num_heads"], point["head_dim"], point["bias"], point["projections"])
        has_its_size = {"topk": point["k"] == 128, "performer": point["num_features"] == 256}.get(method, True)
        is_papers = settings == (12, 64, "none", True) and has_its_size
        label = f"{METHODS[method].description}, Gupta et al. 2021 (quoted, GPU)"
        return label, ATTENTION_LAYER.get(str(name), {}) if is_papers else {}

    def paper_columns(self, point: Json) -> tuple[str, ...]:
        numbers = self.paper(point)[1].get(point["length"])
        return ("", "") if numbers is None else tuple(f"{number:.2f}" for number in numbers)


class Chunks(PointTable):
    """Forward passes against the chunk size."""

    name = "chunk-size"
    schema = "topk_attention/chunk-size/1"
    operation = _OPERATION
    settings = ("length", "num_heads", "head_dim", "is_causal", "device", "threads")
    size = ("chunk_size", "chunk", "C, queries in a chunk")
    memory_note = "Memory is the peak above query, key and value; time: median."
    panels = (("peak_mib", "Peak memory of a forward pass [GiB]", 1 / 1024), ("elapsed_s", "Forward [s]", 1.0))

    def title(self, point: Json) -> str:
        mask = "causal" if point["is_causal"] else "no mask"
        heads = f"{point['num_heads']} heads of {point['head_dim']}"
        return f"Attention, forward pass, L = {point['length']:,}, {heads}, {mask}, float32"

    def label(self, point: Json) -> str:
        description = CHUNK_METHODS[point["method"]]
        return description if point["k"] is None else f"{description}, k = {point['k']}"

    def order(self, point: Json) -> Any:
        return (list(CHUNK_METHODS).index(point["method"]), point["chunk_size"] or 0)

    def paper(self, point: Json) -> tuple[str, Mapping[int, tuple[float, float]]]:
        label = f"query chunks, L = {CHUNK_SIZE_LENGTH:,}, Gupta et al. 2021 (quoted, GPU)"
        return label, CHUNK_SIZE if _has_papers_heads(point) and point["method"] == "vanilla-chunks" else {}

    def paper_rows(self, point: Json) -> list[tuple[str, ...]]:
        name = f"paper, L = {CHUNK_SIZE_LENGTH:,}, quoted"
        rows: list[tuple[str, ...]] = [
            (name, f"{size:,}", f"{gib:.2f}", f"{s:.2f}", "") for size, (gib, s) in CHUNK_SIZE.items()
        ]
        return rows if _has_papers_heads(point) else []


def _has_papers_heads(point: Json) -> bool:
    return (point["num_heads"], point["head_dim"], point["is_causal"]) == (12, 64, False)


ROUNDS, LAYERS, CHUNKS = Rounds(), Layers(), Chunks()
