"""Models that two and four processes share in every way that is supported, each held against one process.

Run by itself with a folder. It imports everything once and then forks worlds of processes: one that trains alone and
writes what the others are compared with, then two, then four, then one again. Each process writes what it found, a
number or words by the name of a claim, into the folder as WORLD-RANK.json.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first operator would load it, in every process anew
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from topk_attention import Completion, calibrate, convert, fit_stand_ins, topk_attention, topk_feed_forward, unconvert
from topk_attention.calibrate import LossIncrease, MeanK
from topk_attention.functional.feed_forward_shard import topk_feed_forward_of_shard

FAMILIES = ("llama", "bert", "t5")
K = {"attention_k": 8, "feed_forward_k": 24}
HEADS = [[2, 9, 4, 14], [11, 3, 7, 2]]
STEPS = 3
Found = dict[str, Any]
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
# 130 neurons: neither two nor four processes hold equally many of a multiple of 32.
_LLAMA = LlamaConfig(**_SMALL, intermediate_size=130, num_key_value_heads=4, max_position_embeddings=128)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def made(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(copy.deepcopy(_LLAMA))
    if family == "bert":
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(**_SMALL, intermediate_size=64, max_position_embeddings=128, **dropouts))
    if family == "phi":  # biases, no gate
        return PhiForCausalLM(PhiConfig(**_SMALL, **_SPECIAL, intermediate_size=64))
    if family == "phi3":  # gate and up in one matrix
        return Phi3ForCausalLM(Phi3Config(**_SMALL, **_SPECIAL, intermediate_size=64, num_key_value_heads=4))
    t5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 97}
    return T5ForConditionalGeneration(T5Config(**t5, dropout_rate=0.0, decoder_start_token_id=0))


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Four rows, with as many labels in each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (4, 24), generator=generator)
    if family == "llama":
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1::2, -5:] = 0
    labels = torch.randint(3, 97, (4, 12), generator=generator) if family == "t5" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: rows.chunk(dist.get_world_size())[dist.get_rank()] for name, rows in batch.items()}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def off(found: Any, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((whole(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    # A large eps: where a gradient is nothing but rounding, Adam would make a step of it.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def trained(model: Any, batch: dict[str, torch.Tensor], steps: int, optimizer: Any = None) -> list[torch.Tensor]:
    """The loss of each step."""
    optimizer, losses = optimizer or optimizer_of(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def off_from(reference: Found, family: str, losses: list[torch.Tensor], parameters: Any) -> float:
    """How far losses and weights after the last of the steps are from those of one process."""
    expected = reference[family]
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    worst = [off(mean / dist.get_world_size(), expected["losses"][-len(losses) :])]
    parameters = dict(parameters)
    assert len(parameters) == len(expected["weights"])
    # Of the change that training made, so that weights which hardly move count too.
    changes = max(float((after - before).abs().max()) for before, after in expected["weights"].values())
    worst += [
        float((whole(parameters[name].detach()) - after).abs().max()) / changes
        for name, (_, after) in expected["weights"].items()
    ]
    return max(worst)


def alone(folder: Path) -> Found:
    """Train and generate in one process, for the others to be compared with."""
    reference: Found = {}
    for family in FAMILIES:
        model = made(family)
        convert(model, **K)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = trained(model, batch_of(family), STEPS)
        weights = {name: (before[name], p.detach()) for name, p in model.named_parameters()}
        reference[family] = {"losses": torch.stack(losses), "weights": weights}
    for family in ("llama", "phi", "phi3"):
        made(family).save_pretrained(folder / family)
    converted = made("llama")
    convert(converted, attention_k=HEADS, feed_forward_k=24, completion=Completion([0.5, 4, 1, 9]))
    converted.save_pretrained(folder / "converted")
    torch.save(reference, folder / "reference.pt")
    return {}


def layers_of(model: Any, family: str) -> list[torch.nn.Module]:
    if family == "t5":
        return [*model.encoder.block, *model.decoder.block]
    return list(model.model.layers if family == "llama" else model.bert.encoder.layer)


def sharded(model: Any, family: str) -> Any:
    for layer in layers_of(model, family):
        fully_shard(layer)
    fully_shard(model)
    return model


def data_parallel(reference: Found) -> Found:
    found = {}
    for family in FAMILIES:
        for order, checkpointed in (("before", False), ("after", True)):
            model = made(family)
            if checkpointed:
                model.gradient_checkpointing_enable()
            if order == "before":
                convert(model, **K)
            wrapped = DistributedDataParallel(model)
            if order == "after":
                convert(wrapped, **K)
            losses = trained(wrapped, own_rows(batch_of(family)), STEPS)
            found[f"DDP, {family}, converted {order}"] = off_from(reference, family, losses, model.named_parameters())
    return found


def fully_sharded(reference: Found, folder: Path) -> Found:
    found = {}
    for family in FAMILIES:
        for order in ("before", "after"):
            for checkpointed in (False, True):
                # T5 has its table, which later layers read. The others need not be shown in every combination, and
                # of four processes `continued` shows more.
                if family != "t5" and checkpointed != (order == "after"):
                    continue
                if dist.get_world_size() == 4 and (order == "after" or not checkpointed):
                    continue
                model = made(family)
                if order == "before":
                    convert(model, **K)
                sharded(model, family)
                if order == "after":
                    convert(model, **K)
                if checkpointed:
                    model.gradient_checkpointing_enable()
                optimizer = optimizer_of(model)
                losses = trained(model, own_rows(batch_of(family)), STEPS - 1, optimizer)
                if (dist.get_world_size(), order, checkpointed) == (2, "before", False):
                    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                    dcp.save(state, checkpoint_id=folder / f"after-2-steps-{family}")
                losses += trained(model, own_rows(batch_of(family)), 1, optimizer)
                name = f"FSDP2, {family}, converted {order}" + (", checkpointed" if checkpointed else "")
                found[name] = off_from(reference, family, losses, model.named_parameters())
    return found


def continued(reference: Found, folder: Path) -> Found:
    """Take up the training of two processes in this number of processes."""
    found = {}
    for family in FAMILIES:
        model = made(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        if dist.get_world_size() > 1:
            sharded(model, family)
        convert(model, **K)
        optimizer = optimizer_of(model)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder / f"after-2-steps-{family}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        losses = trained(model, own_rows(batch_of(family)), 1, optimizer)
        found[f"checkpoint of two, {family}"] = off_from(reference, family, losses, model.named_parameters())
    return found


def refused_when_sharded() -> Found:
    def by_itself() -> Any:
        model = made("llama")
        for layer in model.model.layers:
            fully_shard(layer.mlp)
        return model

    def restored() -> None:
        model = made("llama")
        convert(model, **K)
        for layer in model.model.layers:
            fully_shard(layer.mlp)
        unconvert(model)

    frozen = sharded(made("llama").requires_grad_(False), "llama")
    convert(frozen, **K)
    whole_model = made("llama")
    convert(whole_model, **K)
    tokens = batch_of("llama")["input_ids"]
    return {
        "FSDP2, frozen, converted after": off(frozen(tokens).logits, whole_model(tokens).logits.detach()),
        "network sharded by itself": error_of(lambda: convert(by_itself(), feed_forward_k=24)),
        "restored after it was sharded by itself": error_of(restored),
    }


def cut(folder: Path, name: str = "llama", **options: Any) -> Any:
    """A model that transformers has cut over all processes."""
    from transformers.distributed import DistributedConfig

    cls = {"phi": PhiForCausalLM, "phi3": Phi3ForCausalLM}.get(name, LlamaForCausalLM)
    return cls.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_plan="auto"), **options)


def tensor_parallel(folder: Path) -> Found:
    tokens = batch_of("llama")["input_ids"]
    completion = Completion([0.5, 4, 1, 9])
    settings: dict[str, dict[str, Any]] = {
        "one k": {"attention_k": 8},
        "k per head": {"attention_k": HEADS},
        "k per head, completed": {"attention_k": HEADS, "completion": completion},
        "feed-forward, k = 5": {"feed_forward_k": 5},
        "feed-forward, k = 24": {"feed_forward_k": 24},
        "feed-forward, k = 100": {"feed_forward_k": 100, "backend": "chunked"},
        "feed-forward, all": {"feed_forward_k": "all"},
        "both": {**K, "attention_k": HEADS},
    }
    if dist.get_world_size() == 4:  # two processes have shown the others
        settings = {name: settings[name] for name in ("k per head, completed", "feed-forward, k = 5", "both")}
    found = {}

    def compared(name: str, shared: Any, one: Any) -> None:
        for model in (shared, one):
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        worst = [off(shared.get_parameter(n).grad, gradient) for n, gradient in gradients.items()]
        with torch.no_grad():
            worst.append(off(shared.eval()(tokens).logits, one.eval()(tokens).logits))
        found[f"TP, {name}"] = max(worst)

    for name, arguments in settings.items():
        shared, one = cut(folder), made("llama")
        for model in (shared, one):
            convert(model, **arguments)
        compared(name, shared, one)
    shared, one = cut(folder, "phi"), made("phi")
    for model in (shared, one):
        convert(model, feed_forward_k=9)
    compared("biases and no gate", shared, one)
    shared, one = cut(folder, "converted"), LlamaForCausalLM.from_pretrained(folder / "converted")
    for model in (shared, one):
        convert(model)
    compared("checkpoint of a converted model", shared, one)
    shared.gradient_checkpointing_enable()
    shared.zero_grad(), one.zero_grad()
    compared("checkpointed", shared, one)
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}}.items():
        written = [
            model.eval().generate(tokens[:2], max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
            for model in (shared, one)
        ]
        found[f"TP, generate, {name}"] = float((written[0] != written[1]).sum())
    calibrations = [
        calibrate(model, [tokens], target=MeanK(6), completion="fit", queries_per_head=8)
        for model in (cut(folder), made("llama"))
    ]
    found["TP, calibrated"] = _off_calibration(*calibrations)
    return found


def refused_when_cut(folder: Path) -> Found:
    shared, whole_model = cut(folder), made("llama")
    tokens = batch_of("llama")["input_ids"]
    weight = shared.model.layers[0].self_attn.q_proj.weight
    found = {
        "gates apart": error_of(lambda: convert(cut(folder, "phi3"), feed_forward_k=9)),
        "cut operand": error_of(lambda: topk_attention(weight[None], weight[None], weight[None], k=2)),
        "calibrated neurons": error_of(
            lambda: calibrate(shared, [tokens], target=MeanK(6), feed_forward_target=MeanK(9))
        ),
        "stand-ins": error_of(lambda: fit_stand_ins(shared, [tokens], feed_forward_k=9, rank=0)),
        "batches dealt out": error_of(lambda: calibrate(shared, [tokens], target=MeanK(6), group=dist.group.WORLD)),
    }
    convert(shared, feed_forward_k=9)
    hook = shared.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    found["hook on a cut network"] = error_of(lambda: shared(tokens))
    hook.remove()
    convert(whole_model, attention_k=4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
        found["context_parallel"] = error_of(lambda: whole_model(tokens))
    found["afterwards"] = error_of(lambda: whole_model(tokens))
    return found


def ties() -> Found:
    """Whole numbers, of which many are equal: the k best are the same to the last bit."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).double()

    x, w_in, w_gate, w_out = draw(40, 3), draw(21, 3), draw(21, 3), draw(5, 21)
    rank, size = dist.get_rank(), -(-21 // dist.get_world_size())
    own = slice(rank * size, (rank + 1) * size)
    worst = 0.0
    for k in (1, 4, 10, 20):
        for gate in (None, w_gate):
            expected = topk_feed_forward(x, w_in, w_out, k=k, w_gate=gate, backend="reference")
            for backend in ("auto", "chunked"):
                part = topk_feed_forward_of_shard(
                    x,
                    w_in[own],
                    w_out[:, own],
                    k=k,
                    group=dist.group.WORLD,
                    num_neurons=21,
                    most_neurons=size,
                    w_gate=None if gate is None else gate[own],
                    backend=backend,
                )
                dist.all_reduce(part)
                worst = max(worst, float((part - expected).abs().max()))
    return {"ties": worst}


def calibrated() -> Found:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(3, 97, (1, 20 + 4 * i), generator=generator) for i in range(3)]
    found = {}
    settings: dict[str, dict[str, Any]] = {
        "a budget": {"target": MeanK(6), "feed_forward_target": MeanK(20)},
        "a fitted completion": {"target": MeanK(6), "completion": "fit"},
    }
    if dist.get_world_size() == 2:
        settings["a search"] = {"target": LossIncrease(0.01)}
    for name, arguments in settings.items():
        model = made("llama")
        shared, one = (
            calibrate(model, batches, queries_per_head=7, group=group, **arguments)
            for group in (dist.group.WORLD, None)
        )
        found[f"calibrated, {name}"] = _off_calibration(shared, one)
    shared, one = (
        fit_stand_ins(made("llama"), batches, feed_forward_k=20, rank=3, group=group)
        for group in (dist.group.WORLD, None)
    )
    assert dict(shared) == dict(one)
    assert shared.about == one.about
    found["stand-ins of all processes"] = max(
        off(shared.stand_in[path].w_out @ shared.stand_in[path].w_in, stand_in.w_out @ stand_in.w_in)
        for path, stand_in in one.stand_in.items()
    )
    return found


def _off_calibration(shared: Any, one: Any) -> float:
    """How far the curves are apart; infinite where anything that was chosen differs."""
    chosen = [
        (dict(c), c.feed_forward, c.about, {path: str(of) for path, of in c.completion.items()}) for c in (shared, one)
    ]
    if abs(chosen[0][2].pop("loss") - chosen[1][2].pop("loss")) > 1e-5 or chosen[0] != chosen[1]:
        return float("inf")
    return max(
        off(getattr(mine[path], name), getattr(curves, name))
        for mine, theirs in ((shared.curves, one.curves), (shared.feed_forward_curves, one.feed_forward_curves))
        for path, curves in theirs.items()
        for name in ("lost_mass", "loss_error", "loss_change")
    )


def sharded_by_others(reference: Found, folder: Path) -> Found:
    """What transformers and accelerate themselves shard."""
    from transformers.distributed import DistributedConfig

    found = {}
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(folder / "llama", distributed_config=config).train()
    assert isinstance(model.lm_head.weight, DTensor)
    convert(model, **K)
    losses = trained(model, own_rows(batch_of("llama")), STEPS)
    found["FSDP2 of transformers"] = off_from(reference, "llama", losses, model.named_parameters())
    try:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    except ModuleNotFoundError:
        return found
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    model = made("llama")
    convert(model, **K)
    model = fsdp2_prepare_model(accelerator, model)
    assert isinstance(model.lm_head.weight, DTensor)
    losses = trained(model, own_rows(batch_of("llama")), STEPS)
    found["FSDP2 of accelerate"] = off_from(reference, "llama", losses, model.named_parameters())
    return found


def process(world: int, rank: int, port: int, folder: Path, name: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if name == "reference":
        found = alone(folder)
    else:
        reference = torch.load(folder / "reference.pt")
        found = {} if world == 2 else continued(reference, folder)
        if world > 1:
            found |= fully_sharded(reference, folder) | tensor_parallel(folder) | ties() | calibrated()
        if world == 2:
            found |= data_parallel(reference) | refused_when_sharded() | refused_when_cut(folder)
            found |= sharded_by_others(reference, folder)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(world: int, folder: Path, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                process(world, rank, port, folder, name)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        started.append(child)
    # The first that fails ends all: the others would wait for it.
    while started:
        child, status = os.wait()
        started.remove(child)
        if status != 0:
            for other in started:
                os.kill(other, 9)
                os.waitpid(other, 0)
            sys.exit(f"a process of {world} failed ({name})")


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for world, name in ((1, "reference"), (2, "two"), (4, "four"), (1, "one")):
        run(world, folder, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
