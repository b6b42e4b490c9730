"""`convert` and `unconvert`: plan first, then change the model, all of it or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..backends import choose_backend
from ..functional import Completion
from ..nn.feed_forward import is_frozen
from . import adapters, cached_sums, own_masks, position_bias, torch_layers
from .by_name import (
    configs_around,
    every_config,
    hand_written_attention,
    implementation_of,
    set_by_transformers,
    set_implementations,
)
from .configurations import parts_of
from .plan import (
    AnyCompletion,
    AnyK,
    AnyStandIn,
    Plan,
    Wanted,
    Where,
    completion_beside,
    make_plan,
    prefix_of,
    stand_in_beside,
    wanted_by_config,
)
from .registration import register
from .report import ConversionReport, ReportEntry
from .search import attention_sites, feed_forward_sites
from .settings import (
    ALL,
    CONFIG_ATTRIBUTE,
    NAME,
    LayerSettings,
    ModelSettings,
    completion_to_json,
    set_layer_settings,
)
from .sites import AttentionSite, FeedForwardSite
from .transaction import all_or_nothing, give_own_configuration
from .unknown_layers import unknown_layers
from .wrappers import config_followed_by, unwrapped

# Each transformers model in a converted one remembers the former attention of its configuration and of its parts here.
# `save_pretrained` does not save it.
_FORMER_ATTENTION = "_topk_attention_former_implementation"


def convert(
    model: nn.Module,
    *,
    attention_k: AnyK | None = None,
    feed_forward_k: AnyK | None = None,
    where: Where | None = None,
    backend: str | None = None,
    completion: AnyCompletion | None = None,
    stand_in: AnyStandIn | None = None,
) -> ConversionReport:
    """Change a model in place: each query uses its k best keys, each token its k best feed-forward neurons.

    model           a transformers model whose layers take their attention from transformers' attention interface, or
                    one of MPNet, BLOOM, Falcon, GPT-J, GPT-Neo, DeBERTa v2 and v3 and LayoutLMv3; a SentenceTransformer
                    or PeftModel around one; or any module that holds nn.MultiheadAttention, nn.TransformerEncoderLayer
                    or ...DecoderLayer
    attention_k     keys kept per query: an int, "all", one entry per attention layer (each an int, one int per head as
                    a list, tuple or 1-D tensor, "all", or None to leave it as it is), or a mapping from layer path to
                    such an entry; with None attention stays as it is
    feed_forward_k  neurons kept per token: an int, "all", one such entry per layer, or a mapping from layer path; with
                    None the networks stay as they are
    where           where(path, module) -> bool picks layers, e.g. `is_self_attention`; all by default. A list of k has
                    one entry for each layer that it picks.
    backend         the backend of `topk_attention` and `topk_feed_forward`; by default what a saved model remembers,
                    otherwise "auto"
    completion      what attention adds for the keys that are not kept: a `Completion`, one entry per attention layer
                    (each a Completion, with one scale or one for each query head, or None), or a mapping from layer
                    path; needs attention_k. Scales are taken as numbers. None takes the one of a `Calibration` that is
                    given as attention_k, otherwise it leaves these keys out, as the paper does.
    stand_in        what feed-forward layers add for the neurons that are not kept: the `StandIns` of `fit_stand_ins`, a
                    mapping from layer path, one entry per layer (each a `StandIn` or None), or one for all; needs
                    feed_forward_k, or a model that remembers it. None takes those of `StandIns` that are given as
                    feed_forward_k, otherwise it leaves these neurons out, as the paper does.

    The weights are not copied and keep their names. `save_pretrained` therefore writes an ordinary checkpoint, and its
    configuration remembers every k and completion. After `from_pretrained`, `convert(model)` without any k restores
    them. (A module without a configuration remembers nothing.) Stand-ins have a file of their own: after loading, pass
    them as stand_in. A second call with another k changes it. `unconvert` gives the original model back.

    Attention layers that are not picked run PyTorch's own attention. "all" keeps every key or every neuron: the results
    stay the same, and only memory is saved. Attention saves it where PyTorch's own needs memory quadratic in length
    (dropout, T5's position bias). Networks save it because the backward pass computes the neurons again.

    Returns a report of what was replaced, what was skipped, and why.

    Raises:
        TypeError: the model is of neither kind, or a k, a completion or a stand-in is of the wrong type.
        ValueError: nothing was replaced, a k is out of range, a list or mapping does not fit the model, or there is a
            completion without attention_k or a stand-in without feed_forward_k.

    Whatever is raised, an interruption by Ctrl-C included, the model is as it was. Its configuration becomes one of its
    own: another model that shared the object does not change. Weights that train stay contiguous; if nothing in the
    model requires a gradient, the networks' weights are stored by neuron, which is faster for a few tokens at a time.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(
    ...     hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99
    ... )
    >>> print(convert(BertModel(config), attention_k=16, feed_forward_k=8))
    BertModel: 1 attention layers replaced, 1 feed-forward layers replaced
      encoder.layer.0.attention.self  replaced  k = 16
      encoder.layer.0.intermediate    replaced  k = 8 of 64 neurons
    """
    outer, model = model, unwrapped(model)
    with all_or_nothing(outer), config_followed_by(outer, model):
        return _convert(model, attention_k, feed_forward_k, where, backend, completion, stand_in)


def _convert(
    model: nn.Module,
    attention_k: AnyK | None,
    feed_forward_k: AnyK | None,
    where: Where | None,
    backend: str | None,
    completion: AnyCompletion | None,
    stand_in: AnyStandIn | None,
) -> ConversionReport:
    if completion is not None and attention_k is None:
        raise ValueError(
            "completion is for the keys that attention does not keep, but attention_k is None; pass attention_k= too"
        )
    if completion is None:
        completion = completion_beside(attention_k)
    if stand_in is not None and feed_forward_k is None and attention_k is not None:
        raise ValueError(
            "stand_in is for the neurons that feed-forward layers do not keep, but feed_forward_k is None; pass "
            "feed_forward_k= too"
        )
    if stand_in is None:
        stand_in = stand_in_beside(feed_forward_k)
    config = _config_of(model)
    attention, feed_forward = _attention_sites(model), list(feed_forward_sites(model))
    if backend is not None:
        choose_backend(backend)
    wanted = Wanted(attention_k, feed_forward_k, backend or "auto", backend or "auto", completion, stand_in)
    if attention_k is None and feed_forward_k is None:
        wanted = wanted_by_config(model, config, attention, feed_forward, backend, stand_in)
    plan = make_plan(attention, feed_forward, wanted, where)
    plan = plan.with_unknown(
        unknown_layers(model, [*(site.path for site in attention), *(site.path for site in feed_forward)])
    )
    report = ConversionReport(type(model).__name__, plan.entries, plan.not_found)
    if not report.replaced:
        raise ValueError(f"convert replaced nothing in {_describe(report, model)}")
    give_own_configuration(model)
    config = _config_of(model)
    _apply(model, config, plan, wanted)
    if config is not None:
        _remember(model, _configs(config, attention), plan, wanted)
    _order_in_memory(model, plan)
    return report


def _apply(model: nn.Module, config: Any, plan: Plan, wanted: Wanted) -> None:
    """Change the layers as planned."""
    if any(site.has_adapter and entry.replaced for site, entry in plan.attention):
        adapters.adapt_attention(model, configs_around(model))
    if any(site.takes_function and entry.replaced for site, entry in plan.attention):
        _use_topk_attention(model, plan)
        for _, module in hand_written_attention(model):
            own_masks.give_own_masks(module)
    for site, entry in plan.attention:
        settings = LayerSettings(entry.k, wanted.attention_backend, completion=entry.completion)
        if not site.takes_function:
            torch_layers.use_topk_attention(site.module, settings)
        elif implementation_of(site.module, config) == NAME:
            if site.obstacle is not None:
                settings = replace(settings, left_alone=_former_of(model, site.module))
            set_layer_settings(site.module, settings)
            position_bias.keep_bias_small(site.module)
            if entry.completion is None:
                cached_sums.keep_no_sums(site.module)
            else:
                cached_sums.keep_sums(site.module)
    for feed_forward_site, entry in plan.feed_forward:
        if isinstance(entry.k, int) or entry.k == ALL:
            k = None if entry.k == ALL else entry.k
            feed_forward_site.replace(k, wanted.feed_forward_backend, entry.stand_in)
        elif feed_forward_site.restore is not None:  # an earlier conversion replaced it, this one does not pick it
            feed_forward_site.restore()
    torch_layers.watch_nested_tensors(model)


def _order_in_memory(model: nn.Module, plan: Plan) -> None:
    """Store the weights of top-k networks by neuron if nothing in the model trains, otherwise as usual.

    A network that several layers share (Zamba) stays as usual, because `save_pretrained` looks for shared weights and
    reads only contiguous ones.
    """
    frozen = is_frozen(model)
    sites = [site for site, entry in plan.feed_forward if entry.replaced]
    uses = Counter(id(site.weight_out) for site in sites)
    for site in sites:
        if frozen and uses[id(site.weight_out)] == 1:
            site.store_by_neuron()
        else:
            site.store_as_usual()


def _remember(model: nn.Module, configs: Sequence[Any], plan: Plan, wanted: Wanted) -> None:
    """Write every k into the configurations, the model's own first. `save_pretrained` saves them with the model."""
    prefix = prefix_of(model)
    remembered = ModelSettings.from_config(configs[0]) or ModelSettings({}, {})
    if wanted.attention_k is not None:
        different_k = {entry.k for _, entry in plan.attention}
        remembered = replace(
            remembered,
            attention_k=_by_name(plan.attention, prefix, lambda entry: entry.k),
            attention_backend=wanted.attention_backend,
            every_attention_k=different_k.pop() if len(different_k) == 1 else None,
            completion=_by_name(plan.attention, prefix, lambda entry: entry.completion),
            every_completion=_the_same([entry.completion for _, entry in plan.attention]),
        )
    if wanted.feed_forward_k is not None:
        remembered = replace(
            remembered,
            feed_forward_k=_by_name(plan.feed_forward, prefix, lambda entry: entry.k),
            feed_forward_backend=wanted.feed_forward_backend,
            stand_in_rank=_by_name(plan.feed_forward, prefix, lambda entry: entry.stand_in and entry.stand_in.rank),
        )
    for config in configs:
        setattr(config, CONFIG_ATTRIBUTE, remembered.to_json())


def _the_same(completions: Sequence[Completion | None]) -> Completion | None:
    """The completion that all of them are; None where they differ or are none."""
    first = completions[0] if completions else None
    if first is None or any(one is None or completion_to_json(one) != completion_to_json(first) for one in completions):
        return None
    return first


def unconvert(model: Any) -> None:
    """Give the original model back: its own attention, its own feed-forward layers, the same weights.

    Raises:
        ValueError: the model was not converted, or was restored already.
    """
    outer, model = model, unwrapped(model)
    with all_or_nothing(outer), config_followed_by(outer, model):
        _unconvert(model)


def _unconvert(model: Any) -> None:
    config = _config_of(model)
    attention, feed_forward = _attention_sites(model), list(feed_forward_sites(model))
    if not hasattr(config, CONFIG_ATTRIBUTE) and not any(map(torch_layers.is_converted, model.modules())):
        raise ValueError(f"{type(model).__name__} was not converted, or was restored already")
    give_own_configuration(model)
    config = _config_of(model)
    for site in attention:
        if site.takes_function:
            set_layer_settings(site.module, None)
            position_bias.give_bias_back(site.module)
            cached_sums.keep_no_sums(site.module)
        elif torch_layers.is_converted(site.module):
            torch_layers.restore_attention(site.module)
    for feed_forward_site in feed_forward:
        if feed_forward_site.restore is not None:
            feed_forward_site.restore()
    torch_layers.watch_nested_tensors(model)
    if config is None:
        return
    _give_attention_back(model)
    for module in model.modules():
        own_masks.give_no_own_masks(module)
    adapters.give_attention_back(model)
    for part in _configs(config, attention):
        if hasattr(part, CONFIG_ATTRIBUTE):
            delattr(part, CONFIG_ATTRIBUTE)


def _attention_sites(model: Any) -> list[AttentionSite]:
    sites = list(attention_sites(model))
    if hasattr(model, "set_attn_implementation"):
        return sites
    obstacle = "it belongs to a transformers model inside this one: convert that"
    return [replace(site, obstacle=obstacle) if site.takes_function else site for site in sites]


def _config_of(model: nn.Module) -> Any:
    """The configuration of a transformers model; None for another module that holds PyTorch's own layers."""
    if isinstance(model, nn.Module) and hasattr(model, "set_attn_implementation"):
        return model.config
    if isinstance(model, nn.Module) and any(torch_layers.is_torch_layer(module) for module in model.modules()):
        return None
    raise TypeError(
        "model must be a transformers model (a PreTrainedModel) or hold PyTorch's nn.MultiheadAttention or "
        f"nn.TransformerEncoderLayer, got {type(model).__name__}; for your own modules use topk_attention.nn"
    )


def _use_topk_attention(model: Any, plan: Plan) -> None:
    """Set the name in the model's configurations, but not in those of which no layer is converted while some layer
    cannot be: such a part keeps its own attention and its own masks."""
    register()
    converted = {
        id(_config_around(site.module, model))
        for site, entry in plan.attention
        if entry.replaced and site.takes_function
    }
    obstructed = [site.path for site, _ in plan.attention if site.obstacle is not None]
    around = dict(configs_around(model))
    alone = [around[path] for path in (*obstructed, *(path for path, _ in hand_written_attention(model)))]
    alone = [config for config in alone if id(config) not in converted]
    before = [(config, config._attn_implementation) for config in every_config(model)]
    if any(site.reads_interface for site, _ in plan.attention):
        set_by_transformers(model, NAME)
    adapted = {
        id(_config_around(site.module, model)) for site, entry in plan.attention if site.has_adapter and entry.replaced
    }
    set_implementations([(config, NAME) for config, _ in before if id(config) in adapted])
    if not converted <= {id(config) for config in every_config(model) if config._attn_implementation == NAME}:
        set_implementations(before)
        raise ValueError(f"{type(model).__name__} does not take its attention from transformers' attention interface")
    set_implementations([(config, former) for config, former in before if any(config is part for part in alone)])
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and not hasattr(module, _FORMER_ATTENTION):
            # Loaded with attn_implementation="topk" it has no former one; "sdpa" is the default.
            formers = {id(config): "sdpa" if former == NAME else former for config, former in before}
            setattr(module, _FORMER_ATTENTION, [formers[id(config)] for config in parts_of(module.config)])


def _give_attention_back(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, _FORMER_ATTENTION):
            set_implementations(list(zip(parts_of(module.config), getattr(module, _FORMER_ATTENTION), strict=True)))
            delattr(module, _FORMER_ATTENTION)


def _former_of(model: Any, module: nn.Module) -> str:
    """The implementation that a layer's configuration named before the conversion."""
    wanted = _config_around(module, model)
    for holder in model.modules():
        for part, former in zip(
            parts_of(getattr(holder, "config", None)), getattr(holder, _FORMER_ATTENTION, ()), strict=False
        ):
            if part is wanted:
                return str(former)
    return "sdpa"


def _config_around(module: nn.Module, model: Any) -> Any:
    return getattr(module, "config", None) or model.config


def _configs(config: Any, sites: Sequence[AttentionSite]) -> list[Any]:
    """The model's configuration first, then those of its parts: a layer can read only that of its own part."""
    parts = [part for site in sites if (part := getattr(site.module, "config", None)) is not None]
    return list({id(part): part for part in (config, *parts)}.values())


def _by_name(
    plan: Sequence[tuple[AttentionSite | FeedForwardSite, ReportEntry]], prefix: str, of: Callable[[ReportEntry], Any]
) -> dict[str, Any]:
    """What a configuration holds of each layer that has it, by the layer's path without the base model's prefix."""
    return {entry.path.removeprefix(f"{prefix}."): held for _, entry in plan if (held := of(entry)) is not None}


def _describe(report: ConversionReport, model: nn.Module) -> str:
    if report.entries:
        return str(report)
    return f"{type(model).__name__}: no layer of a kind that this version knows"
