"""Passes over all scores of a tile of rows: the maxima of groups of keys, then one bit for each score that may be kept.

Rows of one key head stand side by side: row n * R + r is query n of the r-th of the R query heads that read it. So a
tile reads each key once for all of them, and a few queries, as where one token is generated, fill a tile.
"""

import triton
import triton.language as tl


@triton.jit
def number(high, low, dtype: tl.constexpr):
    """[1]: a number that is passed as two float32, their sum. Triton rounds the floats of a call to float32."""
    return (tl.zeros((1,), dtype) + high) + low


@triton.jit
def locate(local, first_tile, num_queries, num_heads, group_size, tile_rows: tl.constexpr):
    """(is a row of the call, batch, query head, query, key head) of rows of a slab, which begins with `first_tile`."""
    rows_of_key_head = num_queries * group_size
    tiles_of_key_head = tl.cdiv(rows_of_key_head, tile_rows)
    num_key_heads = num_heads // group_size
    tile = first_tile + local // tile_rows
    place = (tile % tiles_of_key_head) * tile_rows + local % tile_rows
    is_row = place < rows_of_key_head
    query = tl.where(is_row, place // group_size, 0)
    key_head = (tile // tiles_of_key_head) % num_key_heads
    batch = tile // tiles_of_key_head // num_key_heads
    return is_row, batch, key_head * group_size + place % group_size, query, key_head


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def measure_keys_kernel(
    key_ptr,
    broken_ptr,
    norm_ptr,
    key_b,
    key_g,
    key_m,
    num_keys,
    num_key_heads,
    acc: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block: tl.constexpr,
):
    """For each key [B, G, M]: NaN where it has a number that is not finite, else 0; and its squared norm, then 0.

    Scores begin with the first of these. So every number that is not finite makes them NaN, and none makes them -inf,
    which would hide the key.
    """
    head = tl.program_id(1)
    batch, key_head = head // num_key_heads, head % num_key_heads
    keys = tl.program_id(0) * block + tl.arange(0, block)
    dims = tl.arange(0, padded_dim)
    row = key_ptr + batch.to(tl.int64) * key_b + key_head.to(tl.int64) * key_g + keys[:, None].to(tl.int64) * key_m
    inside = keys < num_keys
    numbers = tl.load(row + dims[None, :], mask=inside[:, None] & (dims[None, :] < head_dim), other=0.0).to(acc)
    broken = tl.sum(is_finite(numbers).to(tl.int32), 1) < padded_dim
    at = head.to(tl.int64) * num_keys + keys
    tl.store(broken_ptr + at, tl.where(broken, float("nan"), 0.0).to(acc), mask=inside)
    tl.store(norm_ptr + at, tl.where(broken, 0.0, tl.sum(numbers * numbers, 1)), mask=inside)


@triton.jit
def added_to_scores(
    mask_ptr,
    bias_ptr,
    relative_ptr,
    mask_row,
    bias_row,
    relative_row,
    mask_m,
    bias_m,
    keys,
    inside,
    acc: tl.constexpr,
    mask_kind: tl.constexpr,
    has_bias: tl.constexpr,
    has_relative: tl.constexpr,
):
    """What is added to scores, and `inside` less the keys that a mask or a bias of -inf hides.

    *_row  where a row begins, int64; they broadcast with keys
    mask_kind  0 none, 1 boolean, 2 float
    """
    added = tl.zeros(inside.shape, acc)
    if has_bias:
        added += tl.load(bias_ptr + bias_row + keys.to(tl.int64) * bias_m, mask=inside, other=0.0).to(acc)
    if has_relative:
        added += tl.load(relative_ptr + relative_row + keys, mask=inside, other=0.0).to(acc)
    if mask_kind == 2:
        added += tl.load(mask_ptr + mask_row + keys.to(tl.int64) * mask_m, mask=inside, other=0.0).to(acc)
    if has_bias or has_relative or mask_kind == 2:
        inside = inside & (added != float("-inf"))
    if mask_kind == 1:
        inside = inside & (tl.load(mask_ptr + mask_row + keys.to(tl.int64) * mask_m, mask=inside, other=0) != 0)
    return added, inside


@triton.jit(do_not_specialize=["first_tile"])
def score_tiles_kernel(
    query_ptr,
    key_ptr,
    broken_ptr,
    mask_ptr,
    bias_ptr,
    relative_ptr,
    maxima_ptr,
    threshold_ptr,
    bits_ptr,
    query_b,
    query_h,
    query_n,
    key_b,
    key_g,
    key_m,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    bias_b,
    bias_h,
    bias_n,
    bias_m,
    relative_h,
    num_queries,
    num_keys,
    num_heads,
    group_size,
    first_tile,
    keys_of_split,
    num_groups,
    num_words,
    scale_high,
    scale_low,
    acc: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_keys: tl.constexpr,
    group_keys: tl.constexpr,
    writes_bits: tl.constexpr,
    is_causal: tl.constexpr,
    mask_kind: tl.constexpr,
    has_bias: tl.constexpr,
    has_relative: tl.constexpr,
    upcast: tl.constexpr,
    stages: tl.constexpr,
):
    """One tile of rows against one range of keys, a program each: no two write the same word.

    Both passes are this function with the same tiles, so that a score has the same bits in both. Without `writes_bits`
    it stores the maximum of each group of keys, and otherwise for every 32 keys a word whose bits say which scores
    are not below the row's threshold. NaN is not below it; what a maximum makes of NaN does not matter, as a
    threshold that too few groups reach is only lower.
    """
    local = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    is_row, batch, head, query, _ = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    dims = tl.arange(0, padded_dim)
    row = query_ptr + batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h + query.to(tl.int64) * query_n
    q = tl.load(row[:, None] + dims[None, :], mask=is_row[:, None] & (dims[None, :] < head_dim), other=0.0)
    q_broken = tl.sum(is_finite(q.to(acc)).to(tl.int32), 1) < padded_dim
    if upcast:
        q = q.to(acc)
    scale = tl.where(q_broken, float("nan"), number(scale_high, scale_low, acc))
    threshold = tl.load(threshold_ptr + local) if writes_bits else scale
    mask_row = batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + query.to(tl.int64) * mask_n
    bias_row = batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h + query.to(tl.int64) * bias_n
    relative_row = head.to(tl.int64) * relative_h + num_queries - 1 - query

    # One tile has rows of one key head, so these are the same in all of its rows.
    tiles_of_key_head = tl.cdiv(num_queries * group_size, tile_rows)
    tile = first_tile + tl.program_id(0)
    of_head = tile // tiles_of_key_head
    num_key_heads = num_heads // group_size
    keys_ptr = (
        key_ptr + (of_head // num_key_heads).to(tl.int64) * key_b + (of_head % num_key_heads).to(tl.int64) * key_g
    )
    broken_ptr += of_head.to(tl.int64) * num_keys
    start = tl.program_id(1) * keys_of_split
    stop = tl.minimum(start + keys_of_split, num_keys)
    seen_by_all = num_keys
    if is_causal:
        first_place = (tile % tiles_of_key_head) * tile_rows
        last_place = tl.minimum(first_place + tile_rows, num_queries * group_size) - 1
        lead = num_keys - num_queries + 1
        stop = tl.minimum(stop, tl.maximum(last_place // group_size + lead, 0))
        seen_by_all = tl.maximum(first_place // group_size + lead, 0)
    whole = tl.minimum(seen_by_all, stop) // tile_keys * tile_keys
    # Tiles of keys that every row sees first; then those of which some row does not see all.
    for is_partial in tl.static_range(2):
        if is_partial:
            first, last = tl.maximum(whole, start), stop
        else:
            first, last = start, whole
        for at in tl.range(first, last, tile_keys, num_stages=stages):
            keys = at + tl.arange(0, tile_keys)
            kt_ptr = keys_ptr + keys[None, :].to(tl.int64) * key_m + dims[:, None]
            if is_partial:
                in_tile = keys < num_keys
                kt = tl.load(kt_ptr, mask=in_tile[None, :] & (dims[:, None] < head_dim), other=0.0)
                broken = tl.load(broken_ptr + keys, mask=in_tile, other=0.0)
            else:
                broken = tl.load(broken_ptr + keys)
                if head_dim == padded_dim:
                    kt = tl.load(kt_ptr)
                else:
                    kt = tl.load(kt_ptr, mask=dims[:, None] < head_dim, other=0.0)
            if upcast:
                kt = kt.to(acc)
            scores = tl.dot(q, kt, input_precision="ieee", out_dtype=acc) * scale[:, None] + broken[None, :]
            hides: tl.constexpr = is_partial or mask_kind > 0 or has_bias or has_relative
            if hides:
                inside = is_row[:, None] & (keys[None, :] < num_keys)
                if is_partial and is_causal:
                    inside = inside & (keys[None, :] <= query[:, None] + (num_keys - num_queries))
                added, inside = added_to_scores(
                    mask_ptr,
                    bias_ptr,
                    relative_ptr,
                    mask_row[:, None],
                    bias_row[:, None],
                    relative_row[:, None],
                    mask_m,
                    bias_m,
                    keys[None, :],
                    inside,
                    acc,
                    mask_kind,
                    has_bias,
                    has_relative,
                )
                if mask_kind == 2 or has_bias or has_relative:
                    scores += added
            if writes_bits:
                may_be_kept = (scores < threshold[:, None]) == 0  # also where either is NaN
                if hides:
                    may_be_kept = may_be_kept & inside
                bit = (1 << (tl.arange(0, tile_keys) % 32)).to(tl.int32)
                words = tl.reshape(tl.where(may_be_kept, bit[None, :], 0), (tile_rows, tile_keys // 32, 32))
                word_at = at // 32 + tl.arange(0, tile_keys // 32)
                to = bits_ptr + local[:, None].to(tl.int64) * num_words + word_at[None, :]
                tl.store(to, tl.sum(words, 2))  # each bit once, so the sum of the words is their union
            else:
                if hides:
                    scores = tl.where(inside, scores, float("-inf"))
                groups = tl.reshape(scores, (tile_rows, tile_keys // group_keys, group_keys))
                group_at = at // group_keys + tl.arange(0, tile_keys // group_keys)
                to = maxima_ptr + local[:, None].to(tl.int64) * num_groups + group_at[None, :]
                tl.store(to, tl.max(groups, 2))
