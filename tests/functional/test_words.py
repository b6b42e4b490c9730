"""A k that leaves nothing out is named as full attention."""

from __future__ import annotations

import pytest

from topk_attention.functional.words import full_attention_note, k_in_words


@pytest.mark.parametrize(("k", "is_full"), [(8, False), (9, True), (10, True)])
def test_a_k_of_all_keys_or_more_is_named(k, is_full):
    assert k_in_words(k, 9) == f"k = {k}" + " (every key: full attention)" * is_full
    expected = f"k = {k} is full attention here: no query has more than 9 keys"
    assert full_attention_note(k, 9) == (expected if is_full else None)


def test_of_several_k_those_that_leave_nothing_out_are_named_once_in_order():
    expected = "k = 9, 70 are full attention here: no query has more than 9 keys"
    assert full_attention_note([70, 8, 9, None, 70], 9) == expected


def test_nothing_is_said_without_a_k_or_a_length():
    assert full_attention_note(None, 9) is None
    assert full_attention_note([], 9) is None
    assert full_attention_note(9, None) is None
    assert k_in_words(9) == "k = 9"
