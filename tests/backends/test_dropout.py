"""Dropout masks are a function of position that looks random in every direction."""

import math

import pytest
import torch

from topk_attention.backends.dropout import draw_seed, keep_mask

ROWS, COLUMNS = 256, 4096
SEEDS = pytest.mark.parametrize("seed", [0, 1, 12345, 2**32, 2**61 + 7])


def mask(seed, dropout_p=0.5, rows=ROWS, columns=COLUMNS, first_row=0, first_column=0):
    return keep_mask(
        torch.tensor(seed),
        torch.arange(first_row, first_row + rows)[:, None],
        torch.arange(first_column, first_column + columns),
        dropout_p,
    )


def standardised(mask):
    mask = mask.double()
    return (mask - mask.mean(1, keepdim=True)) / mask.std(1, keepdim=True, correction=0)


@SEEDS
@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_each_row_and_each_column_keeps_its_share(seed, dropout_p):
    kept = mask(seed, dropout_p).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(ROWS * COLUMNS)
    # 256 rows and 4096 columns: six deviations leave room for the worst of them, and for the skew of rare events.
    assert ((kept.mean(1) - (1 - dropout_p)).abs() < 6 * deviation / math.sqrt(COLUMNS)).all()
    assert ((kept.mean(0) - (1 - dropout_p)).abs() < 8 * deviation / math.sqrt(ROWS) + 1 / ROWS).all()


@SEEDS
def test_rows_are_not_correlated(seed):
    rows = standardised(mask(seed))
    correlations = (rows @ rows.T / COLUMNS).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(COLUMNS)


@SEEDS
def test_columns_are_not_correlated(seed):
    columns = standardised(mask(seed, rows=4096, columns=256).T)
    correlations = (columns @ columns.T / 4096).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(4096)


@SEEDS
def test_no_row_is_another_row_shifted(seed):
    spectra = torch.fft.rfft(standardised(mask(seed, rows=64)))
    for first in range(64):  # the correlation of every pair of rows at every shift
        correlations = torch.fft.irfft(spectra[first] * spectra.conj(), n=COLUMNS) / COLUMNS
        correlations[first, 0] = 0  # with itself
        assert correlations.abs().max() < 7 / math.sqrt(COLUMNS)


def test_drawn_seeds_give_uncorrelated_masks():
    seeds = [int(draw_seed(torch.device("cpu"))) for _ in range(16)]
    rows = standardised(torch.cat([mask(seed, rows=16) for seed in seeds]))
    correlations = (rows @ rows.T / COLUMNS).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(COLUMNS)


@pytest.mark.parametrize("first_row", [2**31 - 8, 2**32 - 8, 2**40])
def test_row_numbers_may_exceed_32_bits(first_row):
    rows = standardised(torch.cat([mask(5, rows=16, first_row=first_row), mask(5, rows=16)]))
    correlations = (rows @ rows.T / COLUMNS).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(COLUMNS)


def test_far_columns_differ_from_near_ones():
    kept = standardised(torch.cat([mask(5, rows=16), mask(5, rows=16, first_column=2**31 - COLUMNS)]))
    correlations = (kept @ kept.T / COLUMNS).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(COLUMNS)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_an_entry_does_not_depend_on_which_others_are_asked_for(dropout_p):
    whole = mask(3, dropout_p)
    assert torch.equal(
        mask(3, dropout_p, rows=7, columns=5, first_row=100, first_column=2000), whole[100:107, 2000:2005]
    )
    columns = torch.randint(COLUMNS, (ROWS, 10))
    gathered = keep_mask(torch.tensor(3), torch.arange(ROWS)[:, None], columns, dropout_p)
    assert torch.equal(gathered, whole.gather(1, columns))


def test_what_a_low_probability_drops_a_higher_one_drops_too():
    assert not (mask(3, 0.5) & ~mask(3, 0.2)).any()


def test_masks_are_the_same_on_every_machine():
    # A hash, not a generator: these bits may never change, or saved seeds would mean something else.
    kept = mask(42, 0.5, rows=2, columns=16).int()
    assert kept.tolist() == [
        [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1],
    ]


def test_a_seed_is_drawn_from_torchs_generator():
    torch.manual_seed(7)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(7)
    assert draw_seed(torch.device("cpu")) == first
    assert first != second
    assert first.shape == ()
    assert first.dtype == torch.int64
    seeds = torch.stack([draw_seed(torch.device("cpu")) for _ in range(200)])
    assert (seeds >= 0).all()
    assert (seeds >> 32).unique().numel() > 190  # the high bits are used
