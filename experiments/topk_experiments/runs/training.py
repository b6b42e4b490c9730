"""A training loop that can stop anywhere: its checkpoint holds all it needs to go on to the same weights."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from topk_attention.environment import now

from .checks import check_at_least
from .process import Send, WorkerError, run_in_fresh_process
from .records import SAME_NUMBERS, Json, read_json, write_json, write_whole
from .timing import Stopwatch

if TYPE_CHECKING:
    from rich.console import Console

_LAST_LEARNING_RATE = 0.1  # as a share of the highest


@dataclass(frozen=True)
class TrainingPlan:
    """How long, how fast, and where the checkpoint is.

    learning_rate   the highest: it rises for `warm_up_steps` and falls to a tenth, or stays where `falls` is False
    evaluate_every  steps between two points of the curve, each with a checkpoint
    identity        what has to agree for a checkpoint to be of the same training
    """

    steps: int
    learning_rate: float
    evaluate_every: int
    checkpoint: Path
    identity: Json
    seed: int = 0
    warm_up_steps: int = 40
    falls: bool = True
    gradient_norm: float = 1.0

    @staticmethod
    def of_arm(request: Json) -> TrainingPlan:
        """The plan of a request that came through `train_arms`, whose config says how long and how fast."""
        config = {name: request["config"][name] for name in ("steps", "learning_rate", "evaluate_every", "seed")}
        return TrainingPlan(**config, checkpoint=Path(request["checkpoint"]), identity=request["identity"])

    def learning_rate_at(self, step: int) -> float:
        """
        >>> plan = TrainingPlan(1000, 1.0, 10, Path("x"), {})
        >>> plan.learning_rate_at(20), plan.learning_rate_at(40), round(plan.learning_rate_at(1000), 3)
        (0.5, 1.0, 0.1)
        """
        return self.learning_rate * schedule(step, self.steps, self.warm_up_steps, self.falls)


def check_model_and_training(config: object) -> None:
    """Check what configurations of small language models trained from scratch share.

    Raises:
        ValueError: a size is below 1, or the heads do not divide d_model.
    """
    sizes = ("num_layers", "d_model", "num_heads", "d_ff", "context", "batch", "steps", "evaluate_every")
    check_at_least(1, config, *sizes, "threads")
    check_heads(config)


def check_heads(config: Any) -> None:
    """
    Raises:
        ValueError: the heads do not divide d_model.
    """
    if config.d_model % config.num_heads:
        raise ValueError(f"d_model must be a multiple of its {config.num_heads} heads, got {config.d_model}")


def seed_of(seed: int, number: int) -> int:
    """A seed for the number-th random thing of a run, so that an interrupted run can go on with any of them."""
    return seed * 1_000_003 + number


def random_windows(tokens: Tensor, config: Json, seed: int, number: int) -> Tensor:
    """`batch` windows of `context` + 1 tokens, as the config has them, [B, L + 1]; seed and number decide which."""
    generator = torch.Generator().manual_seed(seed_of(seed, number))
    starts = torch.randint(len(tokens) - config["context"], (config["batch"], 1), generator=generator)
    return tokens[starts + torch.arange(config["context"] + 1)]


def schedule(step: int, steps: int, warm_up_steps: int, falls: bool = True) -> float:
    """Share of the highest learning rate: a straight rise, then half a cosine down to a tenth, or no fall."""
    if step < warm_up_steps:
        return step / warm_up_steps
    if not falls:
        return 1.0
    done = (step - warm_up_steps) / max(1, steps - warm_up_steps)
    return _LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Iterable[Tensor]],
    evaluate: Callable[[], Json],
    plan: TrainingPlan,
    send: Send,
) -> Json:
    """Train to the last step, from the checkpoint on where there is one of the same training.

    optimizer  its groups learn at the plan's learning rate, times their "rate" where they have one
    losses    step -> losses of its parts, each already divided so that their sum is that of the step. Whatever is
              random in them must depend on the step alone; torch's own random numbers do
    evaluate  -> fields of a point of the curve; the model is in evaluation mode meanwhile
    send      is told each step and its loss

    Returns curve, elapsed_s (of the steps alone) and other_cores. The checkpoint stays: remove it when the result is
    kept.
    """
    state: Json = {"step": 0, "elapsed_s": 0.0, "curve": [], "other_cores": None}
    if plan.checkpoint.exists():
        saved = load_whole(plan.checkpoint)
        if saved["identity"] == plan.identity:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            state = saved["state"]
    model.train()
    since_last_point: list[float] = []
    for step in range(state["step"] + 1, plan.steps + 1):
        with Stopwatch() as stopwatch:
            loss = _step(model, optimizer, losses, plan, step)
        since_last_point.append(loss)
        state["elapsed_s"] += stopwatch.elapsed_s
        if stopwatch.other_cores is not None:
            state["other_cores"] = max(state["other_cores"] or 0.0, stopwatch.other_cores)
        if step % plan.evaluate_every == 0 or step == plan.steps:
            model.eval()
            with torch.no_grad():
                point = {"step": step, "training_loss": sum(since_last_point) / len(since_last_point)} | evaluate()
            model.train()
            since_last_point.clear()
            state |= {"step": step, "curve": [*state["curve"], point | {"elapsed_s": state["elapsed_s"]}]}
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_whole(plan.checkpoint, weights | {"state": state, "identity": plan.identity})
        send({"step": step, "loss": loss})
    model.eval()
    return {name: state[name] for name in ("curve", "elapsed_s", "other_cores")}


def train_in_fresh_process(function: str, request: Json, name: str, steps: int, console: Console) -> Json:
    """Run one training in a process of its own, with a bar that shows steps and loss.

    Raises:
        WorkerError: it failed; the message names it.
    """
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(escape(name), total=steps)

        def on_message(message: Json) -> None:
            bar.update(task, completed=message["step"], description=f"{escape(name)}, loss {message['loss']:.3f}")

        try:
            return run_in_fresh_process(function, request, on_message=on_message)
        except WorkerError as error:
            raise WorkerError(error.outcome, f"{name} failed ({error.outcome}): {error}") from error


def train_arms(
    path: Path,
    new: Json,
    requests: Mapping[str, Json],
    function: str,
    steps: int,
    console: Console,
    fresh: bool = False,
) -> Json:
    """Train every arm of a comparison that its record does not hold yet; write the record after each and return it.

    new       the record without arms. Its schema, config, text and environment have to agree with those of a record on
              file for that to be continued
    requests  arm -> request of `function`, which also gets "identity", and "checkpoint" for `TrainingPlan`
    """
    record = new | {"arms": []}
    same = _identity(record)
    old = None if fresh else read_json(path)
    if old is not None and _identity(old) == same:
        record = old
    elif old is not None:
        console.print(f"{path} was made with another configuration and is replaced.", markup=False, highlight=False)
    for name, request in requests.items():
        if name in [arm["name"] for arm in record["arms"]]:
            continue
        checkpoint = path.parent / "work" / f"{name.replace(' ', '')}.pt"
        if fresh:
            checkpoint.unlink(missing_ok=True)
        whole = request | {"identity": same, "checkpoint": str(checkpoint)}
        arm = train_in_fresh_process(function, whole, name, steps, console)
        record["arms"].append({"name": name} | arm | {"date": now()})
        write_json(path, record)
        checkpoint.unlink(missing_ok=True)
    return record


def _identity(record: Json) -> Json:
    """What has to agree for two arms to stand in one picture."""
    here = {name: record.get("environment", {}).get(name) for name in SAME_NUMBERS}
    return {name: record.get(name) for name in ("schema", "config", "text")} | here


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Iterable[Tensor]],
    plan: TrainingPlan,
    step: int,
) -> float:
    torch.manual_seed(seed_of(plan.seed, step))  # dropout after a checkpoint as without one
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate_at(step) * group.get("rate", 1.0)
    optimizer.zero_grad()
    total = 0.0
    for loss in losses(step):
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_norm)
    optimizer.step()
    return total


def save_whole(path: Path, content: Json) -> None:
    """Write tensors and what goes with them in one step, for `torch.load`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_whole(path: Path, **options: Any) -> Json:
    """What `save_whole` wrote; the options are those of `torch.load`.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        saved = torch.load(path, weights_only=True, **options)
        if not isinstance(saved, dict) or "identity" not in saved:
            raise ValueError("it says of no run that it is that run's")
    except (
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no checkpoint of these commands, or a damaged one: {reason}") from error
    return saved
