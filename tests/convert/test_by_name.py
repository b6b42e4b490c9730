"""The name "topk" alone never runs full attention without a word, and converted checkpoints say what they run."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

from convert_models import FAMILIES, inputs_of, tiny_llama
from topk_attention import convert, unconvert
from topk_attention.calibrate import MeanK, calibrate
from topk_attention.convert.search import reads_attention_interface

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
# Types that compute attention in their own code, by what the name did to them before it was refused.
HAND_WRITTEN = {
    "DebertaV2": "full attention",
    "Deberta": "full attention",
    "Longformer": "numbers added to a bool mask",
    "MPNet": "a mask that its code cannot read",
    "Bloom": "a mask that its code cannot read",
    "Falcon": "a KeyError",
    "GPTJ": "a KeyError",
    "GPTNeo": "a KeyError",
}


def config_of(name, **options):
    import transformers

    return getattr(transformers, f"{name}Config")(**options)


def model_class(name):
    import transformers

    return getattr(transformers, f"{name}Model")


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_class_that_computes_attention_itself_is_refused_when_it_is_built(name):
    options = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99, "num_attention_heads": 4}
    if name == "GPTJ":
        options = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "rotary_dim": 4}
    if name == "GPTNeo":
        options = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
        options["attention_types"] = [[["global"], 1]]
    if name == "Longformer":
        options |= {"attention_window": [6], "max_position_embeddings": 64, "intermediate_size": 48}
    words = rf'{name}Model cannot run with attn_implementation="topk".*topk_attention\.convert'
    config = config_of(name, **options)
    if any(map(reads_attention_interface, model_class(name)(config).modules())):
        pytest.skip(f"this version of transformers gives {name} the attention interface")
    config._attn_implementation = "topk"
    with pytest.raises(ValueError, match=words):
        model_class(name)(config)
    config._attn_implementation = "eager"
    model = model_class(name)(config)
    with pytest.raises(ValueError, match=rf'{name}Model cannot run with attn_implementation="topk"'):
        model.set_attn_implementation("topk")
    assert model.config._attn_implementation == "eager"


def test_a_saved_model_that_computes_attention_itself_is_refused_when_it_is_loaded(tmp_path):
    model_class("DebertaV2")(config_of("DebertaV2", **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='DebertaV2Model cannot run with attn_implementation="topk"'):
        model_class("DebertaV2").from_pretrained(tmp_path, attn_implementation="topk")


def test_a_converted_checkpoint_with_layers_that_the_name_does_not_reach_is_refused(tmp_path):
    config = config_of("SiglipVision", **VISION, image_size=16, patch_size=4)
    model = model_class("SiglipVision")(config).eval()
    convert(model, attention_k=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"head\.attention is MultiheadAttention, .*call topk_attention\.convert\(model, attention_k="
    ):
        model_class("SiglipVision").from_pretrained(tmp_path, attn_implementation="topk")


def test_feed_forward_k_alone_is_not_forgotten_by_the_name(tmp_path, tokens):
    model = tiny_llama()
    convert(model, feed_forward_k=5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk")
    with pytest.raises(RuntimeError, match=r"call topk_attention\.convert\(model\) after from_pretrained"):
        loaded(tokens)


def test_a_layer_with_a_feature_that_topk_lacks_is_refused_by_name(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    monkeypatch.setattr(LlamaAttention, "sinks", torch.zeros(4), raising=False)  # which its code hands to nobody
    config = config_of("Llama", **SMALL, num_key_value_heads=2, pad_token_id=0)
    config._attn_implementation = "topk"
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn cannot be converted: .* sinks"):
        model_class("Llama")(config)


def mixed_model():
    """A vision tower that can be converted beside a language model whose layers have something that topk lacks."""
    import transformers

    text = config_of("Gemma2", **SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    vision = {**VISION, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"}
    config = transformers.PaliGemmaConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_id=98, projection_dim=32
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).double().eval()
    for layer in model.model.language_model.layers:
        layer.self_attn.sinks = torch.zeros(4)  # which its code hands to nobody
    ids = torch.cat([torch.full((2, 16), 98), torch.randint(3, 90, (2, 5))], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs | {"pixel_values": torch.randn(2, 3, 16, 16).double()}


@pytest.mark.filterwarnings("ignore:a converted nn.MultiheadAttention returns no attention weights")
def test_a_part_that_cannot_be_converted_keeps_its_own_attention():
    model, inputs = mixed_model()
    with torch.no_grad():
        expected = model(**inputs).logits
        report = convert(model, attention_k=1000)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        assert {entry.path.split(".")[1] for entry in report.replaced} == {"vision_tower"}
        assert model.model.language_model.config._attn_implementation == "eager"
        unconvert(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_a_layer_beside_converted_ones_keeps_its_own_attention():
    """Layers of one configuration: one has attention sinks that it does not hand on, the other not."""
    config = config_of("Llama", **SMALL | {"num_hidden_layers": 2}, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    config._attn_implementation = "eager"
    model = model_class("Llama")(config).double().eval()
    tokens = torch.randint(3, 99, (2, 12))
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        model.layers[1].self_attn.sinks = torch.zeros(4)
        report = convert(model, attention_k=1000)
        assert [entry.path for entry in report.replaced] == ["layers.0.self_attn"]
        torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


def test_the_parts_of_a_model_get_their_own_attention_back():
    model, _ = mixed_model()
    model.model.vision_tower.set_attn_implementation("sdpa")
    convert(model, attention_k=3)
    twin = copy.deepcopy(model)
    for converted in (model, twin):
        unconvert(converted)
        assert converted.model.vision_tower.config._attn_implementation == "sdpa"
        assert converted.model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("options", [{"attention_k": 4}, {"feed_forward_k": 5}])
def test_a_converted_checkpoint_that_is_loaded_plainly_says_that_it_runs_in_full(options, tmp_path):
    model = tiny_llama()
    convert(model, **options)
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"remembers a conversion .* runs in full until topk_attention\.convert\(model\)"
    ):
        loaded = type(model).from_pretrained(tmp_path)
    convert(loaded)
    unconvert(loaded)
    loaded.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entry", [5, "k", [], {}, {"attention_k": 3, "feed_forward_k": {}}, {"attention_k": {"layers.0": "few"}}]
)
def test_a_damaged_entry_of_the_configuration_is_refused_in_words(entry, tmp_path):
    model = tiny_llama()
    convert(model, attention_k=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"topk_attention": entry}))
    words = r'"topk_attention" in the configuration of this model is not as convert writes it .*; delete this entry'
    with pytest.raises(ValueError, match=words):
        type(model).from_pretrained(tmp_path)


def test_calibrate_says_that_a_converted_checkpoint_runs_in_full(tmp_path):
    model = tiny_llama()
    convert(model, attention_k=4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    batches = [torch.randint(3, 97, (1, 16))]
    with pytest.raises(ValueError, match=r"remembers every k, but it runs in full; call topk_attention\.unconvert"):
        calibrate(loaded, batches, target=MeanK(4))
    unconvert(loaded)
    calibrate(loaded, batches, target=MeanK(4))


def test_a_switch_of_a_converted_models_attention_is_told():
    """Whisper's generate(return_token_timestamps=True) writes this into its configuration."""
    family = FAMILIES["whisper"]
    model, inputs = family.build().double(), inputs_of(family)
    convert(model, attention_k=3)
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.warns(
            UserWarning, match=r'switched from top-k to "eager" and stays so; call topk_attention\.convert'
        ):
            model.model.config._attn_implementation = "eager"
        assert not torch.equal(model(**inputs).logits, expected)
        convert(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    unconvert(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_share_one_network_are_saved_after_conversion(frozen, tmp_path):
    import transformers

    config = config_of(
        "Zamba",
        **SMALL | {"num_hidden_layers": 6},
        num_key_value_heads=4,
        attention_head_dim=16,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    )
    model = transformers.ZambaForCausalLM(config).eval().requires_grad_(not frozen)
    convert(model, attention_k=3, feed_forward_k=5)
    model.save_pretrained(tmp_path)
    loaded = transformers.ZambaForCausalLM.from_pretrained(tmp_path).eval()
    convert(loaded)
    tokens = torch.randint(3, 99, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
