"""A TopKCache with storage gives the tokens of one in memory, and a folder is continued where it ended."""

from __future__ import annotations

import copy
import errno
import importlib
import os
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from convert_models import FAMILIES, HEADS, inputs_of, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from topk_attention import Completion, TopKCache, convert
from topk_attention.backends.cpu.key_index import index_obstacle
from topk_attention.convert import cached_index
from topk_attention.convert.cached_index import LEAST_KEYS

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}


def converted(build=tiny_llama, **changes):
    model = build(**changes)
    convert(model, attention_k=4)
    return model


def config_of(model):
    return model.config.get_text_config(decoder=True)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "whisper"])
def test_generation_gives_the_tokens_of_a_cache_in_memory(tmp_path, name):
    family = FAMILIES[name]
    model, inputs = family.build(), inputs_of(family, torch.float32)
    convert(model, attention_k=3)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_") and key != "labels"}
    expected = model.generate(**inputs, **OPTIONS)
    stored = cache = TopKCache(config=config_of(model), storage=tmp_path)
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(stored, DynamicCache(config=config_of(model)))
    assert torch.equal(model.generate(**inputs, **OPTIONS, past_key_values=cache), expected)
    assert {layer.__class__.__name__ for layer in stored.layers} == {"StoredLayer"}
    assert stored.get_seq_length() == stored.storage.num_tokens > 7
    stored.storage.close()


@pytest.mark.parametrize("completion", [None, Completion()])
def test_a_conversation_is_continued_from_the_folder(tmp_path, completion):
    model = tiny_llama()
    convert(model, attention_k=4, completion=completion)
    turns = [torch.randint(0, 90, (1, length), generator=torch.Generator().manual_seed(length)) for length in (9, 5, 7)]
    said, so_far = [], torch.empty(1, 0, dtype=torch.long)
    in_memory = TopKCache(config=model.config)
    for turn in turns:
        so_far = model.generate(torch.cat([so_far, turn], 1), **OPTIONS, past_key_values=in_memory)
        said.append(so_far)
    so_far = so_far[:, :0]
    for turn, expected in zip(turns, said, strict=True):
        cache = TopKCache(config=model.config, storage=tmp_path)
        assert cache.get_seq_length() == max(0, so_far.shape[1] - 1)
        so_far = model.generate(torch.cat([so_far, turn], 1), **OPTIONS, past_key_values=cache)
        assert torch.equal(so_far, expected)
        cache.storage.close()


@pytest.mark.parametrize("way", ["prompt_lookup", "assisted", "sampling", "padded"])
def test_other_ways_to_generate_give_the_tokens_of_a_cache_in_memory(tmp_path, way):
    model = converted()
    ids = torch.randint(0, 90, (1, 4)).repeat(1, 3)
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    if way == "prompt_lookup":
        options["prompt_lookup_num_tokens"] = 3
    elif way == "assisted":
        options["assistant_model"] = converted()
    elif way == "sampling":
        options["do_sample"] = True
    else:
        ids = torch.cat([ids, ids.flip(1)])
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :5] = 0
    torch.manual_seed(1)
    expected = model.generate(ids, **options, past_key_values=TopKCache(config=model.config))
    torch.manual_seed(1)
    cache = TopKCache(config=model.config, storage=tmp_path)
    assert torch.equal(model.generate(ids, **options, past_key_values=cache), expected)
    cache.storage.close()


@pytest.mark.skipif(index_obstacle(torch.ones(1)) is not None, reason=str(index_obstacle(torch.ones(1))))
def test_tokens_of_a_long_context_are_found_in_an_index_and_read_from_the_file_at_once(tmp_path, monkeypatch):
    seen = []
    attention = importlib.import_module("topk_attention.backends.cpu.attention")
    real = attention.indexed_op

    def indexed_op(*inputs):
        seen.append(inputs[-2:])
        return real(*inputs)

    monkeypatch.setattr(attention, "indexed_op", indexed_op)
    model = converted(max_position_embeddings=2048)
    ids = torch.randint(0, 90, (1, LEAST_KEYS + 10))
    expected = model.generate(ids, **OPTIONS, past_key_values=DynamicCache(config=model.config))
    assert not seen
    cache = TopKCache(config=model.config, storage=tmp_path)
    assert torch.equal(model.generate(ids, **OPTIONS, past_key_values=cache), expected)
    num_steps = OPTIONS["max_new_tokens"] - 1
    assert seen == [(LEAST_KEYS + 10 + step, True) for step in range(1, 1 + num_steps) for _ in range(2)]
    made = [layer._index._index for layer in cache.layers]
    # Rows that are taken away leave the index of the others; a folder that is opened anew is indexed anew.
    cache.storage.crop(0, LEAST_KEYS + 5)
    cache.storage.crop(1, LEAST_KEYS + 5)
    del seen[:]
    with torch.no_grad():
        after = model(ids[:, :1], past_key_values=cache).logits
    assert [layer._index._index for layer in cache.layers] == made
    cache.storage.crop(0, LEAST_KEYS + 5)
    cache.storage.crop(1, LEAST_KEYS + 5)
    cache.storage.close()
    heard = []
    cache = TopKCache(config=model.config, storage=tmp_path, progress=lambda *step: heard.append(step))
    assert {name for name, *_ in heard} == {"Reading the stored cache"}
    del heard[:]
    with torch.no_grad():
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, after)
        assert heard == [("Indexing the stored keys", 1, 2), ("Indexing the stored keys", 2, 2)]
        model(ids[:, :1], past_key_values=cache)
    assert len(heard) == 2
    assert seen[:4] == 4 * [(LEAST_KEYS + 6, True)]
    cache.storage.close()


@pytest.mark.parametrize("completion", [None, Completion()])
@pytest.mark.parametrize("way", ["the first pass failed", "reset"])
def test_a_cache_without_tokens_takes_another_batch(tmp_path, way, completion, monkeypatch):
    monkeypatch.setattr(cached_index, "LEAST_KEYS", 1)
    model = tiny_llama()
    convert(model, attention_k=4, completion=completion)
    ids = torch.randint(0, 90, (3, 9))
    expected = model.generate(ids[:1], **OPTIONS, past_key_values=TopKCache(config=model.config))
    cache = TopKCache(config=model.config, storage=tmp_path)
    if way == "reset":
        model.generate(ids, **OPTIONS, past_key_values=cache)
        cache.reset()
    else:
        with monkeypatch.context() as broken, torch.no_grad():
            broken.setattr(model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, past_key_values=cache)
        cache.storage.drop_unfinished_pass()
    assert torch.equal(model.generate(ids[:1], **OPTIONS, past_key_values=cache), expected)
    cache.storage.close()
    assert TopKCache(config=model.config, storage=tmp_path).get_seq_length() == 16


def test_a_model_with_windows_stores_its_other_layers_and_is_not_continued(tmp_path):
    windows = {"use_sliding_window": True, "sliding_window": 4}
    model = converted(tiny_qwen2, **windows, layer_types=["sliding_attention", "full_attention"])
    ids = torch.randint(0, 90, (1, 9))
    expected = model.generate(ids, **OPTIONS, past_key_values=TopKCache(config=model.config))
    cache = TopKCache(config=model.config, storage=tmp_path)
    assert torch.equal(model.generate(ids, **OPTIONS, past_key_values=cache), expected)
    assert sorted(path.name for path in tmp_path.glob("*.rows")) == ["layer-0001.rows"]
    cache.storage.close()
    with pytest.raises(ValueError, match=r"cannot continue, as what its DynamicSlidingWindowLayer held is lost"):
        TopKCache(config=model.config, storage=tmp_path)


def test_the_views_are_those_of_now_whatever_was_cropped(tmp_path):
    model = converted()
    cache = TopKCache(config=model.config, storage=tmp_path)
    heads = (2, model.config.num_key_value_heads)
    keys, values = torch.randn(2, *heads, 10, 8)
    with torch.no_grad():
        for layer in range(2):
            cache.update(keys, values, layer)
    layer = cache.layers[0]
    assert layer.keys is layer.keys
    cache.crop(-3)
    assert torch.equal(layer.keys, keys[:, :, :7])
    new = torch.randn(2, *heads, 3, 8)
    with torch.no_grad():
        for index in range(2):
            cache.update(*new, index)
    assert torch.equal(layer.keys, torch.cat([keys[:, :, :7], new[0]], 2))
    assert torch.equal(layer.values, torch.cat([values[:, :, :7], new[1]], 2))
    with pytest.raises(ValueError, match="positive value"):
        cache.crop(3)
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        for index in range(2):
            cache.update(*new, index)
    cache.reset()
    assert cache.get_seq_length() == cache.storage.num_tokens == 0
    cache.storage.close()


def test_a_full_disk_leaves_a_cache_that_the_same_pass_continues(tmp_path, monkeypatch):
    model = converted()
    cache = TopKCache(config=model.config, storage=tmp_path)
    ids = torch.randint(0, 90, (1, 12))

    def full_in_the_second_layer(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        model(ids[:, :8], past_key_values=cache)
        with monkeypatch.context() as full:
            full.setattr(cache.storage._rows[1], "append", full_in_the_second_layer)
            with pytest.raises(OSError, match="all layers hold 8 tokens: make room, then repeat the pass"):
                model(ids[:, 8:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]
        assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8]
        torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits[:, -1], expected)
    cache.storage.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
            r"beam_idx must be 0 to 1 in this order, got \[1, 0\]",
        ),
        (
            lambda cache: cache.batch_select_indices(torch.tensor([0])),
            r"indices must be 0 to 1 in this order, got \[0\]",
        ),
        (
            lambda cache: cache.batch_repeat_interleave(2),
            "repeats must be 1, got 2: a cache with storage keeps its batch",
        ),
        (lambda cache: cache.layers[0].offload(), "cannot be offloaded"),
    ],
)
def test_what_would_copy_all_rows_is_refused(tmp_path, change, words):
    model = converted()
    cache = TopKCache(config=model.config, storage=tmp_path)
    with torch.no_grad():
        model(torch.randint(0, 90, (2, 6)), past_key_values=cache)
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=words):
        change(cache)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(cache)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(cache)
    assert cache.get_seq_length() == 6
    cache.storage.close()


def test_gradients_are_refused_in_words(tmp_path):
    model = converted()
    cache = TopKCache(config=model.config, storage=tmp_path)
    with pytest.raises(ValueError, match="key must need no gradient"):
        model(torch.randint(0, 90, (1, 6)), past_key_values=cache)
    cache.storage.close()


def test_the_folder_of_another_model_is_refused(tmp_path):
    model = converted()
    TopKCache(config=model.config, storage=tmp_path).storage.close()
    with pytest.raises(ValueError, match=r"must hold a cache with .*, got one with .* it is of another model"):
        TopKCache(config=converted(tiny_gpt2).config, storage=tmp_path)
    TopKCache(config=model.config, storage=tmp_path).storage.close()


def test_storage_that_cannot_be_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="storage needs config"):
        TopKCache(storage=tmp_path / "new")
    with pytest.raises(ValueError, match='storage must name a folder, got ""'):
        TopKCache(config=tiny_llama().config, storage="")
    with pytest.raises(ValueError, match="storage needs a model with layers that attend to all tokens, got DynamicSl"):
        TopKCache(config=tiny_mistral(sliding_window=4).config, storage=tmp_path / "new")
    state = torch.randn(1, HEADS, 3, 8)
    with pytest.raises(ValueError, match="ddp_cache_data must be None with storage"):
        TopKCache([(state, state)] * 2, config=tiny_llama().config, storage=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_read_through_with_progress(tmp_path):
    model = converted()
    cache = TopKCache(config=model.config, storage=tmp_path)
    with torch.no_grad():
        model(torch.randint(0, 90, (1, 6)), past_key_values=cache)
    cache.storage.close()
    steps = []
    cache = TopKCache(config=model.config, storage=tmp_path, progress=lambda *step: steps.append(step))
    assert steps == [("Reading the stored cache", 6, 12), ("Reading the stored cache", 12, 12)]
    cache.storage.close()


def test_compiled_code_stores_the_same(tmp_path):
    cache = TopKCache(config=tiny_llama(num_hidden_layers=1).config, storage=tmp_path)
    keys, values = torch.randn(2, 1, HEADS, 6, 8)

    @torch.compile(backend="eager")
    def updated(keys, values):
        return cache.update(keys, values, 0)[0] * 2

    with torch.no_grad():
        assert torch.equal(updated(keys, values), keys * 2)
        assert torch.equal(updated(keys[:, :, :1], values[:, :, :1]), torch.cat([keys, keys[:, :, :1]], 2) * 2)
    cache.storage.close()
