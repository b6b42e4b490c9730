"""The index kept beside a cache is of its keys whatever is done to it, and generation is as without."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from convert_models import FAMILIES, inputs_of, tiny_llama
from exact_generation import compared_with_all_scores
from hashed_index import use_hashes
from topk_attention import Completion, TopKCache, convert
from topk_attention.backends import cpu
from topk_attention.convert import cached_index

pytestmark = pytest.mark.skipif(cpu.problem() is not None, reason=f"no compiled kernels: {cpu.problem()}")
OPTIONS = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def hashed(monkeypatch):
    monkeypatch.setattr(cached_index, "LEAST_KEYS", 1)
    return use_hashes(monkeypatch)


def converted(build=tiny_llama, k=4, completion=None, **changes):
    model = build(**changes)
    convert(model, attention_k=k, completion=completion)
    return model


def decode(model, tokens, cache):
    """Logits of tokens that come one by one."""
    steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]
    return torch.cat(steps, dim=1)


def whole(model, tokens):
    return model(tokens, past_key_values=DynamicCache(config=model.config)).logits


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "whisper"])
def test_a_hundred_tokens_are_those_of_a_dynamic_cache(name, padded, num_beams, hashed):
    family = FAMILIES[name]
    model = converted(family.build)
    inputs = {name: x for name, x in inputs_of(family).items() if name != "decoder_input_ids"}
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    if family.inputs == "decoder":
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    if not padded and "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    options = OPTIONS | {"num_beams": num_beams, "output_logits": True, "return_dict_in_generate": True}
    if name in ("bart", "whisper"):  # have few positions
        options |= {"max_new_tokens": 24}
    result = model.generate(**inputs, **options)
    assert hashed.used >= 2 * (options["max_new_tokens"] - 5)
    used = hashed.used
    expected = model.generate(**inputs, **options, cache_implementation="dynamic")
    assert hashed.used == used
    assert torch.equal(result.sequences, expected.sequences)
    assert all(map(torch.equal, result.logits, expected.logits))


@pytest.mark.parametrize("padded", [False, True])
def test_each_token_indexes_its_own_key_alone(padded, tokens, hashed):
    model, mask = converted(), torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        cache = TopKCache(config=model.config)
        model(tokens[:, :14], attention_mask=mask[:, :14], past_key_values=cache)
        assert hashed.read == []
        for i in range(14, 24):
            model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
    assert hashed.read == [(0, 15)] * 2 + [(i, i + 1) for i in range(15, 24) for _ in range(2)]
    assert hashed.used == 2 * 10


CHANGES = {
    "nothing": (lambda cache: None, lambda x: x, True),
    "crop": (lambda cache: cache.crop(-4), lambda x: x[:, :-4], True),
    "crop nothing": (lambda cache: cache.crop(0), lambda x: x, True),
    "reset": (lambda cache: cache.reset(), lambda x: x[:, :0], False),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda x: x[[1, 0]], True),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), lambda x: x.repeat_interleave(3, dim=0), False),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda x: x[[1]], False),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_a_cache_the_index_is_of_its_keys(change, inference, tokens, hashed):
    do, same, keeps = CHANGES[change]
    model, rest = converted(), torch.randint(3, 97, (6, 8), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(inference), torch.no_grad():  # inference_mode(False) enables gradients
        cache = TopKCache(config=model.config)
        model(tokens[:, :10], past_key_values=cache)
        decode(model, tokens[:, 10:16], cache)
        do(cache)
        before = same(tokens[:, :16])
        rest = rest[: len(before)]
        hashed.read.clear()
        logits = decode(model, rest, cache)
        expected = whole(model, torch.cat([before, rest], dim=1))[:, before.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (hashed.read[0][0] == 0) != keeps


def test_an_index_moves_with_its_keys_to_more_room(tokens, hashed):
    model = converted()
    with torch.no_grad():
        cache = TopKCache(config=model.config)
        many = tokens.repeat(1, 10)
        model(many[:, :10], past_key_values=cache)
        logits = decode(model, many[:, 10:], cache)
        expected = whole(model, many)[:, 10:]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert [read for read in hashed.read[::2] if read[0] == 0] == [(0, n) for n in (11, 22, 44, 88, 176)]


def test_keys_that_someone_else_puts_there_or_changes_in_place_are_indexed_anew(tokens, hashed):
    model = converted()
    with torch.no_grad():
        cache = TopKCache(config=model.config)
        model(tokens[:, :10], past_key_values=cache)
        decode(model, tokens[:, 10:14], cache)
        cache.layers[0].keys = cache.layers[0].keys * 2
        cache.layers[1].keys[:, :, 3].mul_(2)
        twin = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        hashed.read.clear()
        assert torch.equal(decode(model, tokens[:, 14:], cache), decode(model, tokens[:, 14:], twin))
    assert hashed.read[:2] == [(0, 15)] * 2
    assert hashed.used == 2 * (4 + 10)


def test_keys_that_change_between_the_cache_and_attention_are_indexed_anew(hashed):
    with torch.no_grad():
        cache, (query, rows) = TopKCache(), torch.randn(2, 1, 2, 20, 8)
        key, _ = cache.update(rows, rows, 0)
        index = cached_index.index_of_cached(query[:, :, :1], key, 4, "auto")
        key[0, 0, 0] += 1
        again = cached_index.index_of_cached(query[:, :, :1], key, 4, "auto")
        assert again is not index
        again.check_is_of(key)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_decodes_on_by_itself(copied, tokens, hashed):
    model = converted()
    with torch.no_grad():
        cache = TopKCache(config=model.config)
        model(tokens[:, :10], past_key_values=cache)
        decode(model, tokens[:, 10:14], cache)
        twin, plain = copied(cache), DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        decode(model, tokens[:, 20:], cache)
        assert torch.equal(decode(model, tokens[:, 14:20], twin), decode(model, tokens[:, 14:20], plain))
    assert hashed.used == 2 * (4 + 4 + 6)


@pytest.mark.parametrize(
    "way", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 7}, {"assistant": True}], ids=str
)
def test_several_tokens_at_a_time_use_it_as_well(way, tokens, hashed):
    model, options = converted(), OPTIONS | {"max_new_tokens": 20, "attention_mask": torch.ones_like(tokens[:1])}
    if way.pop("assistant", False):
        way["assistant_model"] = converted(num_hidden_layers=1)
    result = model.generate(tokens[:1], **options, **way)
    assert hashed.used > 0
    assert torch.equal(result, model.generate(tokens[:1], **options, use_cache=False))


@pytest.mark.parametrize(
    "changes",
    [{"backend": "chunked"}, {"backend": "chunked", "completion": Completion()}, {"attention_k": "all"}],
    ids=str,
)
def test_layers_that_cannot_use_it_keep_none(changes, tokens, hashed):
    model = tiny_llama()
    convert(model, **{"attention_k": 4} | changes)
    result = model.generate(tokens, **OPTIONS, attention_mask=torch.ones_like(tokens))
    assert hashed.used == len(hashed.read) == 0
    assert result.shape[1] == tokens.shape[1] + 100


def test_few_keys_are_not_indexed(tokens, hashed, monkeypatch):
    monkeypatch.setattr(cached_index, "LEAST_KEYS", 30)
    model = converted()
    model.generate(tokens, **OPTIONS | {"max_new_tokens": 10}, attention_mask=torch.ones_like(tokens))
    assert hashed.read == [(0, 30), (0, 30), *((i, i + 1) for i in range(30, 33) for _ in range(2))]


def test_gradients_do_without(tokens, hashed):
    model = converted()
    decode(model, tokens[:, :12], TopKCache(config=model.config)).sum().backward()
    assert hashed.used == len(hashed.read) == 0


@pytest.mark.parametrize("padded", [False, True])
def test_completed_layers_use_it_with_the_sums_of_the_cache(padded, tokens, hashed):
    model, mask = converted(completion=Completion([3.0, 0.5, 1.0, 8.0])), torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    options = OPTIONS | {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    result = model.generate(tokens, **options)
    assert hashed.used == 2 * 99
    expected = model.generate(tokens, **options, cache_implementation="dynamic")
    assert hashed.used == 2 * 99
    assert torch.equal(result.sequences, expected.sequences)
    assert all(map(torch.equal, result.logits, expected.logits))


@pytest.mark.parametrize("completion", [None, Completion()], ids=["alone", "completed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_kernels_choose_the_same_keys_with_it_at_each_of_a_hundred_tokens(
    num_beams, dtype, completion, tokens, monkeypatch
):
    monkeypatch.setattr(cached_index, "LEAST_KEYS", 1)
    model, mask = converted(hidden_size=64, completion=completion).to(dtype), torch.ones_like(tokens)
    mask[0, :3] = 0
    with compared_with_all_scores() as compared:
        model.generate(tokens, **OPTIONS, num_beams=num_beams, attention_mask=mask)
    assert compared.differ == 0
    assert compared.calls == 2 * 99
