"""`topk-attention calibrate`: load a model, cut a text into windows, calibrate, and write the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibrate import (
    DEFAULT_RANK,
    AnyCompletion,
    LossIncrease,
    LostMass,
    MeanK,
    completion_by_name,
    fit_stand_ins,
)
from ..calibrate import calibrate as measure
from ..convert.search import feed_forward_sites
from ..files import read_utf8
from ..functional.words import full_attention_note
from .models import load

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

_DEFAULT_TOKENS = 2048
_DEFAULT_MEAN_K = 64.0


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on what, and for which target. At most one of the three targets is given.

    Raises:
        ValueError: several targets, fewer than one window or two tokens, or options for stand-ins that do not fit
            together.
    """

    model: str
    text: Path
    out: Path
    gguf_file: str | None = None
    num_tokens: int | None = None
    windows: int = 3
    mean_k: float | None = None
    lost_mass: float | None = None
    loss_increase: float | None = None
    feed_forward_mean_k: float | None = None
    stand_ins: Path | None = None
    stand_in_rank: int | None = None
    completion: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("mean_k", "lost_mass", "loss_increase") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("give one of --mean-k, --lost-mass and --loss-increase, got several")
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        if self.num_tokens is not None and self.num_tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.num_tokens}")
        for name, number in (
            ("windows", self.windows),
            ("tokens", self.num_tokens),
            ("stand-in-rank", self.stand_in_rank),
        ):
            if number is not None and number >= 2**31:
                raise ValueError(f"{name} must be below 2^31, got {number}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.stand_in_rank is not None:
            if self.stand_in_rank < 0:
                raise ValueError(f"stand-in-rank must be at least 0, got {self.stand_in_rank}")
            if self.stand_ins is None:
                raise ValueError("stand-in-rank is that of stand-ins, and --stand-ins is missing; give both")
        if self.stand_ins is not None and self.stand_ins.resolve() == self.out.resolve():
            raise ValueError(f"stand-ins must be another file than --out, got {self.stand_ins} for both")
        if self.stand_ins is not None and self.feed_forward_mean_k is None:
            raise ValueError(
                "stand-ins are for the neurons that are not kept, and --feed-forward-mean-k is missing; give both"
            )
        # Each checks its own number or name.
        _ = self.target, self.feed_forward_target, self.attention_completion

    @property
    def target(self) -> MeanK | LostMass | LossIncrease:
        if self.lost_mass is not None:
            return LostMass(self.lost_mass)
        if self.loss_increase is not None:
            return LossIncrease(self.loss_increase)
        return MeanK(_DEFAULT_MEAN_K if self.mean_k is None else self.mean_k)

    @property
    def feed_forward_target(self) -> MeanK | None:
        try:
            return None if self.feed_forward_mean_k is None else MeanK(self.feed_forward_mean_k)
        except ValueError as error:
            raise ValueError(str(error).replace("mean_k", "feed-forward-mean-k")) from error

    @property
    def rank(self) -> int:
        return DEFAULT_RANK if self.stand_in_rank is None else self.stand_in_rank

    @property
    def attention_completion(self) -> AnyCompletion:
        return completion_by_name(self.completion)


def run_calibration(request: CalibrationRequest, console: Console) -> None:
    """Calibrate and write the file.

    Raises:
        FileNotFoundError: there is no such text file.
        ValueError: transformers loads no such model, the text is not UTF-8, it is too short for the windows, or the
            options for neurons do not fit the model.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    content = read_utf8(request.text)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    options: dict[str, Any] = {} if request.gguf_file is None else {"gguf_file": request.gguf_file}
    config = load(AutoConfig, request.model, **options)
    length = _window_length(request, config)
    if isinstance(request.target, MeanK) and request.target.mean_k > length:
        raise ValueError(
            f"mean-k must be at most {length}, the tokens of a window, where it is full attention, got "
            f"{request.target.mean_k:g}; give a smaller one, or more --tokens"
        )
    tokenizer = load(AutoTokenizer, request.model, **options)
    batches = _windows(tokenizer, content, length, request)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = load(loader, request.model, dtype=torch.float32, **options).eval()
    _check_neurons(request, model)
    with _processes() as group, console.status("") as status:
        is_first = group is None or group.rank() == 0
        calibration = measure(
            model,
            batches,
            target=request.target,
            feed_forward_target=request.feed_forward_target,
            completion=request.attention_completion,
            progress=lambda step, done, total: status.update(f"{step}: {done} of {total}"),
            group=group,
        )
        if is_first:
            calibration.save(request.out)
        stand_ins = None
        if request.stand_ins is not None:
            stand_ins = fit_stand_ins(
                model,
                batches,
                feed_forward_k=calibration.feed_forward,
                rank=request.rank,
                progress=lambda step, done, total: status.update(f"fitting stand-ins: {done} of {total}"),
                group=group,
            )
            if is_first:
                stand_ins.save(request.stand_ins)
    if not is_first:
        return
    lines = [
        f"{request.target} on {request.windows} windows of {batches[0].shape[1]:,} tokens",
        f"mean k = {calibration.mean_k:.1f}; per head from {_smallest(calibration)} to {_largest(calibration)}",
        *_completion_lines(calibration),
        *_full_heads(calibration, batches[0].shape[1]),
        f"Written: {request.out}",
        "Use it with convert(model, attention_k=Calibration.load(FILE))",
        *([] if stand_ins is None else [_of_stand_ins(request)]),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _processes() -> Iterator[Any]:
    """The processes that `torchrun` or `accelerate launch` has started, which share the windows; None for one alone."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError("several processes need gloo, which this torch lacks; start the command by itself")
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _check_neurons(request: CalibrationRequest, model: Any) -> None:
    """Raise where the options for neurons do not fit the model, before the measurement whose result they need."""
    if request.feed_forward_mean_k is None:
        return
    sites = [site for site in feed_forward_sites(model) if site.obstacle is None]
    if not sites:
        raise ValueError(
            f"feed-forward-mean-k needs a layer that has a top-k form, {type(model).__name__} has none; leave it out"
        )
    if request.stand_ins is None:
        return
    most = min(min(site.sizes) for site in sites)
    if request.rank > most:
        raise ValueError(
            f"stand-in-rank must be at most {most}, the smallest size of an input or output of a feed-forward layer, "
            f"got {request.rank}{'' if request.stand_in_rank is not None else ', its default'}; give a smaller one"
        )
    neurons = sum(site.num_neurons for site in sites) / len(sites)
    if request.feed_forward_mean_k >= neurons:
        raise ValueError(
            f"feed-forward-mean-k must be below {neurons:g}, the mean number of neurons of a layer, got "
            f"{request.feed_forward_mean_k:g}; leave out --stand-ins, which are for the neurons that are not kept"
        )


def _of_stand_ins(request: CalibrationRequest) -> str:
    return f"Written: {request.stand_ins}, for convert(model, feed_forward_k=StandIns.load(FILE))"


def _window_length(request: CalibrationRequest, config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    if request.num_tokens is None:
        return min(_DEFAULT_TOKENS, longest or _DEFAULT_TOKENS)
    if longest is not None and request.num_tokens > longest:
        raise ValueError(
            f"tokens must be at most {longest}, the longest input of {request.model}, got {request.num_tokens}"
        )
    return request.num_tokens


def _windows(tokenizer: Any, content: str, length: int, request: CalibrationRequest) -> list[Tensor]:
    """Token ids [1, length] of each window."""
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids
    needed = request.windows * length
    if ids.shape[1] < needed:
        raise ValueError(
            f"{request.text} has {ids.shape[1]:,} tokens, {request.windows} windows of {length:,} need {needed:,}; "
            "give a longer text, or fewer --windows or --tokens"
        )
    return list(ids[:, :needed].split(length, dim=1))


def _completion_lines(calibration: Any) -> list[str]:
    scales = [scale for completion in calibration.completion.values() for scale in completion.mass_scale]
    return [f"completed; mass scale per head from {min(scales):.3g} to {max(scales):.3g}"] if scales else []


def _full_heads(calibration: Any, num_tokens: int) -> list[str]:
    """A line about the heads that keep every token of a window, if there are any."""
    ks = [k for head_k in calibration.values() for k in head_k]
    note = full_attention_note(ks, num_tokens)
    return [] if note is None else [f"{sum(k >= num_tokens for k in ks)} of {len(ks)} heads: {note}"]


def _smallest(calibration: Any) -> int:
    return min(min(ks) for ks in calibration.values())


def _largest(calibration: Any) -> int:
    return max(max(ks) for ks in calibration.values())
