"""What return_selection returns about the kept keys."""

import pytest
import torch

from comparison import (
    CALL_NAMES,
    COMPLETED_NAMES,
    SINK_NAMES,
    assert_same,
    attention_inputs,
    named_call,
    small_integers,
)
from topk_attention import Selection, topk_attention

OPTIONS = pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": 1000}, {"k": None}], ids=str)
UNCOMPLETED_NAMES = [name for name in CALL_NAMES if name not in COMPLETED_NAMES]


@OPTIONS
@pytest.mark.parametrize("name", CALL_NAMES)
def test_indices_ascend_and_minus_one_pads_the_end(backend, tiling, name, options):
    call = named_call(name)
    indices, _ = call.select(backend=backend, **options)
    query, key, *_ = call.tensors
    k = {"k": 3, **call.options, **options}["k"]
    width = min(key.shape[2] if k is None else k if isinstance(k, int) else max(k), key.shape[2])
    assert indices.dtype == torch.int32
    assert indices.shape == (*query.shape[:3], width)
    assert ((indices >= -1) & (indices < key.shape[2])).all()
    filled = indices >= 0
    assert (filled[..., :-1] >= filled[..., 1:]).all()
    assert (indices[..., 1:] > indices[..., :-1])[filled[..., 1:]].all()


@OPTIONS
@pytest.mark.parametrize("name", [name for name in UNCOMPLETED_NAMES if name not in SINK_NAMES])
def test_weights_sum_to_one_and_empty_slots_weigh_nothing(backend, tiling, name, options):
    indices, weights = named_call(name).select(backend=backend, **options)
    assert weights.dtype == torch.float64
    assert (weights[indices >= 0] > 0).all()
    assert (weights[indices < 0] == 0).all()
    row_has_keys = (indices >= 0).any(-1)
    assert_same([weights.sum(-1)], [row_has_keys.double()])


@OPTIONS
@pytest.mark.parametrize("name", UNCOMPLETED_NAMES)
def test_output_is_the_weighted_sum_of_the_selected_values(backend, tiling, name, options):
    call = named_call(name)
    output, (indices, weights) = call(*call.tensors, backend=backend, return_selection=True, **options)
    value = call.tensors[2].repeat_interleave(output.shape[1] // call.tensors[2].shape[1], dim=1)
    dense = torch.zeros(*output.shape[:3], value.shape[2], dtype=torch.float64)
    dense.scatter_add_(-1, indices.clamp(min=0).long(), weights)
    assert_same([output], [dense @ value])


@OPTIONS
@pytest.mark.parametrize("name", [name for name in COMPLETED_NAMES if name not in SINK_NAMES])
def test_weights_of_a_completed_call_leave_what_the_rest_weighs(backend, tiling, name, options):
    """Of values that are all 1, the weighted mean is 1."""
    call = named_call(name)
    query, key, value, *bias = call.tensors
    inputs = (query, key, torch.ones_like(value), *bias)
    output, (indices, weights) = call(*inputs, backend=backend, return_selection=True, **options)
    full, _ = call(*inputs, backend=backend, return_selection=True, k=None)
    assert (weights[indices >= 0] > 0).all()
    assert (weights[indices < 0] == 0).all()
    assert_same([output], [full])
    kept_mass, row_has_keys = weights.sum(-1), (indices >= 0).any(-1)
    assert (kept_mass < 1 + 1e-12).all()
    everything = call.select(backend=backend, k=None)[0]
    row_has_rest = (everything >= 0).sum(-1) > (indices >= 0).sum(-1)
    scales = torch.tensor(call.options["completion"].mass_scale).expand(query.shape[1]).view(-1, 1)
    gives_it_weight = row_has_rest & (scales > 0)
    assert (kept_mass[gives_it_weight] < 1).all()
    assert_same([kept_mass[~gives_it_weight]], [row_has_keys[~gives_it_weight].double()])


@OPTIONS
@pytest.mark.parametrize("name", CALL_NAMES)
def test_every_backend_selects_the_same(backend, tiling, name, options):
    call = named_call(name)
    indices, weights = call.select(backend=backend, **options)
    expected_indices, expected_weights = call.select(backend="reference", **options)
    assert torch.equal(indices, expected_indices)
    assert_same([weights], [expected_weights])


@pytest.mark.parametrize("k", [3, [1, 2, 3, 4], None], ids=str)
def test_the_selection_has_no_gradient_and_the_output_keeps_its_own(backend, tiling, k):
    inputs = [x.requires_grad_() for x in attention_inputs()]
    output, selection = topk_attention(*inputs, k=k, backend=backend, return_selection=True)
    assert isinstance(selection, Selection)
    assert not selection.indices.requires_grad
    assert not selection.weights.requires_grad
    selected = torch.autograd.grad(output.sum(), inputs)
    assert_same(selected, torch.autograd.grad(topk_attention(*inputs, k=k, backend=backend).sum(), inputs))


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_weights_have_the_accumulation_dtype(backend, dtype, weights_dtype):
    output, selection = topk_attention(*attention_inputs(dtype=dtype), k=3, backend=backend, return_selection=True)
    assert output.dtype == dtype
    assert selection.weights.dtype == weights_dtype


def test_weights_are_those_before_dropout(backend, tiling):
    inputs = attention_inputs()
    _, expected = topk_attention(*inputs, k=3, backend=backend, return_selection=True)
    _, selection = topk_attention(*inputs, k=3, dropout_p=0.5, backend=backend, return_selection=True)
    assert torch.equal(selection.indices, expected.indices)
    assert_same([selection.weights], [expected.weights])


def test_slots_beyond_a_heads_own_k_are_empty(backend, tiling):
    _, selection = topk_attention(*attention_inputs(), k=[1, 5, 2, 3], backend=backend, return_selection=True)
    filled = (selection.indices >= 0).sum(-1)
    assert torch.equal(filled, torch.tensor([1, 5, 2, 3])[:, None].expand_as(filled))


def test_ties_are_selected_alike_with_masks_and_groups(backend, tiling):
    query, key, value = small_integers(2, 4, 7, 4), small_integers(2, 2, 11, 4), small_integers(2, 2, 11, 3)
    mask = torch.rand(2, 1, 7, 11) < 0.6
    options = {"k": [1, 4, 2, 20], "attn_mask": mask, "scale": 0.5, "enable_gqa": True, "return_selection": True}
    _, selection = topk_attention(query, key, value, backend=backend, **options)
    _, expected = topk_attention(query, key, value, backend="reference", **options)
    assert torch.equal(selection.indices, expected.indices)
