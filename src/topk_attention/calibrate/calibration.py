"""`calibrate`: measures a model on a user's own text and chooses one k for each head."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from ..backends.calls import AttentionCall, FeedForwardCall
from ..convert import ConversionReport, convert, unconvert
from ..convert.by_name import is_in_force
from ..convert.plan import AnyK
from ..convert.search import attention_sites, feed_forward_sites
from ..convert.settings import ALL
from ..convert.tensor_parallel import group_of_heads
from ..convert.trials import evaluating
from ..convert.wrappers import puts_prompts, unwrapped
from ..files import notes_as_json, write_whole
from ..functional.checks import check_count
from ..functional.completion import Completion
from ..functional.observation import observed
from ..functional.words import full_attention_note
from ..nn.shards import is_cut
from .allocation import (
    Allocation,
    LossIncrease,
    LostMass,
    MeanK,
    Target,
    completion_at,
    mean_of,
    with_mean_k,
    within_lost_mass,
)
from .processes import ALONE, Processes
from .statistics import Collector, Curves

# progress(name of the current work, steps done, steps in all)
Progress = Callable[[str, int, int], None]
Batch = Tensor | Mapping[str, Any]
# objective(the model's output, the arguments it was called with)
Objective = Callable[[Any, Mapping[str, Any]], Tensor]
AnyCompletion = Completion | Literal["fit"] | None
# Longer than any sequence: with this k attention is full attention.
_FULL_K = 2**31 - 1
_SEARCH_STEPS = 6
# What a batch may hold, of which the first is measured by its length.
_INPUTS = ("input_ids", "input_features", "pixel_values")
_VERSION = 2
# Of files that hold a completion: versions that know none must not take the k without it.
_VERSION_WITH_COMPLETION = 3


@dataclass(frozen=True, eq=False)  # equal as mappings are: with the same k for every head
class Calibration(Mapping[str, tuple[int, ...]]):
    """One k per head, by the path of its attention layer: `convert(model, attention_k=calibration)` takes it, and the
    completion with it.

    attention            path -> k per head
    feed_forward         path -> k, for `convert(model, feed_forward_k=calibration.feed_forward)`; empty without a
                         feed_forward_target
    curves               path -> what was measured, see `Curves`
    feed_forward_curves  the same for feed-forward layers
    about                notes on the data and the target: any words and numbers; saved with it
    completion           path -> `Completion`, its scale one number per head, to be used with these k; empty without one
    """

    attention: Allocation
    feed_forward: dict[str, int] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    feed_forward_curves: dict[str, Curves] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    completion: dict[str, Completion] = field(default_factory=dict)

    def __getitem__(self, path: str) -> tuple[int, ...]:
        return self.attention[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.attention)

    def __len__(self) -> int:
        return len(self.attention)

    @property
    def mean_k(self) -> float:
        """Keys per query, on average over all heads and layers."""
        return mean_of(self.attention)

    def reallocated(self, target: Target) -> Calibration:
        """The same measurements, with k chosen for another target, and the scales of a completion for these k.

        Raises:
            TypeError: the target is of the wrong kind.
            ValueError: the target is `LossIncrease`, whose search needs the model, its number is out of range, or there
                are no curves.
        """
        if isinstance(target, LossIncrease):
            raise ValueError("LossIncrease is searched with the model: call calibrate(model, batches, target=...)")
        _check_target("target", target, (MeanK, LostMass))
        if not self.curves:
            raise ValueError(
                "this calibration has no curves to choose k by: call calibrate(model, batches, target=...)"
            )
        about = {name: value for name, value in self.about.items() if name != "search"} | {"target": repr(target)}
        return replace(self, about=about)._with(_allocate(self.curves, target))

    def with_one_k(self, k: int) -> Calibration:
        """The same measurements, with one k for every head, and the scales of a completion for it."""
        return self._with({path: (k,) * len(ks) for path, ks in self.attention.items()})

    def _with(self, attention: Allocation) -> Calibration:
        """With these k, and the scales that were the best ones for them."""
        return replace(self, attention=attention, completion=completion_at(self.curves, attention))

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `Calibration.load` reads. Folders that are missing are made.

        Raises:
            OSError: the file cannot be written, or is a folder.
            ValueError: `about` holds what JSON cannot.
        """
        notes_as_json(self.about)

        def of(curves: dict[str, Curves]) -> dict[str, Any]:
            return {
                layer: {
                    "k": list(c.ks),
                    "lost_mass": [_short(row) for row in c.lost_mass.tolist()],
                    "loss_error": [_short(row) for row in c.loss_error.tolist()],
                    "loss_change": [[_short(row) for row in half] for half in c.loss_change.tolist()],
                    "rows": c.num_rows,
                }
                | _of_completion(c)
                for layer, c in curves.items()
            }

        content = {
            "version": _VERSION_WITH_COMPLETION if self.completion else _VERSION,
            "about": self.about,
            "attention_k": {layer: list(ks) for layer, ks in self.attention.items()},
            "feed_forward_k": self.feed_forward,
            "attention_curves": of(self.curves),
            "feed_forward_curves": of(self.feed_forward_curves),
        }
        if self.completion:
            content["completion"] = {
                layer: _completion_json(completion) for layer, completion in self.completion.items()
            }
        write_whole(Path(path), json.dumps(content) + "\n")

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] not in (_VERSION, _VERSION_WITH_COMPLETION):
                raise ValueError(f"version must be {_VERSION} or {_VERSION_WITH_COMPLETION}, got {content['version']}")

            def of(stored: dict[str, Any]) -> dict[str, Curves]:
                return {
                    layer: Curves(
                        tuple(c["k"]),
                        torch.tensor(c["lost_mass"], dtype=torch.float64),
                        torch.tensor(c["loss_error"], dtype=torch.float64),
                        torch.tensor(c["loss_change"], dtype=torch.float64),
                        c["rows"],
                        torch.tensor(c["mass_scale"], dtype=torch.float64) if "mass_scale" in c else None,
                        Completion(**c["completion"]) if "completion" in c else None,
                    )
                    for layer, c in stored.items()
                }

            attention = {layer: tuple(ks) for layer, ks in content["attention_k"].items()}
            for layer, ks in [*attention.items(), *((layer, [k]) for layer, k in content["feed_forward_k"].items())]:
                for k in ks:
                    check_count(f"k of {layer}", k)
            if not all(attention.values()):
                raise ValueError("each layer must have at least one head")
            curves, feed_forward_curves = of(content["attention_curves"]), of(content["feed_forward_curves"])
            for layer, c in [*curves.items(), *feed_forward_curves.items()]:
                _check_curves(layer, c)
            if not isinstance(content["about"], dict):
                raise ValueError(f"about must be a JSON object, got {content['about']!r:.60}")
            completion = {layer: Completion(**stored) for layer, stored in content.get("completion", {}).items()}
            return Calibration(
                attention, content["feed_forward_k"], curves, feed_forward_curves, content["about"], completion
            )
        except RecursionError as error:
            raise ValueError(f"{path} is not a calibration file: it is nested too deeply") from error
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration file: {error}") from error


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    target: Target,
    completion: AnyCompletion = None,
    feed_forward_target: MeanK | LostMass | None = None,
    objective: Objective | None = None,
    queries_per_head: int = 512,
    largest_k: int = 2048,
    progress: Progress | None = None,
    group: Any = None,
) -> Calibration:
    """Measure how many keys each head needs, on text like that of later use, and choose a k for each.

    model    a transformers model as `convert` takes it, not converted; it is unchanged afterwards
    batches  token ids [B, N], or mappings of the model's arguments; as long as in later use, because a head needs more
             keys in a longer sequence
    target   `MeanK(64)`: a budget, spent where it matters most to the loss. `LostMass(0.05)`: the softmax weight that
             each head may lose. `LossIncrease(0.01)`: the smallest budget that keeps the loss, searched on the batches
    completion           "fit": the keys that a head does not keep enter its softmax as one entry, whose scale is fitted
                         for each head; a `Completion`: the same with its own scale; None: they are left out
    feed_forward_target  the same for the neurons of feed-forward layers, one k per layer
    objective            objective(output, arguments) -> what must not change: a loss (a number, mean over tokens), or a
                         tensor whose squared error counts, such as sentence embeddings [B, D]
    queries_per_head     queries of each sequence whose scores are sorted
    largest_k            the largest k that is considered
    progress             progress(name of the current work, steps done, steps in all) is called after each step
    group                the processes that share the work, such as `torch.distributed.group.WORLD`: each has the model
                         and all batches, measures every n-th batch of n processes, and returns the one result. None:
                         this process alone

    A budget is spent according to a forecast of the loss for each head at every k. The forecast has two parts: the
    curvature, and the direction in which dropped keys move the loss. The direction counts as far as the earlier and the
    later half of each sequence agree on it. It is more reliable with more batches, and most useful if the text is like
    that of later use.

    With a completion the forecast is that of completed attention, with "fit" at each k with the scale that makes the
    curvature smallest. So a head whose rest is well described by its sums gives its keys to others. `LostMass` still
    bounds the softmax weight of the keys that are not kept, which is then the weight that completion estimates.
    `LossIncrease` searches with completion on.

    Without an objective the loss is the model's own where a batch has labels, and next-token prediction for causal
    language models. For any other model all numbers of its output count equally. Their squared error is estimated by
    projecting them on random signs.

    The cost is a forward pass, a backward pass without weight gradients, and one sort per measured query and head. The
    memory is that of such a backward pass. A `LossIncrease` adds a forward pass for each search step.

    A target that leaves every key to every head is full attention, and a warning says so.

    Raises:
        TypeError: a target or a batch is of the wrong kind.
        ValueError: there are no batches, a batch has no batch axis, the model was converted already, or the target does
            not fit.
    """
    _check_target("target", target, (MeanK, LostMass, LossIncrease))
    if feed_forward_target is not None:
        _check_target("feed_forward_target", feed_forward_target, (MeanK, LostMass))
    if puts_prompts(model):
        raise TypeError(
            "model must not put learned prompts before its input, got a PeftModel that does; calibrate "
            "model.get_base_model() on batches without prompts, and convert takes both"
        )
    model, processes = unwrapped(model), Processes.of(group)
    batches = checked_batches(batches)
    _check_budget(target, batches, largest_k)
    fit = isinstance(completion, str) and completion == "fit"
    if not fit and completion is not None and not isinstance(completion, Completion):
        raise TypeError(
            f'completion must be "fit", a Completion or None, got {type(completion).__name__} {completion!r}'
        )
    of_curves = completion if isinstance(completion, Completion) else Completion() if fit else None
    collector = Collector(queries_per_head, largest_k, completion=of_curves, fit_scale=fit)
    loss = measure(
        model,
        batches,
        collector,
        objective=objective,
        with_feed_forward=feed_forward_target is not None,
        needs_loss=isinstance(target, LossIncrease),
        progress=progress,
        processes=processes,
    )
    feed_forward = {}
    if feed_forward_target is not None:
        if not collector.feed_forward:
            raise ValueError(
                f"feed_forward_target needs a layer that has a top-k form, {type(model).__name__} has none"
            )
        feed_forward = _allocate(collector.feed_forward, feed_forward_target)
    calibration = Calibration(
        {},
        {path: ks[0] for path, ks in feed_forward.items()},
        collector.attention,
        collector.feed_forward,
        {"loss": loss, "target": repr(target), "tokens": sum(_token_ids(batch).numel() for batch in batches)},
    )
    if isinstance(target, LossIncrease):
        calibration = _search(model, batches, objective, calibration, target, progress, processes)
    else:
        calibration = calibration._with(_allocate(collector.attention, target))
    smallest = min((min(ks) for ks in calibration.values()), default=None)
    if (note := full_attention_note(smallest, _most_tokens(batches))) is not None:
        warnings.warn(f"the target leaves no key out in any head: {note}", stacklevel=2)
    return calibration


def completion_by_name(name: str | None) -> AnyCompletion:
    """What a command line means: "on" a `Completion`, "fit" one whose scale is fitted, None none.

    Raises:
        ValueError: it is neither.
    """
    match name:
        case None:
            return None
        case "on":
            return Completion()
        case "fit":
            return "fit"
    raise ValueError(f'completion must be "on" or "fit", got {name!r}')


def fit_completion(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    attention_k: AnyK,
    objective: Objective | None = None,
    queries_per_head: int = 512,
    largest_k: int = 2048,
    progress: Progress | None = None,
    group: Any = None,
) -> Calibration:
    """Fit the scale of a completion for each head, on text like that of later use, for k that are given.

    attention_k  as `convert` takes it: one k, one for each layer or head, or a mapping
    The other arguments are those of `calibrate`, and so are the cost and what counts as an error.

    Returns a calibration with these k: `convert(model, attention_k=fit_completion(model, batches, attention_k=64))`.

    Raises:
        TypeError: a batch or a k is of the wrong kind.
        ValueError: there are no batches, a batch has no batch axis, the model was converted already, no layer has a
            k, or a k does not fit the model.
    """
    model, processes = unwrapped(model), Processes.of(group)
    batches = checked_batches(batches)
    check_unconverted(model)
    with converted(model, attention_k) as report:
        given = {
            entry.path: entry.k
            for entry in report.replaced
            if entry.kind == "attention" and entry.k is not None and entry.k != ALL
        }
    if not given:
        raise ValueError("attention_k must leave keys out in a layer at least, got all keys for each of them")
    collector = Collector(queries_per_head, largest_k, completion=Completion(), fit_scale=True)
    loss = measure(model, batches, collector, objective=objective, progress=progress, processes=processes)
    curves = {path: curves for path, curves in collector.attention.items() if path in given}
    attention = {
        path: k if isinstance(k := given[path], tuple) else (k,) * len(of_layer.lost_mass)
        for path, of_layer in curves.items()
    }
    about = {"loss": loss, "tokens": sum(_token_ids(batch).numel() for batch in batches)}
    return Calibration({}, curves=curves, about=about)._with(attention)


def measure(
    model: nn.Module,
    batches: list[Batch],
    collector: Collector,
    *,
    objective: Objective | None = None,
    with_feed_forward: bool = False,
    needs_loss: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> float:
    """Let the collector measure every attention layer (and feed-forward layer) in passes of the model in full.

    processes  those that share the batches; the collector of each holds then what all have measured

    Returns the mean loss.

    Raises:
        ValueError: the model was converted already, a loss is needed and there is none, or the neurons of a network
            are dealt out over processes.
    """
    check_unconverted(model)
    check_whole(model, processes)
    if with_feed_forward:
        check_neurons_are_whole(model)
    if collector.completion is not None:
        _check_no_soft_cap(model)
    neurons = {site.path: site.num_neurons for site in feed_forward_sites(model) if site.obstacle is None}
    passed: set[tuple[int, str, str]] = set()
    losses: dict[int, float] = {}
    num_batches = len(range(processes.rank, len(batches), processes.count))
    num_keys: dict[str, int] = {}

    def report(pass_name: str, path: str) -> None:
        passed.add((len(losses), pass_name, path))
        if progress is not None:
            progress("measuring", len(passed), 2 * num_batches * len(layers))

    def observe(call: AttentionCall | FeedForwardCall, output: Tensor) -> None:
        path = path_of.get(running[-1], "")
        if isinstance(call, AttentionCall):
            num_keys.setdefault(path, call.key.shape[2])
            # As if this process had run all batches before.
            place = number * len(path_of) + len(running) - started_before
            see = partial(collector.see_attention, path, collector.sample(call, place))
        else:
            see = partial(collector.see_feed_forward, path, call)

        def measure_errors(grad: Tensor) -> None:
            see(grad)
            report("backward", path)

        report("forward", path)
        if not output.requires_grad:  # no earlier layer needs gradients: they start at this one
            output.requires_grad_()
        output.register_hook(measure_errors)

    def agree_on_grids() -> None:
        for part in processes.gather(num_keys):
            for path, number_of_keys in part.items():
                collector.most_keys.setdefault(path, number_of_keys)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(converted(model, _FULL_K, neurons if with_feed_forward else None))
        stack.enter_context(_without_weight_gradients(model))
        stack.enter_context(torch.enable_grad())
        layers = {site.path: site.module for site in attention_sites(model) if site.obstacle is None}
        if with_feed_forward:
            layers |= {path: model.get_submodule(path) for path in neurons}
        path_of = {module: path for path, module in layers.items()}
        running = stack.enter_context(started(path_of))
        stack.enter_context(observed(observe))
        number, is_first = 0, True
        for number, batch in processes.own(batches):
            started_before = len(running)
            loss, collector.signed = _loss(model, batch, objective, must_be_own=needs_loss, seed=number)
            if is_first:  # the grids are those of the first batch that runs a layer, whoever runs it
                agree_on_grids()
            is_first = False
            (loss * _token_ids(batch).numel()).backward()
            losses[number] = loss.item()
        if is_first:
            agree_on_grids()
    _join(collector, processes, model)
    # The backward pass visited the layers from the last to the first.
    for curves in (collector.attention, collector.feed_forward):
        in_order = {path: curves[path] for path in layers if path in curves}
        curves.clear()
        curves.update(in_order)
    return _mean(processes.in_order(losses))


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def _join(collector: Collector, processes: Processes, model: nn.Module) -> None:
    """Let the collector hold what all processes have measured, and of a layer that is cut over processes all heads."""
    if processes.count > 1:
        collector.join(processes.gather(collector))
    for site in attention_sites(model):
        curves = collector.attention.get(site.path)
        if curves is not None and site.num_heads is not None and len(curves.lost_mass) < site.num_heads:
            group = group_of_heads(site.module)
            collector.attention[site.path] = Curves.of_heads(Processes.of(group).gather(curves))


def check_whole(model: nn.Module, processes: Processes) -> None:
    """Raise where processes that shall each run batches of their own hold one model together."""
    sharded = next((name for name, weight in model.named_parameters() if hasattr(weight, "placements")), None)
    if sharded is not None and processes.count > 1:
        raise ValueError(
            f"group needs a model that is whole on each of its processes, got {sharded} dealt out over processes; "
            "leave group out: then they measure all batches together"
        )


def check_neurons_are_whole(model: nn.Module) -> None:
    """Raise where the neurons of a network are dealt out over processes, which each see their own alone."""
    cut = next((site.path for site in feed_forward_sites(model) if any(map(is_cut, site.linears_in))), None)
    if cut is not None:
        raise ValueError(
            f"model must hold all neurons of a network, got {cut} cut over several processes (tensor parallel); load "
            "the model without tp_plan, and share the batches with group="
        )


def _check_no_soft_cap(model: nn.Module) -> None:
    capped = next((site.path for site in attention_sites(model) if site.soft_cap is not None), None)
    if capped is not None:
        raise ValueError(
            f"completion is not possible for {capped}: its scores have a soft cap, and the mean of capped scores is "
            "not a sum over keys; leave completion out"
        )


def _of_completion(curves: Curves) -> dict[str, Any]:
    if curves.mass_scale is None or curves.completion is None:
        return {}
    return {
        "mass_scale": [_short(row) for row in curves.mass_scale.tolist()],
        "completion": _completion_json(curves.completion),
    }


def _completion_json(completion: Completion) -> dict[str, Any]:
    scale = completion.mass_scale
    if isinstance(scale, Tensor):
        scale = scale.tolist()
    return {"mass_scale": scale, "lift": completion.lift}


def _short(row: list[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in row]


def check_unconverted(model: nn.Module) -> None:
    if hasattr(getattr(model, "config", None), "topk_attention"):
        if is_in_force(model):
            raise ValueError("model was converted already; call topk_attention.unconvert(model) first")
        raise ValueError(
            "model was loaded from a converted checkpoint: its configuration remembers every k, but it runs in full; "
            "call topk_attention.unconvert(model) first, which forgets them"
        )


def _check_curves(layer: str, curves: Curves) -> None:
    """Raise where what a file holds for a layer does not fit together."""
    for k in (*curves.ks, curves.num_rows):
        check_count(f"k, or rows, of {layer}", k)
    heads, grid = (*curves.lost_mass.shape, 0, 0)[:2]
    if not curves.ks or not heads or grid != len(curves.ks):
        raise ValueError(f"lost_mass of {layer} must be a table with a column for each of {len(curves.ks)} k")
    for name, shape in (("lost_mass", [heads, grid]), ("loss_error", [heads, grid]), ("loss_change", [2, heads, grid])):
        found = list(getattr(curves, name).shape)
        if found != shape:
            raise ValueError(f"{name} of {layer} must have shape {shape}, got {found}")


def _check_target(name: str, target: object, kinds: tuple[type, ...]) -> None:
    """Raise where a target is of the wrong kind, before the measurement."""
    if not isinstance(target, kinds):
        raise TypeError(f"{name} must be {_listed(kind.__name__ for kind in kinds)}, got {type(target).__name__}")


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches, each of them checked before the model reads the first.

    Raises:
        TypeError: they are one batch alone, or a batch holds no token ids and nothing else that models read.
        ValueError: token ids without a batch axis, or there is no batch.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes):
        raise TypeError(f"batches must be a list of batches, got one {type(batches).__name__}; put it into a list")
    checked = list(batches)
    for number, batch in enumerate(checked):
        name = f"batches[{number}]"
        if isinstance(batch, Mapping):
            if not any(isinstance(batch.get(field), Tensor) for field in _INPUTS):
                raise TypeError(
                    f"{name} must hold a tensor under one of {', '.join(_INPUTS)}, got {', '.join(map(str, batch))}"
                )
            name, ids = f"{name}['input_ids']", batch.get("input_ids")
        else:
            ids = batch
            if not isinstance(ids, Tensor):
                raise TypeError(
                    f"{name} must be token ids [B, N] or a mapping of the model's arguments, got "
                    f"{type(batch).__name__}; a tokenizer makes them from text"
                )
        if ids is None:
            continue
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must hold whole numbers, got {ids.dtype}")
        if ids.ndim != 2 or ids.numel() == 0:
            hint = "; give it a batch axis with [None]" if ids.ndim == 1 else ""
            raise ValueError(f"{name} must have shape [B, N], got {list(ids.shape)}{hint}")
    if not checked:
        raise ValueError("batches must hold at least one batch of token ids, got none")
    return sorted(checked, key=lambda batch: -_token_ids(batch).shape[-1])  # curves are as long as the first


def _check_budget(target: Target, batches: list[Batch], largest_k: int) -> None:
    """Raise where a budget is above the most keys that can be measured, before the measurement."""
    tokens = _most_tokens(batches)
    if not isinstance(target, MeanK) or tokens is None:
        return
    most = min(largest_k, tokens)
    if target.mean_k > most:
        what = "largest_k" if most == largest_k else "the tokens of the longest batch, and full attention"
        raise ValueError(f"mean_k must be at most {most}, {what}, got {target.mean_k:g}")


def _most_tokens(batches: list[Batch]) -> int | None:
    """The tokens of the longest batch; None where some batch holds other inputs, whose tokens the model makes."""
    if not all(isinstance(batch, Tensor) or "input_ids" in batch for batch in batches):
        return None
    return max(
        part.shape[1]
        for batch in batches
        for part in (batch.values() if isinstance(batch, Mapping) else (batch,))
        if isinstance(part, Tensor) and part.ndim == 2
    )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _allocate(curves: dict[str, Curves], target: Target) -> Allocation:
    if isinstance(target, MeanK):
        return with_mean_k(curves, target.mean_k)
    if isinstance(target, LostMass):
        return within_lost_mass(curves, target.bound)
    raise AssertionError(target)


def _search(
    model: nn.Module,
    batches: list[Batch],
    objective: Objective | None,
    calibration: Calibration,
    target: LossIncrease,
    progress: Progress | None,
    processes: Processes,
) -> Calibration:
    """The smallest mean k within the bound, by bisection of its logarithm."""
    full = calibration.about["loss"]
    low, high = 1.0, float(max(c.ks[-1] for c in calibration.curves.values()))
    tried: list[dict[str, float]] = []
    best = calibration._with(with_mean_k(calibration.curves, high))
    for step in range(_SEARCH_STEPS):
        if progress is not None:
            progress("searching", step, _SEARCH_STEPS)
        mean_k = (low * high) ** 0.5
        candidate = calibration._with(with_mean_k(calibration.curves, mean_k))
        increase = _loss_with(model, batches, objective, candidate, processes) - full
        tried.append({"mean_k": mean_k, "loss_increase": increase})
        if increase <= target.bound:
            best, high = candidate, mean_k
        else:
            low = mean_k
    if progress is not None:
        progress("searching", _SEARCH_STEPS, _SEARCH_STEPS)
    return replace(best, about={**calibration.about, "search": tried})


def _loss_with(
    model: nn.Module,
    batches: list[Batch],
    objective: Objective | None,
    calibration: Calibration,
    processes: Processes,
) -> float:
    with torch.no_grad(), evaluating(model), converted(model, calibration):
        losses = {number: _loss(model, batch, objective)[0].item() for number, batch in processes.own(batches)}
    return _mean(processes.in_order(losses))


def _loss(
    model: nn.Module, batch: Batch, objective: Objective | None, *, must_be_own: bool = False, seed: int = 0
) -> tuple[Tensor, bool]:
    """The loss and True, or the outputs projected on random signs and False.

    The square of the change of such a projection is, in expectation over the signs, the squared error of the outputs.
    """
    arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if "labels" not in arguments and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        arguments["labels"] = arguments["input_ids"]
        if _is_padding_mask(mask := arguments.get("attention_mask")):
            arguments["labels"] = arguments["labels"].masked_fill(mask == 0, -100)
    output = model(**arguments)
    if objective is not None:
        value = objective(output, arguments)
    elif getattr(output, "loss", None) is not None:
        value = output.loss
    else:
        value = output[0]
        if _is_padding_mask(mask := arguments.get("attention_mask")) and mask.shape == value.shape[:2]:
            value = value * mask.to(value).unsqueeze(-1)
    if value.ndim == 0:
        return value, True
    if must_be_own:
        if objective is None:
            problem = f"{type(model).__name__} gave none; add labels to the batches"
        else:
            problem = f"objective gave a tensor of shape {list(value.shape)}"
        raise ValueError(f"LossIncrease needs a loss and {problem}")
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (value * signs.to(value)).sum() / _token_ids(batch).numel(), False


def _is_padding_mask(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _token_ids(batch: Batch) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return next(batch[name] for name in _INPUTS if isinstance(batch.get(name), Tensor))


@contextmanager
def _without_weight_gradients(model: Any) -> Iterator[None]:
    """Within this context the backward pass computes the gradients of activations alone, not those of weights."""
    parameters = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in parameters.items():
            parameter.requires_grad_(wanted)


@contextmanager
def started(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Within this context the list grows by each layer that starts: the last one is running.

    Layers that share a network share its hooks, so that one of them may be there several times in a row, or another
    one that is not among these.
    """
    modules: list[nn.Module] = []
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda module, *_: modules.append(module))
            stack.callback(hook.remove)
        yield modules


@contextmanager
def converted(model: Any, attention_k: Any, feed_forward_k: Any = None) -> Iterator[ConversionReport]:
    former = getattr(getattr(model, "config", None), "_attn_implementation", None)
    report = convert(model, attention_k=attention_k, feed_forward_k=feed_forward_k)
    try:
        yield report
    finally:
        unconvert(model)
        if model.config._attn_implementation != former:  # it was loaded with "topk"; unconvert leaves "sdpa"
            model.set_attn_implementation(former)
