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
    """For each model type: "converted" or "refused", or the kind of what was raised and its words.

    Not the exceptions: their tracebacks would hold every model that could not be made small, several GiB.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many families' own code
        for model_type in model_types():
            try:
                found[model_type] = check(model_type), ""
            except NotBuiltError as error:
                found[model_type] = "not built", str(error)
            except Exception as error:
                found[model_type] = "failed", f"{type(error).__name__}: {error}"
    return found


def test_a_converted_model_of_any_type_is_the_original_with_every_key_kept(outcomes):
    failed = [f"{name}: {words}" for name, (outcome, words) in outcomes.items() if outcome == "failed"]
    assert not failed, "\n".join(failed)


def test_the_fuzz_reaches_many_types_and_says_why_it_leaves_the_others_out(outcomes):
    reached = [outcome for outcome, _ in outcomes.values()]
    assert reached.count("converted") >= FEWEST_CONVERTED
    assert reached.count("refused") >= FEWEST_REFUSED
    left_out = {name: words for name, (outcome, words) in outcomes.items() if outcome == "not built"}
    assert all(left_out.values())
    print("\n".join(f"{name}: {reason}" for name, reason in left_out.items()))
