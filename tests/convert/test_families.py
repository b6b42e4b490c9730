"""What holds for the Llama and the BERT kind: k at its limit, caches, masks, windows, saving, compiling."""

from __future__ import annotations

import copy

import pytest
import torch

import convert_models
from convert_models import VOCABULARY, tiny_bert, tiny_llama, tiny_mistral, topk_eager
from dense_networks import keep_best_neurons
from topk_attention import convert, unconvert

FAMILIES = {"llama": tiny_llama, "bert": tiny_bert}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def hidden_states(model, tokens, **inputs):
    base = getattr(model, "model", model)
    return base(tokens, **inputs).last_hidden_state


def loss_and_gradients(model, tokens, **inputs):
    model.zero_grad()
    output = hidden_states(model, tokens, **inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    if "attention_mask" in inputs:
        weights = weights * inputs["attention_mask"].unsqueeze(-1)
    (output * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def test_with_every_key_and_neuron_kept_outputs_and_all_gradients_are_the_originals(model, tokens, right_padding):
    model.double().set_attn_implementation("sdpa")  # eager takes its softmax in float32, whatever the model's dtype
    expected, expected_gradients = loss_and_gradients(model, tokens, attention_mask=right_padding)
    convert(model, attention_k=1000, feed_forward_k=1000)
    output, gradients = loss_and_gradients(model, tokens, attention_mask=right_padding)
    real = right_padding.bool()
    torch.testing.assert_close(output[real], expected[real])
    assert gradients.keys() == expected_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask(
    model, tokens, right_padding, dense_topk
):
    model.double()
    topk_eager.k = 5
    model.set_attn_implementation("topk_eager")
    expected, expected_gradients = loss_and_gradients(model, tokens, attention_mask=right_padding)
    convert(model, attention_k=5)
    output, gradients = loss_and_gradients(model, tokens, attention_mask=right_padding)
    real = right_padding.bool()
    torch.testing.assert_close(output[real], expected[real])
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_padding_tokens_never_change_the_real_ones(model, tokens, right_padding):
    convert(model, attention_k=4, feed_forward_k=8)
    changed = torch.where(right_padding.bool(), tokens, 3)
    real = right_padding.bool()
    with torch.no_grad():
        before = hidden_states(model, tokens, attention_mask=right_padding)
        after = hidden_states(model, changed, attention_mask=right_padding)
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=0)


def test_a_decoder_never_sees_later_tokens(tokens):
    model = tiny_llama()
    convert(model, attention_k=4)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=0, atol=0)
    assert not torch.equal(after[:, 15:], before[:, 15:])


def test_an_encoder_does_see_later_tokens(tokens):
    model = tiny_bert()
    convert(model, attention_k=20)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        assert not torch.equal(hidden_states(model, changed)[:, 0], hidden_states(model, tokens)[:, 0])


def test_a_topk_network_equals_a_dense_one_whose_other_neurons_are_zeroed(model, tokens):
    k = 8
    with torch.no_grad():
        converted = copy.deepcopy(model)
        convert(converted, feed_forward_k=k)

        layers = ("down_proj",) if hasattr(model, "model") else ("output.dense", "intermediate.dense")
        assert keep_best_neurons(model, k, *layers) == 2
        torch.testing.assert_close(hidden_states(converted, tokens), hidden_states(model, tokens), rtol=1e-4, atol=1e-4)


def test_unconverting_gives_the_original_modules_and_outputs_back(model, tokens):
    modules = dict(model.named_modules())
    implementation = model.config._attn_implementation
    with torch.no_grad():
        expected = hidden_states(model, tokens)
        convert(model, attention_k=3, feed_forward_k=4)
        assert not torch.equal(hidden_states(model, tokens), expected)
        unconvert(model)
        torch.testing.assert_close(hidden_states(model, tokens), expected, rtol=0, atol=0)
    assert dict(model.named_modules()) == modules
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.config, "topk_attention")


def test_weights_are_moved_not_copied_and_keep_their_names(model):
    before = {name: id(p) for name, p in model.named_parameters()}
    names = list(model.state_dict())
    convert(model, attention_k=3, feed_forward_k=4)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert sorted(model.state_dict()) == sorted(names)


def test_a_saved_model_restores_every_k_in_a_fresh_object(model, tokens, tmp_path):
    ks = [[1, 2, 3, 4], 7]
    convert(model, attention_k=ks, feed_forward_k=[5, 9])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    report = convert(loaded)
    assert [entry.k for entry in report.replaced] == [(1, 2, 3, 4), 7, 5, 9]
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(loaded, tokens), hidden_states(model, tokens), rtol=0, atol=0)


def test_a_saved_model_is_an_ordinary_checkpoint(model, tokens, tmp_path):
    with torch.no_grad():
        expected = hidden_states(model, tokens)
        convert(model, attention_k=3, feed_forward_k=4)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(hidden_states(loaded, tokens), expected, rtol=0, atol=0)


def test_a_checkpoint_saved_with_a_head_restores_its_k_without_it(tokens, tmp_path):
    from transformers import LlamaModel

    model = tiny_llama()
    convert(model, attention_k=3, feed_forward_k=4)
    model.save_pretrained(tmp_path)
    base = LlamaModel.from_pretrained(tmp_path).eval()
    convert(base)
    with torch.no_grad():
        torch.testing.assert_close(
            base(tokens).last_hidden_state, model.model(tokens).last_hidden_state, rtol=0, atol=0
        )


def test_training_changes_survive_unconverting(model, tokens):
    convert(model, attention_k=3, feed_forward_k=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    hidden_states(model, tokens).square().mean().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unconvert(model)
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(module.training for module in model.modules())


def test_a_deep_copy_of_a_converted_model_shares_nothing_with_it(model, tokens):
    convert(model, attention_k=3, feed_forward_k=4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = hidden_states(model, tokens)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(hidden_states(twin, tokens), expected, rtol=0, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    model = tiny_llama().double()
    convert(model, attention_k=5, feed_forward_k=7)
    model.train()
    _, expected = loss_and_gradients(model, tokens, use_cache=False)
    model.activation_checkpointing_enable()
    _, gradients = loss_and_gradients(model, tokens, use_cache=False)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_eager_token_by_token(tokens, left_padding, padded, cache):
    model = tiny_llama()
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options["attention_mask"] = left_padding if padded else torch.ones_like(left_padding)
    expected = model.generate(tokens, **options)
    convert(model, attention_k=1000)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_decoding_with_a_cache_keeps_the_keys_that_the_whole_sequence_would(tokens):
    model = tiny_llama().double()
    convert(model, attention_k=4)
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        steps = [
            model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(10, tokens.shape[1])
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 10:])


def test_several_tokens_at_once_after_a_cache_stay_causal(tokens):
    model = tiny_llama().double()
    convert(model, attention_k=4)
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        rest = model(tokens[:, 10:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 10:])


def test_beam_search_equals_eager(tokens):
    model = tiny_llama()
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    convert(model, attention_k=1000)
    assert torch.equal(model.generate(tokens, **options), expected)


@pytest.mark.parametrize("k", [1000, 4])
@pytest.mark.parametrize(
    "way",
    [
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3, "cache_implementation": "static"},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=lambda way: "-".join(way),
)
def test_other_ways_to_generate_give_the_same_tokens(way, k, tokens, left_padding):
    """As the original at the limit; below it, as a model that computes everything again for each token."""
    rows = slice(1, None) if "prompt_lookup_num_tokens" in way else slice(None)  # it takes one sequence
    options = {"attention_mask": left_padding[rows], "max_new_tokens": 10, "do_sample": False}
    beams = {name: way[name] for name in way if name.startswith("num_")}
    model = tiny_llama().double()
    if k < tokens.shape[1]:
        convert(model, attention_k=k)
    expected = model.generate(tokens[rows], **options, **beams, use_cache=False)
    convert(model, attention_k=k)
    assert torch.equal(model.generate(tokens[rows], **options, **way), expected)


@pytest.mark.parametrize("k", [1000, 3])
def test_sliding_windows_are_kept(k, tokens, dense_topk):
    model = tiny_mistral().double()
    topk_eager.k = k
    model.set_attn_implementation("topk_eager")
    _, expected = loss_and_gradients(model, tokens, use_cache=False)
    with torch.no_grad():
        logits = model(tokens).logits
        convert(model, attention_k=k)
        torch.testing.assert_close(model(tokens).logits, logits)
    _, gradients = loss_and_gradients(model, tokens, use_cache=False)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)


def test_packed_sequences_do_not_see_each_other(tokens):
    model = tiny_llama().double()
    convert(model, attention_k=5)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    packed, gradients = loss_and_gradients(model, tokens, position_ids=positions, use_cache=False)
    # The same weights in the loss as of the packed sequence.
    weights = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view(packed.shape)
    model.zero_grad()
    first, second = hidden_states(model, tokens[:, :10]), hidden_states(model, tokens[:, 10:])
    apart = torch.cat([first, second], dim=1)
    (apart * weights).sum().backward()
    torch.testing.assert_close(packed, apart.detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


def test_a_mask_tensor_of_the_callers_own_is_applied(tokens):
    model = tiny_llama().double()
    model.set_attn_implementation("sdpa")
    allowed = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    allowed |= torch.eye(24, dtype=torch.bool)
    lowest = torch.zeros(2, 1, 24, 24, dtype=torch.double).masked_fill(~allowed, torch.finfo(torch.double).min)
    with torch.no_grad():
        expected = model(tokens, attention_mask=lowest).logits
        convert(model, attention_k=1000)
        torch.testing.assert_close(model(tokens, attention_mask=lowest).logits, expected)
        torch.testing.assert_close(model(tokens, attention_mask=allowed).logits, expected)


def test_a_keys_hidden_by_the_lowest_float_is_not_chosen(tokens):
    model = tiny_llama().double()
    convert(model, attention_k=20)
    lowest = torch.zeros(2, 1, 24, 24, dtype=torch.double)
    lowest.masked_fill_(~torch.ones(24, 24, dtype=torch.bool).tril(), torch.finfo(torch.double).min)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, attention_mask=lowest).logits, model(tokens).logits)


def test_layers_that_where_does_not_pick_run_full_attention(model, tokens, right_padding):
    with torch.no_grad():
        expected = hidden_states(model, tokens, attention_mask=right_padding)
        report = convert(model, attention_k={first_attention(model): 1000})
        output = hidden_states(model, tokens, attention_mask=right_padding)
    assert len(report.replaced) == 1
    assert len(report.skipped) == 1
    real = right_padding.bool()
    torch.testing.assert_close(output[real], expected[real])


def first_attention(model):
    return "model.layers.0.self_attn" if hasattr(model, "model") else "encoder.layer.0.attention.self"


def test_where_picks_layers_by_path_and_module(model):
    report = convert(model, attention_k=3, where=lambda path, module: ".1." in path and module is not None)
    assert [".1." in entry.path for entry in report.entries] == [entry.replaced for entry in report.entries]
    assert "not picked by where=" in str(report)


def test_converting_again_changes_k(model, tokens):
    once = copy.deepcopy(model)
    convert(once, attention_k=6, feed_forward_k=9)
    convert(model, attention_k=2, feed_forward_k=3)
    convert(model, attention_k=6, feed_forward_k=9)
    with torch.no_grad():
        assert torch.equal(hidden_states(once, tokens), hidden_states(model, tokens))
    assert once.config.topk_attention == model.config.topk_attention


def test_a_bert_decoder_with_cross_attention_equals_eager(tokens):
    model = tiny_bert(is_decoder=True, add_cross_attention=True).double()
    encoded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    encoder_mask = torch.ones(2, 9, dtype=torch.long)
    encoder_mask[1, 6:] = 0
    inputs = {"encoder_hidden_states": encoded, "encoder_attention_mask": encoder_mask}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens, **inputs).last_hidden_state
        report = convert(model, attention_k=1000, feed_forward_k=1000)
        torch.testing.assert_close(model(tokens, **inputs).last_hidden_state, expected)
    assert len(report.replaced) == 6


def test_two_models_in_one_are_converted_saved_and_restored_together(tokens, left_padding, tmp_path):
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    configs = tiny_bert().config, tiny_bert(is_decoder=True, add_cross_attention=True).config
    torch.manual_seed(0)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs)).eval()
    inputs = {"input_ids": tokens, "attention_mask": left_padding, "decoder_input_ids": tokens[:, :9]}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert len(convert(model, attention_k=1000, feed_forward_k=1000).replaced) == 10
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        convert(model, attention_k=[3, 4, 5, 6, 7, 8])
        model.save_pretrained(tmp_path)
        loaded = EncoderDecoderModel.from_pretrained(tmp_path).eval()
        convert(loaded)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
        assert (loaded(**inputs).logits - expected).abs().max() > 1e-2


def test_self_attention_alone_can_be_picked():
    from topk_attention import is_cross_attention, is_self_attention

    model = tiny_bert(is_decoder=True, add_cross_attention=True)
    self_paths = {entry.path for entry in convert(model, attention_k=4, where=is_self_attention).replaced}
    unconvert(model)
    cross_paths = {entry.path for entry in convert(model, attention_k=4, where=is_cross_attention).replaced}
    assert self_paths == {f"encoder.layer.{i}.attention.self" for i in range(2)}
    assert cross_paths == {f"encoder.layer.{i}.crossattention.self" for i in range(2)}


def test_bfloat16_autocast_trains(model, tokens):
    convert(model, attention_k=4, feed_forward_k=8)
    with torch.autocast("cpu", torch.bfloat16):
        output = hidden_states(model, tokens)
    output.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_compiled_model_equals_the_eager_one(tokens):
    model = tiny_llama()
    convert(model, attention_k=5, feed_forward_k=7)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["bert", "mistral", "bart"])
def test_a_compiled_model_has_the_outputs_and_gradients_of_the_eager_one(name):
    """Padding, windows and cross-attention."""
    family = convert_models.FAMILIES[name]
    model, inputs = family.build().double(), convert_models.inputs_of(family)
    if name != "bert":
        inputs["use_cache"] = False
    convert(model, attention_k=5, feed_forward_k=7)
    expected, gradients = convert_models.output_and_gradients(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output, gradients_there = convert_models.output_and_gradients(compiled, inputs)
    torch.testing.assert_close(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_there[f"_orig_mod.{name}"], gradient, msg=name)
