"""Inputs that the tests of `convert` share."""

import pytest
import torch
from convert_models import VOCABULARY


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padding():
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    return mask


@pytest.fixture
def right_padding():
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 17:] = 0
    return mask
