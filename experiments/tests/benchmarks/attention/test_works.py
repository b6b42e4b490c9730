from dataclasses import replace

import pytest

from topk_experiments.benchmarks.attention.works import GOALS, KS, LENGTHS, TABLE, Work

WORK = Work(num_heads=4, length=8192, k=64)


def test_every_row_of_the_table_has_a_goal():
    assert set(GOALS) == set(TABLE.values())
    assert GOALS[WORK].forward_backward == 10.0


def test_the_sweeps_double_from_1024_to_131072_keys_and_from_8_to_1024_kept_ones():
    assert [work.length for work in LENGTHS] == [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    assert [work.k for work in KS] == [8, 16, 32, 64, 128, 256, 512, 1024]


def test_saved_indices_and_weights_take_eight_bytes_for_each_kept_key():
    assert WORK.saved_mib == 4 * 8192 * 64 * 8 / 2**20
    assert Work(num_heads=1, length=16, k=64).saved_mib == 16 * 16 * 8 / 2**20


def test_a_work_names_what_sets_it_apart():
    assert str(WORK) == "H = 4, L = 8,192, k = 64"
    assert str(replace(WORK, is_causal=True, dropout_p=0.1)) == "H = 4, L = 8,192, k = 64, causal, dropout 0.1"
    assert str(replace(WORK, bias="learned")).endswith("learned relative bias")
    assert str(replace(WORK, dtype="bfloat16")) == "H = 4, L = 8,192, k = 64, bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, r"k must be at least 1 and below 2\^31, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"bias": "alibi"}, "bias must be one of none, learned, got 'alibi'"),
    ],
)
def test_a_work_that_cannot_be_done_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(WORK, **change)
