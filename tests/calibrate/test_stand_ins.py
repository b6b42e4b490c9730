"""fit_stand_ins finds, for each layer, the linear function that is nearest to what its dropped neurons would add."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

from convert_models import FAMILIES, NEURONS, inputs_of, output_of, tiny_bert, tiny_gpt2, tiny_llama
from topk_attention import StandIn, StandIns, TopKFeedForward, convert, fit_stand_ins, unconvert

stand_ins_module = importlib.import_module("topk_attention.calibrate.stand_ins")

K, WIDTH = 6, 32
PATHS = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (2, length), generator=generator) for length in (24, 60)]


def inputs_and_dropped(model, batches, k=K):
    """For each layer of a Llama its inputs [T, D], and the outputs of the dense network less those of top-k [T, O]."""
    inputs = {path: [] for path in PATHS}
    for path in PATHS:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs[path].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
        found = {}
        for path in PATHS:
            network, x = model.get_submodule(path), torch.cat([x.flatten(0, 1) for x in inputs[path]])
            network._forward_pre_hooks.clear()
            layers = (network.up_proj, network.down_proj)
            topk = TopKFeedForward(*layers, linear_gate=network.gate_proj, k=k, activation="silu", backend="reference")
            found[path] = x, network(x) - topk(x)
    return found


def given_by(stand_in, x):
    stand_in = stand_in.to(x.dtype)
    changing = 0 if stand_in.w_in is None else x @ stand_in.w_in.T @ stand_in.w_out.T
    return changing + stand_in.bias


def test_a_constant_is_the_mean_of_what_the_dropped_neurons_give(batches):
    model = tiny_llama().double()
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=0)
    assert dict(stand_ins) == dict.fromkeys(PATHS, K)
    assert stand_ins.about == {"tokens": 2 * (24 + 60), "rank": 0}
    for path, (_, dropped) in inputs_and_dropped(model, batches).items():
        assert stand_ins.stand_in[path].rank == 0
        torch.testing.assert_close(stand_ins.stand_in[path].bias, dropped.mean(0).float())


def test_without_a_penalty_and_with_every_direction_it_is_least_squares(batches, monkeypatch):
    monkeypatch.setattr(stand_ins_module, "_PENALTY", 0.0)
    model = tiny_llama().double()
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=WIDTH)
    for path, (x, dropped) in inputs_and_dropped(model, batches).items():
        with_one = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        expected = with_one @ torch.linalg.lstsq(with_one, dropped).solution
        torch.testing.assert_close(given_by(stand_ins.stand_in[path], x), expected, rtol=1e-3, atol=1e-4)


def test_a_rank_keeps_the_directions_in_which_the_full_function_varies_most(batches):
    model = tiny_llama().double()
    full = fit_stand_ins(model, batches, feed_forward_k=K, rank=WIDTH)
    low = fit_stand_ins(model, batches, feed_forward_k=K, rank=5)
    for path, (x, dropped) in inputs_and_dropped(model, batches).items():
        centred = given_by(full.stand_in[path], x) - dropped.mean(0)
        u, s, v = torch.linalg.svd(centred, full_matrices=False)
        expected = (u[:, :5] * s[:5]) @ v[:5] + dropped.mean(0)
        assert low.stand_in[path].rank == 5
        torch.testing.assert_close(given_by(low.stand_in[path], x), expected, rtol=1e-3, atol=1e-4)


def test_more_of_it_leaves_less_error_on_its_own_text(batches):
    model = tiny_llama().double()
    errors = []
    for rank in (0, 4, 16, WIDTH):
        stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=rank)
        found = inputs_and_dropped(model, batches)
        errors.append([(d - given_by(stand_ins.stand_in[path], x)).square().mean() for path, (x, d) in found.items()])
    nothing = [d.square().mean() for _, d in inputs_and_dropped(model, batches).values()]
    for less, more in zip(errors, [nothing, *errors], strict=False):
        assert all(a < b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_fitted_and_comes_back_as_it_was(name, rank):
    model, inputs = FAMILIES[name].build().double(), inputs_of(FAMILIES[name])
    inputs.pop("attention_mask", None)
    before = [(path, type(module), module.training) for path, module in model.train().named_modules()]
    weights = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    stand_ins = fit_stand_ins(model, [inputs], feed_forward_k=K, rank=rank)
    assert [(path, type(module), module.training) for path, module in model.named_modules()] == before
    assert not hasattr(model.config, "topk_attention")
    assert all(torch.equal(tensor, weights[path]) for path, tensor in model.state_dict().items())
    model.eval()
    dense = output_of(model, inputs)
    report = convert(model, feed_forward_k=K)
    alone = (output_of(model, inputs) - dense).square().mean()
    assert {entry.path for entry in report.replaced} == set(stand_ins)
    convert(model, feed_forward_k=stand_ins)
    # Layer by layer the error is smaller; of random deep networks the last output's need not be.
    assert 0 < (output_of(model, inputs) - dense).square().mean() < 1.5 * alone


def test_layers_may_have_different_k_and_some_none(batches):
    model = tiny_llama()
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=[NEURONS, 4], rank=2)
    assert dict(stand_ins) == {PATHS[1]: 4}
    stand_ins = fit_stand_ins(model, batches, feed_forward_k={PATHS[0]: 4, PATHS[1]: 7}, rank=2)
    assert dict(stand_ins) == {PATHS[0]: 4, PATHS[1]: 7}
    other = fit_stand_ins(model, batches, feed_forward_k=[None, 7], rank=2)
    torch.testing.assert_close(other.stand_in[PATHS[1]].bias, stand_ins.stand_in[PATHS[1]].bias)


def test_half_precision_is_fitted_in_float32_and_used_in_its_own(batches):
    model = tiny_llama().bfloat16()
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=3)
    assert stand_ins.stand_in[PATHS[0]].bias.dtype == torch.float32
    convert(model, feed_forward_k=stand_ins)
    assert model(input_ids=batches[0]).logits.dtype == torch.bfloat16


def test_inputs_that_never_change_do_no_harm(batches):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[3:] = 0
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=5)
    assert all(t.isfinite().all() for one in stand_ins.stand_in.values() for t in one.tensors().values())


def test_saved_stand_ins_load_as_they_were(tmp_path, batches):
    stand_ins = fit_stand_ins(tiny_gpt2(), batches, feed_forward_k=[K, 9], rank=3)
    path = tmp_path / "new folder" / "stand-ins.safetensors"
    stand_ins.save(path)
    loaded = StandIns.load(path)
    assert dict(loaded) == dict(stand_ins)
    assert loaded.about == stand_ins.about
    for layer, stand_in in stand_ins.stand_in.items():
        found = loaded.stand_in[layer].tensors()
        assert found.keys() == stand_in.tensors().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in stand_in.tensors().items())
    constant = fit_stand_ins(tiny_gpt2(), batches, feed_forward_k=K, rank=0)
    constant.save(path)
    assert StandIns.load(path).stand_in["transformer.h.0.mlp"].rank == 0


def write(path, tensors, **content):
    from safetensors.torch import save_file

    whole = {"format": "topk_attention/stand-ins/1", "feed_forward_k": json.dumps({"mlp": 3}), "about": "{}"}
    save_file(tensors, path, {name: text for name, text in (whole | content).items() if text is not None})


@pytest.mark.parametrize(
    ("tensors", "content", "words"),
    [
        ({"mlp/bias": torch.zeros(3)}, {"format": None}, "format must be topk_attention/stand-ins/1, got None"),
        ({"mlp/bias": torch.zeros(3)}, {"format": "other/2"}, "got other/2"),
        ({"mlp/bias": torch.zeros(3)}, {"feed_forward_k": "{"}, "Expecting property name"),
        ({"mlp/bias": torch.zeros(3)}, {"feed_forward_k": '{"mlp": 0}'}, "k of mlp must be at least 1"),
        ({"mlp/bias": torch.zeros(3)}, {"feed_forward_k": '["mlp"]'}, "is not a file of stand-ins"),
        ({"mlp/bias": torch.zeros(3)}, {"feed_forward_k": "[" * 10000}, "nested too deeply"),
        ({"mlp/bias": torch.zeros(3)}, {"about": "3"}, "about must be a JSON object, got 3"),
        ({"other/bias": torch.zeros(3)}, {}, "'other'"),
        ({"mlp/other": torch.zeros(3)}, {}, "unexpected keyword argument 'other'"),
        ({"mlp/w_in": torch.zeros(2, 3)}, {}, "missing 1 required positional argument: 'bias'"),
        ({"mlp/bias": torch.zeros(3), "mlp/w_in": torch.zeros(2, 3)}, {}, "w_in needs w_out"),
    ],
)
def test_another_file_is_named(tmp_path, tensors, content, words):
    path = tmp_path / "file.safetensors"
    write(path, tensors, **content)
    with pytest.raises(ValueError, match=rf"file\.safetensors is not a file of stand-ins: .*{words}|{words}"):
        StandIns.load(path)


def test_a_damaged_file_and_a_missing_one_are_named(tmp_path, batches):
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match=r"file of stand-ins not found: .*file\.safetensors"):
        StandIns.load(path)
    fit_stand_ins(tiny_llama(), batches, feed_forward_k=K, rank=3).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"file\.safetensors is not a file of stand-ins"):
        StandIns.load(path)


def test_progress_rises_to_its_end(batches):
    steps = []
    fit_stand_ins(tiny_llama(), batches, feed_forward_k=K, rank=0, progress=lambda *step: steps.append(step))
    assert steps == [("measuring", done, 4) for done in range(1, 5)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"feed_forward_k": "all"}, ValueError, "feed_forward_k must leave neurons out in a layer at least, got all"),
        ({"feed_forward_k": NEURONS}, ValueError, "feed_forward_k must leave neurons out in a layer at least, got all"),
        ({"feed_forward_k": 0}, ValueError, "feed_forward_k must be at least 1"),
        ({"feed_forward_k": [1, 2, 3]}, ValueError, "feed_forward_k must hold one entry for each of the 2 layers"),
        ({"rank": -1}, ValueError, "rank must be at least 1, or 0 for a constant, got -1"),
        ({"rank": 1.5}, TypeError, r"rank must be an int, got float 1\.5"),
        (
            {"rank": 33},
            ValueError,
            r"rank must be at most 32, the smaller of the sizes of .*0\.mlp, got 33",
        ),
        ({"batches": []}, ValueError, "batches must hold at least one batch"),
        ({"batches": torch.zeros(1, 3)}, TypeError, "batches must be a list of batches, got one Tensor"),
        (
            {"batches": [{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0, 1, 1]])}]},
            ValueError,
            r"batches\[0\]\['attention_mask'\] must hide no token, .* got 1 hidden ones; give inputs of one length",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, error, words, batches):
    model = tiny_llama()
    options = {"batches": batches, "feed_forward_k": K, "rank": 3} | options
    with pytest.raises(error, match=words):
        fit_stand_ins(model, options.pop("batches"), **options)
    assert not hasattr(model.config, "topk_attention")


def test_a_converted_model_is_named(batches):
    model = tiny_bert()
    convert(model, feed_forward_k=K)
    with pytest.raises(ValueError, match=r"model was converted already; call topk_attention\.unconvert"):
        fit_stand_ins(model, batches, feed_forward_k=K)
    unconvert(model)
    assert fit_stand_ins(model, batches, feed_forward_k=K, rank=2)


def test_stand_ins_are_a_mapping_of_k():
    stand_ins = StandIns({"mlp": 3}, {"mlp": StandIn(torch.zeros(4))})
    assert (dict(stand_ins), len(stand_ins), stand_ins.about) == ({"mlp": 3}, 1, {})
    assert nn.Identity not in stand_ins


@pytest.mark.parametrize("shared", ["network", "layer"])
def test_layers_that_share_a_network_get_a_stand_in_each(batches, shared):
    model = tiny_llama()
    if shared == "network":
        model.model.layers[1].mlp = model.model.layers[0].mlp
    else:
        model.model.layers[1] = model.model.layers[0]
    stand_ins = fit_stand_ins(model, batches, feed_forward_k=K, rank=0)
    assert dict(stand_ins) == dict.fromkeys(PATHS, K)
    first, second = (stand_ins.stand_in[path].bias for path in PATHS)
    # One module has one stand-in; two modules with the same weights read other inputs.
    assert torch.equal(first, second) == (shared == "layer")
    assert [entry.path for entry in convert(model, feed_forward_k=stand_ins).replaced] == PATHS


def test_layers_that_no_batch_runs_are_named(batches):
    model = tiny_llama()
    model.config.num_hidden_layers = 1
    with pytest.raises(
        ValueError, match=r"batches must run a layer that leaves neurons out, got none of model.layers.1"
    ):
        fit_stand_ins(model, batches, feed_forward_k={PATHS[1]: K}, rank=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_layer_whose_numbers_are_not_finite_is_named(batches, rank):
    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite numbers on the batches, got inputs of model\.layers\.0\.mlp whose"):
        fit_stand_ins(model, batches, feed_forward_k=K, rank=rank)
    model = tiny_llama().double()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e60
    words = r"model\.layers\.1\.mlp cannot be fitted: \w+ must hold finite numbers"
    with pytest.raises(ValueError, match=words):
        fit_stand_ins(model, batches, feed_forward_k=K, rank=rank)
    assert not hasattr(model.config, "topk_attention")


def test_layers_may_share_a_stand_in_or_have_none_in_the_file(tmp_path):
    path = tmp_path / "stand-ins.safetensors"
    one = StandIn(torch.arange(4.0), torch.ones(2, 3), torch.ones(4, 2))
    StandIns({"a": 3, "b": 3, "c": 5}, {"a": one, "b": one}).save(path)
    loaded = StandIns.load(path)
    assert dict(loaded) == {"a": 3, "b": 3, "c": 5}
    assert loaded.stand_in.keys() == {"a", "b"}
    assert all(torch.equal(stand_in.bias, one.bias) for stand_in in loaded.stand_in.values())


@pytest.mark.parametrize(
    ("stand_ins", "words"),
    [
        (StandIns({"a": 3}, {"b": StandIn(torch.zeros(4))}), "stand_in must name layers that have a k, got b; give"),
        (StandIns({"a": 3}, {}, {"loss": torch.zeros(2)}), "about must hold what JSON can: words, .* Tensor is not"),
        (StandIns({"a": 3}, {}, ["loss"]), "about must be a dict, got list"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path, stand_ins, words):
    path = tmp_path / "folder" / "stand-ins.safetensors"
    with pytest.raises(ValueError, match=words):
        stand_ins.save(path)
    assert not path.parent.exists()


def test_a_folder_in_place_of_a_file_is_named_and_stays_as_it_was(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"a file cannot be written in place of the folder .*; name a file in"):
        StandIns({"a": 3}, {"a": StandIn(torch.zeros(4))}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.parent.glob(".*.partial")) == []
