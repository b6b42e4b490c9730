"""Attention whose only method takes 64 MiB that it does not need."""

import torch

from topk_experiments.benchmarks.attention import measure
from topk_experiments.benchmarks.attention.methods import Method


def hungry(method, work):
    def run(query, key, value):
        scratch = torch.ones(16 * 2**20)  # 64 MiB
        return (query + key + value) * scratch[0]

    return Method(run)


OPERATION = measure.OPERATION._replace(new_method=hungry)
