"""Performer and RFA as the attention of a whole model."""

from dataclasses import replace

import pytest
import torch

from convert_models import tiny_bert
from topk_experiments.benchmarks.model import ModelBenchmark, Point, run_model_benchmark
from topk_experiments.benchmarks.model.methods import new_inputs, new_model, prepared_model, use_random_features
from topk_experiments.models.pretrained import find_model
from topk_experiments.rivals import AttentionMethod, PerformerAttention, RandomFeatureAttention, random_feature_weights

CLASSES = {"performer": PerformerAttention, "rfa": RandomFeatureAttention}


def methods_of(model):
    return [module for module in model.modules() if isinstance(module, AttentionMethod)]


@pytest.mark.parametrize("method", CLASSES)
def test_every_self_attention_is_the_methods_class_with_features_of_its_own(point, method):
    model = prepared_model(point(method=method, num_features=64))
    first, second = methods_of(model)
    assert type(first) is type(second) is CLASSES[method]
    features, _ = first.feature_map(torch.float32)(torch.randn(1, 4, 3, 8))
    assert features.shape[-1] == 64
    assert not torch.equal(first.directions, second.directions)


@pytest.mark.parametrize("method", CLASSES)
def test_attention_gives_what_the_features_stand_for_in_each_layer(point, method):
    model = prepared_model(point(method=method))
    layers = [module for module in model.modules() if hasattr(module, "random_features")]
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, arguments, output: calls.append((layer, arguments[0], output[0])))
    model(**new_inputs(point(method=method), model))
    assert [layer for layer, _, _ in calls] == layers
    for layer, hidden, output in calls:
        projections = (layer.query, layer.key, layer.value)
        query, key, value = (projection(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for projection in projections)
        weights = random_feature_weights(layer.random_features, query.double(), key.double())
        expected = (weights @ value.double()).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)


def test_directions_come_from_the_seed_alone_and_stay_through_a_step(point):
    one = point(method="performer")
    model = prepared_model(one)
    drawn = [method.directions.clone() for method in methods_of(model)]
    model(**new_inputs(one, model)).loss.backward()
    torch.rand(3)  # whatever else was drawn before
    again, other = prepared_model(one), prepared_model(replace(one, seed=1))
    for old, after_step, same, different in zip(drawn, *map(methods_of, (model, again, other)), strict=True):
        assert torch.equal(old, after_step.directions)
        assert torch.equal(old, same.directions)
        assert not torch.equal(old, different.directions)


@pytest.mark.parametrize("method", CLASSES)
def test_weights_and_inputs_are_those_of_other_methods(point, method):
    def weights_and_inputs(one):
        torch.manual_seed(3)
        model = prepared_model(one)
        return dict(model.named_parameters()), new_inputs(one, model)

    (ours, our_inputs), (theirs, their_inputs) = (weights_and_inputs(point(method=name)) for name in (method, "sdpa"))
    added = ours.keys() - theirs.keys()
    assert all(name.endswith("random_features.sigma") for name in added)
    assert len(added) == (2 if method == "rfa" else 0)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(our_inputs["input_ids"], their_inputs["input_ids"])


def test_dropout_acts_everywhere_but_in_attention(point):
    model = prepared_model(point(method="performer", dropout_p=0.5))
    layer = next(module for module in model.modules() if hasattr(module, "random_features"))
    assert model.training
    assert layer.dropout.p == 0.5
    hidden = torch.randn(1, 40, 32)
    assert torch.equal(layer(hidden)[0], layer(hidden)[0])
    inputs = new_inputs(point(), model)
    assert model(**inputs).loss != model(**inputs).loss


@pytest.mark.parametrize("method", CLASSES)
def test_networks_stay_as_they_are(point, method):
    model = prepared_model(point(method=method, feed_forward_k=3))
    original = new_model(point(method="sdpa"), "sdpa")
    kinds = [type(module) for module in model.modules() if not isinstance(module, AttentionMethod)]
    assert kinds == [type(module) for module in original.modules()]


@pytest.mark.parametrize("method", CLASSES)
def test_padding_changes_nothing(point, method):
    one = point(method=method, dropout_p=0.0)
    model = prepared_model(one)
    ids = new_inputs(one, model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    expected = model(input_ids=ids[:, :30]).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[:, :30], expected)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("t5", "method rfa is for encoders such as BERT, and t5 has a decoder and a position bias; leave rfa out of"),
        ("llama", "method rfa is for encoders such as BERT, and llama has a decoder; leave rfa out of the methods"),
    ],
)
def test_another_family_is_named_with_the_way_out_before_anything_is_measured(point, console, tmp_path, family, words):
    points = [point(family, "sdpa"), point(family, "rfa")]
    with pytest.raises(ValueError, match=words):
        run_model_benchmark(ModelBenchmark(points, out=tmp_path, name="name"), console)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        prepared_model(points[1])


def test_a_causal_bert_is_refused(tmp_path):
    tiny_bert(is_decoder=True).config.save_pretrained(tmp_path / "causal")
    one = Point("causal", "performer", 20, source=find_model(str(tmp_path / "causal")))
    model = prepared_model(one)
    with pytest.raises(ValueError, match=r"method PerformerAttention .* bert has queries that do not see every key"):
        model(**new_inputs(one, model))


@pytest.mark.parametrize(
    ("argument", "words"),
    [({"position_bias": torch.zeros(1, 4, 9, 9)}, "a position bias"), ({"scaling": 1.0}, "not scaled by 1 / sqrt")],
)
def test_what_the_features_leave_out_is_refused(point, argument, words):
    model = prepared_model(point(method="performer"))
    layer = next(module for module in model.modules() if hasattr(module, "random_features"))
    from transformers import AttentionInterface

    rows = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match=words):
        AttentionInterface()["random-features"](layer, rows, rows, rows, None, **argument)


def test_a_model_whose_attention_is_out_of_reach_is_refused(point):
    with pytest.raises(
        ValueError, match=r"performer is for .*, and bert has attention that transformers' attention inter"
    ):
        use_random_features(_WithoutAttention(new_model(point(), "sdpa").config), point(method="performer"))


class _WithoutAttention(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
