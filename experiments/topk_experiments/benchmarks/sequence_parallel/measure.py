"""One point: a training step of a Llama from scratch whose sequence one or several processes hold."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from topk_attention import convert
from topk_attention.distributed import sequence_parallel, sequence_parallel_cost, shard_batch

from ...runs.memory import PeakMeter
from ...runs.process import Send, run_in_fresh_process
from ...runs.records import Json
from ...runs.steps import Limits, Times, start_point

_NUM_CHECKED = 500  # tokens; no multiple of the parts


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured: a step of AdamW on one sequence."""

    processes: int = 1
    threads: Annotated[int, "CPU threads of a process."] = 1
    tokens: Annotated[int, "Of the sequence."] = 16_384
    k: Annotated[int, "Keys kept per query."] = 64
    layers: Annotated[int, "Layers of the model."] = 4
    hidden: Annotated[int, "Size of the model."] = 256
    heads: Annotated[int, "Query heads."] = 8
    key_heads: Annotated[int, "Key heads."] = 4
    neurons: Annotated[int, "Feed-forward neurons."] = 1024
    vocabulary: Annotated[int, "Different tokens."] = 4096
    method: Annotated[str, '"auto", "heads" or "keys".'] = "auto"
    seed: Annotated[int, "Seed of random numbers."] = 0

    def as_record(self) -> Json:
        return asdict(self)

    def __str__(self) -> str:
        shared = "one process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.tokens:,} tokens, {shared}, {self.threads} thread(s) each"


def measure_point(point: Point, repetitions: int, limits: Limits, on_message: Send) -> Json:
    """Start the processes of a point and put together what they measured.

    Raises:
        WorkerError: an answer is wrong, a process died, or exceeded a limit.
    """
    folder = Path(tempfile.mkdtemp())

    def run(rank: int) -> Json:
        request = {"point": asdict(point), "rank": rank, "folder": str(folder), "repetitions": repetitions}
        return run_in_fresh_process(
            f"{__name__}:measure_rank",
            request | {"memory_limit_gib": limits.memory_gib},
            time_limit_s=limits.time_s,
            on_message=on_message if rank == 0 else None,
            memory_in_use=True,
        )

    try:
        with ThreadPoolExecutor(point.processes) as pool:
            ranks = list(pool.map(run, range(point.processes)))
    finally:
        shutil.rmtree(folder)
    return {
        "ranks": ranks,
        "elapsed_s": max(rank["elapsed_s"] for rank in ranks),
        "cpu_s": sum(rank["cpu_s"] for rank in ranks),
        "peak_mib": max(rank["peak_mib"] for rank in ranks),
        "loss": ranks[0]["loss"],
    }


def measure_rank(request: Json, send: Send) -> Json:
    """What one process of a point measures: times of a step, CPU seconds, and the peak of memory of model and step."""
    start_point(request)
    point, rank = Point(**request["point"]), request["rank"]
    store = dist.FileStore(str(Path(request["folder"]) / "store"), point.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=point.processes, timeout=timedelta(seconds=1800))
    mesh = init_device_mesh("cpu", (point.processes,), mesh_dim_names=("cp",))
    send({"doing": "checking gradients"})
    error = _check(point, mesh)
    send({"doing": "the first step"})
    times, cpu_times = Times("cpu"), []
    with PeakMeter() as meter:
        step = _Step(point, mesh)
        losses = [step()]
        for repetition in range(request["repetitions"]):
            send({"doing": f"step {repetition + 2} of {request['repetitions'] + 1}"})
            dist.barrier()
            before = time.process_time()
            times.take(lambda: losses.append(step()))
            cpu_times.append(time.process_time() - before)
    result = times.as_record() | meter.read().as_record()
    dist.barrier()
    return result | {
        "cpu_s": sorted(cpu_times)[len(cpu_times) // 2],
        "loss": losses[0],
        "losses": losses,
        "largest_gradient_error": error,
        "attention_of_a_layer_on_paper": _on_paper(point, rank),
    }


def _on_paper(point: Point, rank: int) -> Json:
    cost = sequence_parallel_cost(
        point.tokens,
        num_ranks=point.processes,
        num_heads=point.heads,
        num_key_heads=point.key_heads,
        head_dim=point.hidden // point.heads,
        k=point.k,
        is_masked=False,
        method=point.method,
        rank=rank,
    )
    return asdict(cost)


class _Step:
    """A step of training: forward, backward, the sum of gradients over processes, and the optimiser."""

    def __init__(self, point: Point, mesh: Any) -> None:
        self.point, self.mesh = point, mesh
        self.model = new_model(point)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.shard = shard_batch(batch_of(point, point.tokens), mesh, shift_labels=True)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss = gradients_of(self.model, self.shard, self.mesh, self.point)
        self.optimizer.step()
        return loss


def new_model(point: Point) -> nn.Module:
    """A Llama with random weights, the same on every process, converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(point.seed)
    config = LlamaConfig(
        vocab_size=point.vocabulary,
        hidden_size=point.hidden,
        intermediate_size=point.neurons,
        num_hidden_layers=point.layers,
        num_attention_heads=point.heads,
        num_key_value_heads=point.key_heads,
        max_position_embeddings=max(point.tokens, _NUM_CHECKED),
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    convert(model, attention_k=point.k)
    return model


def batch_of(point: Point, tokens: int) -> dict[str, Tensor]:
    """One sequence, the same on every process."""
    generator = torch.Generator().manual_seed(point.seed)
    drawn = torch.randint(point.vocabulary, (1, tokens), generator=generator)
    return {"input_ids": drawn, "labels": drawn}


def gradients_of(model: nn.Module, shard: dict[str, Tensor], mesh: Any, point: Point) -> float:
    """Compute the gradients of the whole sequence, summed over processes; returns its loss."""
    shares = sequence_parallel(model, mesh, method=point.method) if mesh.size() > 1 else nullcontext()  # type: ignore[arg-type]
    with shares:
        loss = model(**shard).loss
        loss.backward()
    total = loss.detach()
    if mesh.size() > 1:
        dist.all_reduce(total)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return float(total)


def _check(point: Point, mesh: Any) -> float:
    """How far gradients over processes are from those of the whole sequence on each, for few tokens.

    Raises:
        ValueError: too far.
    """
    one = new_model(point)
    shared: nn.Module = copy.deepcopy(one)
    batch = batch_of(point, _NUM_CHECKED)
    one(**batch).loss.backward()
    gradients_of(shared, shard_batch(batch, mesh, shift_labels=True), mesh, point)
    errors = []
    for parameter, expected in zip(shared.parameters(), one.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        errors.append(float((parameter.grad - expected.grad).abs().max() / expected.grad.abs().max()))
    if not max(errors) < 1e-3:
        raise ValueError(f"gradients over {point.processes} processes are off from those of one by {max(errors):.2g}")
    return max(errors)
