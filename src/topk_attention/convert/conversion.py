"""`convert` and `unconvert`: plan first, then change the model, so that an error leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..backends import choose_backend
from ..functional.checks import as_k
from . import position_bias, torch_layers
from .registration import register
from .report import ConversionReport, ReportEntry
from .search import attention_sites, feed_forward_sites
from .settings import ALL, CONFIG_ATTRIBUTE, NAME, K, LayerSettings, ModelSettings, set_layer_settings
from .sites import AttentionSite, FeedForwardSite
from .wrappers import unwrapped

Where = Callable[[str, nn.Module], bool]
EntryK = K | Sequence[int] | Tensor | None
AnyK = K | Sequence[EntryK] | Tensor | Mapping[str, EntryK]

# A converted model remembers its former attention in this attribute. `save_pretrained` does not save it.
_FORMER_ATTENTION = "_topk_attention_former_implementation"


def convert(
    model: nn.Module,
    *,
    attention_k: AnyK | None = None,
    feed_forward_k: AnyK | None = None,
    where: Where | None = None,
    backend: str | None = None,
) -> ConversionReport:
    """Change a model in place: each query uses its k best keys, each token its k best feed-forward neurons.

    model           a transformers model whose layers take their attention from transformers' attention interface, a
                    SentenceTransformer or PeftModel around one, or any module that holds nn.MultiheadAttention,
                    nn.TransformerEncoderLayer or ...DecoderLayer
    attention_k     keys kept per query: an int, "all", one entry per attention layer (each an int, one int per head as
                    a list, tuple or 1-D tensor, "all", or None to leave it as it is), or a mapping from layer path to
                    such an entry; with None attention stays as it is
    feed_forward_k  neurons kept per token: an int, "all", one such entry per layer, or a mapping from layer path; with
                    None the networks stay as they are
    where           where(path, module) -> bool picks layers, e.g. `is_self_attention`; all by default. A list of k has
                    one entry for each layer that it picks.
    backend         the backend of `topk_attention` and `topk_feed_forward`; by default what a saved model remembers,
                    otherwise "auto"

    The weights are not copied and keep their names. `save_pretrained` therefore writes an ordinary checkpoint, and its
    configuration remembers every k. After `from_pretrained`, `convert(model)` without any k restores them. (A module
    without a configuration remembers nothing.) A second call with another k changes it. `unconvert` gives the original
    model back.

    Attention layers that are not picked run PyTorch's own attention. "all" keeps every key or every neuron: the results
    stay the same, and only memory is saved. Attention saves it where PyTorch's own needs memory quadratic in length
    (dropout, T5's position bias). Networks save it because the backward pass computes the neurons again.

    Returns a report of what was replaced, what was skipped, and why.

    Raises:
        TypeError: the model is of neither kind, or a k is of the wrong type.
        ValueError: nothing was replaced, a k is out of range, or a list or mapping does not fit the model. After an
            error the model is unchanged.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(
    ...     hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99
    ... )
    >>> print(convert(BertModel(config), attention_k=16, feed_forward_k=8))
    BertModel: 1 attention layers replaced, 1 feed-forward layers replaced
      encoder.layer.0.attention.self  replaced  k = 16
      encoder.layer.0.intermediate    replaced  k = 8 of 64 neurons
    """
    model = unwrapped(model)
    config = _config_of(model)
    attention, feed_forward = _attention_sites(model), list(feed_forward_sites(model))
    if backend is not None:
        choose_backend(backend)
    wanted = _Wanted(attention_k, feed_forward_k, backend or "auto", backend or "auto")
    if attention_k is None and feed_forward_k is None:
        wanted = _wanted_by_config(model, config, attention, feed_forward, backend)
    plan = _plan(attention, feed_forward, wanted, where)
    report = ConversionReport(type(model).__name__, plan.entries, plan.not_found)
    if not report.replaced:
        raise ValueError(f"convert replaced nothing in {_describe(report, model)}")
    _apply(model, config, plan, wanted)
    if config is not None:
        _remember(model, _configs(config, attention), plan, wanted)
    return report


@dataclass(frozen=True)
class _Wanted:
    """The k of both kinds of layer, None where the layers of a kind stay as they are, and their backends."""

    attention_k: AnyK | None
    feed_forward_k: AnyK | None
    attention_backend: str
    feed_forward_backend: str


@dataclass(frozen=True)
class _Plan:
    """What will happen at each site. A kind of layer that stays as it is has no entries."""

    attention: list[tuple[AttentionSite, ReportEntry]]
    feed_forward: list[tuple[FeedForwardSite, ReportEntry]]
    not_found: tuple[str, ...]  # kinds of layer that a k is given for and of which the model has none

    @property
    def entries(self) -> tuple[ReportEntry, ...]:
        return tuple(entry for _, entry in [*self.attention, *self.feed_forward])


def _wanted_by_config(
    model: nn.Module,
    config: Any,
    attention: Sequence[AttentionSite],
    feed_forward: Sequence[FeedForwardSite],
    backend: str | None,
) -> _Wanted:
    """What a saved model remembers of its conversion."""
    stored = ModelSettings.from_config(config)
    if stored is None:
        raise ValueError(
            "nothing to convert: pass attention_k= or feed_forward_k= (the model's configuration holds neither)"
        )
    prefix = _prefix_of(model)
    return _Wanted(
        _with_prefix(stored.attention_k, [site.path for site in attention], prefix) or None,
        _with_prefix(stored.feed_forward_k, [site.path for site in feed_forward], prefix) or None,
        backend or stored.attention_backend,
        backend or stored.feed_forward_backend,
    )


def _plan(
    attention: Sequence[AttentionSite],
    feed_forward: Sequence[FeedForwardSite],
    wanted: _Wanted,
    where: Where | None,
) -> _Plan:
    """Decide for each site, and raise where a k does not fit, before anything changes."""
    attention_plan: list[tuple[AttentionSite, ReportEntry]] = []
    feed_forward_plan: list[tuple[FeedForwardSite, ReportEntry]] = []
    not_found = []
    if wanted.attention_k is not None:
        attention_plan = _plan_attention(attention, wanted.attention_k, where)
        not_found += [] if attention_plan else ["attention"]
    if wanted.feed_forward_k is not None:
        feed_forward_plan = _plan_feed_forward(feed_forward, wanted.feed_forward_k, where)
        not_found += [] if feed_forward_plan else ["feed-forward"]
    return _Plan(attention_plan, feed_forward_plan, tuple(not_found))


def _apply(model: nn.Module, config: Any, plan: _Plan, wanted: _Wanted) -> None:
    """Change the layers as planned."""
    if any(site.reads_interface and entry.replaced for site, entry in plan.attention):
        _use_topk_attention(model)
    for site, entry in plan.attention:
        settings = LayerSettings(entry.k, wanted.attention_backend)
        if not site.reads_interface:
            torch_layers.use_topk_attention(site.module, settings)
        elif config is not None and config._attn_implementation == NAME:
            set_layer_settings(site.module, settings)
            position_bias.keep_bias_small(site.module)
    for feed_forward_site, entry in plan.feed_forward:
        if isinstance(entry.k, int) or entry.k == ALL:
            feed_forward_site.replace(None if entry.k == ALL else entry.k, wanted.feed_forward_backend)
        elif feed_forward_site.restore is not None:  # an earlier conversion replaced it, this one does not pick it
            feed_forward_site.restore()
    torch_layers.watch_nested_tensors(model)


def _remember(model: nn.Module, configs: Sequence[Any], plan: _Plan, wanted: _Wanted) -> None:
    """Write every k into the configurations, the model's own first. `save_pretrained` saves them with the model."""
    prefix = _prefix_of(model)
    remembered = ModelSettings.from_config(configs[0]) or ModelSettings({}, {})
    if wanted.attention_k is not None:
        different_k = {entry.k for _, entry in plan.attention}
        remembered = replace(
            remembered,
            attention_k=_k_by_path(plan.attention, prefix),
            attention_backend=wanted.attention_backend,
            every_attention_k=different_k.pop() if len(different_k) == 1 else None,
        )
    if wanted.feed_forward_k is not None:
        remembered = replace(
            remembered,
            feed_forward_k=_k_by_path(plan.feed_forward, prefix),
            feed_forward_backend=wanted.feed_forward_backend,
        )
    for config in configs:
        setattr(config, CONFIG_ATTRIBUTE, remembered.to_json())


def unconvert(model: Any) -> None:
    """Give the original model back: its own attention, its own feed-forward layers, the same weights.

    Raises:
        ValueError: the model was not converted, or was restored already.
    """
    model = unwrapped(model)
    config = _config_of(model)
    attention, feed_forward = _attention_sites(model), list(feed_forward_sites(model))
    if not hasattr(config, CONFIG_ATTRIBUTE) and not any(map(torch_layers.is_converted, model.modules())):
        raise ValueError(f"{type(model).__name__} was not converted, or was restored already")
    for site in attention:
        if site.reads_interface:
            set_layer_settings(site.module, None)
            position_bias.give_bias_back(site.module)
        elif torch_layers.is_converted(site.module):
            torch_layers.restore_attention(site.module)
    for feed_forward_site in feed_forward:
        if feed_forward_site.restore is not None:
            feed_forward_site.restore()
    torch_layers.watch_nested_tensors(model)
    if config is None:
        return
    if hasattr(model, _FORMER_ATTENTION):
        model.set_attn_implementation(getattr(model, _FORMER_ATTENTION))
        delattr(model, _FORMER_ATTENTION)
    for part in _configs(config, attention):
        if hasattr(part, CONFIG_ATTRIBUTE):
            delattr(part, CONFIG_ATTRIBUTE)


def _attention_sites(model: Any) -> list[AttentionSite]:
    sites = list(attention_sites(model))
    if hasattr(model, "set_attn_implementation"):
        return sites
    obstacle = "it belongs to a transformers model inside this one: convert that"
    return [replace(site, obstacle=obstacle) if site.reads_interface else site for site in sites]


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


def _plan_attention(
    sites: Sequence[AttentionSite], k: AnyK, where: Where | None
) -> list[tuple[AttentionSite, ReportEntry]]:
    chosen = [site for site in sites if site.obstacle is None and (where is None or where(site.path, site.module))]
    per_path = _k_per_path("attention_k", k, [site.path for site in chosen], _obstacles(sites))
    plan = []
    for site in sites:
        layer_k = per_path.get(site.path)
        if site.obstacle is not None:
            reason = site.obstacle
        elif layer_k is None:
            reason = "attention_k has no entry for it" if site in chosen else "not picked by where="
        else:
            if isinstance(layer_k, tuple) and site.num_heads is not None and len(layer_k) != site.num_heads:
                raise ValueError(
                    f"attention_k for {site.path} must hold one int for each of its {site.num_heads} heads, "
                    f"got {len(layer_k)}"
                )
            reason = f"k per head = {list(layer_k)}" if isinstance(layer_k, tuple) else f"k = {layer_k}"
            if position_bias.builds_bias_in_full(site.module):
                reason += "; its code builds the position bias in full, [1, heads, queries, keys]"
        plan.append((site, ReportEntry(site.path, "attention", layer_k, reason)))
    return plan


def _plan_feed_forward(
    sites: Sequence[FeedForwardSite], k: AnyK, where: Where | None
) -> list[tuple[FeedForwardSite, ReportEntry]]:
    chosen = [site for site in sites if site.obstacle is None and (where is None or where(site.path, site.module))]
    per_path = _k_per_path("feed_forward_k", k, [site.path for site in chosen], _obstacles(sites))
    plan = []
    for site in sites:
        layer_k = per_path.get(site.path)
        if isinstance(layer_k, tuple):
            raise TypeError(f"feed_forward_k for {site.path} must be an int, got {list(layer_k)}")
        if layer_k is not None:
            reason = f"k = {layer_k} of {site.num_neurons} neurons"
        elif site.obstacle is not None:
            reason = site.obstacle
        else:
            reason = "feed_forward_k has no entry for it" if site in chosen else "not picked by where="
        plan.append((site, ReportEntry(site.path, "feed_forward", layer_k, reason)))
    return plan


def _obstacles(sites: Sequence[AttentionSite | FeedForwardSite]) -> dict[str, str]:
    return {site.path: site.obstacle for site in sites if site.obstacle is not None}


def _k_per_path(name: str, k: AnyK, paths: Sequence[str], obstacles: Mapping[str, str]) -> dict[str, K]:
    """The k of each of the paths. `obstacles` says of other paths why their layers cannot be replaced."""
    entries: dict[str, Any]
    if isinstance(k, Mapping):
        unknown = sorted(set(k) - set(paths))
        if reason := next((obstacles[path] for path in unknown if path in obstacles), None):
            raise ValueError(f"{name} names layers that cannot be replaced ({reason}): {', '.join(unknown)}")
        if unknown:
            raise ValueError(f"{name} names layers that do not exist or are not picked: {', '.join(unknown)}")
        entries = dict(k)
    elif isinstance(k, list | tuple | Tensor) and not _is_one_number(k):
        if len(k) != len(paths):
            raise ValueError(f"{name} must hold one entry for each of the {len(paths)} layers picked, got {len(k)}")
        entries = dict(zip(paths, k, strict=True))
    else:
        _as_k(name, k)  # also where there is no layer
        entries = dict.fromkeys(paths, k)
    return {path: _as_k(name, entry) for path, entry in entries.items() if entry is not None}


def _is_one_number(k: object) -> bool:
    return isinstance(k, Tensor) and k.ndim == 0


def _as_k(name: str, entry: Any) -> K:
    k = as_k(name, entry)
    return ALL if k is None else k


def _with_prefix(stored: Mapping[str, K], paths: Sequence[str], prefix: str) -> dict[str, K]:
    """Stored k by the model's own paths. A checkpoint loads with or without a head, so it is stored without the prefix
    of the base model."""
    by_name = {path.removeprefix(f"{prefix}."): path for path in paths}
    # A checkpoint also loads in part, for example without its decoder. Every part that the model has must be complete.
    parts = {name.split(".")[0] for name in by_name}
    wanted = {name: k for name, k in stored.items() if name.split(".")[0] in parts}
    if unknown := sorted(set(wanted or stored) - set(by_name)):
        raise ValueError(f"the model's configuration names layers that do not exist: {', '.join(unknown)}")
    return {by_name[name]: k for name, k in wanted.items()}


def _use_topk_attention(model: Any) -> None:
    register()
    former = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} does not take its attention from transformers' attention interface")
    if former != NAME:
        setattr(model, _FORMER_ATTENTION, former)
    elif not hasattr(model, _FORMER_ATTENTION):
        setattr(model, _FORMER_ATTENTION, "sdpa")  # loaded with attn_implementation="topk"; "sdpa" is the default


def _configs(config: Any, sites: Sequence[AttentionSite]) -> list[Any]:
    """The model's configuration first, then those of its parts: a layer can read only that of its own part."""
    parts = [part for site in sites if (part := getattr(site.module, "config", None)) is not None]
    return list({id(part): part for part in (config, *parts)}.values())


def _prefix_of(model: nn.Module) -> str:
    """The name under which a model with a head holds its base model."""
    return getattr(model, "base_model_prefix", "")


def _k_by_path(plan: Sequence[tuple[AttentionSite | FeedForwardSite, ReportEntry]], prefix: str) -> dict[str, Any]:
    return {entry.path.removeprefix(f"{prefix}."): entry.k for _, entry in plan if entry.replaced}


def _describe(report: ConversionReport, model: nn.Module) -> str:
    if report.entries:
        return str(report)
    return f"{type(model).__name__}: no layer of a kind that this version knows"
