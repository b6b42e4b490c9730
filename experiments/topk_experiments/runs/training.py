"""A training loop that may be interrupted at any step: from its checkpoint it continues to the same weights."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from topk_attention.environment import now
from topk_attention.files import check_writable

from .checks import check_above_0, check_at_least
from .files import damage_named, load_tensors
from .ledger import identity, what_differs
from .process import Send, failures_named, run_in_fresh_process
from .records import Json, read_json, write_json, write_whole
from .timing import Stopwatch

if TYPE_CHECKING:
    from rich.console import Console

_LAST_LEARNING_RATE = 0.1  # as a share of the highest


@dataclass(frozen=True)
class TrainingPlan:
    """Steps, learning rate and checkpoint of a training.

    learning_rate   the highest: it rises for `warm_up_steps`, then falls to a tenth, or stays if `falls` is False
    evaluate_every  steps between two points of the curve; a checkpoint is written at each
    identity        what must agree for a checkpoint to belong to this training, of `ledger.identity`
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
        """The plan of a request of `train_arms`; the config in it holds steps and learning rate."""
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
    """Check the fields that the configurations of small language models share.

    Raises:
        ValueError: a size is below 1, the learning rate is not above 0, or the heads do not divide d_model.
    """
    sizes = ("num_layers", "d_model", "num_heads", "d_ff", "context", "batch", "steps", "evaluate_every")
    check_at_least(1, config, *sizes, "threads")
    check_above_0(config, "learning_rate")
    check_heads(config)


def check_heads(config: Any) -> None:
    """
    Raises:
        ValueError: the heads do not divide d_model.
    """
    if config.d_model % config.num_heads:
        raise ValueError(f"d_model must be a multiple of its {config.num_heads} heads, got {config.d_model}")


def seed_of(seed: int, number: int) -> int:
    """A seed for the number-th random draw of a run, so that an interrupted run can continue at any of them."""
    return seed * 1_000_003 + number


def random_windows(tokens: Tensor, config: Json, seed: int, number: int) -> Tensor:
    """Random windows of tokens, [B, L + 1]: B is the config's "batch", L its "context"; seed and number choose them."""
    generator = torch.Generator().manual_seed(seed_of(seed, number))
    starts = torch.randint(len(tokens) - config["context"], (config["batch"], 1), generator=generator)
    return tokens[starts + torch.arange(config["context"] + 1)]


def schedule(step: int, steps: int, warm_up_steps: int, falls: bool = True) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to a tenth, or no fall."""
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
    """Train to the last step. Resume from the checkpoint if it belongs to the same training.

    optimizer  its groups learn at the plan's learning rate, times their "rate" if they have one
    losses     step -> losses of the parts of its batch, scaled so that they sum to the loss of the step. Random draws
               in them must depend on the step alone; torch is seeded anew for each step
    evaluate   -> fields of a point of the curve; called with the model in evaluation mode and without gradients
    send       receives each step and its loss

    Returns curve, elapsed_s (seconds of the steps alone) and other_cores. The checkpoint stays on disk: the caller
    deletes it once the result is on file.
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
    """Run one training in a process of its own and show steps and loss on a progress bar.

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

        with failures_named(name):
            return run_in_fresh_process(function, request, on_message=on_message)


def train_arms(
    path: Path,
    new: Json,
    requests: Mapping[str, Json],
    function: str,
    steps: int,
    console: Console,
    fresh: bool = False,
) -> Json:
    """Train every arm of a comparison that is not on file yet; write the record after each arm and return it.

    new       the record without arms. A record on file is continued if schema, config and text are the same and the
              ledger's rule holds for its environment and code; otherwise it is replaced
    requests  arm -> request of `function`, which also gets "identity", and "checkpoint" for `TrainingPlan`
    """
    check_writable("out", path)
    record = new | {"arms": []}
    configuration = {name: new[name] for name in ("schema", "config", "text")}
    old = None if fresh else read_json(path)
    changed = [] if old is None else what_differs(old, configuration, new["environment"])
    if old is not None and not changed:
        record = old
    elif old is not None:
        reason = f"{path} was made with another configuration, environment or code"
        line = f"{reason} and is replaced ({'; '.join(changed)})."
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with damage_named(path, "move it away or give another --out"):
        finished = [name_of_arm(arm) for arm in record["arms"]]
    for name, request in requests.items():
        if name in finished:
            continue
        checkpoint = path.parent / "work" / f"{name.replace(' ', '')}.pt"
        if fresh:
            checkpoint.unlink(missing_ok=True)
        whole = request | {"identity": identity(configuration, new["environment"]), "checkpoint": str(checkpoint)}
        arm = train_in_fresh_process(function, whole, name, steps, console)
        record["arms"].append({"name": name} | arm | {"date": now()})
        write_json(path, record)
        checkpoint.unlink(missing_ok=True)
    return record


def name_of_arm(arm: Json) -> str:
    """The name of an arm of a record. The oldest records hold no names: their arms differ in k alone.

    >>> name_of_arm({"name": "full"}), name_of_arm({"k": None}), name_of_arm({"k": 128})
    ('full', 'dense', 'k = 128')
    """
    return str(arm["name"]) if "name" in arm else "dense" if arm["k"] is None else f"k = {arm['k']}"


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Iterable[Tensor]],
    plan: TrainingPlan,
    step: int,
) -> float:
    torch.manual_seed(seed_of(plan.seed, step))  # so that dropout is the same after a resume
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
    """Write a checkpoint in one step, for `torch.load`: an interrupted run never leaves half a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_whole(path: Path, **options: Any) -> Json:
    """What `save_whole` wrote; the options are those of `torch.load`.

    Raises:
        ValueError: the file holds something else.
    """
    what = "is no checkpoint of these commands, or a damaged one"
    with damage_named(path, "delete it to begin anew", what):
        saved = load_tensors(path, **options)
        if not isinstance(saved, dict) or not isinstance(saved.get("identity"), dict):
            raise ValueError("it says of no run that it is that run's")
        return dict(saved)
