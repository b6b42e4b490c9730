"""With k = d_ff a converted network is the dense one, on every backend, for the kinds T5, BERT, Llama and Whisper."""

from __future__ import annotations

import copy

import pytest
import torch

from convert_models import FAMILIES, NEURONS, inputs_of, output_and_gradients
from topk_attention import convert

# flan-T5 is T5's gated kind; Llama's networks are always gated, BERT's and Whisper's never.
KINDS = pytest.mark.parametrize("name", ["t5", "flan_t5", "bert", "llama", "whisper"])


def converted(model, backend):
    model = copy.deepcopy(model)
    report = convert(model, feed_forward_k=NEURONS, backend=backend)
    assert {entry.reason for entry in report.replaced} == {f"k = {NEURONS} of {NEURONS} neurons"}
    return model, len(report.replaced)


def parameters_of_networks(model):
    names = (".wi", ".wo", ".intermediate.", ".mlp.", ".fc1.", ".fc2.", ".output.dense.")
    return {
        name for name, _ in model.named_parameters() if any(part in name for part in names) and "attention" not in name
    }


@KINDS
def test_outputs_and_the_gradients_of_all_parameters_are_the_dense_networks(backend, name):
    family = FAMILIES[name]
    model, inputs = family.build().double(), inputs_of(family)
    expected, expected_gradients = output_and_gradients(model, inputs)
    topk_model, num_networks = converted(model, backend)
    assert num_networks == family.num_networks
    output, gradients = output_and_gradients(topk_model, inputs)
    torch.testing.assert_close(output, expected)
    assert gradients.keys() == expected_gradients.keys()
    of_networks = parameters_of_networks(model)
    assert len(of_networks) >= 2 * num_networks
    assert of_networks <= gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[parameter], msg=lambda text, at=parameter: f"{at}: {text}"
        )


@KINDS
def test_float32_gradients_are_as_close_to_float64_as_the_dense_networks(fast_backend, name):
    family = FAMILIES[name]
    model = family.build()
    truth, true_gradients = output_and_gradients(copy.deepcopy(model).double(), inputs_of(family))
    inputs = inputs_of(family, torch.float32)
    dense, dense_gradients = output_and_gradients(model, inputs)
    output, gradients = output_and_gradients(converted(model, fast_backend)[0], inputs)

    def error(actual, true):
        return ((actual.double() - true).norm() / true.norm().clamp(min=1e-6)).item()

    # The other layers of the model leave the same errors in both; that is the measure for each parameter.
    one_rounding = torch.finfo(torch.float32).eps
    assert error(output, truth) <= 2 * error(dense, truth) + one_rounding
    for parameter in parameters_of_networks(model):
        allowed = 2 * error(dense_gradients[parameter], true_gradients[parameter]) + 4 * one_rounding
        assert error(gradients[parameter], true_gradients[parameter]) <= allowed, parameter
