"""What each row reads of its kept keys: the sum of their values, and in the backward pass the gradient of its query."""

import triton
import triton.language as tl

from .scores import locate, number


@triton.jit
def mix(word):
    """The 32-bit finaliser of MurmurHash3 (Appleby), as in backends/dropout.py."""
    word = word ^ (word >> 16)
    word = word * 0x85EBCA6B
    word = word ^ (word >> 13)
    word = word * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def survives(seed_ptr, rows, keys, fewest):
    """Whether entries survive dropout: the draw of backends/dropout.py. `rows` int64 broadcasts with `keys`."""
    x = rows ^ tl.load(seed_ptr)
    low = (x & 0xFFFFFFFF).to(tl.uint32)
    high = ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)
    of_row = mix(mix(low) ^ high)
    return mix(of_row ^ (keys.to(tl.uint32) * 0x9E3779B1)).to(tl.int64) >= fewest


@triton.jit
def first_entry(batch, head, query, k, num_queries, one_k, sum_of_k, head_start_ptr, has_head_k: tl.constexpr):
    """Where the entries of a row begin in the selection of a call, which lists [N, k] of each batch and head."""
    start_of_head = head.to(tl.int64) * num_queries * one_k
    if has_head_k:
        start_of_head = tl.load(head_start_ptr + head) * num_queries
    return batch.to(tl.int64) * num_queries * sum_of_k + start_of_head + query.to(tl.int64) * k


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def sum_values_kernel(
    value_ptr,
    output_ptr,
    index_ptr,
    weight_ptr,
    seed_ptr,
    head_k_ptr,
    head_start_ptr,
    value_b,
    value_g,
    value_m,
    output_b,
    output_h,
    output_n,
    num_queries,
    num_heads,
    group_size,
    first_tile,
    num_rows,
    one_k,
    sum_of_k,
    fewest,
    keep_scale_high,
    keep_scale_low,
    acc: tl.constexpr,
    value_dim: tl.constexpr,
    block_dims: tl.constexpr,
    tile_rows: tl.constexpr,
    padded_k: tl.constexpr,
    has_head_k: tl.constexpr,
    drops: tl.constexpr,
    is_saved: tl.constexpr,
    block_rows: tl.constexpr,
):
    """The weighted sum of each row's kept values; empty slots read nothing."""
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, key_head = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    k = tl.zeros_like(query) + one_k
    if has_head_k:
        k = tl.load(head_k_ptr + head)
    first = local.to(tl.int64) * padded_k
    if is_saved:
        first = first_entry(batch, head, query, k, num_queries, one_k, sum_of_k, head_start_ptr, has_head_k)
    slots = tl.arange(0, padded_k)
    is_slot = is_row[:, None] & (slots[None, :] < k[:, None])
    keys = tl.load(index_ptr + first[:, None] + slots[None, :], mask=is_slot, other=-1)
    weights = tl.load(weight_ptr + first[:, None] + slots[None, :], mask=is_slot, other=0.0)
    is_kept = keys >= 0
    if drops:
        rows = (batch.to(tl.int64) * num_heads + head) * num_queries + query
        kept_by_dropout = survives(seed_ptr, rows[:, None], keys, fewest).to(acc)
        weights = weights * kept_by_dropout * number(keep_scale_high, keep_scale_low, acc)  # so that NaN stays NaN
    table = value_ptr + batch.to(tl.int64) * value_b + key_head.to(tl.int64) * value_g
    at = table[:, None] + keys.to(tl.int64) * value_m
    to = output_ptr + batch.to(tl.int64) * output_b + head.to(tl.int64) * output_h + query.to(tl.int64) * output_n
    for begin in tl.range(0, value_dim, block_dims):
        dims = begin + tl.arange(0, block_dims)
        is_dim = dims < value_dim
        values = tl.load(
            at[:, :, None] + dims[None, None, :], mask=is_kept[:, :, None] & is_dim[None, None, :], other=0
        )
        products = tl.where(is_kept[:, :, None], weights[:, :, None] * values.to(acc), 0.0)
        result = tl.sum(products, 1).to(output_ptr.dtype.element_ty)
        tl.store(to[:, None] + dims[None, :], result, mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["first_tile", "num_rows", "first_of_slab", "first_head", "num_targets"])
def differentiate_rows_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    grad_query_ptr,
    index_ptr,
    weight_ptr,
    grad_added_ptr,
    grad_score_ptr,
    value_weight_ptr,
    target_ptr,
    source_ptr,
    mean_ptr,
    seed_ptr,
    head_k_ptr,
    head_start_ptr,
    grad_b,
    grad_h,
    grad_n,
    query_b,
    query_h,
    query_n,
    key_b,
    key_g,
    key_m,
    value_b,
    value_g,
    value_m,
    grad_query_b,
    grad_query_h,
    grad_query_n,
    num_queries,
    num_keys,
    num_heads,
    group_size,
    first_tile,
    num_rows,
    first_of_slab,
    first_head,
    num_targets,
    one_k,
    sum_of_k,
    scale_high,
    scale_low,
    softcap_high,
    softcap_low,
    fewest,
    keep_scale_high,
    keep_scale_low,
    acc: tl.constexpr,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_dims: tl.constexpr,
    tile_rows: tl.constexpr,
    padded_k: tl.constexpr,
    has_head_k: tl.constexpr,
    drops: tl.constexpr,
    has_cap: tl.constexpr,
    wants_query: tl.constexpr,
    wants_means: tl.constexpr,
    block_rows: tl.constexpr,
):
    """For each entry of a slab its score's gradient, and what its key needs to know; for each row that of its query.

    grad_added    gradient of what is added to the score, and grad_score of the product of query and key
    value_weight  the weight after dropout
    target        the entry's key among those of the slab's key heads, num_targets for an empty slot
    source        the number of the entry's row in the whole call
    first_of_slab  where the slab's entries begin in the selection, first_head its first key head of all batches
    """
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, key_head = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    k = tl.zeros_like(query) + one_k
    if has_head_k:
        k = tl.load(head_k_ptr + head)
    first = first_entry(batch, head, query, k, num_queries, one_k, sum_of_k, head_start_ptr, has_head_k)
    slots = tl.arange(0, padded_k)
    is_slot = is_row[:, None] & (slots[None, :] < k[:, None])
    at = first[:, None] + slots[None, :]
    keys = tl.load(index_ptr + at, mask=is_slot, other=-1)
    weights = tl.load(weight_ptr + at, mask=is_slot, other=0.0)
    is_kept = keys >= 0
    key_rows = (batch.to(tl.int64) * key_b + key_head.to(tl.int64) * key_g)[:, None] + keys.to(tl.int64) * key_m
    value_rows = (batch.to(tl.int64) * value_b + key_head.to(tl.int64) * value_g)[:, None] + keys.to(tl.int64) * value_m
    grad_row = batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h + query.to(tl.int64) * grad_n
    grad_weights = tl.zeros(keys.shape, acc)
    for begin in tl.range(0, value_dim, block_dims):
        dims = begin + tl.arange(0, block_dims)
        is_dim = dims < value_dim
        g = tl.load(grad_ptr + grad_row[:, None] + dims[None, :], mask=is_dim[None, :], other=0.0).to(acc)
        inside = is_kept[:, :, None] & is_dim[None, None, :]
        v = tl.load(value_ptr + value_rows[:, :, None] + dims[None, None, :], mask=inside, other=0.0).to(acc)
        grad_weights += tl.sum(tl.where(is_kept[:, :, None], v * g[:, None, :], 0.0), 2)
    rows = (batch.to(tl.int64) * num_heads + head) * num_queries + query
    value_weights = weights
    if drops:
        kept_by_dropout = survives(seed_ptr, rows[:, None], keys, fewest).to(acc)
        keep_scale = number(keep_scale_high, keep_scale_low, acc)
        grad_weights = grad_weights * kept_by_dropout * keep_scale
        value_weights = weights * kept_by_dropout * keep_scale
    grad_added = tl.where(is_kept, weights * grad_weights, 0.0)
    mean = tl.sum(grad_added, 1)
    grad_added = tl.where(is_kept, grad_added - weights * mean[:, None], 0.0)
    scale = number(scale_high, scale_low, acc)
    grad_scores = grad_added
    query_row = batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h + query.to(tl.int64) * query_n
    if has_cap:
        products = tl.zeros(keys.shape, acc)
        for begin in tl.range(0, head_dim, block_dims):
            dims = begin + tl.arange(0, block_dims)
            is_dim = dims < head_dim
            q = tl.load(query_ptr + query_row[:, None] + dims[None, :], mask=is_dim[None, :], other=0.0).to(acc)
            inside = is_kept[:, :, None] & is_dim[None, None, :]
            x = tl.load(key_ptr + key_rows[:, :, None] + dims[None, None, :], mask=inside, other=0.0).to(acc)
            products += tl.sum(tl.where(is_kept[:, :, None], x * q[:, None, :], 0.0), 2)
        # The slope of the cap is 1 / cosh^2, here of exp of what is not positive.
        e = tl.exp(-2 * tl.abs(products * scale / number(softcap_high, softcap_low, acc)))
        grad_scores = tl.where(is_kept, grad_added * 4 * e / ((1 + e) * (1 + e)), 0.0)
    of_slab = at - first_of_slab
    tl.store(grad_added_ptr + of_slab, grad_added, mask=is_slot)
    if has_cap:
        tl.store(grad_score_ptr + of_slab, grad_scores, mask=is_slot)
    if drops:
        tl.store(value_weight_ptr + of_slab, value_weights, mask=is_slot)
    num_key_heads = num_heads // group_size
    table = (batch.to(tl.int64) * num_key_heads + key_head - first_head) * num_keys
    target = tl.where(is_kept, table[:, None] + keys, num_targets)
    tl.store(target_ptr + of_slab, target.to(target_ptr.dtype.element_ty), mask=is_slot)
    source = tl.broadcast_to(rows[:, None], keys.shape)
    tl.store(source_ptr + of_slab, source.to(source_ptr.dtype.element_ty), mask=is_slot)
    if wants_means:
        tl.store(mean_ptr + rows, mean, mask=is_row)
    if wants_query:
        to = grad_query_ptr + batch.to(tl.int64) * grad_query_b + head.to(tl.int64) * grad_query_h
        to += query.to(tl.int64) * grad_query_n
        for begin in tl.range(0, head_dim, block_dims):
            dims = begin + tl.arange(0, block_dims)
            is_dim = dims < head_dim
            inside = is_kept[:, :, None] & is_dim[None, None, :]
            x = tl.load(key_ptr + key_rows[:, :, None] + dims[None, None, :], mask=inside, other=0.0).to(acc)
            result = tl.sum(tl.where(is_kept[:, :, None], grad_scores[:, :, None] * x, 0.0), 1) * scale[:, None]
            result = result.to(grad_query_ptr.dtype.element_ty)
            tl.store(to[:, None] + dims[None, :], result, mask=is_row[:, None] & is_dim[None, :])
