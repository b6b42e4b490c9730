"""One run: a model trained with one method of attention from one seed, on one process or on several.

Every random draw depends on the seed and the number of the step alone, so that a run resumes from its checkpoint to
the same losses. Several processes share every batch and average their gradients. The result is that of one process,
up to rounding and the draws of dropout.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rivals import new_attention
from ..runs.memory import PeakMeter
from ..runs.records import Json
from ..runs.timing import Stopwatch
from ..runs.training import load_whole, save_whole, seed_of
from .configuration import LraConfig, TrainingConfig
from .model import Classifier
from .tasks import Examples, PreparedData, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

# Called after each step with the step, the mean training loss since the last point, and a point of the curve or None.
Report = Callable[[int, float, Json | None], None]


@dataclass(frozen=True)
class Run:
    """What is trained.

    checkpoint  file that keeps an unfinished run
    model       file for the weights of the best validation accuracy
    """

    config: LraConfig
    method: str
    seed: int
    checkpoint: Path
    model: Path

    def identity(self, data: PreparedData) -> Json:
        """The configuration of the run for the ledger, its checkpoint and its weights."""
        return {
            "config": self.config.as_record(),
            "method": self.method,
            "options": self.config.attention_options(self.method),
            "seed": self.seed,
            "data": {name: split["sha256"] for name, split in data.description["splits"].items()},
        }


def new_model(config: LraConfig, task: Task, method: str, seed: int) -> Classifier:
    """A model whose parameters are the same for every method."""
    options = config.attention_options(method)

    def attention() -> nn.Module:
        # Random draws of a method must not change the draws after it.
        with torch.random.fork_rng(devices=[]):
            return new_attention(method, head_dim=config.model.head_dim, **options)

    torch.manual_seed(seed)
    return Classifier(config.model, task, attention)


def train(run: Run, task: Task, data: PreparedData, accelerator: Accelerator, report: Report | None = None) -> Json:
    """Train to the last step, or until validation accuracy stops rising, and test. Returns the result for the record.

    The checkpoint stays on disk: the caller deletes it once the record is on file.

    Raises:
        ValueError: a batch cannot be shared equally among the processes.
    """
    training = run.config.training
    if training.batch % accelerator.num_processes:
        raise ValueError(f"batch must be a multiple of the {accelerator.num_processes} processes, got {training.batch}")
    with PeakMeter() as meter:
        _reset_peak(accelerator.device)
        trainer = _Trainer(run, task, data, accelerator, lambda: _peak_mib(accelerator.device, meter))
        trainer.resume()
        trainer.train(report or (lambda *_: None))
        return trainer.result()


class _Trainer:
    """The model, its optimizer, and the state that a checkpoint keeps."""

    def __init__(
        self, run: Run, task: Task, data: PreparedData, accelerator: Accelerator, peak_mib: Callable[[], float]
    ) -> None:
        self._run = run
        self._peak_mib = peak_mib  # of this process; `state` keeps the largest of all processes that worked on the run
        self._training = run.config.training
        self._data = data
        self._lengths = data.splits["train"].lengths()
        self._accelerator = accelerator
        model = new_model(run.config, task, run.method, run.seed)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), eps=1e-9, weight_decay=self._training.weight_decay
        )
        self._model = accelerator.prepare(model)
        self._best_weights: dict[str, Tensor] = {}
        self.state: Json = {
            "step": 0,
            "curve": [],
            "elapsed_s": 0.0,
            "processor_s": 0.0,
            "step_s": [],
            "other_cores": None,
            "best": None,
            "peak_mib": 0.0,
        }

    def resume(self) -> None:
        """Resume from the checkpoint if it belongs to this run."""
        path = self._run.checkpoint
        if not path.exists():
            return
        saved = load_whole(path, map_location=self._accelerator.device)
        if saved["identity"] != self._run.identity(self._data):
            return
        self._plain_model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._best_weights = saved["best_weights"]
        self.state = saved["state"]

    def train(self, report: Report) -> None:
        training, state = self._training, self.state
        losses, hits = [], []
        for step in range(state["step"] + 1, training.steps + 1):
            if self._is_out_of_patience():
                return
            processor_s_before = time.process_time()
            with Stopwatch() as stopwatch:
                loss, accuracy = self._step(step)
            state["processor_s"] += time.process_time() - processor_s_before
            losses.append(loss)
            hits.append(accuracy)
            state["elapsed_s"] += stopwatch.elapsed_s
            state["step_s"].append(stopwatch.elapsed_s)
            if stopwatch.other_cores is not None:
                state["other_cores"] = max(state["other_cores"] or 0.0, stopwatch.other_cores)
            point = None
            if step % training.evaluate_every == 0 or step == training.steps:
                point = self._point(step, statistics.fmean(losses), statistics.fmean(hits))
                self._keep(point)
            report(step, statistics.fmean(losses), point)
            if point is not None:
                losses.clear()
                hits.clear()

    def result(self) -> Json:
        """The result for the record; test accuracy of the weights with the best validation and of the last ones."""
        state = self.state
        best = last = self._test()
        state["peak_mib"] = max(state["peak_mib"], self._peak_mib())
        if state["best"]["step"] != state["step"]:
            self._plain_model.load_state_dict(self._best_weights)
            best = self._test()
        if self._accelerator.is_main_process:
            save_whole(self._run.model, {"weights": self._best_weights, "identity": self._run.identity(self._data)})
        return {
            "num_parameters": self.num_parameters,
            "steps": state["step"],
            "curve": state["curve"],
            "best": state["best"] | {"test_loss": best[0], "test_accuracy": best[1]},
            "last": {"step": state["step"], "test_loss": last[0], "test_accuracy": last[1]},
            "elapsed_s": state["elapsed_s"],
            "processor_s": state["processor_s"],
            "median_step_s": statistics.median(state["step_s"]),
            "other_cores": state["other_cores"],
            "peak_mib": state["peak_mib"],
        }

    @property
    def _plain_model(self) -> nn.Module:
        return self._accelerator.unwrap_model(self._model)

    def _step(self, step: int) -> tuple[float, float]:
        """Loss and accuracy of one step over the whole batch."""
        training, accelerator = self._training, self._accelerator
        numbers = self._batch_numbers(step)
        own = numbers[accelerator.process_index :: accelerator.num_processes]
        torch.manual_seed(seed_of(self._run.seed, step * accelerator.num_processes + accelerator.process_index))
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        batch = self._data.splits["train"].batch(own).to(accelerator.device)
        self._model.train()
        logits = self._model(batch.tokens, batch.mask)
        loss = F.cross_entropy(logits.float(), batch.labels)
        self._optimizer.zero_grad()
        accelerator.backward(loss)
        if training.gradient_norm:
            nn.utils.clip_grad_norm_(self._model.parameters(), training.gradient_norm)
        self._optimizer.step()
        hits = (logits.argmax(1) == batch.labels).float().mean()
        both = accelerator.reduce(torch.stack([loss.detach(), hits]), reduction="mean")
        return both[0].item(), both[1].item()

    def _batch_numbers(self, step: int) -> list[int]:
        training, seed = self._training, self._run.seed
        if training.alike_over:
            return alike_batch_numbers(self._lengths, training.batch, seed, step, training.alike_over)
        return batch_numbers(len(self._lengths), training.batch, seed, step)

    def _point(self, step: int, training_loss: float, training_accuracy: float) -> Json:
        examples = self._data.splits["validation"]
        if self._training.validation_examples:
            examples = examples.take(range(min(examples.num_examples, self._training.validation_examples)))
        loss, accuracy = evaluate(self._model, examples, self._accelerator, self._training.batch)
        return {
            "step": step,
            "training_loss": training_loss,
            "training_accuracy": training_accuracy,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "elapsed_s": self.state["elapsed_s"],
        }

    def _keep(self, point: Json) -> None:
        """Add a point to the curve and write a checkpoint."""
        state = self.state
        state["step"] = point["step"]
        state["curve"] = [*state["curve"], point]
        state["peak_mib"] = max(state["peak_mib"], self._peak_mib())
        if state["best"] is None or point["validation_accuracy"] > state["best"]["validation_accuracy"]:
            state["best"] = {"step": point["step"], "validation_accuracy": point["validation_accuracy"]}
            weights = self._plain_model.state_dict()
            self._best_weights = {name: value.detach().clone() for name, value in weights.items()}
        if self._accelerator.is_main_process:
            save_whole(
                self._run.checkpoint,
                {
                    "identity": self._run.identity(self._data),
                    "model": self._plain_model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "best_weights": self._best_weights,
                    "state": state,
                },
            )

    def _is_out_of_patience(self) -> bool:
        state, patience = self.state, self._training.patience
        if not patience or state["best"] is None:
            return False
        since = [point for point in state["curve"] if point["step"] > state["best"]["step"]]
        return len(since) >= patience

    def _test(self) -> tuple[float, float]:
        return evaluate(self._model, self._data.splits["test"], self._accelerator, self._training.batch)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, accelerator: Accelerator, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy over all examples, shared among the processes.

    batch_size  examples at a time, over all processes; the batch of a training step fits in memory
    """
    # The model without its wrapper for several processes: every forward pass of the wrapper exchanges buffers with the
    # other processes, which may have another number of batches.
    model = accelerator.unwrap_model(model)
    was_training = model.training
    model.eval()
    loss, hits = 0.0, 0
    # Sorted by length, for little padding.
    order = np.argsort(examples.lengths(), kind="stable")
    own = order[accelerator.process_index :: accelerator.num_processes].tolist()
    own_batch_size = batch_size // accelerator.num_processes
    for first in range(0, len(own), own_batch_size):
        batch = examples.batch(own[first : first + own_batch_size]).to(accelerator.device)
        logits = model(batch.tokens, batch.mask).float()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        hits += int((logits.argmax(1) == batch.labels).sum())
    model.train(was_training)
    # float32 counts up to 16 million hits; float64 is not on every device.
    totals = torch.tensor([loss, hits], dtype=torch.float32, device=accelerator.device)
    total_loss, total_hits = accelerator.reduce(totals, reduction="sum").tolist()
    return total_loss / examples.num_examples, total_hits / examples.num_examples


def batch_numbers(num_examples: int, batch: int, seed: int, step: int) -> list[int]:
    """The examples of a step, counted from 1. Every epoch shows all examples in a new random order.

    >>> sorted(batch_numbers(6, 3, 0, 1) + batch_numbers(6, 3, 0, 2))
    [0, 1, 2, 3, 4, 5]
    """
    numbers: list[int] = []
    place = (step - 1) * batch
    while len(numbers) < batch:
        epoch, first = divmod(place + len(numbers), num_examples)
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        numbers += order[first : first + batch - len(numbers)].tolist()
    return numbers


def alike_batch_numbers(lengths: np.ndarray, batch: int, seed: int, step: int, alike_over: int) -> list[int]:
    """Like `batch_numbers`, but of every `alike_over` steps each gets examples of about equal length.

    lengths  of all examples

    >>> lengths = np.array([3, 9, 4, 8])
    >>> sorted(sorted(lengths[alike_batch_numbers(lengths, 2, 0, step, 2)].tolist()) for step in (1, 2))
    [[3, 4], [8, 9]]
    """
    stretch, place = divmod(step - 1, alike_over)
    numbers = np.array(batch_numbers(len(lengths), batch * alike_over, seed, stretch + 1))
    numbers = numbers[np.argsort(lengths[numbers], kind="stable")].reshape(alike_over, batch)
    # In a random order, not the short ones first.
    turn = np.random.default_rng([seed, stretch, alike_over]).permutation(alike_over)[place]
    return numbers[turn].tolist()


def new_accelerator(device: str, training: TrainingConfig) -> Accelerator:
    """An accelerator for one process, or for those that torchrun or `accelerate launch` started.

    device  "cpu", or "auto" for what accelerate finds

    Raises:
        ValueError: device is something else.
    """
    from accelerate import Accelerator

    if device not in ("auto", "cpu"):
        raise ValueError(f'device must be "auto" or "cpu", got {device!r}')
    return Accelerator(cpu=device == "cpu", mixed_precision=training.precision)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mib(device: torch.device, meter: PeakMeter) -> float:
    """Peak memory of the GPU; without one that of the process, above what it held before the run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return meter.read().peak_mib
