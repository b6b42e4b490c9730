"""Models that choose keys themselves pass their choice on as indices=."""

from __future__ import annotations

import importlib

import pytest
import torch

from convert_models import VOCABULARY, LargestTensor, output_and_gradients, output_of
from topk_attention import convert, topk_attention
from topk_attention.convert.settings import LayerSettings, set_layer_settings

function = importlib.import_module("topk_attention.convert.attention_function")


def tiny_deepseek_v32(index_topk=6):
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        index_topk=index_topk,
        index_head_dim=16,
        index_n_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return DeepseekV32ForCausalLM(config).eval().double()


@pytest.fixture
def inputs(tokens, right_padding):
    return {"input_ids": tokens, "attention_mask": right_padding, "use_cache": False}


@pytest.mark.parametrize("mask_chunk", [512, 5])
def test_deepseek_v32_attends_to_the_keys_it_chose(inputs, mask_chunk, monkeypatch):
    monkeypatch.setattr(function, "_MASK_CHUNK", mask_chunk)
    model = tiny_deepseek_v32()
    expected = output_and_gradients(model, inputs)
    report = convert(model, attention_k=1000, feed_forward_k=1000)
    assert len(report.replaced) == 4
    output, gradients = output_and_gradients(model, inputs)
    torch.testing.assert_close(output, expected[0])
    for name in expected[1]:
        torch.testing.assert_close(gradients[name], expected[1][name], msg=name)
    convert(model, attention_k=2)
    with torch.no_grad():
        assert (output_of(model, inputs) - output).abs().max() > 1e-3


def test_deepseek_v32_generates_the_same_tokens(tokens, left_padding):
    model = tiny_deepseek_v32()
    options = {"attention_mask": left_padding, "max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
    expected = model.generate(tokens, **options)
    convert(model, attention_k=1000)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_layers_that_where_leaves_out_keep_to_the_choice_as_well(inputs):
    model = tiny_deepseek_v32()
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, attention_k={"model.layers.0.self_attn": 1000})
        torch.testing.assert_close(output_of(model, inputs), expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_k_best_of_the_chosen_and_visible_keys_are_kept(kind):
    module = torch.nn.Identity()
    set_layer_settings(module, LayerSettings(3))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.double) for _ in range(3))
    indices = torch.rand(2, 9, 9, generator=generator).argsort(-1)[..., :5].int()
    indices[:, :, 4] = -1
    visible = torch.ones(9, 9).tril().bool()
    chosen = torch.zeros(2, 9, 9, dtype=torch.bool).scatter(-1, indices[..., :4].long(), True)[:, None]
    expected = topk_attention(query, key, value, k=3, attn_mask=visible & chosen, backend="reference")
    mask = visible.expand(2, 1, 9, 9)
    if kind == "float":
        mask = torch.zeros(2, 1, 9, 9, dtype=torch.double).masked_fill(~mask, torch.finfo(torch.double).min)
    output, _ = function.topk_attention_forward(module, query, key, value, mask, indices=indices)
    torch.testing.assert_close(output.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="indices= needs an attention mask"):
        function.topk_attention_forward(module, query, key, value, None, indices=indices)


def test_the_choice_is_never_written_out_for_all_queries():
    from transformers.masking_utils import causal_mask_function

    masks = importlib.import_module("topk_attention.convert.masks")
    module, length = torch.nn.Identity(), 4096
    set_layer_settings(module, LayerSettings(3))
    q = torch.randn(1, 1, length, 4)
    mask = masks.compact_mask(1, length, length, mask_function=causal_mask_function)
    indices = torch.zeros(1, length, 2, dtype=torch.int32)
    tiles = importlib.import_module("topk_attention.backends.chunked.tiles")
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as mode:
        patch.setattr(tiles, "TILE_BYTES", 2**17)
        function.topk_attention_forward(module, q, q, q, mask, indices=indices)
    assert mode.largest < length * length / 4
