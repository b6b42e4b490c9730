"""`convert` with "all": every key and neuron counts, no tensor of length x length exists, and no neurons are saved."""

from __future__ import annotations

import importlib

import pytest
import torch

from convert_models import FAMILIES, LargestTensor, inputs_of, output_and_gradients, output_of, tiny_bert, tiny_t5
from topk_attention import convert, unconvert


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("name", ["t5", "flan_t5", "bert", "gpt2", "mistral", "bart", "vit"])
def test_outputs_and_all_gradients_are_the_originals(name, backend):
    family = FAMILIES[name]
    model, inputs = family.build().double(), inputs_of(family)
    model.set_attn_implementation("sdpa")  # eager takes its softmax in float32, whatever the model's dtype
    expected, expected_gradients = output_and_gradients(model, inputs)
    convert(model, attention_k="all", feed_forward_k="all", backend=backend)
    output, gradients = output_and_gradients(model, inputs)
    torch.testing.assert_close(output, expected)
    assert gradients.keys() == expected_gradients.keys()
    for path in gradients:
        torch.testing.assert_close(gradients[path], expected_gradients[path], msg=path)


def test_with_dropout_a_training_step_makes_nothing_square(monkeypatch):
    """PyTorch's own attention makes such tensors: 4 bytes for every pair of tokens and head."""
    monkeypatch.setattr(importlib.import_module("topk_attention.backends.chunked.tiles"), "TILE_BYTES", 2**17)
    length, num_heads = 1024, 2
    largest = {}
    for k in ("all", None):
        model = tiny_t5(num_heads=num_heads).train()
        if k is not None:
            convert(model, attention_k=k)
        tokens = torch.randint(3, 90, (1, length))
        with LargestTensor() as mode:
            output_of(model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :8]}).sum().backward()
        largest[k] = mode.largest
    assert largest["all"] < length * length / 2
    assert largest[None] >= 4 * num_heads * length * length


def test_the_backward_pass_computes_the_neurons_again():
    """A network saves its input for the backward pass; the original saves every neuron of every token."""
    inputs = inputs_of(FAMILIES["bert"])
    saved = {}
    for k in ("all", None):
        model = tiny_bert()
        if k is not None:
            convert(model, feed_forward_k=k)
        widths = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=widths: into.append(x.shape) or x, lambda x: x):
            output_of(model, inputs)
        saved[k] = sum(shape[-1] == model.config.intermediate_size and len(shape) == 3 for shape in widths)
    assert saved["all"] == 0
    assert saved[None] >= tiny_bert().config.num_hidden_layers


def test_the_report_and_a_saved_model_say_all(tmp_path):
    model, inputs = tiny_t5(), inputs_of(FAMILIES["t5"])
    paths = [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in (0, 1)]
    report = convert(model, attention_k={paths[0]: "all", paths[1]: 4}, feed_forward_k="all")
    words = " ".join(str(report).split())
    assert f"{paths[0]} replaced k = all" in words
    assert "k = all of 48 neurons" in words
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    convert(loaded)
    assert loaded.config.topk_attention == model.config.topk_attention
    assert loaded.config.topk_attention["attention_k"] == {paths[0]: "all", paths[1]: 4}
    with torch.no_grad():
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs), rtol=0, atol=0)
        unconvert(loaded.double())
        convert(model.double(), attention_k="all", feed_forward_k=1000)
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


def test_pytorchs_own_layers_take_it_too():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = layer(x)
    convert(layer, attention_k="all", feed_forward_k="all")
    torch.testing.assert_close(layer(x), expected)


def test_another_word_is_refused():
    with pytest.raises(TypeError, match=r"attention_k must be an int, .* got str 'most'"):
        convert(tiny_bert(), attention_k="most")
