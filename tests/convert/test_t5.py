"""T5's position bias reaches attention as a table: exact at every offset, never in full, with its gradient."""

from __future__ import annotations

import functools
import importlib
import inspect

import pytest
import torch

from convert_models import FAMILIES, LargestTensor, inputs_of, output_and_gradients, output_of, tiny_flan_t5, tiny_t5
from topk_attention import convert, unconvert
from topk_attention.convert.position_bias import TableBias, _bias_of


@pytest.mark.parametrize("tensor_offset", [False, True])
@pytest.mark.parametrize(("first", "num_queries", "num_keys"), [(0, 7, 7), (5, 1, 6), (5, 3, 8), (0, 4, 9), (2, 3, 30)])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_table_gives_the_bias_that_t5_computes(part, first, num_queries, num_keys, tensor_offset):
    attention = getattr(tiny_t5(), part).block[0].layer[0].SelfAttention
    expected = attention.compute_bias(num_queries, num_keys, past_seen_tokens=first)[0]
    bias = TableBias(
        _bias_of(attention, None, torch.device("cpu")).table, torch.tensor(first) if tensor_offset else first
    )
    values = bias.at(num_queries, num_keys).relative_values(num_queries, num_keys)
    columns = torch.arange(num_keys) - torch.arange(num_queries)[:, None] + num_queries - 1
    torch.testing.assert_close(values[:, columns], expected, rtol=0, atol=0)


def test_the_bias_is_never_built_in_full(monkeypatch):
    monkeypatch.setattr(importlib.import_module("topk_attention.backends.chunked.tiles"), "TILE_BYTES", 2**17)
    length = 1024
    model = tiny_t5(num_heads=2, num_layers=2, num_decoder_layers=2)
    convert(model, attention_k=4, feed_forward_k=5)
    tokens = torch.randint(3, 90, (1, length))
    padding = torch.ones(1, length, dtype=torch.long)
    padding[0, -100:] = 0
    with LargestTensor() as mode:
        output_of(model, {"input_ids": tokens, "attention_mask": padding, "decoder_input_ids": tokens}).sum().backward()
    assert mode.largest < length * length / 2  # bytes, of two heads of a float each


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", [tiny_t5, tiny_flan_t5])
def test_a_cache_of_either_kind_keeps_the_offsets(build, cache):
    model, inputs = build().double(), inputs_of(FAMILIES["t5"])
    inputs.pop("decoder_input_ids")
    options = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}
    convert(model, attention_k=4)
    expected = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), expected)


def with_cache_argument(model, name):
    """The model whose attention layers take the cache under this name, as another version of transformers writes it."""
    from transformers.models.t5.modeling_t5 import T5Attention

    parameters = inspect.signature(T5Attention.forward).parameters
    own = "cache" if "cache" in parameters else "past_key_values"

    def renamed(kwargs, old, new):
        return {new if key == old else key: value for key, value in kwargs.items()}

    class Attention(T5Attention):
        @functools.wraps(T5Attention.forward)
        def forward(self, *args, **kwargs):
            return super().forward(*args, **renamed(kwargs, name, own))

    Attention.forward.__signature__ = inspect.Signature(
        [p.replace(name=name) if p.name == own else p for p in parameters.values()]
    )
    for module in model.modules():
        if type(module) is T5Attention:
            module.__class__ = Attention
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, renamed(kwargs, own, name)), with_kwargs=True
            )
    return model


@pytest.mark.parametrize("name", ["past_key_values", "cache", "a_name_of_the_future"])
def test_the_offsets_stay_right_whatever_transformers_calls_the_cache(name):
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    tokens = inputs.pop("decoder_input_ids")
    with_cache_argument(model, name)
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=tokens).logits
        convert(model, attention_k=1000)
        cache = model(**inputs, decoder_input_ids=tokens[:, :6], use_cache=True).past_key_values
        rest = model(**inputs, decoder_input_ids=tokens[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 6:])


def test_beams_read_an_encoders_output_that_was_computed_before():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    del inputs["decoder_input_ids"]
    convert(model, attention_k=4)
    options = {"max_new_tokens": 8, "num_beams": 3, "no_repeat_ngram_size": 1}
    expected = model.generate(**inputs, **options)
    encoded = model.get_encoder()(**inputs)
    output = model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(output, expected)


def test_several_tokens_at_once_after_a_cache_keep_the_offsets():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    convert(model, attention_k=4)
    tokens = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=tokens).logits
        cache = model(**inputs, decoder_input_ids=tokens[:, :6], use_cache=True).past_key_values
        rest = model(**inputs, decoder_input_ids=tokens[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 6:])


@pytest.mark.parametrize("k", [3, 1000])
def test_mask_patterns_that_are_cut_into_chunks_keep_the_offsets(k, monkeypatch):
    """A window over the decoder's tokens, which no chunk of queries may shift."""
    import transformers.models.t5.modeling_t5 as modeling
    from transformers.masking_utils import create_sliding_window_causal_mask

    function = importlib.import_module("topk_attention.convert.attention_function")
    monkeypatch.setattr(modeling, "create_causal_mask", create_sliding_window_causal_mask)
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    for part in (model.config, model.encoder.config, model.decoder.config):
        part.sliding_window = 5
    convert(model, attention_k=k)
    expected = output_and_gradients(model, inputs)
    monkeypatch.setattr(function, "_MASK_CHUNK", 4)
    output, gradients = output_and_gradients(model, inputs)
    torch.testing.assert_close(output, expected[0])
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[1][name], msg=name)


def test_layers_that_are_left_out_keep_the_table_as_well():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, attention_k={"decoder.block.1.layer.1.EncDecAttention": 1000})
        torch.testing.assert_close(output_of(model, inputs), expected)


def test_another_attention_implementation_gets_the_bias_in_full_again():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, attention_k=3)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(output_of(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_t5, tiny_flan_t5])
def test_a_last_layer_kept_in_float32_computes_in_float32(build, dtype, tmp_path):
    build(initializer_factor=1.0).save_pretrained(tmp_path)
    model = type(build()).from_pretrained(tmp_path, dtype=dtype).eval()
    inputs = inputs_of(FAMILIES["t5"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, attention_k=1000, feed_forward_k=1000)
        torch.testing.assert_close(
            output_of(model, inputs), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )
        convert(model, feed_forward_k=5)
        assert output_of(model, inputs).isfinite().all()


def test_attention_dropout_zeroes_weights_and_scales_the_rest():
    model, inputs = tiny_t5(dropout_rate=0.0).double(), inputs_of(FAMILIES["t5"])
    convert(model, attention_k=3)
    model.train()
    without = output_of(model, inputs)
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.5
    torch.manual_seed(1)
    first = output_of(model, inputs)
    torch.manual_seed(1)
    assert torch.equal(output_of(model, inputs), first)
    assert not torch.equal(first, without)
    first.sum().backward()
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.isfinite().all()


def test_the_encoder_of_a_saved_model_restores_its_k_alone(tmp_path):
    from transformers import T5EncoderModel

    model, inputs = tiny_t5(), inputs_of(FAMILIES["t5"])
    convert(model, attention_k=3, feed_forward_k=4)
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path).eval()
    assert len(convert(encoder).replaced) == 4
    del inputs["decoder_input_ids"]
    with torch.no_grad():
        expected = model.encoder(**inputs).last_hidden_state
        torch.testing.assert_close(encoder(**inputs).last_hidden_state, expected, rtol=0, atol=0)
    unconvert(encoder)


def test_a_compiled_model_equals_the_eager_one():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    convert(model, attention_k=5, feed_forward_k=7)
    inputs["use_cache"] = False
    with torch.no_grad():
        expected = output_of(model, inputs)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_mt5_has_a_table_too():
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model, inputs = MT5ForConditionalGeneration(config).eval().double(), inputs_of(FAMILIES["t5"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        report = convert(model, attention_k=1000, feed_forward_k=1000)
        torch.testing.assert_close(output_of(model, inputs), expected)
    assert not report.skipped
