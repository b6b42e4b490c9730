from dataclasses import replace

import pytest
import torch

from topk_experiments.lra.configuration import METHOD_OPTIONS
from topk_experiments.lra.model import ModelConfig
from topk_experiments.lra.tasks import ExamplesWriter, GreyImages, SameDocument
from topk_experiments.lra.training import new_model


def ragged():
    writer = ExamplesWriter()
    for length, label in ((5, 0), (11, 1), (8, 2)):
        writer.add([bytes(range(length))], label)
    return writer.examples()


@pytest.mark.parametrize("method", [method for method in METHOD_OPTIONS if method != "vanilla"])
def test_all_methods_start_with_the_same_shared_parameters(tiny, method):
    task = tiny.new_task(None)
    vanilla, other = (dict(new_model(tiny, task, name, seed=3).named_parameters()) for name in ("vanilla", method))
    assert all(torch.equal(vanilla[name], other[name]) for name in vanilla)
    own = {name.split(".")[-1] for name in other if name not in vanilla}
    assert own == ({"sigma"} if method == "rfa" else set())


def test_another_seed_starts_elsewhere(tiny):
    task = tiny.new_task(None)
    first, second = (new_model(tiny, task, "topk", seed=seed).head[0].weight for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_padding_changes_nothing(tiny, method, pooling, positions):
    config = replace(tiny, model=replace(tiny.model, pooling=pooling, positions=positions))
    model = new_model(config, config.new_task(None), method, seed=0).double().eval()
    examples = ragged()
    with torch.no_grad():
        together = examples.batch([0, 1, 2])
        padded = model(together.tokens, together.mask)
        for number in range(3):
            alone = examples.batch([number])
            assert alone.mask is None
            torch.testing.assert_close(model(alone.tokens, alone.mask)[0], padded[number], rtol=1e-5, atol=1e-6)


def test_chunks_of_queries_and_every_key_give_what_vanilla_gives(tiny):
    task, batch = tiny.new_task(None), ragged().batch([0, 1, 2])
    models = [new_model(tiny, task, method, seed=0).double() for method in ("vanilla", "query-chunks")]
    models.append(new_model(replace(tiny, k=50), task, "topk", seed=0).double())
    gradients = []
    for model in models:
        logits = model(batch.tokens, batch.mask)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for others in gradients[1:]:
        for expected, found in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["performer", "rfa"])
def test_methods_without_weights_to_drop_train_without_dropping_any(tiny, method):
    config = replace(tiny, model=replace(tiny.model, attention_dropout=0.5))
    model = new_model(config, config.new_task(None), method, seed=0).train()
    batch = ragged().batch([0, 1, 2])
    first, again = (model(batch.tokens, batch.mask) for _ in range(2))
    torch.testing.assert_close(first, again)


def test_fewer_keys_are_not_vanilla(tiny):
    task, batch = tiny.new_task(None), ragged().batch([1])
    vanilla, topk = (new_model(tiny, task, method, seed=0).eval() for method in ("vanilla", "topk"))
    assert not torch.allclose(vanilla(batch.tokens, batch.mask), topk(batch.tokens, batch.mask), atol=1e-4)


@pytest.mark.parametrize("compare_products", [False, True])
def test_pairs_go_through_one_encoder_and_the_order_of_the_two_is_seen(tiny, compare_products):
    task = SameDocument("unused", max_length=16)
    config = replace(tiny, model=replace(tiny.model, compare_products=compare_products))
    model = new_model(config, task, "topk", seed=0).eval()
    writer = ExamplesWriter()
    first, second = writer.add_sequence(b"some words"), writer.add_sequence(b"other word")
    for pair in ((first, second), (second, first), (first, first)):
        writer.add_example(pair, label=0)
    batch = writer.examples().batch([0, 1, 2])
    logits = model(batch.tokens, batch.mask)
    assert logits.shape == (3, 2)
    assert not torch.allclose(logits[0], logits[1])
    encoded = model.encoder(batch.tokens[:, 0], None)
    torch.testing.assert_close(encoded[0], encoded[2])


def test_rows_and_columns_need_a_square(tiny):
    config = replace(tiny, model=replace(tiny.model, positions="rows-and-columns"))
    with pytest.raises(ValueError, match='positions="rows-and-columns" needs square images, got 24 tokens'):
        new_model(config, tiny.new_task(None), "topk", seed=0)
    model = new_model(config, GreyImages("unused"), "topk", seed=0)
    vectors = model.encoder.positions(torch.zeros(1, 1024, 16))[0].unflatten(0, (32, 32))
    torch.testing.assert_close(vectors[3, 5] - vectors[3, 6], vectors[9, 5] - vectors[9, 6])
    assert not torch.allclose(vectors[3, 5], vectors[5, 3])
    assert torch.unique(vectors.flatten(0, 1), dim=0).shape[0] == 1024


def test_sinusoids_have_the_published_wavelengths(tiny):
    model = new_model(tiny, tiny.new_task(None), "topk", seed=0)
    vectors = model.encoder.positions(torch.zeros(1, 9, 16))[0]
    place = torch.arange(9.0)
    torch.testing.assert_close(vectors[:, 0], place.sin())
    torch.testing.assert_close(vectors[:, 3], (place / 10_000 ** (2 / 16)).cos())


def test_sizes_of_the_heads_follow_the_configuration():
    sizes = {"num_layers": 1, "d_model": 128, "num_heads": 4, "d_attention": 64, "d_ff": 128}
    assert ModelConfig(**sizes).head_dim == 16
