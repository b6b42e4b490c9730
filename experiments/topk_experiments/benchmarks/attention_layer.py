"""Memory and time of one causal self-attention layer, forward and backward, against its length.

The setting of the paper's first figure (Gupta et al. 2021): batch 1, 12 heads of size 64, float32. Each point has a
process of its own. Before it is measured, its output and all its gradients are compared at a short length with a
dense computation in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topk_attention.backends import choose_backend
from topk_attention.functional import RelativeBias, topk_attention
from topk_attention.functional.checks import check_dropout, check_k
from topk_attention.nn import TopKAttention

from ..rivals import AttentionMethod, PerformerAttention, RandomFeatureAttention, new_attention, random_feature_weights
from ..runs.checking import NEAR_TIE, CheckFailedError
from ..runs.checks import check_at_least
from ..runs.devices import check_device, device_name
from ..runs.points import PointBenchmark, measure_step, start_point
from ..runs.process import Send
from ..runs.records import Json
from .tables import measured_in_words

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/attention-layer/2"
LINES = "attention.jsonl"
IMPLEMENTATIONS = {
    "topk": "top-k attention",
    "query-chunks": "every key, in query chunks",
    "sdpa": "PyTorch's scaled_dot_product_attention",
    "vanilla": "vanilla (matmul, softmax, matmul)",
    "vanilla-chunks": "vanilla, 1,024 queries at a time",
    "performer": "Performer",
    "rfa": "Random Feature Attention",
}
BIASES = ("none", "learned")
# What the library's own operation computes, and what takes a bias.
_LIBRARY = ("topk", "query-chunks")
_WITH_BIAS = (*_LIBRARY, "sdpa")
_RANDOM = ("performer", "rfa")

# Long enough that k leaves most keys out, short enough that the check costs nothing.
_CHECK_LENGTH = 192
_CHECK_K = 24
_CHECK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Point:
    """One measurement. `k` counts for implementation "topk" alone, `num_features` for random features.

    projections  four square linear layers around the attention; without them its inputs are query, key and value
    bias         "learned": one number per head and distance, trained with the rest
    """

    implementation: str
    length: int
    k: int = 128
    num_features: int = 256
    num_heads: int = 12
    head_dim: int = 64
    bias: str = "none"
    dropout_p: float = 0.0
    projections: bool = True
    backend: str = "auto"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            names = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementations must be among {names}, got {self.implementation!r}")
        if self.bias not in BIASES:
            raise ValueError(f'bias must be "none" or "learned", got {self.bias!r}')
        check_k("k", self.k)
        check_dropout(self.dropout_p)
        check_at_least(1, self, "length", "num_features", "num_heads", "head_dim", "threads")
        if self.bias != "none" and self.implementation not in _WITH_BIAS:
            raise ValueError(f'bias must be "none" for {self.implementation}, got {self.bias!r}')
        if self.dropout_p > 0 and self.implementation in _RANDOM:
            raise ValueError(
                f"dropout must be 0 for {self.implementation}, which forms no weights to drop, got {self.dropout_p:g}"
            )
        check_device(self.device)
        choose_backend(self.backend)

    def as_record(self) -> Json:
        """What tells this point from others: without settings that its implementation does not look at."""
        record = asdict(self)
        if self.implementation != "topk":
            record["k"] = None
        if self.implementation not in _RANDOM:
            record["num_features"] = None
        record["backend"] = self.library_backend if self.implementation in _LIBRARY else None
        if self.device != "cpu":
            record["device"] = f"{self.device} ({device_name(self.device)})"
        return record

    def __str__(self) -> str:
        name = self.implementation
        if name == "topk":
            name += f" k = {self.k}" + ("" if self.backend == "auto" else f" ({self.backend})")
        parts = [f"L = {self.length:,}", name]
        if self.bias != "none":
            parts.append("learned bias")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return ", ".join(parts)

    @property
    def library_backend(self) -> str:
        """The backend of the library that runs. Where every key is kept, "auto" would take PyTorch's attention."""
        if self.backend != "auto":
            return self.backend
        if self.implementation == "query-chunks" or self.device != "cpu":
            return "chunked"
        return choose_backend("auto").name


def grid(
    lengths: Iterable[int], implementations: Iterable[str], ks: Sequence[int] = (128,), **settings: Any
) -> list[Point]:
    """One point for each length and implementation, and for top-k for each k; shortest first.

    implementations  names of IMPLEMENTATIONS, or "topk-BACKEND"

    >>> [(point.length, point.implementation, point.backend) for point in grid([512, 1024], ["topk-chunked"])]
    [(512, 'topk', 'chunked'), (1024, 'topk', 'chunked')]
    >>> [(point.implementation, point.k) for point in grid([512], ["topk", "sdpa"], [64, 32])]
    [('topk', 32), ('topk', 64), ('sdpa', 32)]
    """
    points = []
    for length, name in itertools.product(sorted(set(lengths)), dict.fromkeys(implementations)):
        own = {"backend": name.removeprefix("topk-")} if name.startswith("topk-") else {}
        implementation = "topk" if own else name
        for k in sorted(set(ks))[: None if implementation == "topk" else 1]:
            points.append(Point(implementation, length, k, **settings | own))
    return points


def able_to(bias: str, dropout_p: float) -> list[str]:
    """The implementations that can do with a bias and dropout, top-k also with the backend in plain PyTorch.

    >>> able_to("learned", 0.0)
    ['topk', 'topk-chunked', 'query-chunks', 'sdpa']
    """
    without_bias = [] if bias != "none" else [name for name in IMPLEMENTATIONS if name not in _WITH_BIAS]
    able = [*_WITH_BIAS, *(name for name in without_bias if dropout_p == 0 or name not in _RANDOM)]
    return ["topk", "topk-chunked", *able[1:]]


def bias_and_dropout(**settings: object) -> list[Point]:
    """The two settings in which PyTorch's attention on a CPU falls back to an L x L path: L = 8,192, 4 heads, the
    attention alone without projections."""
    base = Point("topk", 8192, num_heads=4, projections=False, **settings)  # type: ignore[arg-type]
    variants = (replace(base, bias="learned"), replace(base, dropout_p=0.1))
    return [replace(point, implementation=name) for point in variants for name in ("topk", "sdpa")]


def run_attention_benchmark(benchmark: PointBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet and append each to `attention.jsonl` as it finishes.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time is one of them.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    file = benchmark.file(LINES, schema=SCHEMA, function=f"{__name__}:measure_point")
    return file.measure(benchmark.points, benchmark.request, measured_in_words, console)


def measure_point(request: Json, send: Send) -> Json:
    """One point, in a process of its own."""
    start_point(request)
    point = Point(**request["point"])
    largest_error = check(point)  # also the warm-up, at a tiny length

    def new_step() -> Callable[[], None]:
        # Made here: weights, input and all gradients count.
        layer, inputs = new_layer(point), new_inputs(point)
        output_gradient = torch.randn(output_shape(point), device=point.device)

        def step() -> None:
            for tensor in (*inputs, *layer.parameters()):
                tensor.grad = None
            layer(*inputs).backward(output_gradient)

        return step

    return measure_step(new_step, point.device, request, send) | {"largest_error_in_check": largest_error}


def new_layer(point: Point) -> nn.Module:
    """The layer of a point, with random weights.

    It takes x [1, L, H * D] with projections, and query, key and value [1, H, L, D] without.
    """
    if not point.projections:
        return _Attention(point).to(point.device)
    width = point.num_heads * point.head_dim
    projections = [nn.Linear(width, width) for _ in range(4)]
    layer = _LibraryLayer if point.implementation in _LIBRARY else _ProjectedLayer
    return layer(point, projections).to(point.device)


def new_inputs(point: Point) -> tuple[Tensor, ...]:
    """Random inputs of a point's layer that want a gradient."""
    number = 1 if point.projections else 3
    return tuple(torch.randn(output_shape(point), device=point.device).requires_grad_() for _ in range(number))


def output_shape(point: Point) -> tuple[int, ...]:
    """[1, L, H * D] with projections, [1, H, L, D] without; the input has the same."""
    if point.projections:
        return (1, point.length, point.num_heads * point.head_dim)
    return (1, point.num_heads, point.length, point.head_dim)


def check(point: Point) -> float:
    """Compare a point's layer at a short length, in float32 and without dropout, with a dense computation in float64.

    Returns the largest difference in the output and in any gradient, as a fraction of that tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = replace(point, length=min(point.length, _CHECK_LENGTH), k=min(point.k, _CHECK_K), dropout_p=0.0)
    layer, inputs = new_layer(small), new_inputs(small)
    named = {f"input {number}": tensor for number, tensor in enumerate(inputs)} | dict(layer.named_parameters())
    dense = {name: tensor.detach().double().requires_grad_() for name, tensor in named.items()}
    expected, is_clear = _dense_attention(small, dense, layer)
    output_gradient = torch.randn(expected.shape, dtype=torch.float64, device=point.device) * is_clear
    output = layer(*inputs)
    output.backward(output_gradient.float())
    expected.backward(output_gradient)
    results = {"output": (output * is_clear, expected * is_clear)}
    for name, tensor in named.items():
        if tensor.grad is None:
            raise CheckFailedError(f"{small}: {name} got no gradient")
        results[f"gradient of {name}"] = (tensor.grad, cast(Tensor, dense[name].grad))
    # Some gradients are zero but for rounding (that of the key projection's bias): those are held against the others.
    floor = 0.1 * max(truth.abs().max().item() for _, truth in results.values())
    errors = {
        name: (result - truth).abs().max().item() / max(truth.abs().max().item(), floor)
        for name, (result, truth) in results.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
    if not errors[worst] <= _CHECK_TOLERANCE:
        raise CheckFailedError(
            f"{small}: the {worst} differs from a dense computation by {errors[worst]:.1e} of its largest entry"
        )
    return errors[worst]


class _LibraryLayer(nn.Module):
    """The library's layer, with its bias table."""

    def __init__(self, point: Point, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.attention = TopKAttention(
            *projections,
            num_heads=point.num_heads,
            k=_k(point),
            is_causal=True,
            dropout_p=point.dropout_p,
            backend=point.library_backend,
        )
        self.bias_table = _new_bias_table(point)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, bias=_relative_bias(self.bias_table))


class _ProjectedLayer(nn.Module):
    """The same layer around another attention."""

    def __init__(self, point: Point, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.query_projection, self.key_projection, self.value_projection, self.output_projection = projections
        self.num_heads = point.num_heads
        self.attention = _Attention(point)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.query_projection, self.key_projection, self.value_projection)
        output = self.attention(*(_heads(projection(x), self.num_heads) for projection in projections))
        return self.output_projection(output.transpose(1, 2).flatten(2))


class _Attention(nn.Module):
    """Attention alone."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.point = point
        self.bias_table = _new_bias_table(point)
        self.baseline: AttentionMethod | None = None
        if point.implementation not in _WITH_BIAS:
            options = {"head_dim": point.head_dim, "num_features": point.num_features}
            self.baseline = new_attention(point.implementation, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.baseline is not None:
            return self.baseline(query, key, value, is_causal=True, dropout_p=self.point.dropout_p)
        if self.point.implementation == "sdpa":
            return _sdpa(self.point, query, key, value, self.bias_table)
        return topk_attention(
            query,
            key,
            value,
            k=_k(self.point),
            bias=_relative_bias(self.bias_table),
            is_causal=True,
            dropout_p=self.point.dropout_p,
            backend=self.point.library_backend,
        )


def _k(point: Point) -> int | None:
    return point.k if point.implementation == "topk" else None


def _new_bias_table(point: Point) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(point.num_heads, 2 * point.length - 1)) if point.bias == "learned" else None


def _relative_bias(table: Tensor | None) -> RelativeBias | None:
    return None if table is None else RelativeBias(table)


def _heads(projected: Tensor, num_heads: int) -> Tensor:
    """[1, L, H * D] -> [1, H, L, D]"""
    return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _sdpa(point: Point, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=point.dropout_p, is_causal=True)
    # Of the ways to write the table out, windows of it cost least: an index_select would hold an L x L index as well.
    mask = table.unfold(1, point.length, 1).flip(1)  # [H, L, L]
    mask.masked_fill_(_future(query), -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], dropout_p=point.dropout_p)


def _future(like: Tensor) -> Tensor:
    """Which keys come after a query, bool [L, L], for [1, H, L, D]."""
    return torch.ones(like.shape[2], like.shape[2], dtype=torch.bool, device=like.device).triu_(1)


def _dense_attention(point: Point, tensors: dict[str, Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The layer written out with all weights, from tensors named as in `check`.

    Returns the output, and 1 for rows of it that hang on no near-tie, otherwise 0.
    """

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias = (
            next(tensor for full_name, tensor in tensors.items() if full_name.endswith(f"{name}_projection.{part}"))
            for part in ("weight", "bias")
        )
        return x @ weight.T + bias

    if point.projections:
        x = tensors["input 0"]
        query, key, value = (_heads(project(name, x), point.num_heads) for name in ("query", "key", "value"))
    else:
        query, key, value = (tensors[f"input {number}"] for number in range(3))
    weights, is_clear = _dense_weights(point, query, key, tensors, layer)
    output = weights @ value
    if not point.projections:
        return output, is_clear[..., None]
    return project("output", output.transpose(1, 2).flatten(2)), is_clear.all(1)[..., None]


def _dense_weights(
    point: Point, query: Tensor, key: Tensor, tensors: dict[str, Tensor], layer: nn.Module
) -> tuple[Tensor, Tensor]:
    """Weights [1, H, L, L] of query and key [1, H, L, D], and which rows [1, H, L] hang on no near-tie."""
    is_future = _future(query)
    is_clear = torch.ones(query.shape[:3], dtype=torch.bool, device=query.device)
    baseline = next((module for module in layer.modules() if isinstance(module, AttentionMethod)), None)
    parameters = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if isinstance(baseline, PerformerAttention | RandomFeatureAttention):
        sigma = parameters.get("sigma")
        return random_feature_weights(baseline, query, key, visible=~is_future, sigma=sigma), is_clear
    scores = query @ key.mT / point.head_dim**0.5
    if "bias_table" in parameters:
        position = torch.arange(point.length, device=query.device)
        scores = scores + parameters["bias_table"][:, position - position[:, None] + point.length - 1]
    scores = scores.masked_fill(is_future, -torch.inf)
    k = _k(point)
    if k is not None and k < point.length:
        best, order = scores.detach().sort(dim=-1, descending=True, stable=True)
        is_clear = ~(best[..., k - 1] - best[..., k] < NEAR_TIE)  # -inf - -inf is NaN: no key to mistake
        scores = scores.masked_fill(
            torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], False), -torch.inf
        )
    return scores.softmax(-1), is_clear
