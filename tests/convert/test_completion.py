"""`convert(completion=)`: the reference's results, layer by layer, saved with the model, in the report."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from convert_models import FAMILIES, inputs_of, output_and_gradients, output_of, tiny_bert, tiny_llama, tiny_mistral
from topk_attention import Completion, convert, is_cross_attention, topk_attention, unconvert

BACKEND = "auto"
# Scores of random models lie far apart, so that the rest weighs little.
COMPLETION = Completion([3.0, 0.5, 1.0, 8.0], lift=0.6)
LLAMA_PATHS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def completed_eager(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    """What a converted layer must compute: the reference, with a dense mask and a dense bias."""
    completion = completed_eager.completion
    output = topk_attention(
        query,
        key,
        value,
        k=completed_eager.k,
        attn_mask=None if attention_mask is None else attention_mask > -1e30,
        bias=position_bias,
        scale=scaling,
        enable_gqa=True,
        backend="reference",
        completion=completion(module) if callable(completion) else completion,
    )
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def reference():
    """Registers `completed_eager` with transformers' eager mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    completed_eager.k, completed_eager.completion = 4, COMPLETION
    AttentionInterface.register("completed_eager", completed_eager)
    AttentionMaskInterface.register("completed_eager", eager_mask)
    yield
    AttentionInterface._global_mapping.pop("completed_eager")
    AttentionMaskInterface._global_mapping.pop("completed_eager")


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name in expected[1]:
        torch.testing.assert_close(actual[1][name], expected[1][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_all_gradients_are_those_of_the_reference_with_dense_masks(name, reference):
    model, inputs = FAMILIES[name].build().double(), inputs_of(FAMILIES[name])
    model.set_attn_implementation("completed_eager")
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=4, completion=COMPLETION, backend=BACKEND)
    assert_same(output_and_gradients(model, inputs), expected)
    convert(model, attention_k=4, backend=BACKEND)  # a second call without it takes it away
    assert (output_of(model, inputs) - expected[0]).abs().max() > 1e-4


@pytest.mark.parametrize("length", [24, 600])
def test_sliding_windows_are_taken_as_they_are(length, reference):
    """With more queries than one mask chunk, too."""
    model = tiny_mistral().double()
    tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("completed_eager")
    inputs = {"input_ids": tokens, "use_cache": False}
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=4, completion=COMPLETION, backend=BACKEND)
    assert_same(output_and_gradients(model, inputs), expected)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_every_layer_has_its_own_completion(as_mapping, tokens, reference):
    model = tiny_llama().double()
    completions = [Completion(0.7, lift=0), Completion([1, 2, 3, 4])]
    layers = {model.get_submodule(path): one for path, one in zip(LLAMA_PATHS, completions, strict=True)}
    completed_eager.completion = layers.__getitem__
    model.set_attn_implementation("completed_eager")
    expected = output_of(model, {"input_ids": tokens})
    given = dict(zip(LLAMA_PATHS, completions, strict=True)) if as_mapping else completions
    report = convert(model, attention_k=4, completion=given, backend=BACKEND)
    torch.testing.assert_close(output_of(model, {"input_ids": tokens}), expected)
    assert [entry.reason for entry in report.replaced] == [
        "k = 4, completed (mass scale 0.7, lift 0)",
        "k = 4, completed (mass scales 1 to 4, lift 0.35)",
    ]
    assert [entry.completion for entry in report.replaced] == completions


def test_a_layer_without_an_entry_is_completed_by_nothing(tokens):
    model = tiny_llama()
    report = convert(model, attention_k=4, completion=[None, Completion(0.5)], backend=BACKEND)
    assert [entry.completion is None for entry in report.replaced] == [True, False]
    report = convert(model, attention_k=4, completion={LLAMA_PATHS[0]: Completion(0.5)}, backend=BACKEND)
    assert [entry.completion is None for entry in report.replaced] == [False, True]


def test_the_report_says_where_a_completion_does_nothing():
    model = tiny_llama()
    report = convert(model, attention_k=["all", 4], completion=Completion(0.5))
    assert [entry.reason for entry in report.entries] == [
        "k = all, so completion has nothing to add",
        "k = 4, completed (mass scale 0.5, lift 0.35)",
    ]
    report = convert(model, attention_k=[None, 4], completion=[Completion(0.5), None])
    assert [entry.reason for entry in report.entries] == [
        "attention_k has no entry for it, so its completion does nothing",
        "k = 4",
    ]
    assert "completion" not in model.config.topk_attention


def test_where_picks_the_layers_that_are_completed():
    model = FAMILIES["t5"].build()
    report = convert(model, attention_k=4, completion=Completion(0.5), where=is_cross_attention)
    assert len(report.replaced) == 2
    assert all(entry.completion is not None for entry in report.replaced)
    assert all(entry.completion is None for entry in report.skipped)


def test_scales_in_a_tensor_are_taken_as_numbers(tokens):
    model = tiny_llama()
    scales = torch.tensor([0.5, 0.25, 1.0, 2.0])
    convert(model, attention_k=4, completion=Completion(scales), backend=BACKEND)
    scales.zero_()
    expected = output_of(tiny_converted(Completion([0.5, 0.25, 1.0, 2.0])), {"input_ids": tokens})
    assert torch.equal(output_of(model, {"input_ids": tokens}), expected)


def tiny_converted(completion, k=4):
    model = tiny_llama()
    convert(model, attention_k=k, completion=completion, backend=BACKEND)
    return model


@pytest.mark.parametrize(
    ("completion", "error", "words"),
    [
        (0.5, TypeError, r"completion must be a Completion, a list with one for each .*got float 0\.5"),
        ([0.5, None], TypeError, r"completion for model\.layers\.0\.self_attn must be a Completion or None, got float"),
        ([Completion()], ValueError, "completion must hold one entry for each of the 2 layers picked, got 1"),
        ({"model.layers.7": Completion()}, ValueError, "completion names layers that do not exist or are not picked"),
        (Completion([1, 2]), ValueError, r"completion for .*0\.self_attn must hold one mass_scale for each of the 4"),
        (
            Completion(nn.Parameter(torch.ones(4))),
            ValueError,
            r"requires a gradient, .*; detach it, or train it in topk_attention\.TopKAttention",
        ),
    ],
)
def test_a_completion_that_does_not_fit_is_refused_in_words(completion, error, words):
    model = tiny_llama()
    with pytest.raises(error, match=words):
        convert(model, attention_k=4, completion=completion)
    assert model.config._attn_implementation == "sdpa"


def test_completion_without_attention_k_is_refused_in_words():
    model = tiny_llama()
    words = r"completion is for the keys that attention does not keep, but attention_k is None; pass attention_k="
    with pytest.raises(ValueError, match=words):
        convert(model, completion=Completion(0.5))
    with pytest.raises(ValueError, match=words):
        convert(model, feed_forward_k=4, completion=Completion(0.5))
    convert(model, attention_k=4)
    with pytest.raises(ValueError, match=words):
        convert(model, completion=Completion(0.5))


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "whisper"])
def test_a_saved_model_remembers_its_completions(name, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.build(), inputs_of(family, torch.float32)
    completions = [Completion([0.1 * (i + 1), 1 / 3, 0, 2], lift=i % 2) for i in range(family.num_attention)]
    converted = convert(model, attention_k=4, completion=completions, feed_forward_k=9, backend=BACKEND)
    with torch.no_grad():
        expected = output_of(model, inputs)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        report = convert(loaded, backend=BACKEND)
        assert str(report) == str(converted)
        torch.testing.assert_close(output_of(loaded, inputs), expected, rtol=0, atol=0)
    stored = json.loads((tmp_path / "config.json").read_text())["topk_attention"]
    assert {"mass_scale": [0.1, 1 / 3, 0, 2], "lift": 0} in stored["completion"].values()
    unconvert(loaded)
    loaded.save_pretrained(tmp_path)
    assert "completion" not in (tmp_path / "config.json").read_text()


def test_without_completion_nothing_new_is_saved():
    model = tiny_llama()
    convert(model, attention_k=4)
    assert set(model.config.topk_attention) == {
        "attention_k",
        "feed_forward_k",
        "attention_backend",
        "feed_forward_backend",
        "every_attention_k",
    }
    convert(model)  # a configuration of an earlier version, which knows no completion
    convert(model, feed_forward_k=4)
    assert "completion" not in model.config.topk_attention


def test_a_conversion_of_the_networks_keeps_the_completion():
    model = tiny_converted(Completion(0.5))
    convert(model, feed_forward_k=4)
    report = convert(model)
    assert [entry.completion is not None for entry in report.replaced] == [True, True, False, False]


def test_by_name_alone_a_shared_completion_is_in_force(tmp_path, tokens):
    model = tiny_converted(COMPLETION)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk").eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
        plain = tiny_llama()
        convert(plain, attention_k=4)
        assert not torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_by_name_alone_completions_that_differ_are_refused(tmp_path, tokens):
    model = tiny_converted([Completion(0.5), Completion(0.6)])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk")
    with pytest.raises(RuntimeError, match=r"call topk_attention\.convert\(model\) after from_pretrained"):
        loaded(tokens)
    tiny = tiny_converted([Completion(0.5), None])
    tiny.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"call topk_attention\.convert\(model\) after from_pretrained"):
        type(model).from_pretrained(tmp_path, attn_implementation="topk")(tokens)


def test_unconvert_gives_the_original_back(tokens):
    model = tiny_llama()
    before = [sorted(vars(module)) for module in model.modules()]
    with torch.no_grad():
        expected = model(tokens).logits
        convert(model, attention_k=4, completion=Completion(0.5))
        assert any(module._forward_pre_hooks for module in model.modules())
        unconvert(model)
        assert torch.equal(model(tokens).logits, expected)
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_second_conversion_without_completion_leaves_no_hook(tokens):
    model = tiny_converted(Completion(0.5))
    convert(model, attention_k=4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    plain = tiny_llama()
    convert(plain, attention_k=4)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "bert", "mistral", "t5"])
def test_a_compiled_model_has_the_outputs_and_gradients_of_the_eager_one(name):
    family = FAMILIES[name]
    model, inputs = family.build().double(), inputs_of(family)
    if name != "bert":
        inputs["use_cache"] = False
    convert(model, attention_k=4, completion=COMPLETION, backend=BACKEND)
    expected = output_and_gradients(model, inputs)
    output, gradients = output_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(output, expected[0])
    for path, gradient in expected[1].items():
        torch.testing.assert_close(gradients[f"_orig_mod.{path}"], gradient, msg=path)


def test_a_compiled_model_decodes_with_a_cache_that_was_filled_eagerly(tokens):
    model = tiny_converted(COMPLETION)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(10, 14)]
        steps += [compiled(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(14, 18)]
        steps += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(18, 24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, 10:], rtol=1e-4, atol=1e-4)


def test_right_padding_changes_nothing_for_the_real_tokens(tokens, right_padding):
    model = tiny_bert().double()
    convert(model, attention_k=4, completion=COMPLETION, backend=BACKEND)
    with torch.no_grad():
        padded = model(tokens, attention_mask=right_padding).last_hidden_state[:1, :17]
        torch.testing.assert_close(padded, model(tokens[:1, :17]).last_hidden_state)


def torch_attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.double).eval()


PADDING = torch.arange(11).expand(2, 11) >= torch.tensor([[7], [11]])
CAUSAL = torch.ones(11, 11).triu(1).bool()
MASKS = {
    "none": ({}, False),
    "padding": ({"key_padding_mask": PADDING}, False),
    "float padding": ({"key_padding_mask": torch.zeros(2, 11).double().masked_fill(PADDING, -torch.inf)}, False),
    "added padding": ({"key_padding_mask": torch.rand(2, 11).double()}, False),
    "causal": ({"attn_mask": CAUSAL}, True),
    "padding and causal hint": ({"key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True}, True),
    "padding and mask": ({"key_padding_mask": PADDING, "attn_mask": CAUSAL}, True),
}


@pytest.mark.parametrize("name", MASKS)
def test_torchs_own_attention_is_completed(name):
    module, x = torch_attention(), torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(0)).double()
    masks, is_causal = MASKS[name]
    projected = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (part.view(2, 11, 4, 6).transpose(1, 2) for part in projected)
    padding = masks.get("key_padding_mask")
    if padding is not None and padding.dtype == torch.bool:
        padding = torch.zeros(2, 11).double().masked_fill(padding, -torch.inf)
    expected = topk_attention(
        *(query, key, value),
        k=3,
        bias=None if padding is None else padding[:, None, None],
        is_causal=is_causal,
        backend="reference",
        completion=COMPLETION,
    )
    convert(module, attention_k=3, completion=COMPLETION, backend=BACKEND)
    output = module(x, x, x, need_weights=False, **masks)[0]
    torch.testing.assert_close(output, module.out_proj(expected.transpose(1, 2).flatten(2)))


def test_a_torch_encoder_with_padding_takes_running_sums_and_can_be_restored(monkeypatch):
    from topk_attention.convert import torch_layers

    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0.0, dtype=torch.double)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 11, 24).double()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        report = convert(model, attention_k=3, completion=COMPLETION, backend=BACKEND)
        assert "completed (mass scales 0.5 to 8, lift 0.6)" in str(report)
        masks, real = [], torch_layers.topk_attention
        monkeypatch.setattr(
            torch_layers, "topk_attention", lambda *x, **options: (masks.append(options), real(*x, **options))[1]
        )
        model(x, src_key_padding_mask=PADDING)
        assert all(options["attn_mask"].dtype == torch.bool and options["bias"] is None for options in masks)
        unconvert(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING), expected)
    assert len(masks) == 2


def test_training_through_a_window_saves_no_square_mask(monkeypatch):
    """The backward pass of a completed call reads its mask; each chunk writes it out again."""
    from topk_attention.convert import attention_function

    monkeypatch.setattr(attention_function, "_MASK_CHUNK", 64)
    model = tiny_mistral(num_hidden_layers=1)
    tokens = torch.randint(3, 97, (1, 512))
    convert(model, attention_k=4, completion=Completion(0.5), backend=BACKEND)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(tokens, use_cache=False).logits.sum()
    assert not [x.shape for x in saved if x.dtype == torch.bool and x.numel() >= 64 * 512]
