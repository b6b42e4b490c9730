"""Run by torch.distributed.run in two processes: a model cut by tensor parallelism, and torch's context_parallel.

The only argument is the folder of a small Llama with four heads in two layers. Each process prints one line of JSON.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from transformers import LlamaForCausalLM

from topk_attention import Completion, convert, topk_attention

HEADS = [[2, 9, 4, 14], [11, 3, 7, 2]]


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def logits(model, tokens):
    with torch.no_grad():
        output = model(tokens, use_cache=False).logits
    return output.full_tensor() if isinstance(output, DTensor) else output


def main(folder):
    dist.init_process_group("gloo")
    tokens = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = LlamaForCausalLM.from_pretrained(folder)
    convert(whole, attention_k=HEADS)
    cut = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    found = {"network": error_of(lambda: convert(cut, feed_forward_k=8))}
    found["network by path"] = error_of(lambda: convert(cut, feed_forward_k={"model.layers.0.mlp": 8}))
    convert(cut, attention_k=HEADS)
    found["difference"] = (logits(cut, tokens) - logits(whole, tokens)).abs().max().item()
    for model in (whole, cut):
        convert(model, attention_k=HEADS, completion=Completion([0.5, 4, 1, 9]))
    found["difference when completed"] = (logits(cut, tokens) - logits(whole, tokens)).abs().max().item()
    weight = cut.model.layers[0].self_attn.q_proj.weight
    found["cut operand"] = error_of(lambda: topk_attention(weight[None], weight[None], weight[None], k=2))
    mesh = init_device_mesh("cpu", (2,))
    with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
        found["context_parallel"] = error_of(lambda: logits(whole, tokens))
    found["afterwards"] = error_of(lambda: logits(whole, tokens))
    sys.stdout.write(f"{os.environ['RANK']} {json.dumps(found)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
