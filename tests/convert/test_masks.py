"""The mask that models get for top-k attention: code that computes with it, and masks that are learned."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from fuzz_families import outputs_of, results
from small_models import inputs_for, small_model
from topk_attention import convert, unconvert
from topk_attention.convert.by_name import hand_written_attention
from topk_attention.convert.masks import compact_mask


@pytest.fixture
def mask():
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[0, 3:] = False
    return compact_mask(2, 5, 5, attention_mask=padding)


def test_as_an_argument_of_torch_functions_it_is_the_bool_mask(mask):
    dense = mask.dense()
    assert mask.dtype == torch.bool
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([dense, dense], dim=-1))
    assert torch.equal(torch.where(mask, 1, 2), torch.where(dense, 1, 2))
    assert torch.equal(mask.repeat(1, 2, 1, 1), dense.repeat(1, 2, 1, 1))
    assert torch.equal(~mask, ~dense)
    assert copy.copy(mask).q_length == 5


def test_added_to_scores_it_hides_what_the_bool_mask_hides(mask):
    scores = torch.randn(2, 3, 5, 5)
    expected = scores.masked_fill(~mask.dense(), -torch.inf).softmax(-1)
    for added in (scores + mask, mask + scores, torch.add(scores, mask)):
        torch.testing.assert_close(added.softmax(-1), expected)


def full_attention_pegasus():
    """A BigBirdPegasus whose encoder computes full attention in its own code."""
    import transformers

    options = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    options |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99, "d_model": 32}
    config = transformers.BigBirdPegasusConfig(**options, attention_type="original_full", max_position_embeddings=64)
    torch.manual_seed(0)
    return transformers.BigBirdPegasusModel(config).double().eval()


@pytest.mark.filterwarnings("ignore:a converted nn.MultiheadAttention returns no attention weights")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("model_type", ["siglip2", "doge", "lasr_encoder", "t5gemma2", "git", "bigbird_pegasus"])
def test_families_that_compute_with_the_mask_are_the_original_with_every_key_kept(model_type):
    model = full_attention_pegasus() if model_type == "bigbird_pegasus" else small_model(model_type)
    inputs = inputs_for(model)
    if model_type == "siglip2":
        model = model.vision_model
        inputs = {
            "pixel_values": torch.randn(2, 16, 48).double(),
            "pixel_attention_mask": (torch.arange(16) < 12).long().expand(2, 16),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    expected = outputs_of(model, inputs)
    convert(model, attention_k=1000)
    for actual, one in zip(outputs_of(model, inputs), expected, strict=True):
        torch.testing.assert_close(actual, one, rtol=1e-5, atol=1e-6)


def informer(attention_type):
    sizes = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
    config = transformers.InformerConfig(**sizes, attention_type=attention_type, encoder_layers=2, decoder_layers=2)
    torch.manual_seed(0)
    model = transformers.InformerModel(config).double().eval()
    given = {name: torch.randn(2, 10).double() for name in ("past_values", "past_observed_mask")}
    given |= {"past_time_features": torch.randn(2, 10, 1).double(), "future_values": torch.randn(2, 4).double()}
    return model, given | {
        "future_time_features": torch.randn(2, 4, 1).double(),
        "past_observed_mask": torch.ones(2, 10),
    }


@pytest.mark.parametrize(("attention_type", "num_converted"), [("prob", 2), ("full", 6)])
def test_layers_in_their_own_code_get_the_mask_of_their_own_attention(attention_type, num_converted):
    """Informer's encoder halves its tokens between layers, and its decoder picks rows of the mask and adds them."""
    model, given = informer(attention_type)
    expected = results(model, given)
    for k in ("all", 1000):
        report = convert(model, attention_k=k)
        assert len(report.replaced) == num_converted
        actual = results(model, given)
        for one, right in zip((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), strict=True):
            torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-9)
    convert(model, attention_k=2)
    assert (results(model, given)[0][0] - expected[0][0]).abs().max() > 1e-3
    unconvert(model)
    assert torch.equal(results(model, given)[0][0], expected[0][0])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_own_code_is_found_within_what_is_wrapped_around_it():
    """As transformers 5.24 wraps methods whose arguments it renames."""

    class WrappedAttention(nn.Module):
        @functools.wraps(nn.Module.forward)
        def wrapper(self, scores):
            return self.forward.__wrapped__(self, scores)

        def forward(self, scores):
            return scores.softmax(-1)

        wrapper.__wrapped__ = forward
        forward = wrapper

    class Gate(nn.Module):
        forward = WrappedAttention.forward

    model = nn.ModuleDict({"attention": WrappedAttention(), "gate": Gate()})
    assert [path for path, _ in hand_written_attention(model)] == ["attention"]


@pytest.mark.parametrize("model_type", ["swin", "parakeet_encoder", "canary", "cohere_asr", "doge"])
def test_a_learned_bias_that_arrives_as_a_mask_gets_the_gradient_of_eager_attention(model_type):
    model = small_model(model_type)
    inputs = inputs_for(model)
    _, expected = results(model, inputs)
    convert(model, attention_k=1000)
    _, gradients = results(model, inputs)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest.item())
    convert(model, attention_k=2)
    results(model, inputs)


def attention():
    torch.manual_seed(0)
    return nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)]).eval()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(("name", "shape"), [("attn_mask", (6, 6)), ("key_padding_mask", (2, 6))])
def test_integer_masks_are_refused_as_the_original_refuses_them(dtype, name, shape):
    layers, x = attention(), torch.randn(2, 6, 16)
    convert(layers, attention_k=6)
    with pytest.raises(TypeError, match=rf"{name} must be bool .*got {dtype}; convert a 0/1 mask with \.bool\(\)"):
        layers[0](x, x, x, need_weights=False, **{name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6)])
def test_a_learned_mask_of_torchs_own_attention_trains(shape, padded):
    layers, x = attention(), torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6)
    padding[:, 4:] = -torch.inf
    options = {"need_weights": False, "key_padding_mask": padding if padded else None}
    bias = torch.randn(shape, requires_grad=True)
    expected = layers[0](x, x, x, attn_mask=bias, **options)[0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), bias)
    convert(layers, attention_k=6)
    actual = layers[0](x, x, x, attn_mask=bias, **options)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), bias)[0], gradient)


def test_no_mask_is_full_attention_in_families_that_have_eager_attention_alone():
    # The layers of the cross-modal encoder say is_causal=True, which eager attention does not read.
    config = transformers.BridgeTowerConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        num_hidden_layers=2,
        text_config={"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.BridgeTowerModel(config).eval()
    inputs = {"input_ids": torch.arange(10)[None] + 5, "pixel_values": torch.randn(1, 3, 16, 16)}
    expected = model(**inputs).image_features
    for k in ("all", 1000):
        convert(model, attention_k=k)
        torch.testing.assert_close(model(**inputs).image_features, expected)
        unconvert(model)
