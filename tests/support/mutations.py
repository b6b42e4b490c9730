"""Faults that once were in the code, put back one by one: a test must catch each. A command, not part of the suite.

    python tests/support/mutations.py            # all of them, some minutes
    python tests/support/mutations.py bias cache # those with one of these words in their name

A fault is put into a temporary copy of the tree; the tree itself is never changed. It is caught if the copy's tests
fail with it and pass without it. The command fails if one is not caught, or if the code no longer holds its place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("conftest.py", "pyproject.toml", "src", "tests", "experiments", "docs", "results")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "work", "build", "*.egg-info", "*.png")


class Edit(NamedTuple):
    """A piece of a file, which it must hold once, and what stands there with the fault."""

    file: str
    piece: str
    fault: str


class Mutation(NamedTuple):
    """A fault.

    name   what goes wrong with it
    edits  that put it into the code
    tests  that must fail; one of them is enough
    """

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


CONVERT = "src/topk_attention/convert"
NETWORKS = "src/topk_attention/nn/feed_forward.py"
OWN_CONFIGURATION = "    give_own_configuration(model)\n    config = _config_of(model)\n"
CLI = "tests/cli/test_all_commands.py"

MUTATIONS = (
    Mutation(
        "the name is accepted for a model that never asks the interface",
        (
            Edit(f"{CONVERT}/by_name.py", "if (reason := refusal_of_name(self)) is not None:", "if False:"),
            Edit(f"{CONVERT}/by_name.py", "if requested_attention == NAME and is_init_check and", "if False and"),
        ),
        ("tests/convert/test_by_name.py::test_a_class_that_computes_attention_itself_is_refused_when_it_is_built",),
    ),
    Mutation(
        "the name is accepted for a layer with a feature that top-k lacks",
        (Edit(f"{CONVERT}/by_name.py", "if (reason := refusal_of_name(self)) is not None:", "if False:"),),
        ("tests/convert/test_by_name.py::test_a_layer_with_a_feature_that_topk_lacks_is_refused_by_name",),
    ),
    Mutation(
        "the name is looked up in a model's own table of layers",
        (Edit(f"{CONVERT}/by_name.py", "if requested_attention == NAME and is_init_check and", "if False and"),),
        ("tests/convert/test_by_name.py::test_a_class_that_computes_attention_itself_is_refused_when_it_is_built",),
    ),
    Mutation(
        "the name is accepted beside PyTorch's own attention, which stays dense",
        (
            Edit(
                f"{CONVERT}/by_name.py",
                "if torch_layers.is_attention(module) and not torch_layers.is_converted(module):",
                "if False:",
            ),
        ),
        (
            "tests/convert/test_by_name.py::test_a_converted_checkpoint_with_layers_that_the_name_does_not_reach_is_refused",
        ),
    ),
    Mutation(
        "a converted checkpoint that is loaded plainly runs dense without a word",
        (Edit(f"{CONVERT}/by_name.py", "if remembers_conversion(model) and getattr(", "if False and getattr("),),
        (
            "tests/convert/test_by_name.py::test_a_converted_checkpoint_that_is_loaded_plainly_says_that_it_runs_in_full",
        ),
    ),
    Mutation(
        "a learned bias that arrives as a mask gets no gradient",
        (Edit(f"{CONVERT}/attention_function.py", "elif attention_mask.requires_grad:", "elif False:"),),
        (
            "tests/convert/test_masks.py::test_a_learned_bias_that_arrives_as_a_mask_gets_the_gradient_of_eager_attention",
        ),
    ),
    Mutation(
        "a bool mask is added to scores as 0 and 1",
        (
            Edit(
                f"{CONVERT}/masks.py",
                "adds_to = scores.dtype if scores is not None and func in _ADDITIONS else None",
                "adds_to = None",
            ),
        ),
        ("tests/convert/test_masks.py::test_added_to_scores_it_hides_what_the_bool_mask_hides",),
    ),
    Mutation(
        "integer masks are added as numbers",
        (
            Edit(
                f"{CONVERT}/torch_layers.py",
                "if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():",
                "if False:",
            ),
        ),
        ("tests/convert/test_masks.py::test_integer_masks_are_refused_as_the_original_refuses_them",),
    ),
    Mutation(
        "an error in the trial of a network ends convert",
        (
            Edit(
                f"{CONVERT}/network_module.py",
                "except Exception as error:  # whatever its code raises",
                "except ZeroDivisionError as error:  # whatever its code raises",
            ),
        ),
        ("tests/convert/test_reports.py::test_a_network_whose_trial_fails_is_skipped_with_the_error",),
    ),
    Mutation(
        "experts are not listed",
        (
            Edit(
                f"{CONVERT}/unknown_layers.py",
                "if _FEED_FORWARD.search(class_name) or _FEED_FORWARD.fullmatch(name):",
                "if False:",
            ),
        ),
        ("tests/convert/test_reports.py::test_experts_are_listed",),
    ),
    Mutation(
        "hooks on the layers of a network are ignored",
        (Edit(NETWORKS, "if (added := added_to_call(linear)) is not None:", "if (added := None) is not None:"),),
        (
            "tests/convert/test_attachments.py::test_a_network_with_something_attached_to_a_layer_is_skipped_with_the_reason",
            "tests/convert/test_attachments.py::test_what_is_attached_to_a_layer_after_conversion_acts_and_a_warning_names_it",
        ),
    ),
    Mutation(
        "offloaded weights are read where they are not",
        (Edit(NETWORKS, 'if "forward" in vars(module):', "if False:"),),
        ("tests/convert/test_attachments.py::test_offloaded_weights_are_loaded_or_their_network_is_skipped",),
    ),
    Mutation(
        "a failed convert leaves its marks in the configuration",
        (
            Edit(f"{CONVERT}/transaction.py", "for holder in (*modules, *configs.values())]", "for holder in modules]"),
            Edit(f"{CONVERT}/conversion.py", f"{OWN_CONFIGURATION}    _apply(", "    _apply("),
        ),
        (
            "tests/convert/test_transaction.py"
            "::test_an_error_of_transformers_half_way_through_the_parts_of_a_model_leaves_all_of_them",
        ),
    ),
    Mutation(
        "a failed convert leaves weights in another order in memory",
        (Edit(f"{CONVERT}/transaction.py", "if parameter.stride() != stride:", "if False:"),),
        (
            "tests/convert/test_transaction.py"
            "::test_memory_that_runs_out_while_weights_are_stored_by_neuron_leaves_the_former_order",
        ),
    ),
    Mutation(
        "convert changes a configuration that another model shares",
        (Edit(f"{CONVERT}/conversion.py", f"{OWN_CONFIGURATION}    _apply(", "    _apply("),),
        ("tests/convert/test_transaction.py::test_models_that_share_one_configuration_object_are_converted_alone",),
    ),
    Mutation(
        "weights that train are stored by neuron",
        (
            Edit(f"{CONVERT}/conversion.py", "if frozen and uses[", "if uses["),
            Edit(NETWORKS, "is not nn.Parameter or weight.requires_grad or", "is not nn.Parameter or"),
        ),
        (
            "tests/convert/test_order_in_memory.py::test_parameters_of_a_model_that_trains_stay_contiguous",
            "tests/convert/test_order_in_memory.py::test_lbfgs_trains_a_converted_model",
        ),
    ),
    Mutation(
        "a converted network gives its parameters in another order",
        (
            Edit(
                f"{CONVERT}/network_module.py",
                "layer._modules[linear] = layer._modules.pop(linear)",
                "pass",
            ),
        ),
        ("tests/convert/test_order_in_memory.py::test_parameters_keep_their_order_in_which_optimizers_know_them",),
    ),
    Mutation(
        "with every key kept, vmap meets .item()",
        (
            Edit(
                "src/topk_attention/backends/full_attention.py",
                "if torch.compiler.is_compiling() or any(map(_is_batched, (call.query, call.key, call.value))):",
                "if torch.compiler.is_compiling():",
            ),
        ),
        ("tests/functional/test_corners.py::test_every_backend_runs_under_vmap",),
    ),
    Mutation(
        "T5's cache has another name, and every step is taken for the first",
        (
            Edit(f"{CONVERT}/position_bias.py", '("past_key_values", "cache")', '("past_key_values",)'),
            Edit(f"{CONVERT}/position_bias.py", " and any(name in arguments for name in _CACHE_NAMES)", ""),
        ),
        ("tests/convert/test_t5.py::test_the_offsets_stay_right_whatever_transformers_calls_the_cache",),
    ),
    Mutation(
        "an exported program is cut at 512 tokens",
        (Edit(f"{CONVERT}/attention_function.py", "if torch.compiler.is_exporting():", "if False:"),),
        ("tests/convert/test_export.py::test_a_program_of_any_length_serves_lengths_beyond_a_chunk",),
    ),
    Mutation(
        "every process of tensor parallelism takes the k of the first heads",
        (
            Edit(
                f"{CONVERT}/tensor_parallel.py",
                "first = mesh.get_local_rank(axis) * num_heads",
                "first = 0",
            ),
        ),
        ("tests/convert/test_distributed.py::test_k_per_head_is_cut_with_the_heads_of_each_process",),
    ),
    Mutation(
        "within context_parallel each process attends to its own part",
        (Edit("src/topk_attention/functional/attention.py", "    check_context_parallel()\n", ""),),
        ("tests/convert/test_distributed.py::test_context_parallel_is_refused_and_leaves_nothing_behind",),
    ),
    Mutation(
        "U+2028 within a text ends a line of JSON",
        (
            Edit(
                "experiments/topk_experiments/qa/tasks/reading.py",
                'enumerate(content.split("\\n"), 1) if line.strip()',
                "enumerate(content.splitlines(), 1) if line.strip()",
            ),
        ),
        ("experiments/tests/qa/tasks/test_reading.py::test_only_line_feeds_end_a_line",),
    ),
    Mutation(
        "a byte order mark is read as a character",
        (Edit("experiments/topk_experiments/runs/files.py", 'decode("utf-8-sig")', 'decode("utf-8")'),),
        (
            "experiments/tests/qa/tasks/test_reading.py"
            "::test_lines_of_json_are_read_whatever_the_name_and_with_a_byte_order_mark",
            "experiments/tests/lra/tasks/test_files.py::test_lines_of_json_may_begin_with_a_byte_order_mark_and_end_blank",
        ),
    ),
    Mutation(
        "a place that cannot be written is noticed when the work is done",
        (
            Edit(
                "src/topk_attention/cli/options.py",
                "written_folder = _checking(_check_folder)",
                "written_folder = None",
            ),
        ),
        (
            f"{CLI}::test_an_option_that_cannot_be_written_is_refused_with_its_name_its_path_and_the_reason"
            "[lra table --out]",
        ),
    ),
)


def put_into(folder: Path, edits: tuple[Edit, ...]) -> dict[Path, str]:
    """Make the edits in a copy of the tree; returns what the files held.

    Raises:
        LookupError: a file does not hold its piece once.
    """
    before = {folder / edit.file: (folder / edit.file).read_text(encoding="utf-8") for edit in edits}
    after = dict(before)
    for edit in edits:
        path = folder / edit.file
        if (times := after[path].count(edit.piece)) != 1:
            raise LookupError(f"{edit.file} holds {edit.piece!r} {times} times, not once")
        after[path] = after[path].replace(edit.piece, edit.fault)
    _write(after)
    return before


def _write(files: dict[Path, str]) -> None:
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")


def failed_tests(folder: Path, tests: tuple[str, ...]) -> list[str]:
    """The tests of a copy of the tree that fail.

    Raises:
        RuntimeError: they do not run.
    """
    paths = [str(folder / name) for name in ("src", "experiments")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CI": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # an edit within the same second keeps a file's size and time
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--no-header", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) \S+::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


def main(words: list[str]) -> int:
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        folder.mkdir()
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=LEFT_OUT)
            else:
                shutil.copy(source, folder / part)
        if failed := failed_tests(folder, tuple(dict.fromkeys(test for one in chosen for test in one.tests))):
            print(f"without any fault these tests fail: {', '.join(failed)}")
            return 1
        print("| fault | caught by |\n|---|---|")
        for mutation in chosen:
            before: dict[Path, str] = {}
            try:
                before = put_into(folder, mutation.edits)
                failed = failed_tests(folder, mutation.tests)
                caught_by = ", ".join(failed) or "NO TEST"
            except (LookupError, RuntimeError) as error:
                failed, caught_by = [], f"not tried: {error}"
            _write(before)
            if not failed:
                problems.append(mutation.name)
            print(f"| {mutation.name} | {caught_by} |", flush=True)
    print(f"{len(chosen) - len(problems)} of {len(chosen)} faults are caught")
    return 1 if problems or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
