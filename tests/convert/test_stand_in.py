"""`convert(stand_in=)`: what converted networks add for the neurons that they leave out, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convert_models import FAMILIES, LAYERS, NEURONS, inputs_of, output_and_gradients, output_of, tiny_llama, tiny_t5
from topk_attention import StandIn, StandIns, convert, unconvert
from topk_attention.convert.search import feed_forward_sites

WIDTH, K = 32, 6
LLAMA_PATHS = ["model.layers.0.mlp", "model.layers.1.mlp"]


def random_stand_in(seed, rank=3, dtype=torch.float64, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(width,), (rank, width), (width, rank)] if rank else [(width,)]
    return StandIn(*(torch.randn(shape, generator=generator, dtype=dtype) / 5 for shape in shapes))


def stand_ins_of(model, rank=3, k=K):
    paths = [site.path for site in feed_forward_sites(model)]
    return StandIns(dict.fromkeys(paths, k), {path: random_stand_in(n, rank) for n, path in enumerate(paths)})


def add_by_hooks(model, linears, stand_ins):
    """Add to what the last layer of each network computes; a hook has the network call its layers."""
    for (path_in, path_out), stand_in in zip(linears, stand_ins, strict=True):
        inputs = []

        def remember(module, args, inputs=inputs):
            inputs.append(args[0])

        def add(module, args, output, inputs=inputs, stand_in=stand_in):
            x = inputs.pop()
            changing = 0 if stand_in.w_in is None else x @ stand_in.w_in.T @ stand_in.w_out.T
            return output + changing + stand_in.bias

        model.get_submodule(path_in).register_forward_pre_hook(remember)
        model.get_submodule(path_out).register_forward_hook(add)


def paths_of_linears(model):
    names = {id(module): path for path, module in model.named_modules()}
    return [(names[id(site.linears_in[0])], names[id(site.linear_out)]) for site in feed_forward_sites(model)]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:a top-k network calls its layers")
def test_every_network_adds_its_stand_in_and_comes_back(name, rank):
    model, inputs = FAMILIES[name].build().double(), inputs_of(FAMILIES[name])
    linears, stand_ins, names = paths_of_linears(model), stand_ins_of(model, rank), set(model.state_dict())
    dense = output_of(model, inputs)
    by_hooks = copy.deepcopy(model)
    convert(by_hooks, feed_forward_k=K)
    alone = output_of(by_hooks, inputs)
    add_by_hooks(by_hooks, linears, stand_ins.stand_in.values())
    expected = output_and_gradients(by_hooks, inputs)
    report = convert(model, feed_forward_k=stand_ins)
    output, gradients = output_and_gradients(model, inputs)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(gradients, expected[1])
    assert (output - alone).abs().max() > 1e-3
    kind = "rank 3" if rank else "constant"
    assert {entry.reason for entry in report.replaced} == {
        f"k = {K} of {NEURONS} neurons, stand-in for the others ({kind})"
    }
    assert set(model.state_dict()) == names
    torch.testing.assert_close(output_of(copy.deepcopy(model), inputs), output, rtol=0, atol=0)
    convert(model, feed_forward_k=K)  # a second call without them takes them away
    torch.testing.assert_close(output_of(model, inputs), alone)
    convert(model, feed_forward_k=stand_ins)
    unconvert(model)
    assert torch.equal(output_of(model, inputs), dense)


@pytest.mark.parametrize("decoder", [False, True])
def test_pytorchs_own_layers_add_it_too(decoder):
    torch.manual_seed(0)
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(WIDTH, 4, NEURONS, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    names, bias, stand_in = set(model.state_dict()), layer.linear2.bias, random_stand_in(0, rank=0)
    modules = list(model.modules())

    def output():
        return layer(x, x) if decoder else layer(x)

    convert(model, feed_forward_k=K)
    with torch.no_grad():
        bias += stand_in.bias
        expected = output()
        bias -= stand_in.bias
    convert(model, feed_forward_k=K, stand_in=stand_in)
    torch.testing.assert_close(output(), expected)
    assert set(model.state_dict()) == names
    unconvert(model)
    assert not hasattr(layer, "stand_in")
    assert list(model.modules()) == modules


def test_a_saved_model_needs_the_file_of_its_stand_ins_again(tmp_path, tokens):
    from safetensors.torch import load_file

    model = tiny_llama()
    stand_ins = stand_ins_of(model)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, attention_k=4, feed_forward_k=stand_ins)
    expected = output_of(model, {"input_ids": tokens})
    model.save_pretrained(tmp_path / "model")
    stand_ins.save(tmp_path / "stand-ins.safetensors")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in saved.items())
    with pytest.warns(UserWarning, match="it runs in full until"):
        again = type(model).from_pretrained(tmp_path / "model").eval()
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.mlp and 1 more layers had stand-ins .* pass stand_in=StandIns\.load\(file\)",
    ):
        convert(again)
    report = convert(again, stand_in=StandIns.load(tmp_path / "stand-ins.safetensors"))
    assert len(report.replaced) == 2 * LAYERS
    torch.testing.assert_close(output_of(again, {"input_ids": tokens}), expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"attention_k": 3}, {"backend": "chunked"}, {}])
def test_a_later_conversion_of_something_else_keeps_them(options, tokens):
    model = tiny_llama()
    convert(model, attention_k=3, feed_forward_k=stand_ins_of(model))
    expected = output_of(model, {"input_ids": tokens})
    convert(model, **options)
    torch.testing.assert_close(output_of(model, {"input_ids": tokens}), expected)
    assert model.config.topk_attention["stand_in_rank"] == {"layers.0.mlp": 3, "layers.1.mlp": 3}
    convert(model, feed_forward_k=K)
    assert "stand_in_rank" not in model.config.topk_attention


def test_they_go_where_the_model_goes(tokens):
    model = tiny_t5().bfloat16()
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    convert(model, feed_forward_k=stand_ins_of(model))
    network = model.encoder.block[0].layer[1].DenseReluDense
    assert network.stand_in.bias.dtype == torch.bfloat16
    model(input_ids=tokens, decoder_input_ids=tokens)
    model.double()
    assert network.stand_in.bias.dtype == torch.float64
    model(input_ids=tokens, decoder_input_ids=tokens)


def test_numbers_that_the_networks_dtype_cannot_hold_are_refused_and_nothing_changes(tokens):
    model = tiny_llama().half()
    stand_ins = stand_ins_of(model)
    bias, *others = stand_ins.stand_in[LLAMA_PATHS[1]].tensors().values()
    stand_ins.stand_in[LLAMA_PATHS[1]] = StandIn(bias + 1e6, *others)
    expected = output_of(model, {"input_ids": tokens})
    words = (
        r"stand_in for model.layers.1.mlp must fit the network's torch.float16, got numbers in bias that are infinite"
    )
    with pytest.raises(ValueError, match=words):
        convert(model, feed_forward_k=stand_ins)
    torch.testing.assert_close(output_of(model, {"input_ids": tokens}), expected)


def test_stand_ins_without_a_k_say_that_they_give_none():
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"nothing to convert: .*; stand_in= adds to layers that have a feed_forward_k"
    ):
        convert(model, stand_in=stand_ins_of(model))


def test_weights_whose_last_layer_stays_in_float32_get_one_in_float32(tokens):
    model = tiny_t5().bfloat16()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    convert(model, feed_forward_k=stand_ins_of(model))
    assert model.encoder.block[0].layer[1].DenseReluDense.stand_in.bias.dtype == torch.float32
    assert model(input_ids=tokens, decoder_input_ids=tokens).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:a top-k network calls its layers")
def test_a_network_with_an_adapter_adds_it_too(tokens):
    model = tiny_llama().double()
    convert(model, feed_forward_k=stand_ins_of(model))
    expected = output_of(model, {"input_ids": tokens})
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output.clone())
    torch.testing.assert_close(output_of(model, {"input_ids": tokens}), expected)


def test_frozen_models_store_weights_by_neuron_and_train_nothing_of_it(tokens):
    model = tiny_llama().requires_grad_(False)
    convert(model, feed_forward_k=stand_ins_of(model))
    assert model.model.layers[0].mlp.down_proj.weight.stride() == (1, WIDTH)
    assert not any("stand_in" in name for name, _ in model.named_parameters())


def test_the_report_says_where_a_stand_in_does_nothing():
    model = tiny_llama()
    one = random_stand_in(0)
    report = convert(model, feed_forward_k=[NEURONS, "all"], stand_in=one)
    assert [entry.reason for entry in report.replaced] == [
        f"k = {NEURONS} of {NEURONS} neurons, so the stand-in has nothing to add",
        f"k = all of {NEURONS} neurons, so the stand-in has nothing to add",
    ]
    report = convert(model, feed_forward_k=[None, K], stand_in=[one, None])
    assert [entry.reason for entry in report.entries] == [
        "feed_forward_k has no entry for it, so its stand-in does nothing",
        f"k = {K} of {NEURONS} neurons",
    ]
    assert [entry.stand_in for entry in convert(model, feed_forward_k=K, stand_in=[one, None]).entries] == [one, None]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attention_k": 3, "stand_in": random_stand_in(0)}, ValueError, "but feed_forward_k is None; pass feed_f"),
        ({"stand_in": random_stand_in(0)}, ValueError, "nothing to convert: pass attention_k= or feed_forward_k="),
        ({"feed_forward_k": 6, "stand_in": 0.5}, TypeError, r"stand_in must be a StandIn, a list .* got float 0\.5"),
        (
            {"feed_forward_k": 6, "stand_in": [0.5, None]},
            TypeError,
            r"stand_in for model\.layers\.0\.mlp must be a StandIn or None, got float",
        ),
        (
            {"feed_forward_k": 6, "stand_in": [None]},
            ValueError,
            "stand_in must hold one entry for each of the 2",
        ),
        (
            {"feed_forward_k": 6, "stand_in": {"mlp": None}},
            ValueError,
            "stand_in names layers that do not .*: mlp",
        ),
        (
            {"feed_forward_k": 6, "stand_in": StandIn(torch.zeros(3))},
            ValueError,
            r"stand_in for model\.layers\.0\.mlp must have a bias of shape \[32\], got \[3\]",
        ),
        (
            {"feed_forward_k": 6, "stand_in": StandIn(torch.zeros(32, requires_grad=True))},
            ValueError,
            r"has tensors that require a gradient, .* detach them",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(options, error, words, tokens):
    model = tiny_llama()
    expected = output_of(model, {"input_ids": tokens})
    with pytest.raises(error, match=words):
        convert(model, **options)
    assert torch.equal(output_of(model, {"input_ids": tokens}), expected)
    assert not hasattr(model.config, "topk_attention")


def test_stand_ins_for_another_k_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp was fitted for k = 6, got feed_forward_k = 7; fit it again"):
        convert(model, feed_forward_k=7, stand_in=stand_ins_of(model))


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="needs a network with weights, got one on meta; load it first"):
        convert(model, feed_forward_k=K, stand_in=random_stand_in(0))


def test_a_layer_of_ones_own_trains_it_and_saves_it():
    from topk_attention import TopKFeedForward

    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape)) for shape in ((5,), (2, 5), (5, 2))]
    layer = TopKFeedForward(nn.Linear(5, 17), nn.Linear(17, 5), k=4, stand_in=StandIn(*tensors))
    assert {name for name, _ in layer.named_parameters() if "stand_in" in name} == {
        "stand_in.bias",
        "stand_in.w_in",
        "stand_in.w_out",
    }
    x = torch.randn(3, 5)
    layer(x).sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in tensors)
    constant = TopKFeedForward(layer.linear_in, layer.linear_out, k=4, stand_in=StandIn(torch.ones(5)))
    assert "stand_in.bias" in constant.state_dict()
    plain = TopKFeedForward(layer.linear_in, layer.linear_out, k=4)
    torch.testing.assert_close(constant(x), plain(x) + 1)
    torch.testing.assert_close(layer(x), plain(x) + F.linear(F.linear(x, tensors[1]), tensors[2], tensors[0]))


def test_a_stand_in_on_meta_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp must hold numbers, got tensors on meta; load it first"):
        convert(model, feed_forward_k=4, stand_in=StandIn(torch.zeros(32, device="meta")))
    assert not hasattr(model.config, "topk_attention")
