"""What tests of the operations compare with, and the calls they compare.

The dense computations here share no code with the library: they rank by counting, not by sorting.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import ALiBi, BucketedBias, Completion, RelativeBias, topk_attention

FLOAT64_TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


class Sizes(NamedTuple):
    """No two axes alike, so that a mixed-up axis shows."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    queries: int = 7
    keys: int = 11
    head_dim: int = 3
    value_dim: int = 5


SIZES = Sizes()
TINY = Sizes(batch=1, heads=2, key_heads=2, queries=4, keys=5, head_dim=3, value_dim=2)


def attention_inputs(sizes: Sizes = SIZES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys, head_dim, value_dim = sizes
    return (
        torch.randn(batch, heads, queries, head_dim, dtype=dtype),
        torch.randn(batch, key_heads, keys, head_dim, dtype=dtype),
        torch.randn(batch, key_heads, keys, value_dim, dtype=dtype),
    )


def small_integers(*shape: int, largest: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scores of these are exact in every dtype, and many of them are equal."""
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def best_entries(ranked_by: Tensor, eligible: Tensor, k: int | Tensor) -> Tensor:
    """Which entries of the last axis are fewer than k others better than: larger, or equal and further left."""
    index = torch.arange(ranked_by.shape[-1])
    this, other = ranked_by.unsqueeze(-1), ranked_by.unsqueeze(-2)
    other_is_better = (other > this) | ((other == this) & (index < index.unsqueeze(-1)))
    num_better = (other_is_better & eligible.unsqueeze(-2)).sum(-1)
    return eligible & (num_better < k)


def causal_visibility(num_queries: int, num_keys: int) -> Tensor:
    """[N, M] bool, the last query sees all keys."""
    return torch.tensor(
        [[j <= i + num_keys - num_queries for j in range(num_keys)] for i in range(num_queries)], dtype=torch.bool
    ).reshape(num_queries, num_keys)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: int | Sequence[int] | None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """[B, H, N, E] by masking a full matrix of scores; `visible` and `bias` broadcast to [B, H, N, M]."""
    num_keys, group = key.shape[-2], query.shape[-3] // key.shape[-3]
    key, value = (torch.stack([x] * group, dim=-3).flatten(-4, -3) for x in (key, value))
    scores = torch.einsum("...nd,...md->...nm", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    visible = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
    if k is None:
        k = num_keys
    per_head = torch.tensor([k] * query.shape[-3] if isinstance(k, int) else list(k)).view(-1, 1, 1)
    kept = best_entries(scores.detach(), visible, per_head)
    largest = scores.detach().masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    exponentials = (scores - largest).masked_fill(~kept, -math.inf).exp()
    exponentials = exponentials.masked_fill(~kept, 0)
    weights = exponentials / exponentials.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.einsum("...nm,...me->...ne", weights, value)


def output_and_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output, then the gradient of each tensor under a fixed random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], case: str = "") -> None:
    """Equal to the rounding of float64, tensor by tensor, NaN to NaN; `case` begins the message."""
    assert len(actual) == len(expected)
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a, b, **FLOAT64_TOLERANCE, equal_nan=True, msg=lambda words, at=position: f"{case}[{at}] {words}"
        )


def largest_errors(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """[2]: of the output and of all gradients, each tensor's error in units of its largest entry."""
    errors = [
        ((a.double() - true).abs().max() / true.abs().max()).item() for a, true in zip(actual, truth, strict=True)
    ]
    return torch.tensor([errors[0], max(errors[1:])])


def assert_within_measured_allowance(
    errors: Tensor, reference_errors: Tensor, dtype: torch.dtype, case: str = ""
) -> None:
    """As close to float64 as twice what the reference manages in the same dtype, and one rounding.

    errors, reference_errors  [draws, 2], from `largest_errors`; the worst draw counts, as a single one may be lucky
    """
    error, allowance = errors.amax(0), 2 * reference_errors.amax(0) + torch.finfo(dtype).eps
    assert (error <= allowance).all(), f"{case} errors {error.tolist()} above {allowance.tolist()}"


@dataclass(frozen=True)
class Call:
    """One call of topk_attention: the tensors that get a gradient (query, key, value, then a bias's source or what else
    `names` says) and the rest."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bias: Callable[[Tensor], Any] = lambda source: source
    names: tuple[str, ...] = ("bias",)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor, **options: Any) -> Any:
        merged = {"k": 3, **self.options, **options}
        merged |= {
            name: self.bias(tensor) if name == "bias" else tensor
            for name, tensor in zip(self.names, others, strict=False)
        }
        return topk_attention(query, key, value, **merged)

    def run(self, **options: Any) -> list[Tensor]:
        """Output and gradients."""
        return output_and_gradients(lambda *tensors: self(*tensors, **options), *self.tensors)

    def select(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Indices and weights of the kept keys."""
        _, selection = self(*self.tensors, **options, return_selection=True)
        return selection.indices, selection.weights


def _plain(sizes: Sizes, dtype: torch.dtype) -> Call:
    return Call(attention_inputs(sizes, dtype))


def _causal(sizes: Sizes, dtype: torch.dtype) -> Call:
    return Call(attention_inputs(sizes, dtype), {"is_causal": True})


def _causal_with_more_queries_than_keys(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _causal(sizes._replace(queries=sizes.keys, keys=sizes.queries), dtype)


def _bool_mask(sizes: Sizes, dtype: torch.dtype) -> Call:
    mask = torch.rand(sizes.batch, sizes.heads, sizes.queries, sizes.keys) < 0.6
    return Call(attention_inputs(sizes, dtype), {"attn_mask": mask})


def _padding_mask(sizes: Sizes, dtype: torch.dtype) -> Call:
    mask = torch.arange(sizes.keys) < torch.tensor([sizes.keys - 2, 3]).repeat(sizes.batch)[: sizes.batch, None]
    return Call(attention_inputs(sizes, dtype), {"attn_mask": mask[:, None, None, :]})


def _float_mask(sizes: Sizes, dtype: torch.dtype) -> Call:
    mask = torch.randn(sizes.batch, 1, sizes.queries, sizes.keys, dtype=dtype)
    mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, -math.inf)
    return Call(attention_inputs(sizes, dtype), {"attn_mask": mask})


def _queries_without_keys(sizes: Sizes, dtype: torch.dtype) -> Call:
    mask = torch.rand(sizes.queries, sizes.keys) < 0.5
    mask[:3:2] = False  # the first query and the third
    return Call(attention_inputs(sizes, dtype), {"attn_mask": mask})


def _grouped_query_heads(sizes: Sizes, dtype: torch.dtype) -> Call:
    return Call(attention_inputs(sizes._replace(key_heads=sizes.heads // 2), dtype), {"enable_gqa": True})


def _k_per_head(sizes: Sizes, dtype: torch.dtype) -> Call:
    return Call(attention_inputs(sizes, dtype), {"k": [1, sizes.keys, 2, 2][: sizes.heads]})


def _dense_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    bias = torch.randn(sizes.heads, sizes.queries, sizes.keys, dtype=dtype)
    return Call((*attention_inputs(sizes, dtype), bias))


def _relative_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    values = torch.randn(sizes.heads, sizes.queries + sizes.keys - 1, dtype=dtype)
    return Call((*attention_inputs(sizes, dtype), values), {}, RelativeBias)


def _bucketed_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    table = torch.randn(8, sizes.heads, dtype=dtype)
    return Call((*attention_inputs(sizes, dtype), table), {}, lambda table: BucketedBias(table, max_distance=6))


def _causal_bucketed_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    table = torch.randn(6, sizes.heads, dtype=dtype)
    return Call(
        (*attention_inputs(sizes, dtype), table),
        {"is_causal": True},
        lambda table: BucketedBias(table, bidirectional=False, max_distance=7),
    )


def _alibi(sizes: Sizes, dtype: torch.dtype) -> Call:
    slopes = 2.0 ** -torch.arange(1, sizes.heads + 1)  # exact in every dtype
    return Call((*attention_inputs(sizes, dtype), slopes.to(dtype)), {}, ALiBi)


def _everything_at_once(sizes: Sizes, dtype: torch.dtype) -> Call:
    sizes = sizes._replace(key_heads=sizes.heads // 2)
    mask = (torch.rand(sizes.batch, 1, 1, sizes.keys) < 0.8) & (torch.rand(1, sizes.heads, sizes.queries, 1) < 0.8)
    options = {"attn_mask": mask, "is_causal": True, "enable_gqa": True, "k": [2, 3, 1, 2][: sizes.heads], "scale": 0.7}
    return Call((*attention_inputs(sizes, dtype), torch.randn(1, sizes.queries, sizes.keys, dtype=dtype)), options)


def _sinks(sizes: Sizes, dtype: torch.dtype) -> Call:
    call = _queries_without_keys(sizes._replace(key_heads=sizes.heads // 2), dtype)
    options = {**call.options, "enable_gqa": True}
    return replace(
        call, tensors=(*call.tensors, torch.randn(sizes.heads, dtype=dtype)), options=options, names=("sinks",)
    )


def _soft_cap(sizes: Sizes, dtype: torch.dtype) -> Call:
    return Call(attention_inputs(sizes, dtype), {"softcap": 3.0, "is_causal": True})


def _soft_cap_with_sinks_and_a_relative_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    call = _relative_bias(sizes, dtype)
    tensors = (*call.tensors, torch.randn(sizes.heads, dtype=dtype))
    return Call(tensors, {"softcap": 0.5}, RelativeBias, ("bias", "sinks"))


def _completed(call: Call, mass_scale: float | Sequence[float] = 1.5, lift: float = 0.35) -> Call:
    return replace(call, options={**call.options, "completion": Completion(mass_scale, lift)})


def _completed_causal(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _completed(_causal(sizes, dtype))


def _completed_causal_with_a_padding_mask(sizes: Sizes, dtype: torch.dtype) -> Call:
    call = _padding_mask(sizes, dtype)
    return _completed(replace(call, options={**call.options, "is_causal": True}))


def _completed_queries_without_keys(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _completed(_queries_without_keys(sizes, dtype))


def _completed_by_head(sizes: Sizes, dtype: torch.dtype) -> Call:
    call = _k_per_head(sizes._replace(key_heads=sizes.heads // 2), dtype)
    scales = [0.5, 3.0, 0.0, 1.0][: sizes.heads]
    return _completed(replace(call, options={**call.options, "enable_gqa": True}), scales, lift=0.0)


def _completed_relative_bias(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _completed(_relative_bias(sizes, dtype), lift=1.0)


def _completed_sinks(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _completed(_sinks(sizes, dtype), [0.5, 3.0, 0.0, 1.0][: sizes.heads])


def _completed_everything_at_once(sizes: Sizes, dtype: torch.dtype) -> Call:
    return _completed(_everything_at_once(sizes, dtype), [0.5, 2.0, 1.0, 0.1][: sizes.heads])


_CALLS = {
    make.__name__.strip("_"): make
    for make in (
        _plain,
        _causal,
        _causal_with_more_queries_than_keys,
        _bool_mask,
        _padding_mask,
        _float_mask,
        _queries_without_keys,
        _grouped_query_heads,
        _k_per_head,
        _dense_bias,
        _relative_bias,
        _bucketed_bias,
        _causal_bucketed_bias,
        _alibi,
        _everything_at_once,
        _sinks,
        _soft_cap,
        _soft_cap_with_sinks_and_a_relative_bias,
        _completed_causal,
        _completed_causal_with_a_padding_mask,
        _completed_queries_without_keys,
        _completed_by_head,
        _completed_relative_bias,
        _completed_sinks,
        _completed_everything_at_once,
    )
}
CALL_NAMES = list(_CALLS)
SINK_NAMES = [name for name in CALL_NAMES if "sinks" in name]
COMPLETED_NAMES = [name for name in CALL_NAMES if name.startswith("completed_")]


def named_call(
    name: str,
    sizes: Sizes = SIZES,
    dtype: torch.dtype = torch.float64,
    smallest_gap: float = 1e-6,
    first_seed: int = 0,
) -> Call:
    """The call of that name, with scores around the k-th so far apart that rounding cannot reorder them.

    Where all keys are kept, no gap is needed: smallest_gap=0.
    """
    for seed in range(first_seed, first_seed + 1000):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            call = _CALLS[name](sizes, dtype)
        if smallest_gap == 0 or _gap_behind_the_kth_score(call) > smallest_gap:
            return call
    raise AssertionError(f"no inputs with scores {smallest_gap} apart")


def _gap_behind_the_kth_score(call: Call) -> float:
    """Found from the outside: the (k+1)-th weight among all keys is that much smaller than the k-th.

    With all keys kept there is no rest, so completion changes none of these weights.
    """
    query, key, value, *others = (x.double() for x in call.tensors)
    _, everything = call(query, key, value, *others, k=None, backend="reference", return_selection=True)
    scores = everything.weights.log().sort(-1, descending=True).values  # less a constant for each row
    heads, keys = query.shape[-3], key.shape[-2]
    k = call.options.get("k", 3)
    per_head = [k] * heads if isinstance(k, int) else k
    gaps = [scores[:, h, :, k - 1] - scores[:, h, :, k] for h, k in enumerate(per_head) if k < keys]
    return torch.stack(gaps).nan_to_num(nan=math.inf).min().item()


ACTIVATION_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: torch.where(z > 0, z, 0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "relu2": lambda z: torch.where(z > 0, z * z, 0),
    "identity": lambda z: z,
}
# Other names that transformers gives to them.
OTHER_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
    "linear": "identity",
}


def dense_feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    *,
    k: int | None,
    activation: str = "relu",
) -> Tensor:
    """[..., O] by zeroing all but the k best neurons."""
    formula = ACTIVATION_FORMULAS[activation]
    up = F.linear(x, w_in, b_in)
    if w_gate is None:
        hidden, ranked_by = formula(up), up
    else:
        hidden = formula(F.linear(x, w_gate, b_gate)) * up
        ranked_by = hidden.abs()
    all_neurons = torch.ones_like(hidden, dtype=torch.bool)
    kept = best_entries(ranked_by.detach(), all_neurons, w_in.shape[0] if k is None else k)
    return F.linear(hidden * kept, w_out, b_out)
