"""Models with attention sinks (gpt-oss and others) or a soft cap on scores (Gemma 2 and others)."""

from __future__ import annotations

import copy

import pytest
import torch

from convert_models import output_and_gradients, topk_eager
from topk_attention import Completion, MeanK, calibrate, convert, unconvert
from topk_attention.convert.attention_function import topk_attention_forward
from topk_attention.convert.settings import LayerSettings, set_layer_settings

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
FAMILIES = {
    "GptOss": EXPERTS | ROPE,
    "GraniteSWA": {},
    "GraniteMoeSWA": EXPERTS,
    "MiMoV2Flash": {
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Inkling2": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 8,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "Gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "VaultGemma": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "T5Gemma": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
}
# Eager attention of some of these rounds to float32 within its softmax.
ROUNDING = 1e-4
GENERATING = ("GptOss", "Gemma2", "T5Gemma")
# Inkling 2 computes its sinks from its queries.
WITH_SINKS = {
    **dict.fromkeys(("GptOss", "GraniteSWA", "GraniteMoeSWA", "MiMoV2Flash"), "sinks"),
    "Inkling2": "sink_proj.weight",
}


def build(name):
    """A random model in float64 with eager attention, of which every sink and cap shows."""
    import transformers

    options = SIZES | FAMILIES[name]
    names = (f"{name}TextConfig", f"{name}Config")
    config_class = next((getattr(transformers, one) for one in names if hasattr(transformers, one)), None)
    if config_class is None:
        pytest.skip(f"this version of transformers has no {name}")
    if name == "T5Gemma":
        module = transformers.T5GemmaModuleConfig(**options)
        config = config_class(encoder=module, decoder=copy.deepcopy(module), decoder_start_token_id=1)
        model_class = transformers.T5GemmaForConditionalGeneration
    else:
        config, model_class = config_class(**options), getattr(transformers, f"{name}ForCausalLM")
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
            elif parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape) * (0.5 if "embed" in path else 1.5 / parameter.shape[-1] ** 0.5)
                )
    model = model.double()
    for path, parameter in model.named_parameters():
        if name == "Inkling2" and path.endswith("mlp.gate.weight"):  # its router calculates in float32
            parameter.data = parameter.data.float()
    return model


def inputs_of(name):
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 97, (2, 17)), torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0
    more = {"decoder_input_ids": ids[:, :9]} if name == "T5Gemma" else {}
    return {"input_ids": ids, "attention_mask": mask} | more


def assert_same(actual, expected, tolerance=1e-9):
    """Output and gradients, each within `tolerance` of its largest entry."""
    assert actual[1].keys() == expected[1].keys()
    for path in ("", *expected[1]):
        a, b = (pair[1][path] if path else pair[0] for pair in (actual, expected))
        assert (a - b).abs().max() <= tolerance * b.abs().max(), path or "output"


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_key_kept_outputs_and_all_gradients_are_those_of_eager_attention(name, fast_backend):
    model, inputs = build(name), inputs_of(name)
    expected = output_and_gradients(model, inputs)
    num_layers = sum(hasattr(module, "o_proj") for module in model.modules())
    for backend in ("auto", fast_backend):
        report = convert(model, attention_k=1000, backend=backend)
        assert (len(report.replaced), report.skipped) == (num_layers, ())
        assert_same(output_and_gradients(model, inputs), expected, tolerance=ROUNDING)
    if name in WITH_SINKS:
        of_sinks = [gradient for path, gradient in expected[1].items() if path.endswith(WITH_SINKS[name])]
        assert any(gradient.abs().min() > 0 for gradient in of_sinks)


@pytest.mark.parametrize("name", FAMILIES)
def test_below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask(name, dense_topk):
    model, inputs = build(name), inputs_of(name)
    topk_eager.k = 4
    model.set_attn_implementation("topk_eager")
    expected = output_and_gradients(model, inputs)
    model.set_attn_implementation("eager")
    full = output_and_gradients(model, inputs)[0]
    convert(model, attention_k=4)
    # Inkling 2 rounds to float32 behind its attention.
    assert_same(output_and_gradients(model, inputs), expected, tolerance=1e-5 if name == "Inkling2" else 1e-9)
    assert not torch.allclose(expected[0], full)
    unconvert(model)
    assert torch.equal(output_and_gradients(model, inputs)[0], full)


def attention_of(function, sinks, bias, k="all", backend="auto"):
    """Output and gradients of a layer's attention in float64, with a sink for each query."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    set_layer_settings(layer, LayerSettings(k, backend))
    leaves = [torch.randn(2, heads, 11, 4).double() for heads in (4, 2, 2)] + [sinks] * (sinks is not None)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    lowest = torch.finfo(torch.float64).min
    hidden = torch.zeros(2, 1, 11, 11).double().masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), lowest)
    hidden[0, :, :, :3] = lowest  # the first queries see nothing
    options = {"sinks": leaves[3]} if sinks is not None else {}
    output, _ = function(layer, *leaves[:3], hidden, scaling=0.5, position_bias=bias, **options)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    return output.detach(), dict(enumerate(gradients))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("k", ["all", 3])
def test_sinks_that_differ_from_query_to_query_are_one_more_score_each_and_train(k, has_bias, backend):
    sinks = torch.linspace(-3, 40, 88).view(2, 4, 11, 1).double()
    bias = torch.linspace(-2, 2, 11).expand(1, 4, 11, 11).double() if has_bias else None
    topk_eager.k = 11 if k == "all" else k
    expected = attention_of(topk_eager, sinks, bias)
    actual = attention_of(topk_attention_forward, sinks, bias, k=k, backend=backend)
    assert_same(actual, expected, tolerance=1e-12)
    assert (attention_of(topk_attention_forward, None, bias, k=k, backend=backend)[0] - actual[0]).abs().max() > 0.1


def test_sinks_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"sinks must have shape \[2, 4, 11, 1\], one for each query and head, .*got \[4\]; use"
    ):
        attention_of(topk_attention_forward, torch.zeros(4).double(), None, k=3)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_keeps_the_keys_that_a_dense_mask_would(name, dense_topk):
    model, inputs = build(name), inputs_of(name)
    inputs = {"input_ids": inputs["input_ids"]}  # in float64 eager attention makes rows of padding NaN
    options = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    topk_eager.k = 3
    model.set_attn_implementation("topk_eager")
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("eager")
    full, beams = model.generate(**inputs, **options), model.generate(**inputs, **options, num_beams=2)
    convert(model, attention_k=3)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, **options, **more), expected), more
    convert(model, attention_k=1000)
    assert torch.equal(model.generate(**inputs, **options), full)
    assert torch.equal(model.generate(**inputs, **options, num_beams=2), beams)


@pytest.mark.parametrize("name", ["GptOss", "Gemma2"])
def test_layers_that_where_does_not_pick_keep_their_sinks_and_their_cap(name):
    model, inputs = build(name), inputs_of(name)
    expected = output_and_gradients(model, inputs)
    report = convert(model, attention_k=1000, where=lambda path, module: "layers.1" in path)
    assert len(report.replaced) == 1
    assert_same(output_and_gradients(model, inputs), expected, tolerance=ROUNDING)


@pytest.mark.parametrize("name", ["GptOss", "Gemma2"])
def test_a_saved_model_restores_its_k(name, tmp_path):
    model, inputs = build(name).float(), inputs_of(name)
    convert(model, attention_k=4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    convert(loaded)
    by_name = type(model).from_pretrained(tmp_path, attn_implementation="topk").eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(by_name(**inputs).logits, expected)


def test_completion_beside_sinks_leaves_full_attention_where_nothing_is_left_out():
    model, inputs = build("GptOss"), inputs_of("GptOss")
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=17, completion=Completion())
    assert_same(output_and_gradients(model, inputs), expected)
    convert(model, attention_k=3)
    far = (output_and_gradients(model, inputs)[0] - expected[0]).abs().mean()
    convert(model, attention_k=3, completion=Completion())
    assert (output_and_gradients(model, inputs)[0] - expected[0]).abs().mean() < far


def test_completion_of_a_layer_with_a_soft_cap_is_refused_before_anything_changes():
    model = build("Gemma2")
    with pytest.raises(ValueError, match=r"completion for model\.layers\.0\.self_attn is not possible: .* soft cap"):
        convert(model, attention_k=3, completion=Completion())
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"completion is not possible for model\.layers\.0\.self_attn: .* soft cap"):
        calibrate(model, [torch.randint(3, 97, (1, 16))], target=MeanK(4), completion="fit")
