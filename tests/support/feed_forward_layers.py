"""Layers that tests of feed-forward operations compute."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from comparison import ACTIVATION_FORMULAS, dense_feed_forward, output_and_gradients
from topk_attention import topk_feed_forward

TOKENS, MODEL, NEURONS, OUTPUTS = 13, 5, 17, 3


class Layer(NamedTuple):
    """Arguments in the order of `dense_feed_forward`."""

    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    w_gate: torch.Tensor | None = None
    b_in: torch.Tensor | None = None
    b_out: torch.Tensor | None = None
    b_gate: torch.Tensor | None = None

    def present(self):
        return [x for x in self if x is not None]

    def with_tensors(self, tensors):
        """The same layer of other tensors, one for each that is present."""
        tensors = iter(tensors)
        return Layer(*(None if old is None else next(tensors) for old in self))

    def run(self, **options):
        """Output and gradients of every tensor that is present."""
        return output_and_gradients(lambda *tensors: apply(self.with_tensors(tensors), **options), *self.present())

    def run_dense(self, **options):
        return output_and_gradients(
            lambda *tensors: dense_feed_forward(*self.with_tensors(tensors), **options), *self.present()
        )


def apply(layer, **options):
    x, w_in, w_out, w_gate, b_in, b_out, b_gate = layer
    return topk_feed_forward(x, w_in, w_out, w_gate=w_gate, b_in=b_in, b_out=b_out, b_gate=b_gate, **options)


def random_layer(kind, tokens=TOKENS, model=MODEL, neurons=NEURONS, outputs=OUTPUTS, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).div(shape[-1] ** 0.5).to(dtype)

    x, w_in, w_out = random(tokens, model) * 3, random(neurons, model), random(outputs, neurons)
    gate = random(neurons, model) if "gated" in kind else None
    if "biases" not in kind:
        return Layer(x, w_in, w_out, gate)
    b_gate = random(neurons) if gate is not None else None
    return Layer(x, w_in, w_out, gate, random(neurons), random(outputs), b_gate)


def rank_gaps(layer, k, activation):
    """[T], the distance between the k-th and the next neuron of each token."""
    x, w_in, _, w_gate, b_in, _, b_gate = layer.with_tensors(x.double() for x in layer.present())
    ranked_by = F.linear(x, w_in, b_in)
    if w_gate is not None:
        ranked_by = (ACTIVATION_FORMULAS[activation](F.linear(x, w_gate, b_gate)) * ranked_by).abs()
    best = ranked_by.sort(-1, descending=True).values
    return best[:, k - 1] - best[:, k]
