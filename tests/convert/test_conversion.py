"""What `convert` reports, what it refuses, and that a refusal leaves the model unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convert_models import LargestTensor, tiny_bert, tiny_llama
from topk_attention import convert, unconvert
from topk_attention.convert.settings import layer_settings


def test_the_report_names_every_layer_and_its_k():
    text = str(convert(tiny_llama(), attention_k=[3, [1, 2, 3, 4]], feed_forward_k=6))
    assert text.splitlines() == [
        "LlamaForCausalLM: 2 attention layers replaced, 2 feed-forward layers replaced",
        "  model.layers.0.self_attn  replaced  k = 3",
        "  model.layers.1.self_attn  replaced  k per head = [1, 2, 3, 4]",
        "  model.layers.0.mlp        replaced  k = 6 of 48 neurons",
        "  model.layers.1.mlp        replaced  k = 6 of 48 neurons",
    ]


def test_the_report_says_why_a_layer_was_skipped():
    model = tiny_llama(hidden_act="mish")
    report = convert(model, attention_k=3, feed_forward_k=6)
    assert [entry.reason for entry in report.skipped] == ["activation 'mish' has no top-k form"] * 2
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    report = convert(model, feed_forward_k=6)
    assert [entry.reason for entry in report.skipped] == [
        "up_proj is torch.nn.modules.container.Sequential, not nn.Linear; a top-k network reads only weights"
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"nothing to convert: pass attention_k= or feed_forward_k="),
        ({"attention_k": 0}, r"attention_k must be at least 1 and below 2\^31, got 0"),
        ({"feed_forward_k": 2**31}, r"feed_forward_k must be at least 1 and below 2\^31, got 2147483648"),
        ({"attention_k": [1, 2, 3]}, r"attention_k must hold one entry for each of the 2 layers picked, got 3"),
        (
            {"attention_k": [[1, 2], 3]},
            r"attention_k for model.layers.0.self_attn must hold one int for each of its 4 heads",
        ),
        ({"attention_k": {"model.layers.7.self_attn": 3}}, r"do not exist or are not picked: model.layers.7.self_attn"),
        ({"attention_k": 3, "where": lambda path, module: False}, r"convert replaced nothing in LlamaForCausalLM"),
        ({"attention_k": 3, "backend": "fast"}, r'backend must be one of "auto", .*got \'fast\''),
    ],
)
def test_bad_options_are_named_and_leave_the_model_as_it_was(options, words):
    model = tiny_llama()
    modules, implementation = dict(model.named_modules()), model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        convert(model, **options)
    assert dict(model.named_modules()) == modules
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.config, "topk_attention")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_k": True}, r'attention_k must be an int, one int per head, "all" or None, got bool True'),
        ({"attention_k": "many"}, r"attention_k must be an int, .* got str 'many'"),
        ({"feed_forward_k": [[1, 2], 3]}, r"feed_forward_k for model.layers.0.mlp must be an int, got \[1, 2\]"),
    ],
)
def test_a_k_of_the_wrong_type_is_named(options, words):
    with pytest.raises(TypeError, match=words):
        convert(tiny_llama(), **options)


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match=r"a transformers model \(a PreTrainedModel\) or hold PyTorch's .*, got Linear"):
        convert(nn.Linear(2, 2), attention_k=3)


def test_a_model_without_known_layers_is_an_error():
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="no layer of a kind that this version knows"):
        convert(model, attention_k=3)


def test_unconverting_a_model_that_was_not_converted_is_an_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM was not converted"):
        unconvert(tiny_llama())


def test_a_configuration_that_does_not_fit_the_model_is_an_error():
    model = tiny_llama()
    model.config.topk_attention = {"attention_k": {"layers.9.self_attn": 3}, "feed_forward_k": {}}
    with pytest.raises(ValueError, match=r"configuration names layers that do not exist: layers.9.self_attn"):
        convert(model)


def test_loading_with_the_name_alone_warns_which_k_it_uses(tmp_path, tokens):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk").eval()
    with torch.no_grad(), pytest.warns(UserWarning, match='attn_implementation="topk" without a k: using 128'):
        output = loaded(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(output, model(tokens).logits)
        convert(model, attention_k=4)
        convert(loaded, attention_k=4)
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    unconvert(loaded)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options",
    [
        {"attention_k": 4, "feed_forward_k": 5},
        {"attention_k": [4, 3]},
        {"attention_k": [4, [4, 4, 4, 4]]},
        {"attention_k": 4, "where": lambda path, module: ".1." in path},
    ],
)
def test_loading_a_converted_checkpoint_by_the_name_alone_refuses_to_forget_its_k(options, tmp_path, tokens):
    model = tiny_llama()
    convert(model, **options)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk")
    with pytest.raises(
        RuntimeError, match=r"saved with its own k for each layer; call topk_attention.convert\(model\)"
    ):
        loaded(tokens)


@pytest.mark.parametrize("k", [4, [1, 2, 3, 4]])
def test_a_k_that_all_layers_share_is_restored_by_the_name_alone(k, tmp_path, tokens):
    model = tiny_llama()
    convert(model, attention_k=[k, k], backend="reference")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="topk").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert layer_settings(loaded.model.layers[1].self_attn) == layer_settings(model.model.layers[1].self_attn)


def test_an_environment_variable_chooses_k_for_the_name_alone(tmp_path, tokens, monkeypatch):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "plain")
    convert(model, attention_k=4)
    model.save_pretrained(tmp_path / "converted")
    monkeypatch.setenv("TOPK_ATTENTION_K", "4")
    with torch.no_grad():
        for folder in ("plain", "converted"):
            loaded = type(model).from_pretrained(tmp_path / folder, attn_implementation="topk").eval()
            torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    monkeypatch.setenv("TOPK_ATTENTION_K", "5")
    loaded = type(model).from_pretrained(tmp_path / "converted", attn_implementation="topk")
    with pytest.raises(RuntimeError, match="TOPK_ATTENTION_K is 5, but this checkpoint was saved with k = 4; unset"):
        loaded(tokens)
    convert(loaded, attention_k=6)  # the k in code takes precedence
    assert layer_settings(loaded.model.layers[0].self_attn).k == 6


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("many", "the environment variable TOPK_ATTENTION_K must be a whole number, got 'many'"),
        ("-3", "the environment variable TOPK_ATTENTION_K must be a whole number, got '-3'"),
        ("0", "TOPK_ATTENTION_K must be at least 1"),
    ],
)
def test_an_environment_variable_that_holds_no_k_is_told(value, words, tokens, monkeypatch):
    monkeypatch.setenv("TOPK_ATTENTION_K", value)
    model = tiny_llama()
    model.set_attn_implementation("topk")
    with pytest.raises(ValueError, match=words):
        model(tokens)


@pytest.mark.parametrize("name", ["block_indices", "cache"])
def test_arguments_that_would_change_the_result_are_refused(name):
    from topk_attention.convert.attention_function import topk_attention_forward

    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"does not support {name}="):
        topk_attention_forward(nn.Identity(), q, q, q, None, **{name: torch.ones(1)})


def test_asking_for_attention_weights_warns_that_there_are_none(tokens):
    from topk_attention.convert.attention_function import topk_attention_forward

    model = tiny_bert()
    convert(model, attention_k=4)
    layer = model.encoder.layer[0].attention.self
    q = torch.randn(1, 4, 5, 8)
    with pytest.warns(UserWarning, match="returns no attention weights"):
        topk_attention_forward(layer, q, q, q, None, output_attentions=True)


def test_a_sliding_window_without_a_mask_is_refused_rather_than_ignored():
    from topk_attention.convert.attention_function import topk_attention_forward

    model = tiny_llama()
    convert(model, attention_k=4)
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="sliding_window= without a mask"):
        topk_attention_forward(model.model.layers[0].self_attn, q, q, q, None, sliding_window=3)


def test_the_mask_is_never_square():
    """The largest tensor of a whole forward pass stays linear in length, padding and causality included."""
    import topk_attention.backends.chunked.tiles as tiles

    length = 2048
    model = tiny_llama(max_position_embeddings=length, num_hidden_layers=1)
    convert(model, attention_k=4, feed_forward_k=5)
    tokens = torch.randint(3, 90, (1, length))
    padding = torch.ones(1, length, dtype=torch.long)
    padding[0, :100] = 0
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), LargestTensor() as mode:
        patch.setattr(tiles, "TILE_BYTES", 2**17)
        model.model(tokens, attention_mask=padding, use_cache=False)
    assert mode.largest < length * length / 4  # bytes: even a bool mask would be length * length


def test_a_linear_layer_wrapped_after_conversion_is_called(tokens):
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    for model, path in ((tiny_llama(), "model.layers.0.mlp.gate_proj"), (tiny_bert(), "encoder.layer.0.output.dense")):
        convert(model, feed_forward_k=48)
        owner, name = path.rsplit(".", 1)
        setattr(model.get_submodule(owner), name, Adapter(model.get_submodule(path)))
        with pytest.warns(UserWarning, match=f"computes every neuron, because .*{name} is .*Adapter, not nn.Linear"):
            output = model(tokens)[0]
        unconvert(model)
        assert type(model.get_submodule(path)) is Adapter  # nothing is lost
        torch.testing.assert_close(output, model(tokens)[0])


def test_networks_that_compute_something_else_are_skipped_with_the_reason():
    class Scaled(type(tiny_llama().model.layers[0].mlp)):
        def forward(self, x):
            return 0.5 * super().forward(x)

    model = tiny_llama()
    model.model.layers[0].mlp.__class__ = Scaled
    model.model.layers[1].mlp.norm = nn.LayerNorm(48)
    with pytest.raises(ValueError, match="convert replaced nothing") as error:
        convert(model, feed_forward_k=6)
    assert "Scaled computes something else than down(act(gate) * up)" in str(error.value)
    assert "LlamaMLP does more than its projections: norm" in str(error.value)


def test_sinks_that_a_layer_does_not_hand_on_are_skipped_with_the_reason():
    model = tiny_llama()
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    report = convert(model, attention_k=4)
    assert [(entry.path, entry.reason) for entry in report.skipped] == [
        ("model.layers.0.self_attn", "it has attention sinks that it does not hand to attention as s_aux=")
    ]
    assert [entry.path for entry in report.replaced] == ["model.layers.1.self_attn"]


def test_a_network_that_layers_share_is_replaced_in_each_and_stays_shared(tokens):
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    report = convert(model, feed_forward_k=6)
    assert [entry.path for entry in report.replaced] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    first, second = (layer.mlp for layer in model.model.layers)
    assert first.up_proj is second.up_proj
    unconvert(model)
    assert model.model.layers[0].mlp is model.model.layers[1].mlp


def test_each_call_decides_anew_for_the_kind_it_names():
    model = tiny_llama()
    convert(model, attention_k=3, backend="reference")
    convert(model, attention_k=3, feed_forward_k=6, where=lambda path, module: path.endswith("mlp"))
    assert model.config.topk_attention["attention_k"] == {}
    assert all(layer.self_attn._topk_attention_layer.k is None for layer in model.model.layers)
    convert(model, attention_k=3, backend="reference")
    convert(model, feed_forward_k=7)
    assert model.config.topk_attention["attention_backend"] == "reference"
    assert model.config.topk_attention["feed_forward_backend"] == "auto"
    assert len(model.config.topk_attention["attention_k"]) == 2


@pytest.mark.parametrize(
    "k",
    [
        [8, [4, 2, 4, 2]],
        (8, (4, 2, 4, 2)),
        [torch.tensor(8), torch.tensor([4, 2, 4, 2])],
        {"model.layers.0.self_attn": 8, "model.layers.1.self_attn": torch.tensor([4, 2, 4, 2])},
    ],
    ids=str,
)
def test_k_of_a_layer_is_what_topk_attention_takes(k):
    model = tiny_llama()
    report = convert(model, attention_k=k)
    assert [entry.k for entry in report.replaced] == [8, (4, 2, 4, 2)]


def test_a_tensor_of_k_has_one_entry_per_layer_and_none_leaves_a_layer():
    assert [entry.k for entry in convert(tiny_llama(), attention_k=torch.tensor([8, 3])).replaced] == [8, 3]
    assert [entry.k for entry in convert(tiny_llama(), attention_k=[None, 3]).replaced] == [3]
