"""Keys and values that lie in a file are asked for before they are read. Nothing else is different."""

import resource

import pytest
import torch

from topk_attention import KeyIndex, topk_attention
from topk_attention.backends.cpu.key_index import index_obstacle
from topk_attention.storage import StoredCache

pytestmark = pytest.mark.skipif(index_obstacle(torch.ones(1)) is not None, reason=str(index_obstacle(torch.ones(1))))


@pytest.mark.parametrize("head_dim", [3, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_asked_for_at_once_give_the_same_bits(tmp_path, head_dim, dtype):
    key, value = torch.randn(2, 2, 3, 4000, head_dim).to(dtype)
    query = torch.randn(2, 6, 2, head_dim).to(dtype)
    settings = {"k": 50, "is_causal": True, "enable_gqa": True}
    expected = topk_attention(query, key, value, **settings)
    with StoredCache(tmp_path, layers=[0], about={}) as cache:
        key, value = cache.append(0, key, value)
        cache.expect_random_reads(0, True)
        for in_files in (False, True):
            cache.drop_pages()
            index = KeyIndex(key, keys_in_files=in_files)
            assert torch.equal(topk_attention(query, key, value, **settings, key_index=index), expected)


def test_reading_ahead_of_keys_in_memory_changes_nothing():
    key, value = torch.randn(2, 1, 2, 3000, 16)
    query, index = torch.randn(1, 2, 1, 16), KeyIndex(key, keys_in_files=True)
    expected = topk_attention(query, key, value, k=9)
    assert torch.equal(topk_attention(query, key, value, k=9, key_index=index), expected)
    assert torch.equal(topk_attention(query, key, value, k=9, key_index=index.copy()), expected)


def test_fewer_pages_are_waited_for_one_by_one(tmp_path):
    key, value = torch.randn(2, 1, 4, 30_000, 64)
    query = torch.randn(1, 4, 1, 64)

    with StoredCache(tmp_path, layers=[0], about={}) as cache:
        key, value = cache.append(0, key, value)
        cache.expect_random_reads(0, True)

        def faults(in_files):
            index = KeyIndex(key, keys_in_files=in_files)
            cache.drop_pages()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            topk_attention(query, key, value, k=64, key_index=index)
            return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before

        waited_for = faults(False)
        if waited_for < 200:
            pytest.skip(f"the folder of tests is not read from a disk: {waited_for} page faults")
        assert faults(True) < waited_for / 5
