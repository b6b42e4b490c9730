"""Layers that are built from given projections."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topk_attention import ALiBi, Completion, TopKAttention, TopKFeedForward, topk_attention

COMPLETED = "auto"


def projections(size: int, key_size: int | None = None) -> list[nn.Linear]:
    torch.manual_seed(0)
    key_size = key_size or size
    return [
        layer.double()
        for layer in (
            nn.Linear(size, size),
            nn.Linear(size, key_size),
            nn.Linear(size, key_size),
            nn.Linear(size, size, bias=False),
        )
    ]


def test_attention_with_every_key_equals_torchs_multihead_attention():
    to_query, to_key, to_value, to_output = projections(24)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([to_query.weight, to_key.weight, to_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([to_query.bias, to_key.bias, to_value.bias]))
        theirs.out_proj.weight.copy_(to_output.weight)
        theirs.out_proj.bias.zero_()
    ours = TopKAttention(to_query, to_key, to_value, to_output, num_heads=4, k=100)
    x, context = torch.randn(2, 7, 24).double(), torch.randn(2, 11, 24).double()
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0])


def test_attention_hands_every_option_on():
    layers = projections(24, key_size=12)
    bias = ALiBi(torch.rand(4).double())
    mask = torch.rand(2, 1, 1, 9) > 0.3
    x = torch.randn(2, 9, 24).double()
    ours = TopKAttention(*layers, num_heads=4, num_key_heads=2, k=[1, 2, 3, 4], is_causal=True, scale=0.7)
    query, key, value = (
        layer(x).view(2, 9, heads, 6).transpose(1, 2) for layer, heads in zip(layers, (4, 2, 2), strict=False)
    )
    expected = topk_attention(
        query, key, value, k=[1, 2, 3, 4], attn_mask=mask, bias=bias, is_causal=True, scale=0.7, enable_gqa=True
    )
    expected = layers[3](expected.transpose(1, 2).reshape(2, 9, 24))
    torch.testing.assert_close(ours(x, attn_mask=mask, bias=bias), expected)


@pytest.mark.parametrize("scale", [0.5, [0.1, 0.2, 0.3, 0.4], torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_attention_adds_its_completion(scale):
    layers = projections(24)
    x = torch.randn(2, 9, 24).double()
    ours = TopKAttention(*layers, num_heads=4, k=3, is_causal=True, completion=Completion(scale), backend=COMPLETED)
    query, key, value = (layer(x).view(2, 9, 4, 6).transpose(1, 2) for layer in layers[:3])
    expected = topk_attention(query, key, value, k=3, is_causal=True, completion=Completion(scale), backend=COMPLETED)
    torch.testing.assert_close(ours(x), layers[3](expected.transpose(1, 2).reshape(2, 9, 24)))
    assert ("mass_scale" in ours.state_dict()) == isinstance(scale, torch.Tensor)


def test_scales_that_are_a_parameter_train_with_the_layer_and_follow_it():
    scale = nn.Parameter(torch.full((4,), 0.5, dtype=torch.double))
    ours = TopKAttention(*projections(24), num_heads=4, k=3, completion=Completion(scale), backend=COMPLETED)
    x = torch.randn(2, 9, 24).double()
    ours(x).sum().backward()
    assert dict(ours.named_parameters())["mass_scale"] is scale
    assert scale.grad.abs().min() > 0
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.mass_scale.zero_()
    plain = TopKAttention(*projections(24), num_heads=4, k=3, backend=COMPLETED)
    torch.testing.assert_close(twin(x), plain(x))
    assert not torch.equal(ours(x), plain(x))


def test_attention_shows_its_completion():
    options = {"num_heads": 4, "k": 3}
    assert "completion" not in repr(TopKAttention(*projections(24), **options))
    shown = repr(TopKAttention(*projections(24), **options, completion=Completion(0.5, lift=0)))
    assert "completion=(mass scale 0.5, lift 0)" in shown
    shown = repr(TopKAttention(*projections(24), **options, completion=Completion([0.5, 1, 0.25, 0])))
    assert "completion=(mass scales 0 to 1, lift 0.35)" in shown


def test_a_completion_that_does_not_fit_is_refused_when_the_layer_is_built():
    with pytest.raises(ValueError, match="completion must hold one mass_scale for each of the 4 query heads, got 3"):
        TopKAttention(*projections(24), num_heads=4, k=3, completion=Completion([0.5, 0.5, 0.5]))
    with pytest.raises(TypeError, match=r"completion must be a Completion or None, got float 0\.5"):
        TopKAttention(*projections(24), num_heads=4, k=3, completion=0.5)


def test_attention_drops_in_training_alone():
    ours = TopKAttention(*projections(24), num_heads=4, k=5, dropout_p=0.5)
    x = torch.randn(2, 9, 24).double()
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_attention_says_when_heads_do_not_divide_a_projection():
    ours = TopKAttention(*projections(24), num_heads=5, k=5)
    with pytest.raises(ValueError, match="a projection's size must be a multiple of its 5 heads, got 24"):
        ours(torch.randn(2, 9, 24).double())


class Dense(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up = nn.Linear(10, 20)
        self.down = nn.Linear(20, 10)
        self.gate = nn.Linear(10, 20) if gated else None

    def forward(self, x):
        hidden = F.silu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_state_dicts_are_interchangeable_with_the_dense_layers_both_ways(gated):
    torch.manual_seed(0)
    dense = Dense(gated)
    ours = TopKFeedForward(
        dense.up, dense.down, linear_gate=dense.gate, k=20, activation="silu", names=("up", "down", "gate")
    )
    x = torch.randn(3, 10)
    torch.testing.assert_close(ours(x), dense(x))
    assert ours.state_dict().keys() == dense.state_dict().keys()
    other = copy.deepcopy(ours)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    dense.load_state_dict(other.state_dict())
    torch.testing.assert_close(dense(x), other(x))
    other.load_state_dict(Dense(gated).state_dict())


def test_feed_forward_uses_the_very_weights_it_was_handed():
    dense = Dense(gated=True)
    ours = TopKFeedForward(dense.up, dense.down, linear_gate=dense.gate, k=3)
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in dense.parameters()}


def test_feed_forward_drops_in_training_alone():
    dense = Dense(gated=False)
    ours = TopKFeedForward(dense.up, dense.down, k=9, dropout_p=0.5)
    x = torch.randn(3, 10)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_layers_print_their_k():
    assert "k=5, num_heads=4" in repr(TopKAttention(*projections(24), num_heads=4, k=5))
    dense = Dense(gated=False)
    assert "k=7, activation='relu'" in repr(TopKFeedForward(dense.up, dense.down, k=7))


def test_a_k_that_does_not_fit_the_heads_is_refused_when_the_layer_is_made():
    projections = [nn.Linear(8, 8) for _ in range(4)]
    with pytest.raises(ValueError, match="k must hold one number for each of the 2 query heads, got 3"):
        TopKAttention(*projections, num_heads=2, k=[1, 2, 3])
    with pytest.raises(TypeError, match="k must be an int, one int per head"):
        TopKAttention(*projections, num_heads=2, k=2.5)
    assert TopKAttention(*projections, num_heads=2, k="all").k is None
    assert TopKAttention(*projections, num_heads=2, k=torch.tensor([1, 2])).k == (1, 2)
