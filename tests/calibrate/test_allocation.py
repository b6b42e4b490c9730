from itertools import pairwise

import numpy as np
import pytest
import torch

from topk_attention.calibrate.allocation import agreement, mean_of, with_mean_k, within_lost_mass
from topk_attention.calibrate.statistics import Curves, k_grid

KS = k_grid(256)


def curves(*errors, lost=None, changes=None, ks=KS):
    """Curves of one layer: a function of k for each head; changes for both halves, or a pair of lists."""
    at = np.array(ks, dtype=float)
    error = torch.tensor(np.array([function(at) for function in errors]))
    mass = error if lost is None else torch.tensor(np.array([function(at) for function in lost]))
    earlier, later = changes if isinstance(changes, tuple) else (changes, changes)
    change = [[function(at) for function in half or [np.zeros_like] * len(errors)] for half in (earlier, later)]
    return Curves(ks, mass, error, torch.tensor(np.array(change)), 100)


def falling(scale, power=1.5):
    return lambda k: scale * (k**-power - 256.0**-power)


def random_layers(num_layers=3, num_heads=4):
    """Measured curves are noisy, have kinks and end in zero."""
    generator = np.random.default_rng(0)
    layers = {}
    for number in range(num_layers):
        heads = []
        for _ in range(num_heads):
            wobble = np.exp(0.3 * generator.standard_normal(len(KS)))
            steps = 10 ** generator.uniform(-6, 2) * np.array(KS) ** -generator.uniform(0.3, 3) * wobble
            steps[-1] = 0
            heads.append(steps)
        error = torch.tensor(np.array(heads))
        layers[f"layer {number}"] = Curves(KS, error, error, torch.zeros(2, num_heads, len(KS)), 10)
    return layers


@pytest.mark.parametrize("mean_k", [1, 1.5, 2, 7, 16, 64, 100.3, 200, 256])
def test_a_budget_is_never_exceeded_and_nearly_used(mean_k):
    layers = random_layers()
    allocation = with_mean_k(layers, mean_k)
    assert mean_of(allocation) <= mean_k
    assert mean_of(allocation) >= 0.9 * mean_k
    assert list(allocation) == list(layers)
    assert all(len(ks) == 4 for ks in allocation.values())
    assert all(isinstance(k, int) and 1 <= k <= 256 for ks in allocation.values() for k in ks)


def test_a_head_whose_loss_feels_it_more_gets_more():
    ((less, more, most),) = with_mean_k({"layer": curves(falling(1), falling(10), falling(100))}, 32).values()
    assert less < more < most


def test_a_head_that_nothing_is_gained_by_gets_the_smallest_k():
    ((idle, busy),) = with_mean_k({"layer": curves(lambda k: 0 * k, falling(1))}, 32).values()
    assert idle == 1
    assert busy == pytest.approx(63, abs=2)


def test_equal_heads_get_equal_k():
    allocation = with_mean_k({name: curves(falling(1), falling(1)) for name in "ab"}, 32)
    ks = [k for layer in allocation.values() for k in layer]
    assert max(ks) <= 1.06 * min(ks) + 1


def test_a_larger_budget_takes_no_key_away_from_smooth_curves():
    layers = {"layer": curves(falling(1), falling(10, 1.1), falling(0.1, 2), falling(3, 0.8))}
    before = (0, 0, 0, 0)
    for mean_k in (2, 4, 8, 16, 32, 64, 128):
        ((*ks,),) = with_mean_k(layers, mean_k).values()
        # The head that gets the remaining keys may be one candidate up or down.
        assert all(k >= 0.94 * old - 1 for k, old in zip(ks, before, strict=True))
        before = ks


def test_a_larger_budget_never_raises_the_error():
    layers = random_layers()
    errors = []
    for mean_k in (2, 4, 8, 16, 32, 64, 128):
        allocation = with_mean_k(layers, mean_k)
        errors.append(sum(error_at(layers[path], ks) for path, ks in allocation.items()))
    assert errors == sorted(errors, reverse=True)


def error_at(layer, ks):
    falling_error = np.minimum.accumulate(layer.loss_error.numpy(), axis=1)
    return sum(
        np.exp(np.interp(np.log(k), np.log(layer.ks), np.log(np.maximum(row, 1e-30))))
        for k, row in zip(ks, falling_error, strict=True)
    )


def test_no_other_allocation_of_the_same_budget_is_much_better():
    layers = {"layer": curves(falling(1), falling(50, 1.1), falling(0.1, 2))}
    ((*ks,),) = with_mean_k(layers, 16).values()
    ours = error_at(layers["layer"], ks)
    best = min(
        error_at(layers["layer"], (first, second, 48 - first - second))
        for first in range(1, 46)
        for second in range(1, 47 - first)
    )
    assert ours <= 1.02 * best


def test_layers_may_have_curves_of_different_length_and_heads():
    layers = {"short": curves(falling(1), ks=k_grid(16)), "long": curves(falling(1), falling(2))}
    allocation = with_mean_k(layers, 100)
    assert allocation["short"][0] <= 16
    assert len(allocation["long"]) == 2


def test_smallest_k_is_kept():
    allocation = with_mean_k({"layer": curves(falling(1), lambda k: 0 * k)}, 32, smallest_k=5)
    assert min(allocation["layer"]) == 5


def unsteady(scale):
    """A change of the loss that fades as k grows."""
    return lambda k: scale * (1 / k - 1 / 256)


def test_a_head_whose_dropped_keys_raise_the_loss_gets_more():
    three = [falling(1)] * 3
    layer = curves(*three, changes=[unsteady(-0.5), unsteady(0), unsteady(0.5)])
    ((lowers, neither, raises),) = with_mean_k({"layer": layer}, 32).values()
    assert lowers < 0.8 * neither < 0.8 * 0.8 * raises


def test_changes_that_two_halves_of_a_text_contradict_are_not_believed():
    three = [falling(1)] * 3
    heads = [unsteady(-0.5), unsteady(0), unsteady(0.5)]
    contradicted = curves(*three, changes=(heads, [unsteady(0.7), unsteady(0), unsteady(-0.3)]))
    assert with_mean_k({"layer": contradicted}, 32) == with_mean_k({"layer": curves(*three)}, 32)


def test_agreement_is_that_of_halves():
    heads = [unsteady(0.5), unsteady(-0.2)]
    two = [falling(1), falling(3)]
    assert agreement({"layer": curves(*two, changes=heads)}) == pytest.approx(1)
    assert agreement({"layer": curves(*two, changes=(heads, heads[::-1]))}) == 0
    assert agreement({"layer": curves(*two, changes=(heads, [unsteady(0.5), unsteady(0)]))}) == pytest.approx(
        0.25 / (0.25 + 0.04 / 3 / 2), rel=1e-3
    )
    assert agreement({"layer": curves(*two)}) == 0


def test_keys_that_would_raise_the_loss_are_not_spent():
    layer = curves(falling(0.01), falling(0.01), changes=[unsteady(-5), unsteady(0)])
    ((harmful, useful),) = with_mean_k({"layer": layer}, 100).values()
    assert harmful == 1
    assert useful == pytest.approx(199, rel=0.03)
    assert with_mean_k({"layer": layer}, 256) == {"layer": (1, 256)}


@pytest.mark.parametrize("mean_k", [0.5, 257, 10**6])
def test_a_budget_out_of_range_is_named(mean_k):
    message = f"mean_k must be between 1 and 256, the largest k that was measured, got {mean_k:g}"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        with_mean_k({"layer": curves(falling(1))}, mean_k)


def test_a_bound_takes_the_smallest_k_that_keeps_it():
    layer = curves(falling(1), falling(1), lost=(lambda k: 1 / k - 1 / 256, lambda k: 0.5 / k))
    ((first, second),) = within_lost_mass({"layer": layer}, 0.1).values()
    for k, row in ((first, 0), (second, 1)):
        at = KS.index(k)
        assert layer.lost_mass[row, at] <= 0.1 < layer.lost_mass[row, at - 1]


def test_a_tighter_bound_never_gives_less():
    layers = random_layers()
    for layer in layers.values():
        layer.lost_mass = layer.lost_mass.flip(1).cummax(1).values.flip(1) / layer.lost_mass.max()
    ks = [within_lost_mass(layers, bound) for bound in (0.5, 0.1, 0.01, 0.001)]
    for loose, tight in pairwise(ks):
        assert all(t >= k for path in layers for k, t in zip(loose[path], tight[path], strict=True))


def test_a_bound_that_no_k_keeps_takes_the_largest():
    layer = curves(falling(1), lost=(lambda k: 0.5 + 0 * k,))
    assert within_lost_mass({"layer": layer}, 0.1) == {"layer": (256,)}


@pytest.mark.parametrize("bound", [0, 1, -0.1, 2])
def test_a_bound_out_of_range_is_named(bound):
    with pytest.raises(ValueError, match=f"bound must be a share of the mass between 0 and 1, got {bound:g}"):
        within_lost_mass({"layer": curves(falling(1))}, bound)
