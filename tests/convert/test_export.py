"""Converted models as exported programs, which serve lengths that they were not traced with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from convert_models import FAMILIES, VOCABULARY, tiny_mistral
from topk_attention import convert

LONG = 530  # beyond one chunk of a mask, 512


class Logits(nn.Module):
    """The logits of a language model, without a cache, which an exported program would return as well."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def tokens_and_mask(length):
    tokens = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    mask[:, -3:] = 0
    return tokens, mask


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers' own code
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])  # a causal mask, and a window, which is cut into chunks
def test_a_program_of_any_length_serves_lengths_beyond_a_chunk(family, strict):
    if family == "mistral":
        model = tiny_mistral(max_position_embeddings=1024, sliding_window=9)
    else:
        model = FAMILIES[family].build(n_positions=1024)
    layer = Logits(model.eval())
    convert(model, attention_k=4)
    length = Dim("length", min=8, max=1024)
    with torch.no_grad():
        program = torch.export.export(
            layer, tokens_and_mask(24), dynamic_shapes=({1: length}, {1: length}), strict=strict
        ).module()
        for inputs in map(tokens_and_mask, (24, LONG)):
            torch.testing.assert_close(program(*inputs), layer(*inputs))
