"""A stand-in for the operators of a kept index: it holds a hash of each key, and looks whether they are of the keys."""

from __future__ import annotations

import pytest
import torch

from topk_attention.backends import cpu
from topk_attention.backends.cpu import key_index


def hashes(key):
    """[B, G, M, 8] bytes: the sum of a key's numbers, each times one of its own."""
    weights = torch.arange(1, key.shape[-1] + 1).double().sqrt()
    sums = (key.double() * weights).sum(-1)
    return sums.unsqueeze(-1).contiguous().view(torch.uint8)


class HashedIndex:
    """What was asked of the index.

    read  for each call that appends: the first new key, and the number of keys
    used  how many attention calls read it
    """

    def __init__(self):
        self.read = []
        self.used = 0

    def index_keys(self, key, start, panels):
        assert not key.requires_grad
        assert panels.panels.shape[:2] == key.shape[:2]
        assert panels.panels.shape[2] * 32 >= key.shape[2]
        if start == 0:
            panels.centre.zero_()
        self._rows(panels)[:, :, start : key.shape[2]] = hashes(key[:, :, start:])
        self.read.append((start, key.shape[2]))

    def forward(self, *inputs):
        *plain, panels, numbers, unscreened, centre, num_indexed, _ = inputs
        self._check(plain[1], panels, numbers, unscreened, centre, num_indexed)
        return cpu.attention.__globals__["forward_op"](*plain)

    def completed_forward(self, *inputs):
        *plain, panels, numbers, unscreened, centre, num_indexed, _ = inputs
        if isinstance(panels, torch.Tensor) and panels.dtype == torch.uint8:
            self._check(plain[1], panels, numbers, unscreened, centre, num_indexed)
            inputs = plain
        return torch.ops.topk_attention.cpu_completed_attention_forward(*inputs)

    def _check(self, key, panels, numbers, unscreened, centre, num_indexed):
        assert num_indexed == key.shape[2]
        assert not centre.any()
        assert numbers.shape == (*panels.shape[:3], 4)
        assert unscreened.shape == panels.shape[:3]
        rows = panels.view(*panels.shape[:2], -1, 8)[:, :, :num_indexed]
        assert torch.equal(rows, hashes(key)), "the index is not of these keys"
        self.used += 1

    @staticmethod
    def _rows(panels):
        return panels.panels.view(*panels.panels.shape[:2], -1, 8)


def use_hashes(monkeypatch: pytest.MonkeyPatch) -> HashedIndex:
    """Put hashes in the place of the kernels' index."""
    hashed = HashedIndex()

    def new_panels(batch_size, num_heads, head_dim, room):
        return key_index.KeyPanels(
            torch.zeros(batch_size, num_heads, room // 32, 256, dtype=torch.uint8),
            torch.zeros(batch_size, num_heads, room // 32, 4),
            torch.zeros(batch_size, num_heads, room // 32, dtype=torch.int32),
            torch.ones(batch_size, num_heads, head_dim),
        )

    monkeypatch.setattr(key_index, "new_panels", new_panels)
    monkeypatch.setattr(key_index, "index_keys", hashed.index_keys)
    monkeypatch.setitem(cpu.attention.__globals__, "indexed_op", hashed.forward)
    monkeypatch.setitem(cpu.attention.__globals__, "completed_op", hashed.completed_forward)
    return hashed
