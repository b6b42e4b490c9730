import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from topk_experiments.conformance import check, worker
from topk_experiments.conformance.catalogue import Model, part
from topk_experiments.conformance.check import check_model
from topk_experiments.conformance.exercises import GENERATED
from topk_experiments.conformance.judges import best_scores_in, dense_networks, difference
from topk_experiments.conformance.report import (
    DIFFERS,
    EXACT,
    FILE,
    HAS_NONE,
    NOT_TRIED,
    REFUSED,
    verdict,
    verdict_on_networks,
)
from topk_experiments.conformance.tiny import nudged, tiny_configuration

LLAMA = Model("llama", "LlamaForCausalLM")
RECORDS = Path(__file__).parents[3] / "results" / "conformance" / FILE
# One form of generation of each kind in CI; the command has them all.
GENERATING = {"generation": {}, "generation, static cache": {"cache_implementation": "static"}}


def exact_models():
    """Models that are exact by the records, two of each family, drawn anew every time that there are other records."""
    lines = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    newest = {(line["model_type"], line["model_class"]): line for line in lines}
    exact = [Model(*name) for name, line in newest.items() if verdict(line).word == EXACT]
    return part(exact, random.Random(len(lines)).randrange(1000), 2)


@pytest.mark.parametrize("model", exact_models(), ids=lambda model: model.model_class)
def test_a_few_models_of_every_family_are_still_exact(model):
    record = check_model(model, generating=GENERATING)
    assert verdict(record | {"outcome": "finished"}).word == EXACT
    assert verdict_on_networks(record | {"outcome": "finished"}).word != DIFFERS


def test_a_model_without_attention_has_none_and_one_in_its_own_code_is_refused_with_the_reason():
    mamba, funnel = check_model(Model("mamba", "MambaForCausalLM")), check_model(Model("funnel", "FunnelModel"))
    assert verdict(mamba | {"outcome": "finished"}) == (HAS_NONE, "")
    refused = verdict(funnel | {"outcome": "finished"})
    assert refused.word == REFUSED
    assert "FunnelRelMultiheadAttention computes attention in its own code" in refused.reason


@pytest.mark.parametrize("model", [Model("zamba2", "Zamba2ForCausalLM"), Model("mask2former", "Mask2FormerModel")])
def test_attention_that_layers_share_and_a_plain_function_for_an_activation_are_converted_and_restored(model):
    """Zamba2 tells its attention at each call for which layer it is; Mask2Former keeps relu, no module, in a layer."""
    record = check_model(model, generating={"generation": {}}) | {"outcome": "finished"}
    assert DIFFERS not in (verdict(record).word, verdict_on_networks(record).word)
    assert record["attention"]["replaced"] > 0


def test_one_key_more_than_asked_for_is_found(monkeypatch):
    convert = check.convert

    def one_more(model, **options):
        if options.get("attention_k") == check.ATTENTION_K:
            options["attention_k"] += 1
        return convert(model, **options)

    monkeypatch.setattr(check, "convert", one_more)
    record = check_model(LLAMA, generating={})
    assert verdict(record | {"outcome": "finished"}).word == DIFFERS
    assert not any(isinstance(value, str) for value in record["differences"][check.FEW_KEYS].values())
    assert min(record["differences"][check.FEW_KEYS].values()) > 1e-3


@pytest.mark.parametrize("model", [LLAMA, Model("mpnet", "MPNetModel"), Model("siglip", "SiglipModel")])
def test_another_lift_of_completion_is_found(model, monkeypatch):
    """Also in layers that had computed attention in their own code: MPNet's, and PyTorch's in Siglip's head."""
    completion = check.Completion
    monkeypatch.setattr(check, "Completion", lambda: dataclasses.replace(completion(), lift=0.4))
    record = check_model(model, generating={})
    differences = record["differences"]
    assert not record["not_judged"].get(check.COMPLETED)
    assert min(differences[check.COMPLETED].values()) > 1e-3
    assert max(differences[check.FEW_KEYS].values()) < 1e-3


def test_one_neuron_more_than_asked_for_is_found(monkeypatch):
    convert = check.convert

    def one_more(model, **options):
        if options.get("feed_forward_k") == check.FEED_FORWARD_K:
            options["feed_forward_k"] += 1
        return convert(model, **options)

    monkeypatch.setattr(check, "convert", one_more)
    record = check_model(LLAMA, generating={}) | {"outcome": "finished"}
    assert verdict(record).word == EXACT
    assert verdict_on_networks(record).word == DIFFERS


def test_weights_that_are_saved_wrong_are_found(monkeypatch):
    save = transformers.LlamaForCausalLM.save_pretrained

    def other_weights(model, folder):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        save(model, folder)
        with torch.no_grad():
            model.lm_head.weight.sub_(1)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", other_weights)
    record = check_model(LLAMA, generating={})
    assert verdict(record | {"outcome": "finished"}).reason.startswith("saved and loaded, plain: ")


def test_beams_that_tie_are_not_judged_as_rounding_decides_between_them(monkeypatch):
    model, beams = Model("m2m_100", "M2M100ForConditionalGeneration"), {"beams": GENERATED["beams"]}
    assert check_model(model, generating=beams)["differences"][check.ALL_KEYS]["beams"] < 1e-5
    monkeypatch.setitem(check.tiny_model.__globals__["OVERRIDES"], "m2m_100", {})
    record = check_model(model, generating=beams)
    assert record["not_judged"][check.ALL_KEYS]["beams"].startswith("rounding decides: ")
    assert verdict(record | {"outcome": "finished"}).word == EXACT


def test_weights_are_nudged_by_their_last_bits_and_given_back():
    layer = nn.Linear(4, 6)
    before = layer.weight.detach().clone()
    with nudged(layer, 0):
        share = (layer.weight / before - 1).abs()
        assert 0 < share.min() < share.max() < 4e-7
    assert torch.equal(layer.weight, before)


def test_a_model_that_cannot_be_made_this_small_is_not_tried_and_the_reason_kept(monkeypatch):
    monkeypatch.setitem(check.tiny_model.__globals__["OVERRIDES"], "llama", {"hidden_size": 33})
    record = check_model(LLAMA)
    assert verdict(record | {"outcome": "finished"}).word == NOT_TRIED
    assert record["reason"]


def test_a_model_that_takes_too_long_is_stopped_and_the_next_one_is_checked(monkeypatch):
    def never(model):
        while model.model_type == "gpt2":
            try:
                torch.ones(1).sum()
            except Exception:
                pytest.fail("a family caught the end of its time")
        return {"built": False, "reason": ""}

    monkeypatch.setattr(worker, "check_model", never)
    sent = []
    models = [["gpt2", "GPT2LMHeadModel"], ["llama", "LlamaForCausalLM"]]
    worker.check_models({"models": models, "time_limit_s": 0.5, "memory_limit_gib": None}, sent.append)
    outcomes = [message["record"]["outcome"] for message in sent if "record" in message]
    assert outcomes == ["time limit", "finished"]


def test_sizes_are_shrunk_and_dropout_is_off_in_every_part_of_a_configuration():
    config = tiny_configuration(transformers.CLIPConfig, {"text_config": {"num_hidden_layers": 3}})
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 32
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (3, 2)
    assert tiny_configuration(transformers.BertConfig).hidden_dropout_prob == 0.0


@pytest.mark.parametrize("need_weights", [True, False])
def test_best_scores_reach_the_attention_of_torch_layers_alone(need_weights):
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    outside = torch.randn(2, 3, 4).softmax(-1)
    with best_scores_in([layer], 2):
        found = layer(x, x, x, need_weights=need_weights)[0]
        assert (torch.randn(2, 3, 4).softmax(-1) > 0).all()
        assert outside.sum(-1).allclose(torch.ones(2, 3))
    query, key, value = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in layer_projections(layer, x))
    scores = query @ key.mT / 2
    scores[scores < scores.topk(2).values[..., -1:]] = -torch.inf
    expected = layer.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(found, expected)


def layer_projections(layer, x):
    return nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)


def test_dense_networks_rank_by_what_the_first_layer_gives_or_by_what_the_last_is_given():
    torch.manual_seed(0)
    first, gate, last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
    x = torch.randn(3, 4)
    with dense_networks([([first], last)], 2):
        plain = last(nn.functional.gelu(first(x)))
    before = first(x)
    kept = before >= before.topk(2).values[..., -1:]
    torch.testing.assert_close(plain, last(nn.functional.gelu(before) * kept))
    with dense_networks([([first, gate], last)], 2):
        gated = last(nn.functional.silu(gate(x)) * first(x))
    hidden = nn.functional.silu(gate(x)) * first(x)
    kept = hidden.abs() >= hidden.abs().topk(2).values[..., -1:]
    torch.testing.assert_close(gated, last(hidden * kept))


def test_a_difference_is_a_share_of_the_largest_number_and_words_say_what_is_wrong():
    right = {"output": torch.tensor([4.0, 2.0])}
    assert difference({"output": torch.tensor([4.0, 3.0])}, right) == 0.25
    assert difference({"output": torch.tensor([4.0, torch.nan])}, right) > 1e30
    assert difference({"output": torch.tensor([4.0])}, right) == "output has shape [1], not [2]"
    assert difference({}, right) == "other tensors: output"
    assert difference({"tokens": torch.tensor([1])}, {"tokens": torch.tensor([2])}) == "other tokens"
