"""Every family: with k at its limit a converted model is the original, below it the dense specification."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch

from convert_models import FAMILIES, inputs_of, output_and_gradients, output_of, topk_eager
from dense_networks import keep_best_neurons
from topk_attention import convert, is_cross_attention, is_self_attention, topk_attention, unconvert

GENERATING = ("t5", "flan_t5", "gpt2", "llama", "mistral", "qwen2", "bart", "whisper")
# Random models would repeat one token.
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
CROSS = ("t5", "flan_t5", "bart", "whisper")
# The name of the dropout of attention weights in a family's configuration.
ATTENTION_DROPOUT = {
    "t5": "dropout_rate",
    "flan_t5": "dropout_rate",
    "bert": "attention_probs_dropout_prob",
    "roberta": "attention_probs_dropout_prob",
    "gpt2": "attn_pdrop",
    "vit": "attention_probs_dropout_prob",
}
function = importlib.import_module("topk_attention.convert.attention_function")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    return family.build().double()


@pytest.fixture
def inputs(family):
    return inputs_of(family)


def assert_same(actual, expected):
    output, gradients = actual
    expected_output, expected_gradients = expected
    torch.testing.assert_close(output, expected_output)
    assert gradients.keys() == expected_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_with_every_key_and_neuron_kept_outputs_and_all_gradients_are_the_originals(family, model, inputs):
    expected = output_and_gradients(model, inputs)
    report = convert(model, attention_k=1000, feed_forward_k=1000)
    assert_same(output_and_gradients(model, inputs), expected)
    kinds = [entry.kind for entry in report.replaced]
    assert (kinds.count("attention"), kinds.count("feed_forward")) == (family.num_attention, family.num_networks)
    assert not report.skipped


def test_with_k_at_the_number_of_keys_every_backend_gives_the_originals_outputs_and_gradients(
    model, inputs, fast_backend
):
    """By name, a backend runs its own top-k; "auto" gives such calls to PyTorch's attention."""
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=24, backend=fast_backend)
    assert_same(output_and_gradients(model, inputs), expected)


def test_below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask(model, inputs, dense_topk):
    topk_eager.k = 5
    model.set_attn_implementation("topk_eager")
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=5)
    assert_same(output_and_gradients(model, inputs), expected)


def test_every_layer_and_head_keeps_its_own_k(family, model, inputs, dense_topk):
    """Heads that share keys, cross-attention and T5's bias included."""
    paths = [entry.path for entry in convert(model, attention_k=1).replaced]
    ks = {path: [4, 1, 3, 2] if number % 2 else number + 2 for number, path in enumerate(paths)}
    layers = {model.get_submodule(path): k for path, k in ks.items()}
    unconvert(model)
    topk_eager.k = layers.__getitem__
    model.set_attn_implementation("topk_eager")
    expected = output_and_gradients(model, inputs)
    convert(model, attention_k=list(ks.values()))
    assert_same(output_and_gradients(model, inputs), expected)


def test_a_topk_network_equals_a_dense_one_whose_other_neurons_are_zeroed(family, model, inputs):
    converted = copy.deepcopy(model)
    convert(converted, feed_forward_k=8)
    num_networks = keep_best_neurons(model, 8, family.linear_out[1:], (family.linear_in or "")[1:])
    assert num_networks == family.num_networks
    assert_same(output_and_gradients(converted, inputs), output_and_gradients(model, inputs))


def test_the_name_alone_runs_the_default_k(family, inputs):
    model = family.build().double()
    with torch.no_grad():
        expected = output_of(model, inputs)
        model.set_attn_implementation("topk")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = output_of(model, inputs)
    words = {str(one.message) for one in caught}
    assert any('attn_implementation="topk" without a k: using 128' in text for text in words)
    assert any("computes its position bias in full" in text for text in words) == ("T5" in type(model).__name__)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_drops_out_in_training_alone_and_as_the_configuration_says(name, monkeypatch):
    family, rates = FAMILIES[name], []

    def recorded(*args, dropout_p, **options):
        rates.append(dropout_p)
        return topk_attention(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(function, "topk_attention", recorded)
    model, inputs = family.build(**{ATTENTION_DROPOUT.get(name, "attention_dropout"): 0.25}).double(), inputs_of(family)
    convert(model, attention_k=5, feed_forward_k=8)
    with torch.no_grad():
        expected = output_of(model, inputs)
    model.train()
    output, gradients = output_and_gradients(model, inputs)
    assert rates == [0.0] * family.num_attention + [0.25] * family.num_attention
    assert not torch.equal(output, expected)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_unconverting_gives_the_original_modules_and_outputs_back(model, inputs):
    modules, implementation = dict(model.named_modules()), model.config._attn_implementation
    hooks = {name: len(module._forward_pre_hooks) for name, module in modules.items()}
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, attention_k=3, feed_forward_k=4)
        assert not torch.equal(output_of(model, inputs), expected)
        unconvert(model)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=0, atol=0)
    assert dict(model.named_modules()) == modules
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(getattr(module, "config", None), "topk_attention") for module in model.modules())


def test_weights_are_moved_not_copied_and_keep_their_names(model):
    before, names = {name: id(p) for name, p in model.named_parameters()}, list(model.state_dict())
    convert(model, attention_k=3, feed_forward_k=4)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert sorted(model.state_dict()) == sorted(names)


def test_a_saved_model_restores_every_k_in_a_fresh_object(family, inputs, tmp_path):
    model = family.build()
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    ks = [[1, 2, 3, 4], *range(3, family.num_attention + 2)]
    convert(model, attention_k=ks, feed_forward_k=[5 + i for i in range(family.num_networks)])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        original = output_of(loaded, inputs)
        report = convert(loaded)
        assert len(report.replaced) == family.num_attention + family.num_networks
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs), rtol=0, atol=0)
        unconvert(model)
        torch.testing.assert_close(output_of(model, inputs), original)


def test_a_deep_copy_of_a_converted_model_shares_nothing_with_it(model, inputs):
    convert(model, attention_k=3, feed_forward_k=4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = output_of(model, inputs)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(output_of(twin, inputs), expected, rtol=0, atol=0)
        unconvert(twin)
        assert not torch.equal(output_of(twin, inputs), expected)


def test_layers_that_where_does_not_pick_run_full_attention(family, model, inputs):
    expected = output_and_gradients(model, inputs)
    report = convert(model, attention_k=1000, where=lambda path, module: "1" in path.split("."))
    assert 0 < len(report.replaced) < family.num_attention
    assert_same(output_and_gradients(model, inputs), expected)


@pytest.mark.parametrize("name", CROSS)
def test_self_and_cross_attention_can_be_picked(name):
    model = FAMILIES[name].build()
    cross = convert(model, attention_k=3, where=is_cross_attention)
    picked = convert(model, attention_k=3, where=is_self_attention)
    assert len(cross.replaced) == 2
    assert len(picked.replaced) == 4
    assert {entry.path for entry in cross.replaced} == {entry.path for entry in picked.skipped}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_equals_the_original_token_by_token(name, num_beams):
    family = FAMILIES[name]
    model, inputs = family.build().double(), generation_inputs(family)
    options = OPTIONS | {"num_beams": num_beams}
    expected = model.generate(**inputs, **options)
    convert(model, attention_k=1000, feed_forward_k=1000)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_static_cache_equals_the_original_token_by_token(name):
    family = FAMILIES[name]
    model, inputs = family.build().double(), generation_inputs(family)
    expected = model.generate(**inputs, **OPTIONS)
    convert(model, attention_k=1000)
    assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_below_the_limit_keeps_the_keys_that_a_dense_mask_would(name, dense_topk):
    family = FAMILIES[name]
    model, inputs = family.build().double(), generation_inputs(family)
    topk_eager.k = 3
    model.set_attn_implementation("topk_eager")
    expected = model.generate(**inputs, **OPTIONS)
    convert(model, attention_k=3)
    assert torch.equal(model.generate(**inputs, **OPTIONS), expected)
    assert torch.equal(model.generate(**inputs, **OPTIONS, use_cache=False), expected)
    assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), expected)


def generation_inputs(family):
    inputs = {name: x for name, x in inputs_of(family).items() if name != "decoder_input_ids"}
    if family.inputs == "decoder":  # padding on the left
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    return inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(name, monkeypatch):
    family = FAMILIES[name]
    model, inputs = family.build().double(), inputs_of(family)
    if family.inputs != "image" and family.inputs != "encoder":
        inputs["use_cache"] = False
    for module in model.modules():  # dropout draws anew each time
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    convert(model, attention_k=5, feed_forward_k=7)
    model.train()
    calls = []
    attend = function.topk_attention
    monkeypatch.setattr(
        function, "topk_attention", lambda *args, **options: calls.append(0) or attend(*args, **options)
    )
    expected = output_and_gradients(model, inputs)
    assert len(calls) == family.num_attention
    model.activation_checkpointing_enable()
    assert_same(output_and_gradients(model, inputs), expected)
    assert len(calls) == 3 * family.num_attention  # computed again in the backward pass
