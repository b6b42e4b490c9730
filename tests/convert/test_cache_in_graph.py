"""Compiled code generates over a TopKCache as other code does: in place, with its index and sums, compiled once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache

from convert_models import VOCABULARY, tiny_gpt2, tiny_llama
from topk_attention import Completion, TopKCache, convert
from topk_attention.backends import cpu
from topk_attention.convert import cached_index, cached_sums
from topk_attention.convert.cache import GrowingLayer
from topk_attention.convert.cache_in_graph import layer_of

PROMPT = 10


@pytest.fixture(autouse=True)
def forgotten_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compilations():
    """Every graph that `compiled` has made."""
    return []


@pytest.fixture
def compiled(compilations):
    def keep(graph, inputs):
        compilations.append(graph)
        return graph

    return lambda function, backend=keep: torch.compile(function, backend=backend, dynamic=True, fullgraph=True)


@pytest.fixture
def many_tokens():
    return torch.randint(3, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(1))


def converted(k=4, completion=None, layers=1):
    model = tiny_llama(num_hidden_layers=layers)
    convert(model, attention_k=k, completion=completion)
    return model


@torch.no_grad()
def decode(step, model, tokens, cache=None, mask=None):
    """Logits of tokens one by one after a prompt that the model itself has read."""
    cache = TopKCache(config=model.config) if cache is None else cache

    def masked(end):
        return {} if mask is None else {"attention_mask": mask[:, :end]}

    model(tokens[:, :PROMPT], past_key_values=cache, **masked(PROMPT))
    ends = range(PROMPT + 1, tokens.shape[1] + 1)
    steps = [step(tokens[:, end - 1 : end].clone(), past_key_values=cache, **masked(end)).logits for end in ends]
    return torch.cat(steps, dim=1)


def test_it_is_compiled_once_and_gives_the_same(many_tokens, compiled, compilations):
    model = converted(layers=2)
    step = compiled(model)
    expected = decode(model, model, many_tokens)
    assert torch.equal(decode(step, model, many_tokens), expected)  # memory is full and grows on the way
    assert torch.equal(decode(step, model, many_tokens), expected)  # another cache
    assert len(compilations) == 1


def test_rows_are_written_in_place_and_never_copied(tokens, compiled):
    compilations, model = [], converted()

    def keep(graph, inputs):
        compilations.append([str(node.target) for node in graph.graph.nodes])
        return graph

    cache = TopKCache(config=model.config)
    decode(compiled(model, aot_autograd(fw_compiler=keep)), model, tokens, cache)
    memory = cache.layers[0]._memory[0].memory
    assert cache.layers[0].keys.data_ptr() == memory.data_ptr()
    assert memory.shape[-2] > cache.get_seq_length() == tokens.shape[1]
    (operators,) = compilations
    assert not any("cache_rows" in name for name in operators)
    assert sum("cache_attend" in name for name in operators) == len(cache.layers)


@pytest.mark.skipif(cpu.problem() is not None, reason=f"no compiled kernels: {cpu.problem()}")
def test_the_index_is_kept(tokens, compiled, monkeypatch):
    monkeypatch.setattr(cached_index, "LEAST_KEYS", 1)
    model = converted()
    expected, cache = decode(model, model, tokens), TopKCache(config=model.config)
    assert torch.equal(decode(compiled(model), model, tokens, cache), expected)
    for layer in cache.layers:
        assert layer._index._index.length == tokens.shape[1]


def test_sums_for_completion_are_kept(tokens, compiled, monkeypatch):
    made = []
    sums = cached_sums._sums
    monkeypatch.setattr(cached_sums, "_sums", lambda *call: made.append(call[1].shape[2]) or sums(*call))
    model = converted(completion=Completion([0.5, 1.0, 1.5, 2.0], lift=0.2), k=[[2, 3, 4, 5]])
    expected = decode(model, model, tokens)
    made.clear()
    assert torch.equal(decode(compiled(model), model, tokens), expected)
    assert made == [PROMPT + 1] * model.config.num_hidden_layers


def test_padding_stays_hidden(tokens, left_padding, compiled):
    model = converted()
    expected = decode(model, model, tokens, mask=left_padding)
    assert torch.equal(decode(compiled(model), model, tokens, mask=left_padding), expected)


def test_layers_with_full_attention_read_all_rows(tokens, compiled):
    model = converted(k=[4, None], layers=2)
    expected = decode(model, model, tokens)
    torch.testing.assert_close(decode(compiled(model), model, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_model_that_is_not_converted_takes_it(build, tokens, compiled):
    model = build()
    expected = decode(model, model, tokens, DynamicCache(config=model.config))
    found = decode(compiled(model), model, tokens, TopKCache(config=model.config))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_code_that_runs_twice_in_one_graph_sees_what_has_grown(tokens, compiled, compilations):
    model = converted(layers=2)

    def two_steps(first, second, cache):
        logits = model(first, past_key_values=cache).logits, model(second, past_key_values=cache).logits
        return *logits, cache.get_seq_length(), cache.layers[1].keys * 2, cache.layers[0].values * 2

    with torch.no_grad():
        caches = [TopKCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(tokens[:, :PROMPT], past_key_values=cache)
        step = compiled(two_steps)
        for start in range(PROMPT, 20, 2):
            parts = tokens[:, start : start + 1].clone(), tokens[:, start + 1 : start + 2].clone()
            expected, found = two_steps(*parts, caches[0]), step(*parts, caches[1])
            assert found[2] == expected[2] == start + 2
            for number in (0, 1, 3, 4):
                assert torch.equal(found[number], expected[number])
    assert len(compilations) == 1


def test_whatever_is_done_to_a_cache_between_steps_counts(tokens, compiled):
    model = converted()
    caches, step = [TopKCache(config=model.config) for _ in range(2)], compiled(model)

    def changed(cache, run):
        yield decode(run, model, tokens[:, :14], cache)
        cache.crop(-1)  # to as many rows as there were before the last step
        yield run(tokens[:, 14:15].clone(), past_key_values=cache).logits
        cache.reorder_cache(torch.tensor([1, 0]))
        yield run(tokens[:, 15:16].clone(), past_key_values=cache).logits
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., 3:, :] * 0.5, layer.values[..., 3:, :]
        yield run(tokens[:, 16:17].clone(), past_key_values=cache).logits
        twin = copy.deepcopy(cache)
        yield run(tokens[:, 17:18].clone(), past_key_values=twin).logits
        yield run(tokens[:, 18:19].clone(), past_key_values=cache).logits

    with torch.no_grad():
        for expected, found in zip(changed(caches[0], model), changed(caches[1], step), strict=True):
            assert torch.equal(found, expected)
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == 14


def grow_and_crop(model, tokens, cache):
    first = model(tokens, past_key_values=cache).logits
    cache.crop(-2)
    return first, model(tokens + 1, past_key_values=cache).logits


def grow_and_reorder(model, tokens, cache):
    first = model(tokens, past_key_values=cache).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    return first, model(tokens + 1, past_key_values=cache).logits


def prompt_and_step(model, tokens, cache):
    cache.reset()
    first = model(torch.cat([tokens, tokens + 2], 1), past_key_values=cache).logits[:, -1:]
    return first, model(tokens + 1, past_key_values=cache).logits


@pytest.mark.parametrize("change", [grow_and_crop, grow_and_reorder, prompt_and_step])
def test_what_is_done_to_a_cache_inside_a_graph_counts(change, tokens):
    model = converted()
    caches = [TopKCache(config=model.config) for _ in range(2)]
    step = torch.compile(change, backend="eager", dynamic=True)
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :PROMPT], past_key_values=cache)
        for end in range(PROMPT, PROMPT + 3):
            part = tokens[:, end : end + 1].clone()
            for expected, found in zip(
                (*change(model, part, caches[0]), model(part, past_key_values=caches[0]).logits),
                (*step(model, part, caches[1]), model(part, past_key_values=caches[1]).logits),
                strict=True,
            ):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_layers_that_compiled_code_makes_hold_its_rows(tokens):
    model = converted()
    results = []
    for step in (model, torch.compile(model, backend="eager", dynamic=True, fullgraph=True)):
        cache = TopKCache()  # without a configuration layers are made for the first rows
        with torch.no_grad():
            first = step(tokens[:, :PROMPT].clone(), past_key_values=cache).logits
            results.append(torch.cat([first, step(tokens[:, PROMPT:], past_key_values=cache).logits], 1))
        assert cache.get_seq_length() == tokens.shape[1]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_with_gradients_rows_are_joined(tokens):
    model = converted()
    results = []
    for step in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = TopKCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :PROMPT], past_key_values=cache)
        logits = step(tokens[:, PROMPT : PROMPT + 2], past_key_values=cache).logits
        logits.sum().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
        model.zero_grad()
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_rows_are_joined(tokens, compiled):
    model = converted()
    with torch.autocast("cpu", torch.bfloat16):
        expected = decode(model, model, tokens)
        torch.testing.assert_close(decode(compiled(model), model, tokens), expected, rtol=0.05, atol=0.05)


def test_generate_calls_compiled_code(tokens, compiled, compilations):
    model = converted()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(tokens, **options), expected)
    num_compilations = len(compilations)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(compilations) == num_compilations <= 3


def test_handles_of_caches_that_are_gone_are_forgotten():
    cache = TopKCache(config=tiny_llama().config)
    handle = cache.layers[0]._handle
    assert type(cache.layers[0]) is GrowingLayer
    assert layer_of(handle) is cache.layers[0]
    del cache
    with pytest.raises(KeyError):
        layer_of(handle)
