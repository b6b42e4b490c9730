"""Attention whose only method takes 64 MiB that it does not need."""

import torch

from topk_experiments.benchmarks.attention import methods
from topk_experiments.benchmarks.attention.methods import Method


def hungry(method, work):
    def run(query, key, value):
        scratch = torch.ones(16 * 2**20)  # 64 MiB
        return (query + key + value) * scratch[0]

    return Method(run)


OPERATION = methods.OPERATION._replace(new_method=hungry)
