"""From maxima and bits to the kept keys: a proven threshold, a list of candidates, their scores, the cut, the softmax.

Each step is a kernel of its own, so that the next one reads what all programs of the last one have written. A program
works on `block_rows` rows, one on a GPU.
"""

import triton
import triton.language as tl

from .scores import added_to_scores, is_finite, locate, number


@triton.jit
def ordered(scores, bits: tl.constexpr):
    """Integers in the order of the scores, NaN above all others, -0 equal to 0."""
    scores = tl.where(scores == 0, 0.0, scores)
    if bits == 64:
        code = scores.to(tl.int64, bitcast=True)
        code = code ^ ((code >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(scores == scores, code, 0x7FFFFFFFFFFFFFF0)
    code = scores.to(tl.int32, bitcast=True)
    code = code ^ ((code >> 31) & 0x7FFFFFFF)
    return tl.where(scores == scores, code, 0x7FFFFFF0)


@triton.jit
def lowest(like, bits: tl.constexpr):
    """Numbers below every one that `ordered` returns; their negatives are above every one."""
    if bits == 64:
        return tl.zeros_like(like).to(tl.int64) - 0x7FFFFFFFFFFFFFFF
    return tl.zeros_like(like) - 0x7FFFFFFF


@triton.jit
def middle(low, high):
    """The mean of two integers, rounded down, without their sum, which may be too large."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def bits_in(word):
    """The number of bits in a uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def visible_end(query, num_queries, num_keys, is_causal: tl.constexpr):
    """The first key that causality hides from a query."""
    if is_causal:
        return tl.maximum(query + 1 + num_keys - num_queries, 0)
    return tl.zeros_like(query) + num_keys


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def thresholds_kernel(
    maxima_ptr,
    threshold_ptr,
    query_ptr,
    norm_ptr,
    head_k_ptr,
    query_b,
    query_h,
    query_n,
    num_queries,
    num_keys,
    num_heads,
    group_size,
    first_tile,
    num_rows,
    num_groups,
    one_k,
    scale_size,
    acc: tl.constexpr,
    bits: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_rows: tl.constexpr,
    group_keys: tl.constexpr,
    slack: tl.constexpr,
    is_causal: tl.constexpr,
    has_head_k: tl.constexpr,
    block_rows: tl.constexpr,
    block_groups: tl.constexpr,
):
    """A threshold that the k best keys of each row reach for all data.

    k groups have a maximum of at least the k-th largest maximum, so k keys have a score of at least that. Scores are
    computed once more, in another order, for the choice between the keys that reach it. Both roundings are at most
    slack / 2 * |scale| * |query| * |key| for a product, and a few units in the last place for what is added to it, so
    the threshold is lowered by twice that much for the largest key. -inf where fewer than k groups hold a key.
    """
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, key_head = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    k = tl.zeros_like(query) + one_k
    if has_head_k:
        k = tl.load(head_k_ptr + head, mask=is_row, other=1)
    num_seen = tl.cdiv(visible_end(query, num_queries, num_keys, is_causal), group_keys)
    num_seen = tl.where(is_row, num_seen, 0)
    end = tl.max(num_seen, 0)
    maxima = maxima_ptr + local[:, None].to(tl.int64) * num_groups
    groups = tl.arange(0, block_groups)
    bottom = lowest(query, bits)
    low = bottom
    high = low + 1
    for start in tl.range(0, end, block_groups):
        at = start + groups
        largest = tl.load(maxima + at[None, :], mask=at[None, :] < num_seen[:, None], other=float("-inf"))
        code = tl.where(largest == largest, ordered(largest, bits), bottom[:, None])
        high = tl.maximum(high, tl.max(code, 1) + 1)
    # As many groups reach `low` as are wanted, if so many hold a key at all; fewer reach `high`.
    is_exact = low == high
    going = tl.max(((low + 1) < high).to(tl.int32), 0) > 0
    while going:
        mid = middle(low, high)
        count = tl.zeros_like(query)
        for start in tl.range(0, end, block_groups):
            at = start + groups
            largest = tl.load(maxima + at[None, :], mask=at[None, :] < num_seen[:, None], other=float("-inf"))
            code = tl.where(largest == largest, ordered(largest, bits), bottom[:, None])
            count += tl.sum((code >= mid[:, None]).to(tl.int32), 1)
        low = tl.where((count >= k) & (is_exact == 0), mid, low)
        high = tl.where((count < k) & (is_exact == 0), mid, high)
        is_exact = is_exact | (count == k)
        going = tl.max((((low + 1) < high) & (is_exact == 0)).to(tl.int32), 0) > 0
    if bits == 64:
        threshold = (low ^ ((low >> 63) & 0x7FFFFFFFFFFFFFFF)).to(acc, bitcast=True)
    else:
        threshold = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(acc, bitcast=True)
    dims = tl.arange(0, padded_dim)
    row = query_ptr + batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h + query.to(tl.int64) * query_n
    q = tl.load(row[:, None] + dims[None, :], mask=is_row[:, None] & (dims[None, :] < head_dim), other=0.0).to(acc)
    num_key_heads = num_heads // group_size
    norm = tl.load(norm_ptr + batch * num_key_heads + key_head, mask=is_row, other=0.0)
    margin = slack * scale_size * tl.sqrt(tl.sum(q * q, 1)) * tl.sqrt(norm) + slack * tl.abs(threshold)
    # Not a number here, from -inf or below it, is -inf: every key is a candidate.
    threshold = threshold - margin
    threshold = tl.where(threshold == threshold, threshold, float("-inf"))
    tl.store(threshold_ptr + local, threshold, mask=local < num_rows)


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def list_candidates_kernel(
    bits_ptr,
    candidate_ptr,
    count_ptr,
    num_queries,
    num_keys,
    num_heads,
    group_size,
    first_tile,
    num_rows,
    num_words,
    tile_rows: tl.constexpr,
    capacity: tl.constexpr,
    is_causal: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
):
    """The places of a row's bits as a list in ascending order, as far as there is room, and their number."""
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, _, _, query, _ = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    num_seen = tl.where(is_row, tl.cdiv(visible_end(query, num_queries, num_keys, is_causal), 32), 0)
    end = tl.max(num_seen, 0)
    found = tl.zeros_like(query)
    to = candidate_ptr + local[:, None].to(tl.int64) * capacity
    for start in tl.range(0, end, block_words):
        at = start + tl.arange(0, block_words)
        words = tl.load(
            bits_ptr + local[:, None].to(tl.int64) * num_words + at[None, :],
            mask=at[None, :] < num_seen[:, None],
            other=0,
        ).to(tl.uint32, bitcast=True)
        sizes = bits_in(words)
        position = found[:, None] + tl.cumsum(sizes, 1) - sizes
        # A turn for each bit of the fullest word; most words are empty.
        for _turn in tl.range(0, tl.max(tl.max(sizes, 1), 0)):
            below = words - 1
            bit = bits_in(below & (words ^ 0xFFFFFFFF))
            keys = at[None, :] * 32 + bit
            tl.store(to + position, keys, mask=(words != 0) & (position < capacity))
            position += 1
            words = words & below
        found += tl.sum(sizes, 1)
    tl.store(count_ptr + local, found, mask=local < num_rows)


@triton.jit
def score_entries(
    query_ptr,
    key_ptr,
    broken_ptr,
    mask_ptr,
    bias_ptr,
    relative_ptr,
    query_row,
    key_table,
    broken_row,
    mask_row,
    bias_row,
    relative_row,
    keys,
    inside,
    key_m,
    mask_m,
    bias_m,
    scale_high,
    scale_low,
    acc: tl.constexpr,
    head_dim: tl.constexpr,
    block_dims: tl.constexpr,
    mask_kind: tl.constexpr,
    has_bias: tl.constexpr,
    has_relative: tl.constexpr,
):
    """Scores of rows' entries, keys [rows, entries]: products in the accumulation dtype, in one order for all of them.

    *_row, key_table  where each row's numbers begin, int64 [rows]
    """
    products = tl.zeros(inside.shape, acc)
    num_finite = tl.zeros(query_row.shape, tl.int32)
    num_read = 0
    for first in tl.static_range(0, head_dim, block_dims):
        dims = first + tl.arange(0, block_dims)
        is_dim = dims < head_dim
        q = tl.load(query_ptr + query_row[:, None] + dims[None, :], mask=is_dim[None, :], other=0.0).to(acc)
        num_finite += tl.sum(is_finite(q).to(tl.int32), 1)
        num_read += block_dims
        at = key_ptr + key_table[:, None, None] + keys[:, :, None].to(tl.int64) * key_m + dims[None, None, :]
        k = tl.load(at, mask=inside[:, :, None] & is_dim[None, None, :], other=0.0).to(acc)
        products += tl.sum(k * q[:, None, :], 2)
    scale = tl.where(num_finite < num_read, float("nan"), number(scale_high, scale_low, acc))
    scores = products * scale[:, None]
    scores += tl.load(broken_ptr + broken_row[:, None] + keys, mask=inside, other=0.0)
    if mask_kind == 2 or has_bias or has_relative:
        added, inside = added_to_scores(
            mask_ptr,
            bias_ptr,
            relative_ptr,
            mask_row[:, None],
            bias_row[:, None],
            relative_row[:, None],
            mask_m,
            bias_m,
            keys,
            inside,
            acc,
            2 if mask_kind == 2 else 0,
            has_bias,
            has_relative,
        )
        scores += added
    return scores


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def score_candidates_kernel(
    query_ptr,
    key_ptr,
    broken_ptr,
    mask_ptr,
    bias_ptr,
    relative_ptr,
    candidate_ptr,
    count_ptr,
    score_ptr,
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
    num_rows,
    scale_high,
    scale_low,
    acc: tl.constexpr,
    head_dim: tl.constexpr,
    block_dims: tl.constexpr,
    tile_rows: tl.constexpr,
    capacity: tl.constexpr,
    mask_kind: tl.constexpr,
    has_bias: tl.constexpr,
    has_relative: tl.constexpr,
    block_rows: tl.constexpr,
    block_entries: tl.constexpr,
):
    """The scores of listed candidates; rows with more of them than there is room for are left to `cut_in_passes`."""
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, key_head = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    count = tl.load(count_ptr + local, mask=is_row, other=0)
    count = tl.where(count > capacity, 0, count)
    entries = tl.program_id(1) * block_entries + tl.arange(0, block_entries)
    if tl.program_id(1) * block_entries < tl.max(count, 0):
        inside = entries[None, :] < count[:, None]
        at = local[:, None].to(tl.int64) * capacity + entries[None, :]
        keys = tl.load(candidate_ptr + at, mask=inside, other=0)
        of_head = (batch * (num_heads // group_size) + key_head).to(tl.int64)
        scores = score_entries(
            query_ptr,
            key_ptr,
            broken_ptr,
            mask_ptr,
            bias_ptr,
            relative_ptr,
            batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h + query.to(tl.int64) * query_n,
            batch.to(tl.int64) * key_b + key_head.to(tl.int64) * key_g,
            of_head * num_keys,
            batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + query.to(tl.int64) * mask_n,
            batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h + query.to(tl.int64) * bias_n,
            head.to(tl.int64) * relative_h + num_queries - 1 - query,
            keys,
            inside,
            key_m,
            mask_m,
            bias_m,
            scale_high,
            scale_low,
            acc,
            head_dim,
            block_dims,
            mask_kind,
            has_bias,
            has_relative,
        )
        tl.store(score_ptr + at, scores, mask=inside)


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def cut_in_passes_kernel(
    query_ptr,
    key_ptr,
    broken_ptr,
    mask_ptr,
    bias_ptr,
    relative_ptr,
    bits_ptr,
    head_k_ptr,
    candidate_ptr,
    count_ptr,
    score_ptr,
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
    num_rows,
    num_words,
    one_k,
    scale_high,
    scale_low,
    acc: tl.constexpr,
    bits: tl.constexpr,
    head_dim: tl.constexpr,
    block_dims: tl.constexpr,
    tile_rows: tl.constexpr,
    capacity: tl.constexpr,
    is_causal: tl.constexpr,
    mask_kind: tl.constexpr,
    has_bias: tl.constexpr,
    has_relative: tl.constexpr,
    has_head_k: tl.constexpr,
    block_rows: tl.constexpr,
    block_entries: tl.constexpr,
):
    """The k best of rows with more candidates than there is room for, in passes that keep nothing.

    Each pass computes the scores of all candidates and counts those that reach a number, until k do; the last one
    writes these, of equal ones the first, as the row's candidates. Rows come here where very many scores are equal
    or nearly so: equal ones take two passes, others at most as many as a score has bits.
    """
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, key_head = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    is_row = is_row & (tl.load(count_ptr + local, mask=is_row, other=0) > capacity)
    if tl.max(is_row.to(tl.int32), 0) > 0:
        k = tl.zeros_like(query) + one_k
        if has_head_k:
            k = tl.load(head_k_ptr + head, mask=is_row, other=1)
        end = tl.minimum(tl.max(tl.where(is_row, visible_end(query, num_queries, num_keys, is_causal), 0), 0), num_keys)
        of_head = (batch * (num_heads // group_size) + key_head).to(tl.int64)
        query_row = batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h + query.to(tl.int64) * query_n
        key_table = batch.to(tl.int64) * key_b + key_head.to(tl.int64) * key_g
        mask_row = batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + query.to(tl.int64) * mask_n
        bias_row = batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h + query.to(tl.int64) * bias_n
        relative_row = head.to(tl.int64) * relative_h + num_queries - 1 - query
        bottom = lowest(query, bits)
        low = bottom
        high = low + 1
        mid = low
        at_least = tl.zeros_like(query)
        # 0: the first pass, which finds the range of the scores; 1: passes that halve it; 2: the last one, which writes
        phase = 0
        while phase < 3:
            count = tl.zeros_like(query)
            smallest = -bottom
            largest = bottom
            written = tl.zeros_like(query)
            num_equal = tl.zeros_like(query)
            needed = k - at_least
            for start in tl.range(0, end, block_entries):
                keys = start + tl.arange(0, block_entries)
                inside = is_row[:, None] & (keys[None, :] < end)
                if is_causal:
                    inside = inside & (keys[None, :] < visible_end(query, num_queries, num_keys, is_causal)[:, None])
                word = bits_ptr + local[:, None].to(tl.int64) * num_words + (keys // 32)[None, :]
                inside = inside & (((tl.load(word, mask=inside, other=0) >> (keys % 32)[None, :]) & 1) != 0)
                keys = tl.broadcast_to(keys[None, :], inside.shape)
                scores = score_entries(
                    query_ptr,
                    key_ptr,
                    broken_ptr,
                    mask_ptr,
                    bias_ptr,
                    relative_ptr,
                    query_row,
                    key_table,
                    of_head * num_keys,
                    mask_row,
                    bias_row,
                    relative_row,
                    keys,
                    inside,
                    key_m,
                    mask_m,
                    bias_m,
                    scale_high,
                    scale_low,
                    acc,
                    head_dim,
                    block_dims,
                    mask_kind,
                    has_bias,
                    has_relative,
                )
                inside = inside & (scores != float("-inf"))
                code = tl.where(inside, ordered(scores, bits), bottom[:, None])
                if phase == 0:
                    largest = tl.maximum(largest, tl.max(code, 1))
                    smallest = tl.minimum(smallest, tl.min(tl.where(inside, code, -bottom[:, None]), 1))
                    count += tl.sum(inside.to(tl.int32), 1)
                elif phase == 1:
                    count += tl.sum((inside & (code >= mid[:, None])).to(tl.int32), 1)
                else:
                    equal = (inside & (code == low[:, None])).to(tl.int32)
                    taken = (num_equal[:, None] + tl.cumsum(equal, 1)) <= needed[:, None]
                    keep = (inside & (code > low[:, None])) | ((equal != 0) & taken)
                    place = written[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
                    at = local[:, None].to(tl.int64) * capacity + place
                    tl.store(candidate_ptr + at, keys, mask=keep)
                    tl.store(score_ptr + at, scores, mask=keep)
                    written += tl.sum(keep.to(tl.int32), 1)
                    num_equal += tl.sum(equal, 1)
            if phase == 0:
                # At least k candidates reach `low`, or all of them where there are fewer; `at_least` reach `high`.
                low = tl.where(count > 0, smallest, low)
                high = tl.where(count > 0, largest + 1, low + 1)
                phase = 1
            elif phase == 1:
                low = tl.where(count >= k, mid, low)
                high = tl.where(count < k, mid, high)
                at_least = tl.where(count < k, count, at_least)
            if phase == 2:
                tl.store(count_ptr + local, written, mask=is_row)
                phase = 3
            if phase == 1:
                mid = middle(low, high)
                if tl.max((is_row & ((low + 1) < high)).to(tl.int32), 0) == 0:
                    phase = 2


@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def cut_kernel(
    candidate_ptr,
    count_ptr,
    score_ptr,
    head_k_ptr,
    head_start_ptr,
    sink_ptr,
    index_ptr,
    weight_ptr,
    log_sum_ptr,
    num_queries,
    num_heads,
    group_size,
    first_tile,
    num_rows,
    one_k,
    sum_of_k,
    softcap_high,
    softcap_low,
    acc: tl.constexpr,
    bits: tl.constexpr,
    tile_rows: tl.constexpr,
    capacity: tl.constexpr,
    fewest: tl.constexpr,
    most: tl.constexpr,
    padded_k: tl.constexpr,
    has_head_k: tl.constexpr,
    has_sinks: tl.constexpr,
    saves_sums: tl.constexpr,
    has_cap: tl.constexpr,
    is_saved: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Cut rows with more than `fewest` and at most `most` candidates to their k best and weigh these.

    Entries stand in ascending order of keys, -1 with weight 0 behind the last one. The selection of the whole call
    lists, for each batch and head, [N, k] entries; where it is not saved, there is one of this slab's rows.
    """
    local = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row, batch, head, query, _ = locate(local, first_tile, num_queries, num_heads, group_size, tile_rows)
    is_row = is_row & (local < num_rows)
    count = tl.load(count_ptr + local, mask=is_row, other=0)
    is_row = is_row & (count <= most) & (count > fewest)
    if tl.max(is_row.to(tl.int32), 0) > 0:
        k = tl.zeros_like(query) + one_k
        start_of_head = head.to(tl.int64) * num_queries * one_k
        if has_head_k:
            k = tl.load(head_k_ptr + head, mask=is_row, other=1)
            start_of_head = tl.load(head_start_ptr + head, mask=is_row, other=0) * num_queries
        first = batch.to(tl.int64) * num_queries * sum_of_k + start_of_head + query.to(tl.int64) * k
        if is_saved == 0:
            first = local.to(tl.int64) * padded_k
        entries = tl.arange(0, most)
        at = local[:, None].to(tl.int64) * capacity + entries[None, :]
        inside = is_row[:, None] & (entries[None, :] < count[:, None])
        scores = tl.load(score_ptr + at, mask=inside, other=float("-inf"))
        keys = tl.load(candidate_ptr + at, mask=inside, other=0)
        inside = inside & (scores != float("-inf"))
        bottom = lowest(query, bits)
        code = tl.where(inside, ordered(scores, bits), bottom[:, None])
        num_inside = tl.sum(inside.to(tl.int32), 1)
        is_full = num_inside > k
        # At least k entries reach `low`, fewer reach `high`, which are `at_least`.
        low = tl.min(tl.where(inside, code, -bottom[:, None]), 1)
        high = tl.max(code, 1) + 1
        at_least = tl.zeros_like(query)
        low = tl.where(is_full, low, bottom + 1)
        high = tl.where(is_full, high, low + 1)
        going = tl.max(((low + 1) < high).to(tl.int32), 0) > 0
        while going:
            mid = middle(low, high)
            reach = tl.sum((code >= mid[:, None]).to(tl.int32), 1)
            is_open = (low + 1) < high
            at_least = tl.where(is_open & (reach < k), reach, at_least)
            high = tl.where(is_open & (reach < k), mid, high)
            low = tl.where(is_open & (reach >= k), mid, low)
            going = tl.max(((low + 1) < high).to(tl.int32), 0) > 0
        equal = (inside & (code == low[:, None])).to(tl.int32)
        keep = (inside & (code > low[:, None])) | ((equal != 0) & (tl.cumsum(equal, 1) <= (k - at_least)[:, None]))
        keep = tl.where(is_full[:, None], keep, inside)
        num_kept = tl.minimum(num_inside, k)
        if has_cap:
            cap = number(softcap_high, softcap_low, acc)
            # tanh without overflow, from exp of what is not positive
            e = tl.exp(-2 * tl.abs(scores / cap))
            capped = cap * (1 - e) / (1 + e)
            scores = tl.where(scores < 0, -capped, capped)
        largest = tl.max(tl.where(keep, scores, float("-inf")), 1)
        if has_sinks:
            sink = tl.load(sink_ptr + head, mask=is_row, other=0.0)
            largest = tl.maximum(largest, sink)
        largest = tl.where(num_kept > 0, largest, 0.0)
        powers = tl.where(keep, tl.exp(scores - largest[:, None]), 0.0)
        total = tl.sum(powers, 1)
        if has_sinks:
            total += tl.exp(sink - largest)
        weights = powers / tl.where(num_kept > 0, total, 1.0)[:, None]
        place = tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.store(index_ptr + first[:, None] + place, keys, mask=keep)
        tl.store(weight_ptr + first[:, None] + place, weights, mask=keep)
        slots = tl.arange(0, padded_k)
        is_empty = is_row[:, None] & (slots[None, :] >= num_kept[:, None]) & (slots[None, :] < k[:, None])
        tl.store(index_ptr + first[:, None] + slots[None, :], tl.zeros(is_empty.shape, tl.int32) - 1, mask=is_empty)
        tl.store(weight_ptr + first[:, None] + slots[None, :], tl.zeros(is_empty.shape, acc), mask=is_empty)
        if saves_sums:
            log_sum = tl.where(num_kept > 0, largest + tl.log(total), float("inf"))
            at_row = (batch.to(tl.int64) * num_heads + head) * num_queries + query
            tl.store(log_sum_ptr + at_row, log_sum, mask=is_row)
