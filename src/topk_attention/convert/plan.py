"""The plan of a conversion: which k each layer gets, and why the others get none. It changes nothing in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..functional import Completion, StandIn
from ..functional.checks import as_k
from ..functional.completion import check_completion
from ..functional.stand_in import check_stand_in
from . import position_bias
from .report import ReportEntry
from .settings import ALL, K, ModelSettings
from .sites import AttentionSite, FeedForwardSite

Where = Callable[[str, nn.Module], bool]
EntryK = K | Sequence[int] | Tensor | None
AnyK = K | Sequence[EntryK] | Tensor | Mapping[str, EntryK]
AnyCompletion = Completion | Sequence[Completion | None] | Mapping[str, Completion | None]
_Stored = TypeVar("_Stored")


class HoldsStandIns(Protocol):
    """What `StandIns` are here: stand-ins by layer path, beside the k that each was fitted for."""

    @property
    def stand_in(self) -> Mapping[str, StandIn]: ...


AnyStandIn = StandIn | Sequence[StandIn | None] | Mapping[str, StandIn | None] | HoldsStandIns


@dataclass(frozen=True)
class Wanted:
    """The k of both kinds of layer, None where the layers of a kind stay as they are, their backends, and what the
    layers add for the keys and the neurons that are not kept."""

    attention_k: AnyK | None
    feed_forward_k: AnyK | None
    attention_backend: str
    feed_forward_backend: str
    completion: AnyCompletion | None = None
    stand_in: AnyStandIn | None = None


@dataclass(frozen=True)
class Plan:
    """What will happen at each site. A kind of layer that stays as it is has no entries."""

    attention: list[tuple[AttentionSite, ReportEntry]]
    feed_forward: list[tuple[FeedForwardSite, ReportEntry]]
    not_found: tuple[str, ...]  # kinds of layer that a k is given for and of which the model has none

    unknown: tuple[ReportEntry, ...] = ()  # layers that hold attention or a network in a form that nothing here knows

    @property
    def entries(self) -> tuple[ReportEntry, ...]:
        return (*(entry for _, entry in [*self.attention, *self.feed_forward]), *self.unknown)

    def with_unknown(self, entries: Sequence[ReportEntry]) -> Plan:
        """The plan with those of these layers whose kind was asked for."""
        kinds = {
            "attention" if isinstance(site, AttentionSite) else "feed_forward"
            for site, _ in (*self.attention, *self.feed_forward)
        }
        kinds |= {kind.replace("-", "_") for kind in self.not_found}
        listed = tuple(entry for entry in entries if entry.kind in kinds)
        named = {entry.kind.replace("_", "-") for entry in listed}
        return replace(self, unknown=listed, not_found=tuple(kind for kind in self.not_found if kind not in named))


def wanted_by_config(
    model: nn.Module,
    config: Any,
    attention: Sequence[AttentionSite],
    feed_forward: Sequence[FeedForwardSite],
    backend: str | None,
    stand_in: AnyStandIn | None,
) -> Wanted:
    """What a saved model remembers of its conversion, with the stand-ins that are given or in force."""
    stored = ModelSettings.from_config(config)
    if stored is None:
        raise ValueError(
            "nothing to convert: pass attention_k= or feed_forward_k= (the model's configuration holds neither)"
            + (
                "; stand_in= adds to layers that have a feed_forward_k and gives them none"
                if stand_in is not None
                else ""
            )
        )
    prefix = prefix_of(model)
    attention_paths, feed_forward_paths = [site.path for site in attention], [site.path for site in feed_forward]
    remembered = _with_prefix(stored.stand_in_rank, feed_forward_paths, prefix)
    if stand_in is None and remembered:
        in_force = {site.path: site.stand_in for site in feed_forward}
        if lost := [path for path in remembered if in_force[path] is None]:
            raise ValueError(
                f"{_some(lost)} had stand-ins for neurons that are not kept, and a checkpoint does not hold them; "
                "pass stand_in=StandIns.load(file) with the file that StandIns.save wrote, or feed_forward_k= to "
                "convert without them"
            )
        stand_in = {path: in_force[path] for path in remembered}
    return Wanted(
        _with_prefix(stored.attention_k, attention_paths, prefix) or None,
        _with_prefix(stored.feed_forward_k, feed_forward_paths, prefix) or None,
        backend or stored.attention_backend,
        backend or stored.feed_forward_backend,
        _with_prefix(stored.completion, attention_paths, prefix) or None,
        stand_in,
    )


def make_plan(
    attention: Sequence[AttentionSite],
    feed_forward: Sequence[FeedForwardSite],
    wanted: Wanted,
    where: Where | None,
) -> Plan:
    """Decide for each site, and raise where a k does not fit, before anything changes."""
    attention_plan: list[tuple[AttentionSite, ReportEntry]] = []
    feed_forward_plan: list[tuple[FeedForwardSite, ReportEntry]] = []
    not_found = []
    if wanted.attention_k is not None:
        attention_plan = _plan_attention(attention, wanted.attention_k, wanted.completion, where)
        not_found += [] if attention_plan else ["attention"]
    if wanted.feed_forward_k is not None:
        feed_forward_plan = _plan_feed_forward(feed_forward, wanted.feed_forward_k, wanted.stand_in, where)
        not_found += [] if feed_forward_plan else ["feed-forward"]
    return Plan(attention_plan, feed_forward_plan, tuple(not_found))


def _plan_attention(
    sites: Sequence[AttentionSite], k: AnyK, completion: AnyCompletion | None, where: Where | None
) -> list[tuple[AttentionSite, ReportEntry]]:
    chosen = [site for site in sites if site.obstacle is None and (where is None or where(site.path, site.module))]
    paths = [site.path for site in chosen]
    per_path = _k_per_path("attention_k", k, paths, _obstacles(sites))
    completions = _completion_per_path(completion, paths, _obstacles(sites))
    plan = []
    for site in sites:
        layer_k, layer_completion = per_path.get(site.path), completions.get(site.path)
        if layer_completion is not None:
            check_completion(f"completion for {site.path}", layer_completion, site.num_heads)
        if site.obstacle is not None:
            reason = site.obstacle
        elif layer_k is None:
            reason = "attention_k has no entry for it" if site in chosen else "not picked by where="
            if layer_completion is not None and not isinstance(completion, Completion):
                reason += ", so its completion does nothing"
        else:
            if isinstance(layer_k, tuple) and site.num_heads is not None and len(layer_k) != site.num_heads:
                raise ValueError(
                    f"attention_k for {site.path} must hold one int for each of its {site.num_heads} heads, "
                    f"got {len(layer_k)}"
                )
            reason = f"k per head = {list(layer_k)}" if isinstance(layer_k, tuple) else f"k = {layer_k}"
            if layer_completion is not None:
                if site.soft_cap is not None and layer_k != ALL:
                    raise ValueError(
                        f"completion for {site.path} is not possible: its scores have a soft cap, and the mean of "
                        "capped scores is not a sum over keys; leave completion out"
                    )
                reason += (
                    ", so completion has nothing to add" if layer_k == ALL else f", completed ({layer_completion})"
                )
            if site.reads_interface and position_bias.builds_bias_in_full(site.module):
                reason += "; its code builds the position bias in full, [1, heads, queries, keys]"
        completes = layer_k is not None and layer_k != ALL
        entry = ReportEntry(site.path, "attention", layer_k, reason, layer_completion if completes else None)
        plan.append((site, entry))
    return plan


def _plan_feed_forward(
    sites: Sequence[FeedForwardSite], k: AnyK, stand_in: AnyStandIn | None, where: Where | None
) -> list[tuple[FeedForwardSite, ReportEntry]]:
    chosen = [site for site in sites if site.obstacle is None and (where is None or where(site.path, site.module))]
    paths = [site.path for site in chosen]
    per_path = _k_per_path("feed_forward_k", k, paths, _obstacles(sites))
    stand_ins = _stand_in_per_path(stand_in, paths, _obstacles(sites))
    plan = []
    for site in sites:
        layer_k, layer_stand_in = per_path.get(site.path), stand_ins.get(site.path)
        if isinstance(layer_k, tuple):
            raise TypeError(f"feed_forward_k for {site.path} must be an int, got {list(layer_k)}")
        if layer_k is not None:
            reason = f"k = {layer_k} of {site.neurons_in_words}"
            if layer_stand_in is not None:
                _check_stand_in_at(site, layer_k, layer_stand_in, stand_in)
                if layer_k == ALL or layer_k >= site.num_neurons:
                    reason, layer_stand_in = f"{reason}, so the stand-in has nothing to add", None
                else:
                    reason += f", stand-in for the others ({layer_stand_in})"
        elif site.obstacle is not None:
            reason = site.obstacle
        else:
            reason = "feed_forward_k has no entry for it" if site in chosen else "not picked by where="
            if layer_stand_in is not None:
                reason += ", so its stand-in does nothing"
        layer_stand_in = None if layer_k is None else layer_stand_in
        plan.append((site, ReportEntry(site.path, "feed_forward", layer_k, reason, stand_in=layer_stand_in)))
    return plan


def _obstacles(sites: Sequence[AttentionSite | FeedForwardSite]) -> dict[str, str]:
    return {site.path: site.obstacle for site in sites if site.obstacle is not None}


def _k_per_path(name: str, k: AnyK, paths: Sequence[str], obstacles: Mapping[str, str]) -> dict[str, K]:
    """The k of each of the paths. `obstacles` says of other paths why their layers cannot be replaced."""
    entries = _entries(name, k, paths, obstacles)
    if entries is None:
        _as_k(name, k)  # also where there is no layer
        entries = dict.fromkeys(paths, k)
    return {path: _as_k(name, entry) for path, entry in entries.items() if entry is not None}


def completion_beside(k: object) -> Mapping[str, Completion] | None:
    """The completion, by layer path, that comes with a k: a `Calibration` was made for both."""
    beside = getattr(k, "completion", None)
    return beside if isinstance(beside, Mapping) and beside else None


def _completion_per_path(
    completion: AnyCompletion | None, paths: Sequence[str], obstacles: Mapping[str, str]
) -> dict[str, Completion]:
    """The completion of each of the paths, with numbers for scales: a configuration and other devices take them."""
    if completion is None:
        return {}
    entries = _added_per_path("completion", completion, Completion, "attention", paths, obstacles)
    return {path: _with_numbers(path, entry) for path, entry in entries.items()}


def _with_numbers(path: str, completion: Completion) -> Completion:
    check_completion(f"completion for {path}", completion, None)
    scale = completion.mass_scale
    if not isinstance(scale, Tensor):
        return completion
    if scale.requires_grad:
        raise ValueError(
            f"completion for {path} has a mass_scale that requires a gradient, which a converted layer does not give "
            "it; detach it, or train it in topk_attention.TopKAttention"
        )
    return replace(completion, mass_scale=scale.tolist())


def stand_in_beside(k: object) -> Mapping[str, StandIn] | None:
    """The stand-ins, by layer path, that come with a k: `StandIns` were fitted for both."""
    beside = getattr(k, "stand_in", None)
    return beside if isinstance(beside, Mapping) and beside else None


def _stand_in_per_path(
    stand_in: AnyStandIn | None, paths: Sequence[str], obstacles: Mapping[str, str]
) -> dict[str, StandIn]:
    if stand_in is None:
        return {}
    wanted = stand_in_beside(stand_in) or stand_in
    return _added_per_path("stand_in", wanted, StandIn, "feed-forward", paths, obstacles)


def _check_stand_in_at(site: FeedForwardSite, k: K, stand_in: StandIn, given: AnyStandIn | None) -> None:
    """Raise unless the stand-in fits the network at this site, and its k if it was fitted for one."""
    if (reason := site.why_no_stand_in) is not None:
        raise ValueError(f"stand_in for {site.path} must be None, as {reason}; give the others theirs by path")
    check_stand_in(f"stand_in for {site.path}", stand_in, *site.sizes)
    if any(tensor.requires_grad for tensor in stand_in.tensors().values()):
        raise ValueError(
            f"stand_in for {site.path} has tensors that require a gradient, which a converted layer does not give "
            "them; detach them, or train them in topk_attention.TopKFeedForward"
        )
    if stand_in.bias.is_meta:
        raise ValueError(f"stand_in for {site.path} must hold numbers, got tensors on meta; load it first")
    if site.weight_out.is_meta:
        raise ValueError(f"stand_in for {site.path} needs a network with weights, got one on meta; load it first")
    dtype = site.weight_out.dtype
    if too_large := [
        name for name, tensor in stand_in.to(dtype).tensors().items() if not bool(tensor.isfinite().all())
    ]:
        raise ValueError(
            f"stand_in for {site.path} must fit the network's {dtype}, got numbers in {' and '.join(too_large)} that "
            "are infinite there; load the model in bfloat16 or float32"
        )
    fitted_k = given.get(site.path) if stand_in_beside(given) is not None and isinstance(given, Mapping) else None
    if fitted_k is not None and fitted_k != k:
        raise ValueError(
            f"stand_in for {site.path} was fitted for k = {fitted_k}, got feed_forward_k = {k}; fit it again for this "
            "k with topk_attention.fit_stand_ins"
        )


def _some(paths: Sequence[str]) -> str:
    """Some of these paths, for a message."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more layers"


def _added_per_path(
    name: str, wanted: Any, kind: type[Any], layers: str, paths: Sequence[str], obstacles: Mapping[str, str]
) -> dict[str, Any]:
    """What these layers add, by path, of those that add something. One thing for all of them must be of the kind; the
    entries of a list or mapping are looked at with the layer that they are for."""
    entries = _entries(name, wanted, paths, obstacles)
    if entries is None:
        if not isinstance(wanted, kind):
            raise TypeError(
                f"{name} must be a {kind.__name__}, a list with one for each {layers} layer, or a mapping from layer "
                f"path, got {type(wanted).__name__} {wanted!r}"
            )
        entries = dict.fromkeys(paths, wanted)
    return {path: entry for path, entry in entries.items() if entry is not None}


def _entries(name: str, wanted: Any, paths: Sequence[str], obstacles: Mapping[str, str]) -> dict[str, Any] | None:
    """What is wanted for each of the paths; None where it is one thing for all layers."""
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(paths))
        if reason := next((obstacles[path] for path in unknown if path in obstacles), None):
            raise ValueError(f"{name} names layers that cannot be replaced ({reason}): {', '.join(unknown)}")
        if unknown:
            raise ValueError(f"{name} names layers that do not exist or are not picked: {', '.join(unknown)}")
        return dict(wanted)
    if isinstance(wanted, list | tuple | Tensor) and not _is_one_number(wanted):
        if len(wanted) != len(paths):
            raise ValueError(
                f"{name} must hold one entry for each of the {len(paths)} layers picked, got {len(wanted)}"
            )
        return dict(zip(paths, wanted, strict=True))
    return None


def _is_one_number(k: object) -> bool:
    return isinstance(k, Tensor) and k.ndim == 0


def _as_k(name: str, entry: Any) -> K:
    k = as_k(name, entry)
    return ALL if k is None else k


def _with_prefix(stored: Mapping[str, _Stored], paths: Sequence[str], prefix: str) -> dict[str, _Stored]:
    """What is stored by the model's own paths. A checkpoint loads with or without a head, so it is stored without the
    prefix of the base model."""
    by_name = {path.removeprefix(f"{prefix}."): path for path in paths}
    # A checkpoint also loads in part, for example without its decoder. Every part that the model has must be complete.
    parts = {name.split(".")[0] for name in by_name}
    wanted = {name: entry for name, entry in stored.items() if name.split(".")[0] in parts}
    if unknown := sorted(set(wanted or stored) - set(by_name)):
        raise ValueError(f"the model's configuration names layers that do not exist: {', '.join(unknown)}")
    return {by_name[name]: entry for name, entry in wanted.items()}


def prefix_of(model: nn.Module) -> str:
    """The name under which a model with a head holds its base model."""
    return getattr(model, "base_model_prefix", "")
