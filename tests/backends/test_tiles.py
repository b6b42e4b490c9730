"""Steps cover every row once and keep to their budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topk_attention.backends.chunked import tiles
from topk_attention.backends.chunked.tiles import (
    entries_of,
    head_groups,
    num_entries,
    row_numbers,
    rows_of,
    split,
    steps,
    tile_shape,
    write_rows,
)


@st.composite
def cut_calls(draw):
    batch, key_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_queries, num_keys = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    heads = key_heads * group
    some_k = st.integers(1, num_keys)
    head_k = draw(st.one_of(some_k.map(lambda k: [k] * heads), st.lists(some_k, min_size=heads, max_size=heads)))
    query_chunk = draw(st.one_of(st.none(), st.integers(1, 60)))
    return batch, key_heads, heads, num_queries, num_keys, head_k, query_chunk, draw(st.integers(8, 5000))


@given(cut_calls())
def test_steps_cover_every_row_once_within_the_budget(call):
    batch, key_heads, heads, num_queries, num_keys, head_k, query_chunk, tile_bytes = call
    times_visited = torch.zeros(batch, heads, num_queries, 1, dtype=torch.int64)
    numbers = torch.arange(batch * heads * num_queries).view(batch, heads, num_queries, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", tile_bytes)
        for group in head_groups(head_k, batch, key_heads, num_queries):
            shape = tile_shape(group, num_queries, num_keys, 4, query_chunk)
            assert 1 <= shape.query_chunk <= (query_chunk or num_queries)
            assert min(group.k, num_keys) <= shape.key_block <= num_keys
            first_rows = None
            for step in steps(group, batch, num_queries, shape.query_chunk, shape.rows_per_step):
                first_rows = first_rows or step.num_rows
                assert step.num_rows <= first_rows  # the tile's memory is allocated for the first
                assert len(step.queries) <= shape.query_chunk
                rows = rows_of(times_visited, step)
                assert rows.shape == (step.num_rows, 1)
                write_rows(times_visited, step, rows + 1)
                assert torch.equal(
                    row_numbers(step, heads, num_queries, torch.device("cpu")), rows_of(numbers, step)[:, 0]
                )
                assert [head // (heads // key_heads) for head in step.query_heads] == [
                    key_head for key_head in step.key_heads for _ in range(step.shape[2])
                ]
                if query_chunk is None and step.num_rows > step.shape[2]:
                    assert step.num_rows * shape.key_block * 4 <= tile_bytes
    assert torch.equal(times_visited, torch.ones_like(times_visited))


@given(cut_calls())
def test_entries_of_the_head_groups_fill_the_flat_selection(call):
    batch, key_heads, _, num_queries, _, head_k, _, _ = call
    selection = torch.zeros(num_entries(head_k, batch, num_queries), dtype=torch.int64)
    for group in head_groups(head_k, batch, key_heads, num_queries):
        entries = entries_of(selection, group, batch, num_queries)
        assert entries.shape == (batch, len(group.query_heads), num_queries, group.k)
        assert all(head_k[head] == group.k for head in group.query_heads)
        entries += 1
    assert torch.equal(selection, torch.ones_like(selection))


@given(start=st.integers(0, 20), length=st.integers(0, 50), size=st.integers(1, 60))
def test_split_covers_a_range_in_pieces_of_at_most_the_size(start, length, size):
    pieces = list(split(range(start, start + length), size))
    assert [i for piece in pieces for i in piece] == list(range(start, start + length))
    assert all(1 <= len(piece) <= size for piece in pieces)
