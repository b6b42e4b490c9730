"""Which claims of all backends are tried on the Triton kernels whenever the tests run.

Triton's interpreter takes half a second for a call of seven queries, however few the keys. With
TOPK_ATTENTION_EVERY_TRITON_CLAIM=1 every claim is tried, which takes most of an hour.
"""

import os
import re

# Names of tests, and what their parameters have to match.
_CLAIMS = {
    # Every kind of call but completed ones, which "chunked" computes
    "test_fast_backends_equal_the_reference": r"triton-(?!completed).*-3\]",
    "test_fast_backends_keep_the_keys_the_reference_keeps": r"triton-(?!completed)",
    "test_one_seed_drops_the_same_weights_as_in_the_reference": r"triton-(plain|k_per_head|grouped_query_heads)-some",
    # Shapes and layouts
    "test_causal_queries_are_aligned_with_the_last_keys": r"tile-2-",
    "test_a_negative_scale_keeps_the_keys_with_the_smallest_products": "",
    "test_values_may_have_another_size_than_keys": r"tile-(1|17)-3\]",
    "test_empty_inputs_give_zeros_of_the_right_shape_and_zero_gradients": "one k|k per head",
    "test_strides_of_the_inputs_do_not_matter": r"-3\]",
    "test_expanded_inputs_get_the_sum_of_their_gradients": r"-3\]",
    # Ties
    "test_of_tied_keys_the_lower_index_is_kept": "",
    "test_ties_within_and_across_key_blocks_are_broken_as_by_a_stable_sort": r"tile-2-(1|3|22)-",
    "test_hidden_keys_take_no_part_in_ties": "",
    "test_gradients_flow_to_the_kept_one_of_tied_keys_alone": "",
    "test_integer_inputs_full_of_ties_select_the_same_keys_in_every_dtype": r"tile-3-",
    # Hidden keys, and what is not finite
    "test_a_query_without_keys_returns_zeros_and_gets_zero_gradient": r"-3-|\[3-|-3\]",
    "test_hidden_nan_or_inf_reaches_no_output_and_no_gradient": r"-3-|\[3-|-3\]",
    "test_nan_or_inf_in_a_visible_key_makes_its_rows_nan_and_leaves_others_untouched": r"-3-|\[3-|-3\]",
    "test_nan_or_inf_in_the_future_does_not_reach_the_past": r"-3-|\[3-|-3\]",
    "test_hidden_nan_behind_a_relative_bias_of_minus_inf_does_not_reach_the_output": r"-3-|\[3-|-3\]",
    # Sinks and soft caps
    "test_attention_is_that_of_a_softmax_with_one_more_score_per_head": r"(0.4|None)-3\]",
    "test_a_soft_cap_that_rounds_scores_to_the_same_number_keeps_their_order": "",
    "test_of_tied_keys_the_lower_index_is_kept_under_a_cap_and_a_sink": "",
    "test_weights_sum_to_one_less_those_of_the_sink_and_the_rest": r"(?!.*completed)",
    "test_a_query_that_sees_no_key_returns_zeros_beside_a_sink_too": r"\[3-|-3\]",
    "test_dropout_leaves_the_sink_its_weight": "",
}


def is_triton_claim(test: str) -> bool:
    """Whether a test with this id is run in the interpreter."""
    if "triton" not in test:
        return False
    if "tests/backends/triton" in test or os.environ.get("TOPK_ATTENTION_EVERY_TRITON_CLAIM") == "1":
        return True
    name = test.rpartition("::")[2].partition("[")[0]
    return name in _CLAIMS and re.search(_CLAIMS[name], test) is not None
