from dataclasses import replace

import pytest
import torch

from topk_experiments.benchmarks.model import Point
from topk_experiments.benchmarks.model.methods import new_config, new_inputs, new_model

LONG = 32768


def test_bert_base_is_the_papers_12_layer_model():
    config = new_config(Point("bert-base", "topk", LONG))
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (12, 12, 768)
    assert config.intermediate_size == 3072
    assert config.max_position_embeddings > LONG
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1


def test_t5_base_has_its_222_million_weights():
    with torch.device("meta"):
        model = new_model(Point("t5-base", "topk", LONG, device="cpu"), "sdpa")
    assert sum(parameter.numel() for parameter in model.parameters()) == 222_903_552


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_every_dropout_is_the_points(point, family):
    for p in (0.0, 0.25):
        model = new_model(point(family, dropout_p=p), "sdpa")
        assert model.training
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        rates += [module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")]
        assert rates
        assert set(rates) == {p}


@pytest.mark.parametrize(
    ("family", "kind", "num_labels"),
    [
        ("bert", "BertForTokenClassification", 40),
        ("t5", "T5ForConditionalGeneration", 9),
        ("llama", "LlamaForCausalLM", 40),
    ],
)
def test_each_family_gets_a_loss_that_reaches_its_weights(point, family, kind, num_labels):
    one = point(family)
    model = new_model(one, "eager")
    assert type(model).__name__ == kind
    inputs = new_inputs(one, model)
    assert inputs["input_ids"].shape == (1, 40)
    assert inputs["labels"].shape == (1, num_labels)
    output = model(**inputs)
    output.loss.backward()
    assert getattr(output, "past_key_values", None) is None
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_positions_beyond_those_of_the_configuration_are_added(point):
    one = replace(point("bert", "vanilla"), length=300)  # it has 256
    model = new_model(one, "sdpa")
    assert model(**new_inputs(one, model)).loss.isfinite()


def test_a_configuration_without_a_fitting_model_is_named(tmp_path):
    from transformers import ViTConfig

    from topk_experiments.models.pretrained import find_model

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "vit")
    source = find_model(str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="config vit makes no model of AutoModelForTokenClassification"):
        new_model(Point(source.name, "topk", 16, source=source), "sdpa")


def test_gradient_checkpointing_is_on_where_asked_for(point):
    def is_on(model):
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    assert not is_on(new_model(point(), "sdpa"))
    assert is_on(new_model(point(checkpointing=True), "sdpa"))
