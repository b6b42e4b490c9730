"""Sums kept beside a cache are those of its keys whatever is done to it, and generation is as without them."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from convert_models import FAMILIES, HEADS, inputs_of, tiny_gpt2, tiny_llama, tiny_mistral
from topk_attention import Completion, convert, unconvert
from topk_attention.convert import cached_sums

BACKEND = "auto"
COMPLETION = Completion([3.0, 0.5, 1.0, 8.0])
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}
GENERATING = ("t5", "gpt2", "llama", "mistral", "bart", "whisper")
function = importlib.import_module("topk_attention.convert.attention_function")


class Asked:
    """How often attention asked for kept sums, and how often it got some."""

    def __init__(self):
        self.times = self.got = 0
        self.given = []


@pytest.fixture
def asked(monkeypatch):
    asked = Asked()

    def sums_of_cached(key, value, completion, shown=None):
        sums = cached_sums.sums_of_cached(key, value, completion, shown)
        if shown is not None:
            key, value = (x.masked_fill(~shown[:, None, :, None], 0) for x in (key, value))
        asked.times += 1
        asked.got += sums is not None
        asked.given.append(sums)
        if sums is not None:
            for total, expected in zip(sums, completion.sums(key, value), strict=True):
                torch.testing.assert_close(total, expected)
        return sums

    monkeypatch.setattr(function, "sums_of_cached", sums_of_cached)
    return asked


@pytest.fixture
def no_sums(monkeypatch):
    def switch_off():
        monkeypatch.setattr(function, "sums_of_cached", lambda *_: None)

    return switch_off


def completed(build, completion=COMPLETION, k=4, **changes):
    model = build(**changes).double()
    convert(model, attention_k=k, completion=completion, backend=BACKEND)
    return model


def generation_inputs(family, padded):
    inputs = {name: x for name, x in inputs_of(family).items() if name != "decoder_input_ids"}
    if family.inputs == "decoder":
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    if not padded and "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return inputs


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_the_same_without_a_cache_and_without_kept_sums(name, padded, num_beams, asked, no_sums):
    family = FAMILIES[name]
    model, inputs = completed(family.build), generation_inputs(family, padded)
    options = OPTIONS | {"num_beams": num_beams, "output_logits": True, "return_dict_in_generate": True}
    kept = model.generate(**inputs, **options)
    assert (asked.got > 0) == (name != "mistral")  # windows are masks
    # The layers of an encoder ask as well, once, and have no cache.
    assert asked.times - asked.got in (0, 2) or name == "mistral"
    no_sums()
    for others in (model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False)):
        assert torch.equal(kept.sequences, others.sequences)
        for logits, expected in zip(kept.logits, others.logits, strict=True):
            torch.testing.assert_close(logits, expected)


def decode(model, tokens, cache):
    """Logits of tokens that come one by one."""
    steps = [model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(tokens.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("padded", [False, True])
def test_each_token_sums_its_own_key_and_value_alone(padded, tokens, monkeypatch):
    model, lengths = completed(tiny_llama), []
    some, one = cached_sums._sums, cached_sums._plus_one
    monkeypatch.setattr(cached_sums, "_sums", lambda *x: (lengths.append(x[1].shape[2]), some(*x))[1])
    monkeypatch.setattr(cached_sums, "_plus_one", lambda *x: (lengths.append(x[1].shape[2]), one(*x))[1])
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        cache = model(tokens[:, :10], attention_mask=mask[:, :10], use_cache=True).past_key_values
        assert lengths == []  # running sums are the operation's own
        for i in range(10, 24):
            model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
    assert lengths == [11, 11] + [1] * 26


def test_padding_that_changes_is_summed_anew(tokens, asked):
    model, plain = completed(tiny_llama), tiny_llama().double()
    convert(plain, attention_k=4, completion=COMPLETION, backend="reference")
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        for i in range(20, 24):
            mask[i % 2, i - 10] = 0
            shown = mask[:, : i + 1]
            twin = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
            logits = model(tokens[:, i : i + 1], attention_mask=shown, past_key_values=cache).logits
            expected = plain(tokens[:, i : i + 1], attention_mask=shown, past_key_values=twin).logits
            torch.testing.assert_close(logits, expected)
    assert asked.got > 0


def test_nan_in_a_hidden_cached_key_reaches_no_sum(tokens):
    model = completed(tiny_llama)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    with torch.no_grad():
        cache = model(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys[:, :, :3] = torch.nan
        for i in range(20, 24):
            logits = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
            assert logits.isfinite().all()


def test_decoding_gives_the_logits_of_the_whole_sequence(tokens, asked):
    model = completed(tiny_llama)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        torch.testing.assert_close(decode(model, tokens[:, 10:], cache), expected[:, 10:])
    assert asked.got == asked.times == 28


def test_an_empty_cache_of_either_make_is_taken(tokens, asked):
    model = completed(tiny_llama)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            torch.testing.assert_close(decode(model, tokens, cache), expected)
    assert asked.got == asked.times == 2 * 2 * 20  # at the first four tokens every key is kept


CHANGES = {
    "crop": lambda cache, tokens: (cache.crop(-4), tokens[:, :12]),
    "reset": lambda cache, tokens: (cache.reset(), tokens[:, :0]),
    "reorder": lambda cache, tokens: (cache.reorder_cache(torch.tensor([1, 1])), tokens[[1, 1], :16]),
    "repeat": lambda cache, tokens: (cache.batch_repeat_interleave(3), tokens[:, :16].repeat_interleave(3, dim=0)),
    "select": lambda cache, tokens: (cache.batch_select_indices(torch.tensor([1])), tokens[1:, :16]),
}
KEEPS_SUMS = {"reorder", "repeat", "select"}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_a_cache_the_sums_are_of_its_keys(change, tokens, asked, monkeypatch):
    model, rest = completed(tiny_llama), torch.randint(3, 97, (6, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        decode(model, tokens[:, 10:16], cache)
        _, before = CHANGES[change](cache, tokens)
        whole = torch.cat([before, rest[: len(before)]], dim=1)
        new, real = [], cached_sums._Known.over_all

        def over_all(self, key, completion, shown):
            new.append(key.shape[2] - self.num_keys)
            return real(self, key, completion, shown)

        monkeypatch.setattr(cached_sums._Known, "over_all", over_all)
        logits = decode(model, rest[: len(before)], cache)
        expected = model(whole, use_cache=False).logits[:, before.shape[1] :]
    torch.testing.assert_close(logits, expected)
    assert asked.got == asked.times
    assert (max(new) == 1) == (change in KEEPS_SUMS)


def test_keys_that_someone_else_puts_into_a_cache_or_changes_in_place_are_summed_anew(tokens, asked):
    model = completed(tiny_llama)
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        decode(model, tokens[:, 10:14], cache)
        cache.layers[0].keys = cache.layers[0].keys * 2
        cache.layers[1].values.mul_(2)
        twin = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        torch.testing.assert_close(decode(model, tokens[:, 14:], cache), decode(model, tokens[:, 14:], twin))
    assert asked.got == asked.times


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_decodes_on_by_itself(copied, tokens, asked):
    model = completed(tiny_llama)
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        decode(model, tokens[:, 10:14], cache)
        twin = copied(cache)
        decode(model, tokens[:, 20:], cache)
        expected = model(tokens[:, :20], use_cache=False).logits[:, 14:]
        torch.testing.assert_close(decode(model, tokens[:, 14:20], twin), expected)
    assert asked.got == asked.times


def test_float32_sums_stay_exact_over_many_tokens():
    layer = cached_sums.sum_keeping_layer()()
    # Keys far from 0: in float32 the rounding errors of one addition a token would add up.
    keys, values = torch.rand(2, 1, 1, 3000, 4, generator=torch.Generator().manual_seed(0)) + 100
    for j in range(3000):
        key, value = layer.update(keys[:, :, j : j + 1], values[:, :, j : j + 1])
        sums = cached_sums.sums_of_cached(key, value, Completion(0.5))
    exact = Completion(0.5).sums(keys.double(), values.double())
    for total, expected in zip(sums, exact, strict=True):
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, expected.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_tokens_come_one_by_one_as_at_once(dtype, tokens, asked):
    """Keys that attention rounds first are summed as rounded."""
    model = completed(tiny_gpt2).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, use_cache=False).logits.float()
        logits = decode(model, tokens, DynamicCache()).float()
    assert (logits - expected).abs().max() < 0.1 * expected.std()
    assert asked.got == asked.times == 40


def test_inference_mode_keeps_sums_too(tokens, asked):
    model = completed(tiny_llama)
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(decode(model, tokens, DynamicCache()), expected)
    assert asked.got == asked.times > 0


def test_gradients_reach_cached_keys_and_values(tokens, asked, no_sums):
    model = completed(tiny_llama)

    def gradients():
        model.zero_grad()
        cache = model(tokens[:, :16], use_cache=True).past_key_values
        decode(model, tokens[:, 16:], cache).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients()
    assert asked.got > 0
    no_sums()
    for gradient, expected in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "way",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda way: "-".join(way),
)
def test_other_ways_to_generate_give_the_same_tokens(way, tokens):
    model = completed(tiny_llama)
    options = {"attention_mask": torch.ones_like(tokens[:1]), "max_new_tokens": 10, "eos_token_id": None}
    options |= {"do_sample": False}
    same = {name: x for name, x in way.items() if name in ("num_beams", "num_return_sequences", "do_sample")}
    if "offloaded" in way.values() and not torch.cuda.is_available():
        pytest.skip("transformers offloads a cache from an accelerator alone, and this machine has none")
    torch.manual_seed(0)
    expected = model.generate(tokens[:1], **options | same, use_cache=False)
    torch.manual_seed(0)
    assert torch.equal(model.generate(tokens[:1], **options | way), expected)


def test_assisted_decoding_gives_the_same_tokens(tokens, asked):
    model, assistant = completed(tiny_llama), completed(tiny_llama, num_hidden_layers=1)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens[:1])}
    expected = model.generate(tokens[:1], **options, use_cache=False)
    assert torch.equal(model.generate(tokens[:1], **options, assistant_model=assistant), expected)
    assert asked.got == asked.times > 0


def test_caches_of_other_models_and_other_kinds_stay_as_they_are(tokens):
    with torch.no_grad():
        model = tiny_llama()
        convert(model, attention_k=4)
        cache = model(tokens, use_cache=True).past_key_values
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
        assert not any(hasattr(layer.keys, cached_sums._SUMS) for layer in cache.layers)
        windows = completed(tiny_mistral)
        kinds = {type(layer) for layer in DynamicCache(config=windows.config).layers}
        assert {type(layer) for layer in windows(tokens, use_cache=True).past_key_values.layers} == kinds


def test_only_layers_with_a_completion_keep_sums_and_unconvert_ends_it(tokens):
    model = completed(tiny_llama, completion=[None, Completion([1.0] * HEADS)])
    with torch.no_grad():
        cache = model(tokens[:, :9], use_cache=True).past_key_values
        model(tokens[:, 9:10], past_key_values=cache)
        kinds = [type(layer).__name__ for layer in cache.layers]
        assert kinds == ["DynamicLayer", "SumKeepingLayer"]
        unconvert(model)
        expected = model(tokens[:, :11], use_cache=False).logits[:, 10:]
        fresh = model(tokens[:, :10], use_cache=True).past_key_values
        torch.testing.assert_close(model(tokens[:, 10:11], past_key_values=fresh).logits, expected)
        assert {type(layer) for layer in fresh.layers} == {DynamicLayer}
        assert isinstance(cache.layers[1], DynamicLayer)
        model(tokens[:, 10:11], past_key_values=cache)  # one from before goes on as a plain one
