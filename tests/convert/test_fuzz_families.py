"""Every type of transformers that can be made small is converted, compared with its own eager attention and restored.

`python tests/support/fuzz_families.py --seeds 5` does the same with more random models.
"""

from __future__ import annotations

import warnings

import pytest

from fuzz_families import NotBuiltError, check, model_types

# Half of what transformers 5.23 has; other versions know other types.
FEWEST_CONVERTED, FEWEST_REFUSED = 120, 25


@pytest.fixture(scope="module")
def outcomes():
    """For each model type: "converted", "refused", or what was raised."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many families' own code
        for model_type in model_types():
            try:
                found[model_type] = check(model_type)
            except Exception as error:
                found[model_type] = error
    return found


def test_a_converted_model_of_any_type_is_the_original_with_every_key_kept(outcomes):
    failed = {
        name: f"{type(outcome).__name__}: {outcome}"
        for name, outcome in outcomes.items()
        if isinstance(outcome, Exception) and not isinstance(outcome, NotBuiltError)
    }
    assert not failed, "\n".join(f"{name}: {words}" for name, words in failed.items())


def test_the_fuzz_reaches_many_types_and_says_why_it_leaves_the_others_out(outcomes):
    assert list(outcomes.values()).count("converted") >= FEWEST_CONVERTED
    assert list(outcomes.values()).count("refused") >= FEWEST_REFUSED
    left_out = {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, NotBuiltError)}
    assert all(left_out.values())
    print("\n".join(f"{name}: {reason}" for name, reason in left_out.items()))
