"""Experts whose weights lie together in tensors (Mixtral, Qwen3-MoE, gpt-oss, Llama 4, DBRX, JetMoE, ...).

A converted module remains the same module. Only its class changes, to a subclass whose experts use their k best
neurons. Routers, the weights of experts and auxiliary losses are not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends.activations import ACTIVATIONS, Cut, gated
from ..functional import StandIn
from ..nn.experts import ExpertWeights, Routing, routing_of, sum_of_experts
from ..nn.linears import added_forward
from .sites import FeedForwardSite, added_to, full_name_of, known_activation, own_forward
from .subclasses import Subclassed, subclass_of
from .trials import SCALES, evaluating, failure, is_same

_SETTINGS = "_topk_attention_experts"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What activations, and the limits of gates that are cut, are called.
_ACTIVATIONS = ("act_fn", "activation", "mlp.activation_fn")
_LIMITS = ("limit", "swiglu_limit")


class _Settings(NamedTuple):
    """How converted experts compute.

    form  the name of their form
    k     None keeps every neuron
    """

    form: str
    k: int | None
    backend: str
    activation: str
    cut: Cut

    def sum_of(self, x: Tensor, routing: Routing, weights: ExpertWeights, **further: Any) -> Tensor:
        return sum_of_experts(
            x,
            routing,
            weights,
            k=self.k,
            activation=self.activation,
            cut=self.cut,
            backend=self.backend,
            **further,
        )


@dataclass(frozen=True)
class _Form:
    """One way to hold experts, and to call them.

    names     of the parameters: what the first layer holds, what the last one holds, the biases
    bypassed  names of the submodules that top-k experts compute themselves and do not call
    weights   the parameters' views
    forward   (module, settings, *arguments of the module's forward) -> what the module's forward returns
    trial     (module, x [T, D]) -> arguments for a call of the module's forward with these tokens
    by_neuron names of the weights whose last two axes change their order in memory where they are stored by neuron
    """

    names: tuple[str, ...]
    bypassed: tuple[str, ...]
    weights: Callable[[Any], ExpertWeights]
    forward: Callable[..., Tensor]
    trial: Callable[[Any, Tensor], tuple[Any, ...]]
    by_neuron: Callable[[Any], tuple[str, ...]]


class TopKExperts(Subclassed):
    """What the classes of converted experts have in common; the other base is the original class."""

    @property
    def topk_form(self) -> _Form:
        return _FORMS[getattr(self, _SETTINGS).form]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        form = self.topk_form
        if (reason := _why_not_computed(self, form)) is not None:
            raise RuntimeError(
                f"{self.topk_former_class.__name__} is converted and its {reason}, since convert; remove that, or call "
                "topk_attention.unconvert first, or leave the layer out with where="
            )
        return form.forward(self, getattr(self, _SETTINGS), *arguments, **named)

    def extra_repr(self) -> str:
        settings = getattr(self, _SETTINGS)
        return f"k={settings.k}, activation={settings.activation!r}, backend={settings.backend!r}"


@dataclass(frozen=True)
class ExpertsSite(FeedForwardSite):
    """All experts of a layer, which share one k."""

    form: _Form | None = None

    @property
    def _weights(self) -> ExpertWeights:
        assert self.form is not None
        return self.form.weights(self.module)

    @property
    def num_neurons(self) -> int:
        return int(self._weights.w_out.shape[2])

    @property
    def neurons_in_words(self) -> str:
        return f"{self.num_neurons} neurons of each of {self._weights.w_out.shape[0]} experts"

    @property
    def sizes(self) -> tuple[int, int]:
        weights = self._weights
        return weights.size_in, int(weights.w_out.shape[1])

    @property
    def why_no_stand_in(self) -> str | None:
        return "it holds experts, of which each would need its own"

    @property
    def weight_out(self) -> Any:
        assert self.form is not None
        return _part(self.module, self.form.names[0])

    def store_by_neuron(self) -> None:
        assert self.form is not None
        for name in self.form.by_neuron(self.module):
            weight = _part(self.module, name)
            is_frozen = type(weight) is nn.Parameter and not weight.requires_grad
            if is_frozen and not weight.is_meta and not weight.mT.is_contiguous():
                weight.data = weight.data.mT.contiguous().mT

    def store_as_usual(self) -> None:
        assert self.form is not None
        _store_as_usual(self.module, self.form)


def _store_as_usual(module: nn.Module, form: _Form) -> None:
    for name in form.by_neuron(module):
        weight = _part(module, name)
        if type(weight) is nn.Parameter and not weight.is_contiguous():
            weight.data = weight.data.contiguous()


def feed_forward_sites(path: str, module: Any) -> Iterator[FeedForwardSite]:
    is_converted = isinstance(module, TopKExperts)
    name = getattr(module, _SETTINGS).form if is_converted else _form_of(module)
    if name is None:
        return
    form = _FORMS[name]
    found: list[tuple[str, Cut]] = []  # the activation, once the module was examined

    def examine() -> str | None:
        reason = _why_not_computed(module, form)
        if is_converted:
            settings: _Settings = getattr(module, _SETTINGS)
            found.append((settings.activation, settings.cut))
            return reason
        class_name = type(module).__name__
        if (added := added_forward(module)) is not None:
            return f"{class_name} has {added}"
        if getattr(module, "_is_expert_parallel", False):
            return f"{class_name} holds some of the experts, the others are in other processes"
        if reason is not None:
            return reason
        gate = _gate_of(module)
        if isinstance(gate, str):
            return gate
        found.append(gate)
        try:
            is_plain = _is_plain(module, form, _Settings(name, None, "auto", *gate))
        except MemoryError:
            raise
        except Exception as error:  # whatever its code raises: no reason to give up on the other layers
            return failure(class_name, error)
        return None if is_plain else f"{class_name} computes something else than its weights and its activation say"

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        if not found:
            examine()
        setattr(module, _SETTINGS, _Settings(name, k, backend, *found[-1]))
        if not is_converted:
            former_class: Any = type(module)
            module.__class__ = subclass_of(TopKExperts, former_class)

    def restore() -> None:
        if type(module) is not subclass_of(TopKExperts, module.topk_former_class):
            raise ValueError(
                f"{path} must be what convert made of it, got {full_name_of(type(module))}; undo that before "
                "topk_attention.unconvert"
            )
        module.__class__ = module.topk_former_class
        delattr(module, _SETTINGS)
        _store_as_usual(module, form)

    yield ExpertsSite(
        path,
        module,
        (),
        module,
        examine,
        replace,
        restore if is_converted else None,
        None,
        form,
    )


def _form_of(module: Any) -> str | None:
    """The name of the form that holds this module's experts; None for other modules."""
    own = ("down_proj", "gate_up_proj", "up_proj", "gate_proj")
    down, gate_up, up, gate = (getattr(getattr(module, name, None), "ndim", 0) for name in own)
    if gate == 3:
        return None  # Inkling's shared experts, which have gate and up in two and no routing
    if down == 3 and 3 in (gate_up, up):
        takes = [p for p in inspect.signature(own_forward(module)).parameters.values() if p.kind is not p.VAR_KEYWORD]
        return "presorted" if len(takes) == 2 else "stacked"
    inner = getattr(module, "mlp", None)
    if {"w1", "v1", "w2"} == set(getattr(inner, "_parameters", ())) and isinstance(
        getattr(inner, "moe_num_experts", None), int
    ):
        return "split"
    linears = [getattr(module, name, None) for name in ("input_linear", "output_linear")]
    # JetMoE's attention has the same two, without an activation between them.
    if all(getattr(getattr(linear, "weight", None), "ndim", 0) == 3 for linear in linears) and callable(
        getattr(module, "activation", None)
    ):
        return "between routers"
    return None


def _part(module: Any, name: str) -> Any:
    """A parameter or submodule by its name, which may have dots; None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _why_not_computed(module: Any, form: _Form) -> str | None:
    """Why the views of this form are not all that the module computes with; None where they are."""
    reason = next((reason for name in form.names if (reason := _why_not_read(module, name))), None)
    return reason or added_to({name: _part(module, name) for name in form.bypassed})


def _why_not_read(module: Any, name: str) -> str | None:
    """Why a parameter does not say all that is computed with it; None where it does, or where there is none."""
    holder, _, last = name.rpartition(".")
    owner = _part(module, holder) if holder else module
    weight = getattr(owner, last, None)
    if weight is None:
        return None
    if type(weight) not in (nn.Parameter, Tensor):
        return f"{name} is {full_name_of(type(weight))}, no ordinary tensor"
    if weight.dtype not in _DTYPES:
        return f"{name} is of {weight.dtype}, with which a top-k network does not calculate"
    if is_parametrized(owner, last) and not isinstance(owner, TopKExperts):
        return f"{name} has a parametrization"
    return None


def _is_plain(module: Any, form: _Form, settings: _Settings) -> bool:
    """Whether the experts compute what this file computes in their place. A few random tokens decide.

    Drawing them does not change the global random state.
    """
    weight = _part(module, form.names[0])
    if weight.is_meta:
        return True
    unscaled = torch.randn(4, form.weights(module).size_in, generator=torch.Generator().manual_seed(0))
    with evaluating(module), torch.no_grad():
        for scale in SCALES:
            arguments = form.trial(module, (scale * unscaled).to(weight.device, weight.dtype))
            # Not the module's call: the trial is nothing that its hooks should see. Nor its experts_implementation.
            expected = own_forward(module)(module, *arguments)
            if not is_same(form.forward(module, settings, *arguments), expected):
                return False
    return True


def _gate_of(module: Any) -> tuple[str, Cut] | str:
    """The activation and what is cut of the gates, by values; or why there is none with a top-k form."""
    act = next((act for name in _ACTIVATIONS if callable(act := _part(module, name))), None)
    if not getattr(module, "has_gate", True) or not hasattr(module, "_apply_gate"):
        activation = None if act is None else known_activation(act)
        if activation is None:
            return f"its activation, {'none' if act is None else full_name_of(act)}, has no top-k form"
        return activation, Cut()
    limits = [None, *(limit for name in _LIMITS if (limit := getattr(module, name, None)) is not None)]
    widest = max([8.0, *(2 * limit for limit in limits if limit is not None and limit < 1e4)])
    grid = torch.linspace(-widest, widest, 65)
    gates, values = (axis.reshape(-1, 1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    with torch.no_grad():
        # With one neuron it does not matter whether gates and values are interleaved.
        products = module._apply_gate(torch.cat([gates, values], dim=1))
        for activation in ACTIVATIONS:
            for cut in (Cut(limit, offset) for limit in limits for offset in (0.0, 1.0)):
                if products.shape == gates.shape and torch.allclose(
                    products, gated(values, gates, activation, cut), rtol=1e-4, atol=1e-4
                ):
                    return activation, Cut() if cut.limit is not None and cut.limit > 1e30 else cut
    return f"what {type(module).__name__} does between gate and up has no top-k form"


def _stacked_weights(module: Any) -> ExpertWeights:
    gate_up, down = getattr(module, "gate_up_proj", None), module.down_proj
    first = module.up_proj if gate_up is None else gate_up
    b_first = getattr(module, "up_proj_bias" if gate_up is None else "gate_up_proj_bias", None)
    b_out = getattr(module, "down_proj_bias", None)
    if _is_transposed(module):
        first, down = first.mT, down.mT
    first = first[: down.shape[0]] if first.shape[0] != down.shape[0] else first  # LongCat: experts without weights
    if gate_up is None:
        return ExpertWeights(w_in=first, b_in=b_first, w_out=down, b_out=b_out)
    if getattr(module, "is_concatenated", True):
        gate_in = first.unflatten(1, (2, -1))
        b_gate_in = None if b_first is None else b_first.unflatten(1, (2, -1))
    else:
        gate_in = first.unflatten(1, (-1, 2)).transpose(1, 2)
        b_gate_in = None if b_first is None else b_first.unflatten(1, (-1, 2)).transpose(1, 2)
    return ExpertWeights(gate_in=gate_in, b_gate_in=b_gate_in, w_out=down, b_out=b_out)


def _is_transposed(module: Any) -> bool:
    """Whether the weights are [E, inputs, outputs], as in Llama 4 and gpt-oss."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    num_neurons = module.gate_up_proj.shape[2] // 2
    return module.down_proj.shape[1] == num_neurons and module.down_proj.shape[2] == module.gate_up_proj.shape[1]


def _stacked_forward(
    module: Any,
    settings: _Settings,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    router_indices: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    index = router_indices if top_k_index is None else top_k_index
    token_weights = routing_weights if top_k_weights is None else top_k_weights
    assert index is not None
    assert token_weights is not None
    weights = _stacked_weights(module)
    has_norm = getattr(module, "has_post_expert_norm", False)
    return settings.sum_of(
        hidden_states,
        routing_of(index, token_weights, weights.w_out.shape[0]),
        weights,
        finish=module.post_expert_norm if has_norm else None,
        beyond=getattr(module, "identity_expert", None),
    )


def _stacked_trial(module: Any, x: Tensor) -> tuple[Any, ...]:
    return x, *_trial_routing(x, _stacked_weights(module).w_out.shape[0])


def _trial_routing(x: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Each token to the first and the last expert, [T, 2], and their weights; [T, 1] where there is one expert."""
    last = num_experts - 1
    index = torch.tensor([[0, last]] if last else [[0]], device=x.device).expand(x.shape[0], -1)
    weights = torch.tensor([0.75, 0.25], device=x.device, dtype=x.dtype)[: index.shape[1]]
    return index, weights.expand(x.shape[0], -1)


def _stacked_by_neuron(module: Any) -> tuple[str, ...]:
    return ("gate_up_proj",) if _is_transposed(module) else ("down_proj",)


def _presorted_forward(module: Any, settings: _Settings, hidden_states: Tensor) -> Tensor:
    """Every expert is given all tokens (Llama 4), of which those that are not its own are zero, and give zero."""
    weights = _stacked_weights(module)
    num_experts = weights.w_out.shape[0]
    x = hidden_states.reshape(-1, weights.w_out.shape[1])
    routed = x.detach().ne(0).any(1)
    counts = routed.view(num_experts, -1).sum(1).tolist()
    return settings.sum_of(x, Routing(routed.nonzero().squeeze(1), None, counts), weights)


def _presorted_trial(module: Any, x: Tensor) -> tuple[Any, ...]:
    num_experts = module.down_proj.shape[0]
    x = x.repeat(num_experts, 1)
    x[1::4] = 0
    return (x,)


def _split_weights(module: Any) -> ExpertWeights:
    inner = module.mlp
    shape = (inner.moe_num_experts, -1, inner.w1.shape[1])
    w1, v1, w2 = (weight.view(shape) for weight in (inner.w1, inner.v1, inner.w2))
    return ExpertWeights(w_gate=w1, w_in=v1, w_out=w2.mT)


def _split_forward(
    module: Any, settings: _Settings, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    weights = _split_weights(module)
    num_experts, size, _ = weights.w_out.shape
    x = hidden_states.reshape(-1, size)
    output = settings.sum_of(x, routing_of(top_k_index, top_k_weights, num_experts), weights)
    return output.view(hidden_states.shape[0], -1, size)


def _split_trial(module: Any, x: Tensor) -> tuple[Any, ...]:
    return x[None], *_trial_routing(x, module.mlp.moe_num_experts)


def _between_routers_weights(module: Any) -> ExpertWeights:
    first, last = module.input_linear.weight, module.output_linear.weight
    return ExpertWeights(gate_in=first.unflatten(1, (2, -1)), w_out=last)


def _between_routers_forward(module: Any, settings: _Settings, layer_input: Tensor) -> Tensor:
    x = layer_input.flatten(0, 1)
    _, tokens, token_weights, counts, _ = module.router(x)
    output = settings.sum_of(x, Routing(tokens, token_weights, counts), _between_routers_weights(module))
    return output.view(layer_input.shape) + module.bias


def _between_routers_trial(module: Any, x: Tensor) -> tuple[Any, ...]:
    return (x[None],)


_FORMS = {
    "stacked": _Form(
        ("down_proj", "gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"),
        ("act_fn",),
        _stacked_weights,
        _stacked_forward,
        _stacked_trial,
        _stacked_by_neuron,
    ),
    "presorted": _Form(
        ("down_proj", "gate_up_proj"),
        ("act_fn",),
        _stacked_weights,
        _presorted_forward,
        _presorted_trial,
        _stacked_by_neuron,
    ),
    "split": _Form(
        ("mlp.w2", "mlp.w1", "mlp.v1"),
        ("mlp", "mlp.activation_fn"),
        _split_weights,
        _split_forward,
        _split_trial,
        lambda module: (),
    ),
    "between routers": _Form(
        ("output_linear.weight", "input_linear.weight"),
        ("input_linear", "output_linear", "activation"),
        _between_routers_weights,
        _between_routers_forward,
        _between_routers_trial,
        lambda module: ("output_linear.weight",),
    ),
}
