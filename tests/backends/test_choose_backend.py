"""A named backend is taken at its word; "auto" says what it chose and why."""

import pytest

from topk_attention.backends import BACKENDS, choose_backend


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_is_chosen(name):
    assert choose_backend(name).name == name


def test_auto_chooses_a_backend_with_linear_memory_and_says_why():
    choice = choose_backend("auto")
    assert choice.name in BACKENDS
    assert choice.name != "reference"
    assert choice.reason


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r'backend must be one of "auto", "cpu", "chunked", "reference", got .fastest'):
        choose_backend("fastest")
