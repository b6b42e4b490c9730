"""Claims on sequences that several processes share, found out by processes that talk with gloo.

Arguments: a folder, and the numbers of processes. Everything is imported once; then the processes of each number are
forked. Each writes what it has found to NUMBER-RANK.json in the folder.
"""

import copy
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from topk_attention import ALiBi, BucketedBias, Completion, RelativeBias, convert, topk_attention
from topk_attention.distributed import (
    sequence_loss,
    sequence_parallel,
    sequence_parallel_attention,
    sequence_parallel_cost,
    sequence_positions,
    shard_batch,
    shard_sequence,
    unshard_sequence,
)
from topk_attention.distributed.ranks import _ALL_GATHER

# name: heads, key heads, tokens, keys of another length, and the options of the call
CASES = {
    "plain": (4, 4, 32, None, {}),
    "causal": (4, 4, 32, None, {"is_causal": True}),
    "grouped queries": (8, 2, 32, None, {"is_causal": True}),
    "groups that ranks cut": (12, 4, 24, None, {"is_causal": True}),
    "heads that ranks do not divide": (3, 1, 32, None, {"is_causal": True}),
    "one key head": (4, 1, 32, None, {}),
    "odd length": (4, 2, 45, None, {"is_causal": True}),
    "odd length seen whole": (4, 2, 45, None, {}),
    "fewer tokens than parts": (4, 2, 5, None, {"is_causal": True}),
    "keys of another sequence": (4, 2, 19, 40, {}),
    "fewer queries than keys": (4, 2, 19, 40, {"is_causal": True}),
    "more queries than keys": (4, 2, 40, 19, {"is_causal": True}),
    "padding": (4, 2, 40, None, {"is_causal": True, "padding": True}),
    "padding on some ranks alone": (4, 2, 40, None, {"padding": "some"}),
    "float padding": (4, 2, 40, None, {"padding": "float"}),
    "k per head": (4, 2, 40, None, {"k": [2, 5, 9, 40], "is_causal": True}),
    "every key": (4, 2, 40, None, {"k": "all", "is_causal": True}),
    "table of distances": (4, 2, 37, None, {"bias": "relative", "is_causal": True}),
    "buckets": (4, 2, 37, None, {"bias": "buckets"}),
    "slopes": (4, 2, 37, None, {"bias": "slopes", "is_causal": True}),
    "slopes shared by heads": (4, 2, 37, 20, {"bias": "one slope"}),
    "dropout": (4, 2, 32, None, {"dropout_p": 0.4, "is_causal": True}),
    "dropout of an odd length": (8, 2, 37, None, {"dropout_p": 0.4, "is_causal": True}),
    "dropout of full attention": (4, 2, 24, None, {"k": "all", "dropout_p": 0.4}),
    "sinks": (4, 2, 40, None, {"sinks": True, "is_causal": True}),
    "soft cap": (4, 2, 40, None, {"softcap": 2.0, "is_causal": True}),
    "completion": (4, 2, 40, None, {"completion": True, "is_causal": True}),
    "another scale": (4, 2, 32, None, {"scale": 0.7, "is_causal": True}),
}
ALSO_CONTIGUOUS = {"plain", "causal", "odd length", "fewer queries than keys", "buckets", "dropout of an odd length"}
FAMILIES = ("llama", "bert", "t5")


class CountedBytes:
    """The bytes that this process sends to others while it is open."""

    def __enter__(self):
        self.sent, self._kept = 0, (dist.all_to_all_single, getattr(dist, _ALL_GATHER))
        to_all, gather = self._kept

        def counted_to_all(output, sent, output_split_sizes, input_split_sizes, group):
            self.sent += sum(n for r, n in enumerate(input_split_sizes) if r != group.rank()) * sent.element_size()
            return to_all(output, sent, output_split_sizes, input_split_sizes, group=group)

        def counted_gather(output, sent, group):
            self.sent += sent.numel() * sent.element_size() * (group.size() - 1)
            return gather(output, sent, group=group)

        dist.all_to_all_single = counted_to_all
        setattr(dist, _ALL_GATHER, counted_gather)
        return self

    def __exit__(self, *_):
        dist.all_to_all_single = self._kept[0]
        setattr(dist, _ALL_GATHER, self._kept[1])


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def largest(errors):
    """The largest of numbers over all processes; NaN if one is."""
    of_all = torch.tensor([float(torch.as_tensor(x).detach()) for x in errors], dtype=torch.float64)
    of_all = torch.where(of_all.isnan(), torch.inf, of_all).max().reshape(1)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return of_all.item()


def off(mine, theirs):
    if mine.shape != theirs.shape:
        return torch.tensor(torch.inf)
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)) if theirs.numel() else torch.tensor(0.0)


def bias_of(kind, heads, queries, keys):
    if kind == "relative":
        parameter = torch.randn(heads, queries + keys - 1, dtype=torch.float64, requires_grad=True)
        return parameter, lambda p: RelativeBias(p)
    if kind == "buckets":
        parameter = torch.randn(8, heads, dtype=torch.float64, requires_grad=True)
        return parameter, lambda p: BucketedBias(p, max_distance=16)
    parameter = torch.rand(heads if kind == "slopes" else 1, dtype=torch.float64, requires_grad=True)
    return parameter, lambda p: ALiBi(p)


def attention_case(mesh, case, order, method):
    """How far outputs and gradients are from those of one process."""
    heads, key_heads, num_queries, num_keys, options = case
    num_keys, options = num_keys or num_queries, dict(options)
    torch.manual_seed(7)
    kept = options.pop("k", 6)
    query, key = (
        torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((heads, num_queries), (key_heads, num_keys))
    )
    value, weights = (
        torch.randn(2, h, n, 5, dtype=torch.float64) for h, n in ((key_heads, num_keys), (heads, num_queries))
    )
    whole_options, options, shared = {}, {"k": kept, "enable_gqa": True, **options}, []
    if (padding := options.pop("padding", None)) is not None:
        visible = torch.ones(2, 1, 1, num_keys, dtype=torch.bool)
        visible[1, ..., :4] = False
        if padding == "float":
            visible = torch.randn(2, 1, 1, num_keys, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        whole_options["attn_mask"] = visible
    makers = {}
    if (kind := options.pop("bias", None)) is not None:
        parameter, makers["bias"] = bias_of(kind, heads, num_queries, num_keys)
        shared.append(("bias", parameter))
    if options.pop("sinks", False):
        shared.append(("sinks", torch.randn(heads, dtype=torch.float64, requires_grad=True)))
    if options.pop("completion", False):
        shared.append(("completion", torch.rand(heads, dtype=torch.float64, requires_grad=True)))
        makers["completion"] = Completion
    if "dropout_p" in options:
        options["dropout_seed"] = 2**61 + 12345

    def made(parameters):
        return {name: makers.get(name, lambda x: x)(x) for (name, _), x in zip(shared, parameters, strict=True)}

    of_one = [x.clone().requires_grad_() for x in (query, key, value, *(x.detach() for _, x in shared))]
    expected = topk_attention(*of_one[:3], **options, **whole_options, **made(of_one[3:]))
    wanted = torch.autograd.grad((expected * weights).sum(), of_one)

    mine = [shard_sequence(x, mesh, dim=2, order=order).requires_grad_() for x in (query, key, value)]
    mine += [x.detach().clone().requires_grad_() for _, x in shared]
    if (mask := whole_options.get("attn_mask")) is not None:
        mask = shard_sequence(mask, mesh, dim=3, order=order)
        if padding == "some" and mask.all():
            mask = None
    found = sequence_parallel_attention(
        *mine[:3], mesh, **options, attn_mask=mask, **made(mine[3:]), order=order, method=method
    )
    own_weights = shard_sequence(weights, mesh, dim=2, order=order)
    gradients = torch.autograd.grad((found * own_weights).sum(), mine)
    for gradient in gradients[3:]:  # of what all ranks share, each has a part
        dist.all_reduce(gradient)
    errors = [off(found, shard_sequence(expected, mesh, dim=2, order=order))]
    errors += [
        off(a, shard_sequence(b, mesh, dim=2, order=order)) for a, b in zip(gradients[:3], wanted[:3], strict=True)
    ]
    errors += [off(a, b) for a, b in zip(gradients[3:], wanted[3:], strict=True)]
    return largest(errors)


def attention_claims(mesh):
    found = {}
    for name, case in CASES.items():
        for order in ("zigzag", "contiguous") if name in ALSO_CONTIGUOUS else ("zigzag",):
            for method in ("heads", "keys"):
                if method == "heads" and case[0] % mesh.size():
                    continue
                found[f"{name}, {order}, {method}"] = attention_case(mesh, case, order, method)
    return found


def shard_claims(mesh):
    whole = torch.arange(2 * 23 * 3, dtype=torch.float64).view(2, 23, 3)
    found = {}
    for order in ("zigzag", "contiguous"):
        shard = shard_sequence(whole, mesh, dim=1, order=order).requires_grad_()
        again = unshard_sequence(shard, mesh, dim=1, order=order)
        (again * whole).sum().backward()
        positions = unshard_sequence(sequence_positions(23, mesh, order=order), mesh, dim=0, order=order)
        wanted = mesh.size() * shard_sequence(whole, mesh, dim=1, order=order)
        found[order] = [again.equal(whole), positions.equal(torch.arange(23)), shard.grad.equal(wanted)]
    balanced = sequence_positions(16 * mesh.size(), mesh)
    found["visible keys of all queries"] = (balanced + 1).sum().item()
    return found


def low_precision_claims(mesh):
    """bfloat16 under autocast and alone, and a call without gradients."""
    torch.manual_seed(3)
    whole = [torch.randn(1, 4, 48, 16) for _ in range(3)]
    found = {}
    for method in ("heads", "keys"):
        mine = [shard_sequence(x, mesh, dim=2) for x in whole]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = topk_attention(*whole, k=8, is_causal=True)
            output = sequence_parallel_attention(*mine, mesh, k=8, is_causal=True, method=method)
        found[method] = [str(output.dtype), largest([off(output, shard_sequence(expected, mesh, dim=2))])]
    return found


def seed_claims(mesh):
    """Without a seed the first process draws one, as one process would."""
    torch.manual_seed(11)
    query = torch.randn(1, 4, 32, 8, dtype=torch.float64)
    torch.manual_seed(5)
    expected = topk_attention(query, query, query, k=8, dropout_p=0.5)
    torch.manual_seed(5 + 100 * mesh.get_local_rank())
    mine = shard_sequence(query, mesh, dim=2)
    found = sequence_parallel_attention(mine, mine, mine, mesh, k=8, dropout_p=0.5)
    return largest([off(found, shard_sequence(expected, mesh, dim=2))])


def saved_bytes(action):
    """Bytes of the tensors that autograd keeps while an action runs, each piece of memory once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # with the tensor, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = action()
    return sum(size for size, _ in kept.values()), result


def cost_claims(mesh):
    """Counted bytes beside those of `sequence_parallel_cost`."""
    found = {}
    shapes = [(8, 8, 64, 1, {}), (8, 2, 64, 2, {"is_causal": True}), (4, 1, 61, 1, {"is_causal": True})]
    for heads, key_heads, length, batch, options in shapes:
        for method in ("heads", "keys", "auto"):
            for masked in (False, True):
                mine = [
                    shard_sequence(torch.randn(batch, h, length, size), mesh, dim=2).requires_grad_()
                    for h, size in ((heads, 16), (key_heads, 16), (key_heads, 8))
                ]
                mask = torch.ones(batch, 1, 1, mine[0].shape[2], dtype=torch.bool) if masked else None
                call = dict(k=4, enable_gqa=True, attn_mask=mask, method=method, **options)
                with CountedBytes() as forward:
                    kept, output = saved_bytes(lambda: sequence_parallel_attention(*mine, mesh, **call))  # noqa: B023
                with CountedBytes() as backward:
                    output.sum().backward()
                cost = sequence_parallel_cost(
                    length,
                    num_ranks=mesh.size(),
                    num_heads=heads,
                    num_key_heads=key_heads,
                    k=4,
                    head_dim=16,
                    value_dim=8,
                    batch_size=batch,
                    is_masked=masked,
                    method=method,
                    rank=mesh.get_local_rank(),
                )
                by_keys = cost.method == "keys"
                queries = mine[0].numel() * 4 if by_keys else 0  # an input of the call, which it keeps as it is
                counted = [forward.sent, backward.sent, kept - queries]
                paper = [cost.forward_bytes, cost.backward_bytes, cost.kept_bytes]
                found[f"{heads}/{key_heads}, {length} tokens, {method}, mask {masked}"] = [counted, paper]
    return found


def error_claims(mesh):
    rank, ranks = mesh.get_local_rank(), mesh.size()
    torch.manual_seed(0)
    query = torch.randn(1, 4, 8, 8)
    one = torch.randn(1, 3, 8, 8)
    first = rank == 0

    def call(query=query, key=None, value=None, **options):
        key = query if key is None else key
        return sequence_parallel_attention(query, key, key if value is None else value, mesh, **({"k": 2} | options))

    tries = {
        "k that one rank alone has wrong": lambda: call(k=0 if rank == ranks - 1 else 2),
        "another k": lambda: call(k=2 + rank),
        "another order": lambda: call(order="zigzag" if first else "contiguous"),
        "unknown order": lambda: call(order="spiral"),
        "unknown method": lambda: call(method="ring"),
        "heads that ranks do not divide": lambda: call(one, method="heads"),
        "lengths": lambda: call(query if first else query[:, :, :5]),
        "key lengths": lambda: call(key=query if first else query[:, :, :5]),
        "dtype": lambda: call(query if first else query.double()),
        "three axes": lambda: call(query[0]),
        "key heads": lambda: call(key=query[:, :2]),
        "mask of all queries": lambda: call(attn_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        "mask of ints": lambda: call(attn_mask=torch.ones(1, 1, 1, 8, dtype=torch.long)),
        "masks of two kinds": lambda: call(
            attn_mask=torch.ones(1, 1, 1, 8, dtype=torch.bool if first else torch.float)
        ),
        "dense bias": lambda: call(bias=torch.zeros(1, 4, 8, 8)),
        "bias of other heads": lambda: call(bias=ALiBi(torch.ones(3))),
        "k of other heads": lambda: call(k=[1, 2]),
        "sinks of other heads": lambda: call(sinks=torch.zeros(2)),
        "completion of other heads": lambda: call(completion=Completion([1.0, 2.0])),
        "another seed": lambda: call(dropout_p=0.5, dropout_seed=rank),
        "no seed": lambda: call(dropout_p=0.5, dropout_seed=0.5),
        "dropout": lambda: call(dropout_p=1.5),
        "gradients": lambda: call(query.clone().requires_grad_(first)),
        "mesh": lambda: sequence_parallel_attention(query, query, query, "cp", k=2),
        "axis": lambda: shard_sequence(query, mesh, dim=7),
        "order of shards": lambda: shard_sequence(query, mesh, dim=2, order="spiral"),
        "lengths of shards": lambda: unshard_sequence(query[:, :, : 8 - 3 * first], mesh, dim=2),
        "batch": lambda: shard_batch({"input_ids": torch.zeros(2, 8), "labels": torch.zeros(2, 7)}, mesh),
        "batch without labels": lambda: shard_batch({"input_ids": torch.zeros(2, 8)}, mesh, shift_labels=True),
    }
    found = {}
    for name, action in tries.items():
        found[name] = error_of(action)
    found["afterwards"] = error_of(lambda: call())
    return found


def tiny(family):
    torch.manual_seed(0)
    common = {"vocab_size": 61, "attn_implementation": "sdpa"}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256, **common)
        return LlamaForCausalLM(config).double().train()
    if family == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
        return BertForMaskedLM(config).double().train()
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
    config = T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="relu", **common)
    return T5ForConditionalGeneration(config).double().train()


def use_gradient_checkpointing(model):
    with warnings.catch_warnings():  # transformers 5.23 has another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False


def batch_of(family, length=45):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 61, (2, length), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if family != "llama":
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][1, -7:] = 0
        batch["labels"][1, -7:] = -100
    return batch


def part_of_loss(family, model, mesh, order):
    """This rank's part of the loss, of which the sum over ranks is the loss of one process; and that loss."""
    batch = batch_of(family)
    if family == "llama":
        loss = model(**shard_batch(batch, mesh, order=order, shift_labels=True)).loss
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return loss, whole
    labels = batch.pop("labels")
    if family == "t5":
        decoder = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(2))
        shards = {name: shard_sequence(x, mesh, dim=1, order=order) for name, x in batch.items()}
        logits = model(**shards, decoder_input_ids=shard_sequence(decoder, mesh, dim=1, order=order)).logits
        labels = decoder
    else:
        logits = model(**shard_batch(batch, mesh, order=order)).logits
    loss = sequence_loss(logits, shard_sequence(labels, mesh, dim=1, order=order), mesh)
    return loss, loss.detach()


def loss_of_one(family, model):
    batch = batch_of(family)
    if family == "t5":
        decoder = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(2))
        del batch["labels"]
        logits = model(**batch, decoder_input_ids=decoder).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), decoder.flatten())
    return model(**batch).loss


def model_claims(mesh):
    found = {}
    for family in FAMILIES:
        kept = {"attention_k": [[3, 9, 6, 4], [5, 2, 8, 7]], "feed_forward_k": 24}
        one = tiny(family)
        if family == "t5":
            kept["attention_k"] = 6
        convert(one, **kept)
        model, again = copy.deepcopy(one), copy.deepcopy(one)
        use_gradient_checkpointing(again)
        expected = loss_of_one(family, one)
        expected.backward()
        wanted = {name: x.grad for name, x in one.named_parameters() if x.grad is not None}
        for name, shared, order in (
            ("zigzag", model, "zigzag"),
            ("contiguous", model, "contiguous"),
            ("gradient checkpointing", again, "zigzag"),
        ):
            shared.zero_grad()
            with sequence_parallel(shared, mesh, order=order):
                loss, whole = part_of_loss(family, shared, mesh, order)
                loss.backward()
            gradients = {name: x.grad for name, x in shared.named_parameters() if x.grad is not None}
            for gradient in gradients.values():
                dist.all_reduce(gradient)
            errors = (
                [off(gradients[n], wanted[n]) for n in wanted] if gradients.keys() == wanted.keys() else [torch.inf]
            )
            found[f"{family}, {name}"] = {
                "loss": largest([abs(whole.item() - expected.item())]),
                "gradients": largest(errors),
            }
        with torch.no_grad():  # the context leaves nothing behind
            found[f"{family}, afterwards"] = largest([off(loss_of_one(family, model), expected.detach())])
    return found


def other_model_claims(mesh):
    found = {}
    model = tiny("llama")
    batch = batch_of("llama")

    def within(model, action, **options):
        def run():
            with sequence_parallel(model, mesh, **options):
                action()

        return error_of(run)

    shards = shard_batch(batch, mesh, shift_labels=True)
    found["not converted"] = within(model, lambda: model(**shards))
    convert(model, attention_k=6)
    without = {name: x for name, x in shards.items() if name != "position_ids"}
    found["without positions"] = within(model, lambda: model(**without))
    found["unknown order"] = within(model, lambda: None, order="spiral")
    found["unknown method"] = within(model, lambda: None, method="ring")
    found["twice"] = within(model, lambda: sequence_parallel(model, mesh).__enter__())
    found["wrapped"] = within(torch.nn.Sequential(model), lambda: None)
    mixed = torch.ones(2, 1, 3, 3)
    found["mask of numbers"] = within(
        model,
        lambda: model(input_ids=shards["input_ids"][:, :3], position_ids=mixed[:, 0, 0].long(), attention_mask=mixed),
    )

    def continue_cache():
        cache = model(**{n: shards[n] for n in ("input_ids", "position_ids")}, use_cache=True).past_key_values
        model(input_ids=shards["input_ids"][:, :1], position_ids=torch.full((2, 1), 45), past_key_values=cache)

    found["a cache that goes on"] = within(model, continue_cache)
    windowed = copy.deepcopy(model)
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    found["windows"] = within(windowed, lambda: None)
    convolved = copy.deepcopy(model)
    convolved.model.smear = torch.nn.Conv1d(4, 4, 3)
    found["convolution"] = within(convolved, lambda: None)
    use_gradient_checkpointing(model)
    with sequence_parallel(model, mesh):
        loss = model(**shards).loss
    found["backward pass after the context"] = error_of(loss.backward)
    found["another forward pass after it"] = error_of(lambda: model(**batch).loss.backward())

    # Wrapped by DistributedDataParallel, which averages: times the number of processes.
    one = tiny("llama")
    convert(one, attention_k=6)
    shared = copy.deepcopy(one)
    wrapped = DistributedDataParallel(shared)
    expected = []
    steps = [torch.optim.SGD(x.parameters(), lr=0.5) for x in (one, shared)]
    with sequence_parallel(shared, mesh):
        for _ in range(3):
            for optimizer in steps:
                optimizer.zero_grad()
            loss = one_loss = None
            loss = wrapped(**shards).loss * mesh.size()
            loss.backward()
            steps[1].step()
            total = loss.detach() / mesh.size()
            dist.all_reduce(total)
            expected.append(total)
    losses = []
    for _ in range(3):
        steps[0].zero_grad()
        one_loss = one(**batch).loss
        one_loss.backward()
        steps[0].step()
        losses.append(one_loss.detach())
    found["steps with DistributedDataParallel"] = largest([off(a, b) for a, b in zip(expected, losses, strict=True)])

    # Dropout of attention: the draw of one process with the seed of the first.
    for layer in (*one.modules(), *shared.modules()):
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.3
    shared.load_state_dict(one.state_dict())
    with sequence_parallel(shared, mesh), torch.no_grad():
        torch.manual_seed(21)
        total = shared(**shards).loss.detach()
        dist.all_reduce(total)
    torch.manual_seed(21)
    with torch.no_grad():
        found["dropout of attention"] = largest([off(total, one(**batch).loss)])
    return found


def accelerate_claims(mesh):
    """What accelerate says to context parallelism here, and a step with its Accelerator around ours."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import ParallelismConfig
    except ImportError as error:
        return {"missing": str(error)}
    one = tiny("llama")
    convert(one, attention_k=6)
    shared = copy.deepcopy(one)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(shared)
    shards = shard_batch(batch_of("llama"), mesh, shift_labels=True)
    with sequence_parallel(accelerator.unwrap_model(wrapped), mesh):
        accelerator.backward(wrapped(**shards).loss * mesh.size())
    one(**batch_of("llama")).loss.backward()
    gradients = [off(a.grad, b.grad) for a, b in zip(shared.parameters(), one.parameters(), strict=True)]
    AcceleratorState._reset_state(reset_partial_state=True)
    after_training = trainer_claim(mesh) if mesh.size() == 2 else None  # it takes a second on each process
    AcceleratorState._reset_state(reset_partial_state=True)
    theirs = error_of(lambda: Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=mesh.size())))
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"gradients": largest(gradients), "trainer": after_training, "their context parallelism": theirs}


def trainer_claim(mesh):
    """How far weights are from those of one process after three steps of transformers' Trainer."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    class SequenceTrainer(Trainer):
        """Every process reads whole sequences and keeps its tokens of each."""

        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)

        def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
            return mesh.size() * model(**shard_batch(inputs, mesh, shift_labels=True)).loss

    texts = torch.randint(3, 61, (6, 45), generator=torch.Generator().manual_seed(4))
    one = tiny("llama")
    convert(one, attention_k=6)
    shared = copy.deepcopy(one)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            disable_tqdm=True,
            gradient_checkpointing=True,
            ddp_find_unused_parameters=False,
        )
        data = [{"input_ids": text, "labels": text} for text in texts]
        trainer = SequenceTrainer(model=shared, args=arguments, train_dataset=data)
        with sequence_parallel(shared, mesh):
            trainer.train()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
    for batch in texts.split(2):
        optimizer.zero_grad()
        one(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return largest([off(a, b) for a, b in zip(shared.parameters(), one.parameters(), strict=True)])


CLAIMS = {
    "attention": attention_claims,
    "shards": shard_claims,
    "low precision": low_precision_claims,
    "seed": seed_claims,
    "cost": cost_claims,
    "errors": error_claims,
    "models": model_claims,
    "other models": other_model_claims,
    "accelerate": accelerate_claims,
}


def run_rank(folder, rank, num_ranks):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}
    store = dist.FileStore(str(folder / f"store-{num_ranks}"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=100))
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("cp",))
    found, seconds = {}, {}
    for name, claims in CLAIMS.items():
        begun = time.process_time()
        found[name] = claims(mesh)
        seconds[name] = round(time.process_time() - begun, 2)
    found["seconds"] = seconds
    (folder / f"{num_ranks}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def forked(folder, rank, num_ranks):
    child = os.fork()
    if child:
        return child
    try:
        run_rank(folder, rank, num_ranks)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main(folder, numbers):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fork.*")
    for num_ranks in numbers:
        children = {forked(folder, rank, num_ranks) for rank in range(num_ranks)}
        while children:
            child, status = os.wait()
            children.discard(child)
            if status != 0:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a process of {num_ranks} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
