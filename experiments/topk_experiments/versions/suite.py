"""The part of the test suite that is run with each pair of versions, and the process that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..runs.records import Json
from . import listener


class Claim(NamedTuple):
    """What a group of tests shows.

    tests  files, or "file::test"; a parametrized test is named as a whole, or "file::test[one]"
    """

    name: str
    tests: tuple[str, ...]


# Statuses of pytest: all passed, some failed.
_RAN = (0, 1)
_GO_ON = "--continue-on-collection-errors"
_OPERATIONS, _NETWORKS = "tests/functional/test_attention.py::test_", "tests/functional/test_feed_forward.py::test_"
_COMPILED = "tests/functional/test_compile.py::test_"
_FAMILIES, _T5 = "tests/convert/test_all_families.py::test_", "tests/convert/test_t5.py::test_"
_SINKS, _FUSED = "tests/convert/test_sinks_and_soft_caps.py::test_", "tests/convert/test_fused_networks.py::test_"
_EXPERTS, _ADAPTERS = "tests/convert/test_experts.py::test_", "tests/convert/test_adapters.py::test_"
_CACHE, _NAME = "tests/convert/test_cache.py::test_", "tests/convert/test_by_name.py::test_"


def _each(names: Sequence[str], *tests: str) -> tuple[str, ...]:
    """These tests with each of these parameters."""
    return tuple(f"{test}[{name}]" for test in tests for name in names)


CLAIMS = (
    Claim(
        "attention and feed-forward operations on every backend",
        (
            f"{_OPERATIONS}output_and_gradients_are_those_of_softmax_over_the_k_best_keys",
            f"{_OPERATIONS}fast_backends_equal_the_reference",
            f"{_NETWORKS}with_all_neurons_it_is_the_ordinary_layer",
            f"{_NETWORKS}a_gated_layer_keeps_the_largest_products_in_magnitude",
            f"{_NETWORKS}autocast_casts_like_linear_and_sums_in_float32",
        ),
    ),
    Claim(
        "compilation without a break",
        (
            *_each(
                ("cpu-plain-some", "cpu-causal-all", "chunked-padding_mask-some", "chunked-sinks-some"),
                f"{_COMPILED}compiled_attention_equals_eager_attention",
            ),
            f"{_COMPILED}compiled_feed_forward_equals_eager_feed_forward",
            f"{_COMPILED}a_compiled_call_returns_the_selection",
            f"{_T5}a_compiled_model_equals_the_eager_one",
            f"{_CACHE}a_compiled_model_takes_it",
            f"{_ADAPTERS}an_adapted_model_compiles_without_a_break[gpt_neo]",
        ),
    ),
    Claim(
        "twelve families: outputs, gradients, saving, unconvert",
        (
            f"{_FAMILIES}with_every_key_and_neuron_kept_outputs_and_all_gradients_are_the_originals",
            f"{_FAMILIES}below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask",
            f"{_FAMILIES}a_topk_network_equals_a_dense_one_whose_other_neurons_are_zeroed",
            f"{_FAMILIES}a_saved_model_restores_every_k_in_a_fresh_object",
            f"{_FAMILIES}unconverting_gives_the_original_modules_and_outputs_back",
        ),
    ),
    Claim(
        "gpt-oss, Gemma 2, Phi-3, ModernBERT, CLIP, Mixtral, Qwen3-MoE, DeBERTa v3, Falcon, MPNet",
        (
            *_each(
                ("GptOss", "Gemma2"),
                f"{_SINKS}below_the_limit_outputs_and_all_gradients_are_those_of_a_dense_topk_mask",
                f"{_SINKS}generation_keeps_the_keys_that_a_dense_mask_would",
            ),
            *_each(("GptOss", "Gemma2"), f"{_SINKS}a_saved_model_restores_its_k"),
            *_each(
                ("phi3", "modernbert", "clip"),
                f"{_FUSED}outputs_and_all_gradients_are_those_of_a_dense_topk",
                f"{_FUSED}it_generates_saves_loads_and_comes_back",
            ),
            *_each(
                ("mixtral", "qwen3_moe"),
                f"{_EXPERTS}each_token_uses_the_k_best_neurons_of_each_of_its_experts",
                f"{_EXPERTS}a_saved_model_is_an_ordinary_checkpoint_that_remembers_every_k",
            ),
            f"{_EXPERTS}a_converted_model_generates_what_the_whole_sequence_gives[mixtral]",
            *_each(
                ("deberta_v3-left", "falcon-left", "mpnet-left"),
                f"{_ADAPTERS}with_a_small_k_output_and_every_gradient_are_those_of_a_dense_topk_softmax",
            ),
            *_each(("deberta_v3", "falcon", "mpnet"), f"{_ADAPTERS}saving_and_loading_restore_every_k"),
            f"{_ADAPTERS}cached_steps_keep_the_keys_of_a_dense_topk_softmax[falcon]",
        ),
    ),
    Claim(
        "generation and caches",
        (
            f"{_FAMILIES}generation_with_a_cache_equals_the_original_token_by_token",
            f"{_FAMILIES}generation_below_the_limit_keeps_the_keys_that_a_dense_mask_would",
            f"{_T5}the_offsets_stay_right_whatever_transformers_calls_the_cache",
            f"{_CACHE}generate_takes_it_by_default_and_gives_the_tokens_of_a_dynamic_cache",
            f"{_CACHE}other_ways_to_generate_give_the_tokens_of_a_dynamic_cache",
            f"{_CACHE}keys_that_someone_else_puts_into_a_layer_are_continued",
            f"{_CACHE}layers_are_those_of_a_dynamic_cache_but_for_the_plain_growing_ones",
        ),
    ),
    Claim(
        "attn_implementation by name",
        (f"{_FAMILIES}the_name_alone_runs_the_default_k", "tests/convert/test_by_name.py"),
    ),
    Claim(
        "caches in files",
        (
            "tests/convert/test_stored_layers.py::test_generation_gives_the_tokens_of_a_cache_in_memory",
            "tests/convert/test_stored_layers.py::test_a_conversation_is_continued_from_the_folder",
        ),
    ),
    Claim(
        "pretrained MiniLM",
        (
            "tests/convert/test_real_models.py::"
            "test_minilm_hidden_states_with_every_key_and_neuron_kept_are_within_1e_4_of_eager",
        ),
    ),
)


def run_suite(folders: Sequence[Path], claims: Sequence[Claim], time_limit_s: float) -> Json:
    """Run the tests of some claims in a process that finds packages in these folders first.

    What a version only calls deprecated counts as no failure: it works.

    Returns for a record:

    outcome     "finished", "time limit" or "crash"; of the latter two `message` has more
    ran_with    the versions as the process had them
    kernels     why the compiled kernels were not there; None where they were
    claims      claim -> passed, failed, skipped: how many tests
    failures    test -> the error
    skips       why tests were skipped -> how many
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", listener.VARIABLE: str(answer)}
        deprecations = [f"-Wdefault::{kind}" for kind in ("DeprecationWarning", "FutureWarning")]
        options = ["-p", "no:cacheprovider", "-p", listener.__name__, "--quiet", "--tb=short", _GO_ON, *deprecations]
        tests = [test for claim in claims for test in claim.tests]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        try:
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=time_limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return {"outcome": "time limit", "message": f"not finished after {time_limit_s:g} s"}
        if process.returncode not in _RAN or not answer.exists():
            last = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()][-3:]
            return {"outcome": "crash", "message": f"status {process.returncode}: {'; '.join(last)}"[:500]}
        return {"outcome": "finished"} | summary(json.loads(answer.read_text()), claims)


def summary(answer: Json, claims: Sequence[Claim]) -> Json:
    """For a record, from what the listener wrote: the outcomes by claim, failures and reasons of skips.

    Raises:
        ValueError: a test belongs to no claim, or a claim has no test.
    """
    counts: dict[str, Json] = {claim.name: {"passed": 0, "failed": 0, "skipped": 0} for claim in claims}
    skips: dict[str, int] = {}
    for test, outcome in answer["outcomes"].items():
        counts[_claim_of(test, claims)][outcome] += 1
        if outcome == "skipped":
            reason = answer["reasons"].get(test, "")
            skips[reason] = skips.get(reason, 0) + 1
    if empty := [name for name, count in counts.items() if not any(count.values())]:
        raise ValueError(f"no test was run for {', '.join(empty)}; mend the names of their tests in {__name__}")
    failures = {test: answer["reasons"][test] for test, outcome in answer["outcomes"].items() if outcome == "failed"}
    return {
        "ran_with": answer["versions"],
        "kernels": answer["kernels"],
        "claims": counts,
        "failures": failures,
        "skips": skips,
    }


def _claim_of(test: str, claims: Sequence[Claim]) -> str:
    """The claim whose name of a test is the longest that this one begins with."""
    fitting = [(len(named), claim.name) for claim in claims for named in claim.tests if test.startswith(named)]
    if not fitting:
        raise ValueError(f"{test} belongs to no claim of {__name__}")
    return max(fitting)[1]
