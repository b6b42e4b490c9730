"""`fit_stand_ins`: a stand-in for the neurons that each feed-forward layer does not keep, fitted on a user's own text.

For a layer with input x, let d be what its dropped neurons would add to the output. The stand-in is the linear function
of x that is nearest to d on the text, by least squares with a penalty, cut to a rank: of all matrices of that rank the
one whose output is nearest to the full one's on the text. It needs sums over the text alone: of x, d, x x' and x d'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.calls import AttentionCall, FeedForwardCall, accumulation_dtype
from ..convert.plan import AnyK
from ..convert.search import feed_forward_sites
from ..convert.settings import ALL
from ..convert.trials import evaluating
from ..convert.wrappers import unwrapped
from ..files import notes_as_json, write_whole
from ..functional import StandIn
from ..functional.checks import check_count
from ..functional.observation import observed
from .calibration import (
    Batch,
    Progress,
    check_neurons_are_whole,
    check_unconverted,
    check_whole,
    checked_batches,
    converted,
    started,
)
from .processes import Processes
from .statistics import neurons_of

_FORMAT = "topk_attention/stand-ins/1"
DEFAULT_RANK = 64
# The penalty, in units of the variance of each input.
_PENALTY = 0.3
# Tokens whose neurons stand in memory at a time.
_TOKENS_AT_A_TIME = 1024


@dataclass(frozen=True, eq=False)
class StandIns(Mapping[str, int]):
    """One k per feed-forward layer, by its path, and a stand-in for the neurons that it leaves out:
    `convert(model, feed_forward_k=stand_ins)` takes both.

    feed_forward  path -> k
    stand_in      path -> `StandIn`, fitted for this k; a layer without one adds nothing for the others
    about         notes on the data: any words and numbers; saved with it
    """

    feed_forward: dict[str, int]
    stand_in: dict[str, StandIn]
    about: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, path: str) -> int:
        return self.feed_forward[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.feed_forward)

    def __len__(self) -> int:
        return len(self.feed_forward)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `StandIns.load` reads. Folders that are missing are made.

        Raises:
            OSError: the file cannot be written, or is a folder.
            ValueError: a layer has a stand-in and no k, or `about` holds what JSON cannot.
        """
        from safetensors.torch import save

        if without_k := sorted(set(self.stand_in) - set(self.feed_forward)):
            raise ValueError(f"stand_in must name layers that have a k, got {', '.join(without_k)}; give these a k too")
        # A file holds each tensor by itself; here, layers may share one.
        tensors = {
            f"{layer}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for layer, stand_in in self.stand_in.items()
            for name, tensor in stand_in.tensors().items()
        }
        content = {
            "format": _FORMAT,
            "feed_forward_k": json.dumps(self.feed_forward),
            "about": notes_as_json(self.about),
        }
        write_whole(Path(path), save(tensors, content))

    @staticmethod
    def load(path: str | Path) -> StandIns:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"file of stand-ins not found: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                content = file.metadata() or {}
                if content.get("format") != _FORMAT:
                    raise ValueError(f"format must be {_FORMAT}, got {content.get('format')}")
                feed_forward = json.loads(content["feed_forward_k"])
                about = json.loads(content["about"])
                parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in feed_forward}
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    layer, _, part = name.rpartition("/")
                    parts[layer][part] = file.get_tensor(name)
            for layer, k in feed_forward.items():
                check_count(f"k of {layer}", k)
            if not isinstance(about, dict):
                raise ValueError(f"about must be a JSON object, got {about!r:.60}")
            stand_in = {layer: StandIn(**tensors) for layer, tensors in parts.items() if tensors}
            return StandIns(feed_forward, stand_in, about)
        except RecursionError as error:
            raise ValueError(f"{path} is not a file of stand-ins: it is nested too deeply") from error
        except (AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of stand-ins: {error}") from error


def fit_stand_ins(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    feed_forward_k: AnyK,
    rank: int = DEFAULT_RANK,
    progress: Progress | None = None,
    group: Any = None,
) -> StandIns:
    """Fit a stand-in for the neurons that each feed-forward layer does not keep, on text like that of later use.

    model           a transformers model as `convert` takes it, not converted; it is unchanged afterwards
    batches         token ids [B, N], or mappings of the model's arguments, without padding
    feed_forward_k  as `convert` takes it: one k, one for each layer, or a mapping such as `Calibration.feed_forward`
    rank            of what changes with a layer's input; 0 for a constant, the mean of what the dropped neurons give
    progress        progress(name of the current work, steps done, steps in all) is called after each step
    group           the processes that share the batches, as in `calibrate`; None: this process alone

    Returns `StandIns` with these k: `convert(model, feed_forward_k=fit_stand_ins(model, batches, feed_forward_k=384))`.
    Layers that keep every neuron get none, and so do experts, which keep their k.

    The cost is a forward pass of the model in full and each network once more. A rank above 0 also costs, for each
    layer, a few products of its input size squared with the number of tokens, and two matrices of its input and output
    size in float64. It needs several tokens for each input of a layer: a few thousand for a small model.

    Raises:
        TypeError: a batch, a k or the rank is of the wrong kind.
        ValueError: there are no batches, a batch has no batch axis or is padded, the model was converted already, no
            layer leaves a neuron out, a k or the rank does not fit the model, or a layer meets numbers that are not
            finite.
    """
    _check_rank(rank)
    model, processes = unwrapped(model), Processes.of(group)
    batches = checked_batches(batches)
    _check_unpadded(batches)
    check_unconverted(model)
    check_whole(model, processes)
    check_neurons_are_whole(model)
    sites = {site.path: site for site in feed_forward_sites(model) if site.obstacle is None}
    with converted(model, None, feed_forward_k) as report:
        given = {
            entry.path: entry.k
            for entry in report.replaced
            if isinstance(entry.k, int) and entry.k != ALL and entry.k < sites[entry.path].num_neurons
        }
    if not given:
        raise ValueError("feed_forward_k must leave neurons out in a layer at least, got all neurons for each of them")
    fitted = {path: k for path, k in given.items() if sites[path].why_no_stand_in is None}
    if not fitted:
        raise ValueError(
            "model must have a feed-forward layer other than experts, of which each would need a stand-in of its own, "
            f"got experts alone: {', '.join(given)}"
        )
    for path in fitted:
        if rank > (most := min(sites[path].sizes)):
            raise ValueError(f"rank must be at most {most}, the smaller of the sizes of {path}, got {rank}")
    sums = _sums(model, batches, fitted, processes, with_products=rank > 0, progress=progress)
    if not sums:
        raise ValueError(
            f"batches must run a layer that leaves neurons out, got none of {', '.join(fitted)} run in {len(batches)} "
            "batches; give inputs that the model passes through them, or feed_forward_k for layers that run"
        )
    for path, of_layer in sums.items():
        of_layer.check_finite(path)
    about = {"tokens": max(of_layer.num_tokens for of_layer in sums.values()), "rank": rank}
    return StandIns(
        {path: k for path, k in given.items() if path in sums or path not in fitted},
        {path: _fitted(path, of_layer, rank) for path, of_layer in sums.items()},
        about,
    )


def _fitted(path: str, of_layer: _Sums, rank: int) -> StandIn:
    try:
        return of_layer.fitted(rank)
    except ValueError as error:  # sums that are finite in float64 alone
        raise ValueError(f"{path} cannot be fitted: {error}") from error


class _Sums:
    """Sums over the tokens of one layer: of its input x [D], of what its dropped neurons give, d [O], and of products.

    squares   [D, D], x x'; only with products
    products  [D, O], x d'; not there where a constant is fitted
    """

    def __init__(self, model_size: int, output_size: int, *, with_products: bool) -> None:
        self.num_tokens = 0
        self.x = torch.zeros(model_size, dtype=torch.float64)
        self.dropped = torch.zeros(output_size, dtype=torch.float64)
        self.with_products = with_products
        if with_products:
            self.squares = torch.zeros(model_size, model_size, dtype=torch.float64)
            self.products = torch.zeros(model_size, output_size, dtype=torch.float64)

    def add(self, x: Tensor, dropped: Tensor) -> None:
        """Add tokens: x [T, D] and dropped [T, O]."""
        self.num_tokens += x.shape[0]
        self.x += x.double().sum(0).cpu()
        self.dropped += dropped.double().sum(0).cpu()
        if self.with_products:
            self.squares += (x.T @ x).double().cpu()
            self.products += (x.T @ dropped).double().cpu()

    def add_up(self, processes: Processes) -> None:
        """Hold the sums over the tokens of all processes."""
        self.num_tokens = sum(processes.gather(self.num_tokens))
        for sums in (self.x, self.dropped, *((self.squares, self.products) if self.with_products else ())):
            processes.add_up(sums)

    def check_finite(self, path: str) -> None:
        """Raise, naming the layer, where the text met numbers that are not finite."""
        sums = {"inputs": [self.x], "outputs": [self.dropped]}
        if self.with_products:
            sums["inputs"] += [self.squares]
            sums["outputs"] += [self.products]
        for name, of_kind in sums.items():
            if not all(bool(one.isfinite().all()) for one in of_kind):
                raise ValueError(
                    f"model must give finite numbers on the batches, got {name} of {path} whose sums are nan or "
                    "infinite; look at its weights, or load it in float32 or float64"
                )

    def fitted(self, rank: int) -> StandIn:
        mean_x, mean_dropped = self.x / self.num_tokens, self.dropped / self.num_tokens
        if rank == 0:
            return StandIn(mean_dropped.float())
        covariance = self.squares / self.num_tokens - torch.outer(mean_x, mean_x)
        shared = self.products / self.num_tokens - torch.outer(mean_x, mean_dropped)
        # Each input in units of its own spread, so that one penalty serves them all. Some hardly ever change.
        variances = covariance.diagonal()
        spread = variances.clamp(min=1e-12 * float(variances.amax()) + torch.finfo(torch.float64).tiny).sqrt()
        covariance, shared = covariance / torch.outer(spread, spread), shared / spread[:, None]
        penalty = _PENALTY * torch.eye(len(mean_x), dtype=torch.float64)
        weight = torch.linalg.solve(covariance + penalty, shared)  # [D, O]
        # The directions of the output in which this varies most on the text.
        directions = torch.linalg.eigh(weight.T @ covariance @ weight).eigenvectors[:, -rank:]  # [O, R]
        w_in = ((weight @ directions) / spread[:, None]).T
        bias = mean_dropped - directions @ (w_in @ mean_x)
        return StandIn(bias.float(), w_in.float().contiguous(), directions.float().contiguous())


@torch.no_grad()
def _sums(
    model: nn.Module,
    batches: list[Batch],
    given: dict[str, int],
    processes: Processes,
    *,
    with_products: bool,
    progress: Progress | None,
) -> dict[str, _Sums]:
    """The sums of each layer, from passes of the model in full."""
    sums: dict[str, _Sums] = {}
    layers: dict[nn.Module, list[str]] = {}
    done, num_batches = 0, len(range(processes.rank, len(batches), processes.count))

    def observe(call: AttentionCall | FeedForwardCall, output: Tensor) -> None:
        nonlocal done
        if not isinstance(call, FeedForwardCall):
            return
        for path in layers.get(running[-1], []):
            if path not in sums:
                sums[path] = _Sums(call.x.shape[1], call.w_out.shape[0], with_products=with_products)
            for x in call.x.split(_TOKENS_AT_A_TIME):
                sums[path].add(*_input_and_dropped(call, x, given[path]))
            done += 1
            if progress is not None:
                progress("measuring", done, max(done, num_batches * len(given)))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(converted(model, None, dict.fromkeys(given, ALL)))
        for path in given:
            layers.setdefault(model.get_submodule(path), []).append(path)
        running = stack.enter_context(started(layers))
        stack.enter_context(observed(observe))
        for _, batch in processes.own(batches):
            model(**(batch if isinstance(batch, Mapping) else {"input_ids": batch}))
    # A layer that another process alone has run is added to nothing.
    for path, sizes in {path: of for part in processes.gather(_sizes(sums)) for path, of in part.items()}.items():
        sums.setdefault(path, _Sums(*sizes, with_products=with_products)).add_up(processes)
    return {path: sums[path] for path in given if path in sums}


def _sizes(sums: dict[str, _Sums]) -> dict[str, tuple[int, int]]:
    return {path: (len(of_layer.x), len(of_layer.dropped)) for path, of_layer in sums.items()}


def _input_and_dropped(call: FeedForwardCall, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The inputs [T, D] and what the neurons outside the k best give [T, O], in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    hidden, ranked_by = neurons_of(call, x)
    hidden = hidden.scatter(-1, ranked_by.topk(k, dim=-1).indices, 0)
    return x, F.linear(hidden, call.w_out.to(x.dtype))


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {type(rank).__name__} {rank!r}")
    if rank < 0:
        raise ValueError(f"rank must be at least 1, or 0 for a constant, got {rank}")


def _check_unpadded(batches: list[Batch]) -> None:
    for number, batch in enumerate(batches):
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(name) if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and not bool(mask.all()):
                raise ValueError(
                    f"batches[{number}]['{name}'] must hide no token, because the fit counts them all, got "
                    f"{int((mask == 0).sum())} hidden ones; give inputs of one length, or one batch for each length"
                )
