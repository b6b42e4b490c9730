"""PyTorch's own layers: at the limit the original, below it the dense specification, and no fused path around it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topk_attention import convert, is_cross_attention, is_self_attention, topk_attention, unconvert

B, L, M, C, H, NEURONS = 2, 11, 13, 24, 4, 40


def randn(*shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(sum(shape)))


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(C, H, dtype=torch.double, **{"batch_first": True} | options).eval()


def encoder(**options):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0} | options
    layer = nn.TransformerEncoderLayer(C, H, NEURONS, dtype=torch.double, **options)
    uses_nested = layer.activation_relu_or_gelu and not layer.norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(uses_nested)).eval()


def output_and_gradients(module, compute):
    module.zero_grad()
    output = compute()
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name in expected[1]:
        torch.testing.assert_close(actual[1][name], expected[1][name], msg=name)


INPUTS = {
    "self": {},
    "cross": {"context": M},
    "boolean mask": {"attn_mask": torch.ones(L, L).triu(1).bool()},
    "float mask": {"attn_mask": randn(L, L)},
    "a mask per head": {"attn_mask": randn(B * H, L, L)},
    "causal hint": {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True},
    "padding": {"key_padding_mask": torch.arange(L).expand(B, L) >= torch.tensor([[7], [L]])},
    "padding and causal hint": {
        "key_padding_mask": torch.arange(L).expand(B, L) >= torch.tensor([[7], [L]]),
        "attn_mask": torch.ones(L, L).triu(1).bool(),
        "is_causal": True,
    },
}


def attend(module, context=None, **masks):
    x = randn(B, L, C)
    keys = x if context is None else randn(B, context, C)
    if not module.batch_first:
        x, keys = x.transpose(0, 1), keys.transpose(0, 1)
    return module(x, keys, keys, need_weights=False, **masks)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_attention_with_every_key_kept_is_the_original(name, bias, batch_first):
    module = attention(bias=bias, batch_first=batch_first)
    expected = output_and_gradients(module, lambda: attend(module, **INPUTS[name]))
    convert(module, attention_k=100)
    assert_same(output_and_gradients(module, lambda: attend(module, **INPUTS[name])), expected)


@pytest.mark.parametrize("name", INPUTS)
def test_attention_below_the_limit_is_that_of_the_reference(name):
    module, options = attention(), dict(INPUTS[name])
    x = randn(B, L, C)
    keys = randn(B, options.pop("context"), C) if "context" in options else x
    mask = options.get("attn_mask", torch.zeros(L, keys.shape[1]).bool())
    mask = ~mask if mask.dtype == torch.bool else mask
    mask = mask.unflatten(0, (B, H)) if mask.dim() == 3 else mask
    if "key_padding_mask" in options:
        mask = mask & ~options["key_padding_mask"][:, None, None, :]

    def by_the_reference():
        projections = [
            F.linear(source, weight, bias).unflatten(-1, (H, -1)).transpose(1, 2)
            for source, weight, bias in zip(
                (x, keys, keys), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
            )
        ]
        output = topk_attention(*projections, k=3, attn_mask=mask, backend="reference")
        return module.out_proj(output.transpose(1, 2).flatten(2))

    expected = output_and_gradients(module, by_the_reference)
    convert(module, attention_k=3)
    assert_same(output_and_gradients(module, lambda: attend(module, **INPUTS[name])), expected)


def test_keys_and_values_of_other_sizes_and_inputs_without_a_batch():
    module = attention(kdim=10, vdim=12)
    q, k, v = randn(B, L, C), randn(B, M, 10), randn(B, M, 12)
    padding = torch.arange(M) > 9
    with torch.no_grad():
        expected = module(q, k, v, need_weights=False)[0], module(q[0], k[0], v[0], padding, need_weights=False)[0]
        convert(module, attention_k=100)
        torch.testing.assert_close(module(q, k, v, need_weights=False)[0], expected[0])
        torch.testing.assert_close(module(q[0], k[0], v[0], padding, need_weights=False)[0], expected[1])


def test_weights_are_not_returned_and_a_warning_says_so():
    module = attention()
    convert(module, attention_k=3)
    with pytest.warns(UserWarning, match="returns no attention weights; pass need_weights=False"):
        assert module(randn(B, L, C), randn(B, L, C), randn(B, L, C))[1] is None


def test_a_key_of_its_own_is_skipped_with_the_reason():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="it adds a key of its own"):
            convert(attention(**options), attention_k=3)


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU(), F.relu])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_everything_kept_is_the_original(norm_first, activation):
    model = encoder(norm_first=norm_first, activation=activation)
    expected = output_and_gradients(model, lambda: model(randn(B, L, C)))
    report = convert(model, attention_k=100, feed_forward_k=100)
    assert [entry.path for entry in report.replaced] == [
        *(f"layers.{i}.self_attn" for i in range(2)),
        *(f"layers.{i}.linear1" for i in range(2)),
    ]
    assert_same(output_and_gradients(model, lambda: model(randn(B, L, C))), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kinds", [("attention_k",), ("feed_forward_k",), ("attention_k", "feed_forward_k")])
def test_the_fused_inference_path_does_not_bypass_it(kinds, padded):
    model = encoder()
    padding = torch.arange(L).expand(B, L) >= torch.tensor([[7], [L]]) if padded else None
    x = randn(B, L, C)
    with torch.no_grad():
        full = model(x, src_key_padding_mask=padding)
    convert(model, **dict.fromkeys(kinds, 3))
    real = torch.ones(B, L).bool() if padding is None else ~padding
    expected = model(x, src_key_padding_mask=padding)  # gradients keep PyTorch from that path
    with torch.no_grad():
        output = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(output[real], expected[real])
        assert (output - full)[real].abs().max() > 1e-3
        unconvert(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), full, rtol=0, atol=0)


def test_an_encoder_network_equals_a_dense_one_whose_other_neurons_are_zeroed():
    model = encoder(activation="gelu")
    converted = copy.deepcopy(model)
    convert(converted, feed_forward_k=6)
    for layer in model.layers:

        def keep_best(module, inputs, output):
            return output.masked_fill(output < output.topk(6).values[..., -1:], -torch.inf)

        layer.linear1.register_forward_hook(keep_best)
        layer.activation = lambda z: F.gelu(z.clamp(min=-1e9)).masked_fill(z == -torch.inf, 0)
    torch.testing.assert_close(converted(randn(B, L, C)), model(randn(B, L, C)))


def test_a_whole_transformer_with_everything_kept_is_the_original():
    torch.manual_seed(0)
    model = nn.Transformer(C, H, 2, 2, NEURONS, 0.0, batch_first=True, dtype=torch.double).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.double)

    def compute():
        return model(randn(B, M, C), randn(B, L, C), tgt_mask=causal, tgt_is_causal=True)

    expected = output_and_gradients(model, compute)
    report = convert(model, attention_k=100, feed_forward_k=100)
    assert len(report.replaced) == 10
    assert_same(output_and_gradients(model, compute), expected)
    cross = {entry.path for entry in convert(model, attention_k=3, where=is_cross_attention).replaced}
    assert cross == {f"decoder.layers.{i}.multihead_attn" for i in range(2)}
    assert len(convert(model, attention_k=3, where=is_self_attention).replaced) == 4


def test_layers_keep_their_modules_weights_and_names_and_come_back():
    model = encoder()
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    weights, state = [id(p) for p in model.parameters()], {n: t.clone() for n, t in model.state_dict().items()}
    nested = model.use_nested_tensor
    convert(model, attention_k=[2, [1, 2, 3, 4]], feed_forward_k=5)
    twin = copy.deepcopy(model)
    assert [id(p) for p in model.parameters()] == weights
    assert model.state_dict().keys() == state.keys()
    x = randn(B, L, C)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    unconvert(model)
    assert list(model.modules()) == modules
    assert [type(module) for module in model.modules()] == classes
    assert model.use_nested_tensor == nested
    assert not any("topk" in name for module in model.modules() for name in vars(module))
    with pytest.raises(ValueError, match="TransformerEncoder was not converted"):
        unconvert(model)


def test_layers_that_a_second_conversion_leaves_out_are_given_back():
    model = encoder()
    convert(model, attention_k=2, feed_forward_k=5)
    convert(model, attention_k=2, feed_forward_k=5, where=lambda path, module: path.startswith("layers.1"))
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_a_module_without_a_configuration_remembers_nothing():
    model = encoder()
    convert(model, attention_k=2)
    with pytest.raises(ValueError, match="nothing to convert: pass attention_k= or feed_forward_k="):
        convert(model)


def test_dropout_acts_in_training_alone():
    model = encoder(dropout=0.5)
    convert(model, attention_k=3, feed_forward_k=6)
    x = randn(B, L, C)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_transformers_model_inside_another_module_is_to_be_converted_by_itself():
    from convert_models import tiny_bert

    model = nn.ModuleDict({"bert": tiny_bert(), "head": attention()})
    report = convert(model, attention_k=3)
    assert [entry.path for entry in report.replaced] == ["head"]
    assert {entry.reason for entry in report.skipped} == {
        "it belongs to a transformers model inside this one: convert that"
    }
