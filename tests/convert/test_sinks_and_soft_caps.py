"""Models with attention sinks (gpt-oss and others) or a soft cap on scores (Gemma 2 and others)."""

from __future__ import annotations

import copy

import pytest
import torch

from convert_models import output_and_gradients, topk_eager
from topk_attention import Completion, MeanK, calibrate, convert, unconvert

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
    "Gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "VaultGemma": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "T5Gemma": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
}
# Eager attention of some of these rounds to float32 within its softmax.
ROUNDING = 1e-4
GENERATING = ("GptOss", "Gemma2", "T5Gemma")
WITH_SINKS = ("GptOss", "GraniteSWA", "GraniteMoeSWA", "MiMoV2Flash")


def build(name):
    """A random model in float64 with eager attention, of which every sink and cap shows."""
    import transformers

    options = SIZES | FAMILIES[name]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this version of transformers has no {name}")
    config_class = getattr(transformers, f"{name}Config")
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
    return model.double()


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
        assert any(path.endswith("sinks") and gradient.abs().min() > 0 for path, gradient in expected[1].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask(name, dense_topk):
    model, inputs = build(name), inputs_of(name)
    topk_eager.k = 4
    model.set_attn_implementation("topk_eager")
    expected = output_and_gradients(model, inputs)
    model.set_attn_implementation("eager")
    full = output_and_gradients(model, inputs)[0]
    convert(model, attention_k=4)
    assert_same(output_and_gradients(model, inputs), expected)
    assert not torch.allclose(expected[0], full)
    unconvert(model)
    assert torch.equal(output_and_gradients(model, inputs)[0], full)


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
