"""Inputs that the tests of `convert` share."""

import pytest
import torch

from convert_models import VOCABULARY, topk_eager


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


@pytest.fixture
def dense_topk():
    """Registers `topk_eager` with transformers' eager mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("topk_eager", topk_eager)
    AttentionMaskInterface.register("topk_eager", eager_mask)
    yield
    AttentionInterface._global_mapping.pop("topk_eager")
    AttentionMaskInterface._global_mapping.pop("topk_eager")
