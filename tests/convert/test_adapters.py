"""Families that compute attention in their own code: converted through an adapter, they are still themselves.

The reference for a small k is the family's own eager code in float64 with another softmax: one over the k largest
scores that are not hidden.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from topk_attention import Completion, convert, unconvert
from topk_attention.calibrate import MeanK, calibrate
from topk_attention.convert.adapters import chunks
from topk_attention.convert.search import reads_attention_interface

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEW = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
END = {"bos_token_id": 1, "eos_token_id": None}
DEBERTA = {"intermediate_size": 48, "relative_attention": True, "conv_kernel_size": 3}
V3 = {"pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
V3 |= {"position_biased_input": False, "max_position_embeddings": 1024}
LAYOUT = {"intermediate_size": 48, "coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 128}
LAYOUT |= {"visual_embed": False, "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 16, "max_rel_2d_pos": 64}
NO_PAGE, NO_TEXT = {"has_spatial_attention_bias": False}, {"has_relative_attention_bias": False}
# Class, options, and the attention that is the family's own. Falcon's eager code adds its bias twice.
MODELS = {
    "mpnet": ("MPNetForMaskedLM", NEW | {"intermediate_size": 48}, "eager"),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "eager"),
    "bloom_12_heads": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_head": 12}, "eager"),
    "falcon": ("FalconForCausalLM", NEW | END, "eager"),
    "falcon_grouped": ("FalconForCausalLM", NEW | END | {"new_decoder_architecture": True, "num_kv_heads": 2}, "eager"),
    "falcon_every_head": ("FalconForCausalLM", NEW | END | {"multi_query": False}, "eager"),
    "falcon_alibi": ("FalconForCausalLM", NEW | END | {"multi_query": False, "alibi": True}, "sdpa"),
    # Version 3 has buckets and shares its projections; version 2 may have neither.
    "deberta_v3": ("DebertaV2ForMaskedLM", NEW | DEBERTA | V3, "eager"),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        NEW | DEBERTA | {"pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
        "eager",
    ),
    "deberta_c2p": ("DebertaV2ForMaskedLM", NEW | DEBERTA | V3 | {"pos_att_type": ["c2p"]}, "eager"),
    "deberta_plain": ("DebertaV2ForMaskedLM", NEW | DEBERTA | {"relative_attention": False}, "eager"),
    "layoutlmv3": ("LayoutLMv3ForTokenClassification", NEW | LAYOUT, "eager"),
    "layoutlmv3_text": ("LayoutLMv3ForTokenClassification", NEW | LAYOUT | NO_PAGE, "eager"),
    "layoutlmv3_no_bias": ("LayoutLMv3ForTokenClassification", NEW | LAYOUT | NO_PAGE | NO_TEXT, "eager"),
    "gptj": ("GPTJForCausalLM", OLD | END | {"rotary_dim": 4}, "eager"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6}
        | {"attention_types": [[["global", "local"], 1]]}
        | END,
        "eager",
    ),
}
ENCODERS = [name for name in MODELS if "CausalLM" not in MODELS[name][0]]
GENERATING = [name for name in MODELS if name not in ENCODERS]
PADDINGS = ["none", "left", "right"]


def made(name, dtype=torch.float32, **options):
    class_name, own_options, implementation = MODELS[name]
    config = getattr(transformers, class_name.partition("For")[0] + "Config")(**(own_options | options))
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    for parameter in model.parameters():  # as initialised, scores would hardly differ
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def padding(side, shape=(2, 24)):
    mask = torch.ones(shape, dtype=torch.long)
    if side != "none":
        mask[0, slice(0, 5) if side == "left" else slice(17, None)] = 0
    return mask


def logits_of(model, tokens, mask):
    """The output at real tokens."""
    boxes = {"bbox": torch.stack([tokens, 97 - tokens, tokens + 5, 106 - tokens], -1)}
    on_page = boxes if "LayoutLM" in type(model).__name__ else {}
    return model(tokens, attention_mask=mask, **on_page).logits[mask.bool()]


def topk_softmax(k):
    """In float64, whatever dtype is asked for."""

    def softmax(scores, dim=-1, _stacklevel=3, dtype=None):
        scores = scores.double().masked_fill(scores < -1e30, -torch.inf)
        lowest = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)

    return softmax


def gradients(model, tokens, mask):
    model.zero_grad()
    logits = logits_of(model, tokens, mask)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_with_every_key_the_output_is_that_of_the_familys_own_attention(name, side, tokens):
    model, mask = made(name), padding(side)
    with torch.no_grad():
        expected = logits_of(model, tokens, mask)
        report = convert(model, attention_k="all")
        torch.testing.assert_close(logits_of(model, tokens, mask), expected, rtol=1e-4, atol=1e-4)
    assert len(report.replaced) == len(report.entries) == 2
    assert all(entry.k == "all" for entry in report.entries)


@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "falcon_alibi"])
def test_with_a_small_k_output_and_every_gradient_are_those_of_a_dense_topk_softmax(name, side, monkeypatch):
    model, mask = made(name, torch.float64), padding(side)
    # No token twice: without positions in the input, DeBERTa's scores of the same token in the same bucket would tie.
    tokens = torch.stack([torch.randperm(VOCABULARY - 3)[:24] + 3 for _ in range(2)])
    with monkeypatch.context() as patch:
        patch.setattr(F, "softmax", topk_softmax(4))
        expected = gradients(model, tokens, mask)
    convert(model, attention_k=4)
    actual = gradients(model, tokens, mask)
    # GPT-J and GPT-Neo round scores to float32.
    allowed = {"rtol": 1e-4, "atol": 1e-4} if name.startswith("gpt") else {"rtol": 1e-8, "atol": 1e-8}
    allowed = {"rtol": 1e-6, "atol": 1e-6} if name.startswith("deberta") else allowed  # its scale is a float32
    torch.testing.assert_close(actual, expected, **allowed)
    assert any("relative_attention_bias" in path for path in actual[1]) == (name == "mpnet")
    assert any("rel_embeddings" in path for path in actual[1]) == (
        name.startswith("deberta") and name != "deberta_plain"
    )


def test_falcons_bias_of_positions_is_added_once(tokens, monkeypatch):
    """Its PyTorch attention, with a mask that hides all but the k best keys."""
    model, mask, k = made("falcon_alibi", torch.float64), padding("left"), 4

    def dense(query, key, value, attn_mask, dropout_p, is_causal):
        return topk_softmax(k)(query @ key.mT / query.shape[-1] ** 0.5 + attn_mask) @ value

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", dense)
        expected = gradients(model, tokens, mask)
    convert(model, attention_k=k)
    torch.testing.assert_close(gradients(model, tokens, mask), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_is_that_without(name, cache, tokens):
    model, mask = made(name), padding("left")
    convert(model, attention_k=4)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, use_cache=False, **options)
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    torch.testing.assert_close(model.generate(tokens, **options), expected)
    beams = {"num_beams": 3} | options
    torch.testing.assert_close(model.generate(tokens, **beams), model.generate(tokens, **beams, use_cache=False))


@pytest.mark.parametrize("name", GENERATING)
def test_cached_steps_keep_the_keys_of_a_dense_topk_softmax(name, tokens, monkeypatch):
    model, k = made(name, torch.float64), 5
    reference = copy.deepcopy(model)
    convert(model, attention_k=k)
    with torch.no_grad():
        cache = model(tokens[:, :17], use_cache=True).past_key_values
        held = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        steps = [model(tokens[:, t : t + 1], **{held: cache}).logits for t in range(17, 24)]
        if name == "falcon_alibi":
            expected = model(tokens).logits[:, 17:]
        else:
            with monkeypatch.context() as patch:
                patch.setattr(F, "softmax", topk_softmax(k))
                expected = reference(tokens).logits[:, 17:]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_saving_and_loading_restore_every_k(name, tokens, tmp_path):
    model, mask = made(name), padding("left")
    convert(model, attention_k=4, feed_forward_k=8)
    with torch.no_grad():
        expected = logits_of(model, tokens, mask)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a converted checkpoint was loaded plainly
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert len(convert(loaded).replaced) == 4
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, tokens, mask), expected)


@pytest.mark.parametrize("name", MODELS)
def test_unconvert_gives_back_classes_configurations_and_outputs(name, tokens):
    model, mask = made(name), padding("right")
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with torch.no_grad():
        expected = logits_of(model, tokens, mask)
        convert(model, attention_k=4)
        assert not torch.equal(logits_of(model, tokens, mask), expected)
        unconvert(model)
        torch.testing.assert_close(logits_of(model, tokens, mask), expected, rtol=0, atol=0)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert model.config._attn_implementation == MODELS[name][2]


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_converted_too(name, tokens):
    model, mask = made(name), padding("left")
    convert(model, attention_k=4)
    with torch.no_grad():
        expected = logits_of(model, tokens, mask)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(logits_of(other, tokens, mask), expected, rtol=0, atol=0)
            unconvert(other)
            assert not torch.equal(logits_of(other, tokens, mask), expected)


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_not_picked_run_full_attention(name, tokens):
    model, mask = made(name), padding("left")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        convert(model, attention_k=[2, None])
        report = convert(model, attention_k=4, where=lambda path, _: ".1." in path)
        actual = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [entry.k for entry in report.entries] == [None, 4]
    torch.testing.assert_close(actual[1][mask.bool()], expected[1][mask.bool()], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual[2][mask.bool()], expected[2][mask.bool()], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_that_is_switched_by_hand_runs_the_familys_own_code(name, tokens):
    model, mask = made(name), padding("left")
    with torch.no_grad():
        expected = logits_of(model, tokens, mask)
        convert(model, attention_k=4)
        with pytest.warns(UserWarning, match="was switched from top-k"):
            model.config._attn_implementation = MODELS[name][2]
        torch.testing.assert_close(logits_of(model, tokens, mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_completion_and_a_k_for_each_head_are_taken(name, tokens):
    model, mask = made(name, torch.float64), padding("left")
    num_heads = 12 if name == "bloom_12_heads" else 4
    k = [list(range(2, 2 + num_heads))] * 2
    with torch.no_grad():
        every_key = logits_of(model, tokens, mask)
        convert(model, attention_k=k)
        without = logits_of(model, tokens, mask)
        convert(model, attention_k=k, completion=Completion())
        completed = logits_of(model, tokens, mask)
    assert not torch.allclose(completed, without)
    assert not torch.allclose(without, every_key)
    if name not in ENCODERS:
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        torch.testing.assert_close(
            model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options)
        )


@pytest.mark.parametrize("name", ["mpnet", "gptj", "falcon", "deberta_v3"])
def test_calibration_measures_adapted_layers(name, tokens):
    model = made(name)
    former = [type(module) for module in model.modules()]
    calibration = calibrate(model, [{"input_ids": tokens}], target=MeanK(6))
    assert [type(module) for module in model.modules()] == former
    assert len(convert(model, attention_k=calibration).replaced) == 2


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_queries_times_keys_is_made(name):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    length = 1024
    sizes = {"max_position_embeddings": length + 2, "n_positions": length + 2}
    sizes = {key: size for key, size in sizes.items() if name not in ("bloom", "bloom_12_heads")}
    sizes |= {"window_size": 2 * length} if name == "gpt_neo" else {}  # windows are masks, tile by tile
    model = made(name, **sizes)
    if name.startswith("layoutlmv3") and any(map(reads_attention_interface, model.modules())):
        pytest.skip("this version of transformers hands LayoutLMv3's bias to the attention interface in full")
    convert(model, attention_k=8)
    tokens = torch.randint(3, VOCABULARY, (1, length))
    with Largest() as largest:
        model(tokens).logits.sum().backward()
    assert largest.numel < length * length


@pytest.mark.parametrize("name", ["mpnet", "bloom", "deberta_v3", "falcon", "gpt_neo"])
def test_the_name_alone_is_refused_and_convert_is_the_way_out(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in its own code; load it without .*call topk_attention\.convert\(model"):
        type(model).from_pretrained(tmp_path, attn_implementation="topk")
    with pytest.raises(ValueError, match='cannot run with attn_implementation="topk"'):
        model.set_attn_implementation("topk")
    convert(model, attention_k=4)
    model.set_attn_implementation("topk")  # what it runs already


def test_a_layer_whose_forward_was_replaced_is_left_as_it_is():
    model = made("bloom")
    layer = model.transformer.h[1].self_attention
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match=r"h\.1\.self_attention: its forward method was replaced by .*lambda"):
        convert(model, attention_k=4)
    assert type(layer).__name__ == "BloomAttention"


def test_blooms_output_in_slices_is_not_adapted():
    model = made("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ValueError, match=r"its output is computed in slices \(pretraining_tp with slow_but_exact\)"):
        convert(model, attention_k=4)


def test_grouped_falcon_caches_each_key_once(tokens):
    model = made("falcon_grouped")
    whole = model(tokens, use_cache=True).past_key_values.layers[0].keys
    convert(model, attention_k=4)
    assert whole.shape[1] == 4
    assert model(tokens, use_cache=True).past_key_values.layers[0].keys.shape[1] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_as_near_to_float32_as_the_familys_own(name, dtype, tokens):
    mask = padding("left")
    with torch.no_grad():
        exact = logits_of(made(name), tokens, mask)
        model = made(name, dtype)
        own = (logits_of(model, tokens, mask).float() - exact).abs().mean()
        convert(model, attention_k="all")
        assert (logits_of(model, tokens, mask).float() - exact).abs().mean() < 2 * own


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_weights_is_that_of_the_layer(name, tokens):
    option = "attn_pdrop" if name == "gptj" else "attention_dropout"
    model = made(name, **{"attention_probs_dropout_prob" if name in ENCODERS else option: 0.5})
    for module in model.modules():  # all other dropouts off
        if isinstance(module, nn.Dropout) and module.p != 0.5:
            module.p = 0.0
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
    convert(model.train(), attention_k="all")
    with torch.no_grad():
        differs = not torch.equal(model(tokens).logits, model(tokens).logits)
    # Falcon without a bias of positions drops no weights.
    assert differs == (not name.startswith("falcon") or name == "falcon_alibi")


@pytest.mark.parametrize("name", ["deberta_v3", "layoutlmv3"])
def test_chunks_of_queries_change_nothing(name, monkeypatch):
    model, mask = made(name, torch.float64), padding("left")
    tokens = torch.stack([torch.randperm(VOCABULARY - 3)[:24] + 3 for _ in range(2)])
    convert(model, attention_k=4)
    expected = gradients(model, tokens, mask)
    monkeypatch.setattr(chunks, "_CHUNK", 7)
    torch.testing.assert_close(gradients(model, tokens, mask), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mpnet", "falcon", "gptj", "gpt_neo", "layoutlmv3"])
def test_a_mask_for_each_query_and_key_is_taken(name, tokens):
    """Float, as the family's own code adds it to scores: each query sees the ten last keys, less every third one."""
    rows, columns = torch.arange(24)[:, None], torch.arange(24)
    visible = (columns <= rows) & (columns > rows - 10) & ((columns % 3 != 1) | (columns == rows))
    mask = torch.zeros(1, 1, 24, 24).masked_fill(~visible, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    model = made(name)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        convert(model, attention_k="all")
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT with this transformers
def test_lora_on_projections_of_adapted_layers_acts_and_trains(tokens):
    peft = pytest.importorskip("peft")
    base = made("gptj")
    targets = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, targets).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    convert(model, attention_k="all")
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    model(input_ids=tokens).logits.sum().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if "lora_" in path)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # BLOOM's activation, traced
@pytest.mark.parametrize("name", ["bloom", "deberta_v3", "falcon_alibi", "gpt_neo"])
def test_an_adapted_model_compiles_without_a_break(name, tokens):
    model = made(name)
    convert(model, attention_k=4)
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
