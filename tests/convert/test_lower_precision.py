"""Models in bfloat16 and float16, and under autocast: as near to float64 as the original is."""

from __future__ import annotations

import pytest
import torch

from convert_models import FAMILIES, inputs_of, output_and_gradients, output_of
from topk_attention import convert


def distance(output, exact):
    """Root mean square over that of the exact output: one number that a single unlucky rounding does not move."""
    return ((output.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_half_precision_is_as_exact_as_the_original(name, dtype, kernels):
    family = FAMILIES[name]
    model, twin = family.build().to(dtype), family.build().double()
    twin.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    exact_inputs = inputs_of(family)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in exact_inputs.items()}
    exact_inputs |= {name: x.double() for name, x in inputs.items() if x.is_floating_point()}
    with torch.no_grad():
        exact = output_of(twin, exact_inputs)
        own_error = distance(output_of(model, inputs), exact)
        for backend in ("auto", "cpu", "chunked"):
            convert(model, attention_k=24, feed_forward_k=48, backend=backend)
            output = output_of(model, inputs)
            assert output.dtype == dtype
            assert distance(output, exact) < 1.5 * own_error + torch.finfo(dtype).eps
    convert(model, attention_k=4, feed_forward_k=8)
    output, gradients = output_and_gradients(model.train(), inputs)
    assert distance(output, exact) > 0.01  # keys and neurons are left out
    assert all(gradient.isfinite().all() for gradient in gradients.values())
