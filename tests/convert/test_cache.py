"""A TopKCache gives the tokens of a DynamicCache whatever is done to it, and copies no row that it need not copy."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

import topk_attention
from convert_models import FAMILIES, HEADS, inputs_of, tiny_gpt2, tiny_llama, tiny_mistral
from topk_attention import Completion, TopKCache, convert, unconvert
from topk_attention.convert.cache import GrowingLayer, topk_cache

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}
GENERATING = ("t5", "gpt2", "llama", "mistral", "bart", "whisper")


def converted(build=tiny_llama, **changes):
    model = build(**changes)
    convert(model, attention_k=4)
    return model


def filled(length=10, batch=2, **options):
    """A cache of two layers, and the keys and values that it holds."""
    cache, (keys, values) = TopKCache(), torch.randn(2, batch, 3, length, 8, **options)
    with torch.no_grad():
        for layer in range(2):
            cache.update(keys, values, layer)
    return cache, keys, values


def token(batch=2, **options):
    return torch.randn(batch, 3, 1, 8, **options)


def append(cache, keys, values):
    with torch.no_grad():
        for layer in range(2):
            cache.update(keys, values, layer)


def assert_holds(cache, keys, values):
    for layer in cache.layers:
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_seq_length() == keys.shape[-2]


@pytest.fixture
def caches_seen(monkeypatch):
    """The caches that generate begins with."""
    seen = []
    module = importlib.import_module("topk_attention.convert.cache")
    real = module._let_grow

    def let_grow(made):
        real(made)
        if made is not None:
            seen.append(made)

    monkeypatch.setattr(module, "_let_grow", let_grow)
    return seen


def with_dynamic_cache(model, inputs, options):
    """What generate returns with a cache that the caller made: it stays what it is."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    result = model.generate(**inputs, **options, past_key_values=cache)
    kinds = {type(layer) for layer in getattr(cache, "self_attention_cache", cache).layers}
    assert GrowingLayer not in kinds
    return result


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", GENERATING)
def test_generate_takes_it_by_default_and_gives_the_tokens_of_a_dynamic_cache(name, padded, num_beams, caches_seen):
    family = FAMILIES[name]
    model = family.build().double()
    convert(model, attention_k=4)
    inputs = {name: x for name, x in inputs_of(family).items() if name != "decoder_input_ids"}
    if family.inputs == "decoder":
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    if not padded and "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    options = OPTIONS | {"num_beams": num_beams}
    tokens = model.generate(**inputs, **options)
    (cache,) = caches_seen
    assert type(cache) is TopKCache
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert kinds == ({"DynamicSlidingWindowLayer"} if name == "mistral" else {"GrowingLayer"})
    assert cache.get_seq_length() >= OPTIONS["max_new_tokens"] - 1
    expected = with_dynamic_cache(model, inputs, options)
    assert torch.equal(tokens, expected)
    assert len(caches_seen) == 1


WAYS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks of the prompt": {"prefill_chunk_size": 7},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "two at once": {"num_return_sequences": 2, "num_beams": 2, "early_stopping": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_generate_give_the_tokens_of_a_dynamic_cache(way, tokens, caches_seen):
    model = converted()
    options = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False} | WAYS[way]
    inputs = {"input_ids": tokens[:1], "attention_mask": torch.ones_like(tokens[:1])}
    torch.manual_seed(0)
    result = model.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(result, with_dynamic_cache(model, inputs, options))
    assert type(caches_seen[0]) is TopKCache


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
def test_assisted_decoding_gives_the_same_tokens(build, tokens, caches_seen):
    model, assistant = converted(build), converted(build, num_hidden_layers=1)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens[:1])}
    expected = model.generate(tokens[:1], **options, use_cache=False)
    assert torch.equal(model.generate(tokens[:1], **options, assistant_model=assistant), expected)
    assert {type(cache) for cache in caches_seen} == {TopKCache}
    assert len(caches_seen) >= 2


def test_a_chat_keeps_its_cache(tokens):
    model, cache, shown = converted(), TopKCache(config=converted().config), tokens[:1, :6]
    for turn in range(3):
        shown = torch.cat([shown, tokens[1:, 4 * turn : 4 * turn + 4]], dim=1)
        mask = torch.ones_like(shown)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        answer = model.generate(shown, **options, past_key_values=cache)
        assert torch.equal(answer, model.generate(shown, **options, use_cache=False))
        shown = answer
        assert cache.get_seq_length() == shown.shape[1] - 1


def test_a_prompt_that_is_kept_serves_several_questions(tokens):
    model = converted()
    with torch.no_grad():
        prompt = model(tokens[:1, :10], past_key_values=TopKCache(config=model.config)).past_key_values
    for question in range(2):
        shown = torch.cat([tokens[:1, :10], tokens[1:, 5 * question : 5 * question + 5]], dim=1)
        options = {"attention_mask": torch.ones_like(shown), "max_new_tokens": 5, "do_sample": False}
        answer = model.generate(shown, **options, past_key_values=copy.deepcopy(prompt))
        assert torch.equal(answer, model.generate(shown, **options, use_cache=False))
    assert prompt.get_seq_length() == 10


def test_an_unconverted_model_takes_it_as_well(tokens):
    model, options = tiny_gpt2(), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=TopKCache(config=model.config)), expected)


class TestWhoseCacheItIs:
    inputs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}  # noqa: RUF012

    def cache_of(self, model, tokens, **options):
        mask = torch.ones_like(tokens)
        return model.generate(tokens, attention_mask=mask, **self.inputs | options).past_key_values

    def test_unconvert_takes_it_back(self, tokens):
        model = converted()
        assert type(self.cache_of(model, tokens)) is TopKCache
        unconvert(model)
        assert type(self.cache_of(model, tokens)) is DynamicCache

    def test_a_model_without_topk_attention_keeps_its_own(self, tokens):
        model = tiny_llama()
        convert(model, feed_forward_k=8)
        assert type(self.cache_of(model, tokens)) is DynamicCache
        assert type(self.cache_of(tiny_llama(), tokens)) is DynamicCache

    def test_what_the_caller_asks_for_wins(self, tokens):
        model = converted()
        given = DynamicCache(config=model.config)
        assert self.cache_of(model, tokens, past_key_values=given) is given
        assert type(given) is DynamicCache
        assert {type(layer) for layer in given.layers} == {DynamicLayer}
        assert type(self.cache_of(model, tokens, cache_implementation="dynamic")) is DynamicCache
        assert type(self.cache_of(model, tokens, cache_implementation="static")).__name__ == "StaticCache"
        assert self.cache_of(model, tokens, use_cache=False) is None

    def test_the_name_alone_is_enough(self, tokens, monkeypatch):
        monkeypatch.setenv("TOPK_ATTENTION_K", "4")
        model = tiny_llama()
        model.set_attn_implementation("topk")
        assert type(self.cache_of(model, tokens)) is TopKCache


def test_a_token_writes_one_row_and_moves_no_other():
    cache, keys, values = filled(10)
    places = set()
    for _ in range(50):
        new_keys, new_values = token(), token()
        append(cache, new_keys, new_values)
        keys, values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        assert_holds(cache, keys, values)
        places.add((cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()))
    assert len(places) == 1


@pytest.mark.parametrize("first", [1, 63, 64, 65, 300])
def test_room_grows_by_a_quarter(first):
    cache, keys, values = filled(first)
    moves, place = 0, cache.layers[0].keys.data_ptr()
    for _ in range(600):
        row = token()
        append(cache, row, row)
        keys, values = torch.cat([keys, row], dim=2), torch.cat([values, row], dim=2)
        moves, place = moves + (cache.layers[0].keys.data_ptr() != place), cache.layers[0].keys.data_ptr()
    assert_holds(cache, keys, values)
    assert 2 <= moves <= 11
    room = cache.layers[0].keys.stride(1) // 8
    assert keys.shape[2] <= room <= keys.shape[2] * 1.25 + 32


def last_and_first(cache):
    return torch.tensor([len(cache.layers[0].keys) - 1, 0])


CHANGES = {
    "crop": (lambda cache: cache.crop(-4), lambda x: x[:, :, :-4]),
    "crop nothing": (lambda cache: cache.crop(0), lambda x: x),
    "crop all": (lambda cache: cache.crop(-cache.get_seq_length()), lambda x: x[:, :, :0]),
    "reset": (lambda cache: cache.reset(), lambda x: x[:, :, :0]),
    "reorder": (lambda cache: cache.reorder_cache(last_and_first(cache)), lambda x: x[[-1, 0]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), lambda x: x.repeat_interleave(3, dim=0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([-1])), lambda x: x[[-1]]),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_after_any_two_changes_the_rows_are_those_of_a_dynamic_cache(first, second, inference):
    with torch.inference_mode(inference), torch.no_grad():
        cache, keys, values = filled(10)
        rows = token(), token()
        for name in (None, None, first, second):
            if name is not None:
                CHANGES[name][0](cache)
                keys, values = CHANGES[name][1](keys), CHANGES[name][1](values)
            rows = token(len(keys)), token(len(keys))
            append(cache, *rows)
            keys, values = torch.cat([keys, rows[0]], dim=2), torch.cat([values, rows[1]], dim=2)
            assert_holds(cache, keys, values)


def test_an_empty_cache_can_be_changed_and_asked():
    for cache in (TopKCache(), TopKCache(config=tiny_llama().config)):
        cache.reorder_cache(torch.tensor([0]))
        cache.crop(0)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.is_sliding == [False, False]


def test_what_is_appended_after_a_crop_leaves_a_copy_as_it_was():
    cache, keys, values = filled(10)
    twins = [copy.deepcopy(cache), copy.copy(cache.layers[0]), pickle.loads(pickle.dumps(cache))]
    cache.crop(-5)
    append(cache, token(), token())
    for twin in twins:
        for layer in getattr(twin, "layers", [twin]):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    append(twins[0], keys[:, :, :1], values[:, :, :1])
    assert_holds(twins[0], torch.cat([keys, keys[:, :, :1]], 2), torch.cat([values, values[:, :, :1]], 2))


def test_a_pickle_holds_the_rows_and_not_the_room_behind_them():
    cache, keys, values = filled(10)
    cache.layers[0]._memory[0].memory[:, :, 10:] = 7.0
    file = io.BytesIO()
    torch.save(cache, file)
    assert file.getbuffer().nbytes < 2 * (keys.nbytes + values.nbytes) + 5000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is TopKCache
    assert_holds(loaded, keys, values)


def test_rows_that_are_handed_out_keep_their_contents_while_the_cache_grows():
    cache, keys, _ = filled(10)
    held = cache.layers[0].keys
    for _ in range(100):
        append(cache, token(), token())
    assert torch.equal(held, keys)


def test_keys_that_someone_else_puts_into_a_layer_are_continued():
    cache, _, values = filled(10)
    other, row = torch.randn(2, 3, 6, 8), token()
    for layer in cache.layers:
        layer.keys, layer.values = other, values[:, :, :6]
    append(cache, row, row)
    assert_holds(cache, torch.cat([other, row], 2), torch.cat([values[:, :, :6], row], 2))
    for layer in cache.layers:
        layer.keys, layer.values = other, layer.values[:, :, :6]
    append(cache, row, row)
    assert_holds(cache, torch.cat([other, row], 2), torch.cat([values[:, :, :6], row], 2))


def test_two_caches_that_share_keys_do_not_write_into_each_other():
    cache, keys, values = filled(10)
    twin = TopKCache([(layer.keys, layer.values) for layer in cache.layers])
    third = TopKCache(tuple(cache))
    for layer, own in zip(third.layers, cache.layers, strict=True):
        layer.keys, layer.values = own.keys, own.values
    rows = [token() for _ in range(3)]
    for one, row in zip((cache, twin, third), rows, strict=True):
        append(one, row, row)
    for one, row in zip((cache, twin, third), rows, strict=True):
        assert_holds(one, torch.cat([keys, row], 2), torch.cat([values, row], 2))


def test_rows_of_another_dtype_are_joined_as_in_a_dynamic_cache():
    cache, keys, values = filled(10, dtype=torch.bfloat16)
    row = token()
    append(cache, row, row)
    assert_holds(cache, torch.cat([keys, row], 2), torch.cat([values, row], 2))
    assert cache.layers[0].keys.dtype == torch.float32


def test_rows_of_another_batch_size_are_refused_as_in_a_dynamic_cache():
    cache, keys, values = filled(10)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        append(cache, token(3), token(3))
    assert_holds(cache, keys, values)


def test_a_cache_from_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        cache, keys, values = filled(10)
        append(cache, keys[:, :, :1], values[:, :, :1])
    row = token()
    append(cache, row, row)
    assert_holds(cache, torch.cat([keys, keys[:, :, :1], row], 2), torch.cat([values, values[:, :, :1], row], 2))


def test_gradients_reach_cached_keys_and_values(tokens):
    model = converted()

    def gradients(cache):
        model.zero_grad()
        steps = [model(tokens[:, :16], past_key_values=cache).logits]
        steps += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(16, 20)]
        torch.cat(steps, dim=1).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(DynamicCache(config=model.config))
    for gradient, plain in zip(gradients(TopKCache(config=model.config)), expected, strict=True):
        assert torch.equal(gradient, plain)


def test_what_the_backward_pass_has_saved_is_not_overwritten():
    """A trained query over frozen keys: nothing that the cache holds requires a gradient, yet it is saved."""
    cache, keys, values = filled(10)
    query = torch.randn(2, 3, 4, 8, requires_grad=True)
    row = token()
    held_keys, held_values = cache.update(row, row, 0)
    output = topk_attention.topk_attention(query, held_keys, held_values, k=3)
    cache.update(row, row, 0)
    append(cache, row, row)
    output.sum().backward()
    twin = query.detach().clone().requires_grad_()
    topk_attention.topk_attention(twin, torch.cat([keys, row], 2), torch.cat([values, row], 2), k=3).sum().backward()
    assert torch.equal(query.grad, twin.grad)


def test_a_compiled_model_takes_it(tokens):
    model = converted()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = TopKCache(config=model.config)
        logits = [compiled(tokens[:, :10], past_key_values=cache).logits]
        logits += [compiled(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(10, 12)]
        logits += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(12, 14)]
        logits += [compiled(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(14, 16)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, :16], rtol=1e-4, atol=1e-4)


def test_offloading_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"offloading must be False: .*DynamicCache\(config=config, offloading=True\)"):
        TopKCache(config=tiny_llama().config, offloading=True)


def test_layers_are_those_of_a_dynamic_cache_but_for_the_plain_growing_ones():
    for build, growing in ((tiny_llama, True), (tiny_mistral, False)):
        config = build().config
        for layer, plain in zip(TopKCache(config=config).layers, DynamicCache(config=config).layers, strict=True):
            assert isinstance(layer, type(plain))
            assert (type(layer) is GrowingLayer) == growing


def test_layers_of_hybrid_models_stay_as_they_are():
    config = tiny_llama(num_hidden_layers=5).config
    config.layer_types = ["full_attention", "sliding_attention", "linear_attention", "hybrid", "indexed_attention"]
    config.sliding_window = 7
    plain = [type(layer) for layer in DynamicCache(config=config).layers]
    assert [type(layer) for layer in TopKCache(config=config).layers] == [GrowingLayer, *plain[1:]]
    assert len(set(plain)) == 5


def test_sums_for_completion_are_kept_beside_it(tokens, monkeypatch):
    function = importlib.import_module("topk_attention.convert.attention_function")
    real, given = function.sums_of_cached, []

    def sums_of_cached(key, value, completion, shown=None):
        sums = real(key, value, completion, shown)
        given.append(sums is not None)
        for total, expected in zip(sums, completion.sums(key, value), strict=True):
            torch.testing.assert_close(total, expected)
        return sums

    monkeypatch.setattr(function, "sums_of_cached", sums_of_cached)
    model = tiny_llama().double()
    convert(model, attention_k=4, completion=Completion([3.0, 0.5, 1.0, 8.0][:HEADS]))
    for num_beams in (1, 3):
        options = OPTIONS | {"num_beams": num_beams, "attention_mask": torch.ones_like(tokens)}
        result = model.generate(tokens, **options)
        assert torch.equal(result, model.generate(tokens, **options, use_cache=False))
    assert given
    assert all(given)


def test_without_transformers_the_name_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    with pytest.raises(ImportError, match=r"TopKCache is a cache of transformers.*pip install topk-attention\[hf\]"):
        topk_cache.__wrapped__()


def test_other_names_are_still_missing():
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchCache'"):
        _ = topk_attention.NoSuchCache
