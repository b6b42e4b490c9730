"""A seeded fuzz of conversions over model types: `check` for one of them, and a command for all.

    python tests/support/fuzz_families.py --seeds 5

Each type is built small and at random. Eager attention is the judge: with k at its limit a converted model gives its
outputs, its gradients and its tokens.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import tempfile
import time
import warnings
from collections import Counter
from typing import Any
from unittest import mock

import torch

from small_models import TooLargeError, at_most, inputs_for, small_model
from topk_attention import convert, unconvert

# Longer than any sequence here.
FULL = 1000
_LARGEST = 3_000_000  # parameters; a larger model was not shrunk by the table of sizes


TOO_SLOW = {
    "blt": "its patcher computes a hash of every byte in a loop",
    "emu3": "it holds an image tokenizer that the table of sizes does not reach",
    "kimi_linear": "its linear attention computes token by token in Python",
    "perceiver": "its preprocessors are as large as in the published model",
}


class NotBuiltError(Exception):
    """A type that the table of sizes cannot make small, or whose own forward or backward fails with these inputs."""


def model_types() -> list[str]:
    """Every type of transformers that has a base model, by name."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    return sorted(name for name, config_class in CONFIG_MAPPING.items() if config_class in MODEL_MAPPING)


def check(model_type: str, seed: int = 0) -> str:
    """Convert a random model of this type, compare it with itself, and convert it back.

    Returns "converted", or "refused" where no attention layer could be replaced.

    Raises:
        AssertionError: the converted model is another function, or does not come back as it was.
        NotBuiltError: there is no small model of this type.
    """
    rng = random.Random(f"{model_type} {seed}")
    if model_type in TOO_SLOW:
        raise NotBuiltError(TOO_SLOW[model_type])
    try:
        with at_most(_LARGEST):
            model = small_model(model_type, seed=seed)
        inputs = inputs_for(model, seed)
        expected = results(model, inputs)
    except TooLargeError as error:
        raise NotBuiltError(str(error)) from None
    except Exception as error:  # whatever its own code raises
        raise NotBuiltError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    if not expected[0]:
        raise NotBuiltError("it returns no numbers")
    if not all(torch.isfinite(x).all() for x in (*expected[0], *expected[1].values())):
        raise NotBuiltError("its own eager attention gives numbers that are not finite")
    formers = _implementations(model)
    names = list(model.state_dict())
    options: dict[str, Any] = {
        "attention_k": rng.choice([FULL, "all"]),
        "feed_forward_k": rng.choice([None, "all"]),
        "backend": rng.choice([None, "chunked", "reference", "auto"]),
    }
    try:
        report = convert(model, **options)
    except ValueError as error:
        if not any(words in str(error) for words in ("convert replaced nothing", "does not take its attention")):
            raise
        _assert_equal(results(model, inputs), expected, exact=True)
        _assert_name_is_refused(model)
        return "refused"
    assert report.replaced
    # With sinks all keys are attended to by code of ours, which adds up in another order.
    has_sinks = any(getattr(module, "sinks", None) is not None for module in model.modules())
    _assert_equal(results(model, inputs), expected, atol=2e-6 if has_sinks else 1e-6)
    _assert_generates_as_before(model_type, seed, options)

    has_attention = any(entry.kind == "attention" for entry in report.replaced)
    convert(model, **({"attention_k": 3} if has_attention else {"feed_forward_k": 3}))
    few = results(model, inputs)
    assert all(torch.isfinite(x).all() for x in (*few[0], *few[1].values()))
    _assert_restored_from_disk(model, inputs, few[0])
    unconvert(model)
    assert _implementations(model) == formers
    assert list(model.state_dict()) == names
    _assert_equal(results(model, inputs), expected, exact=True)
    if not has_attention:
        _assert_name_is_refused(model)
    return "converted" if has_attention else "refused"


def results(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Every tensor of numbers that the model returns, and the gradients of its weights."""
    model.zero_grad()
    outputs = outputs_of(model, inputs)
    trained = [x for x in outputs if x.requires_grad]
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in trained)
    if trained:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)  # some models draw numbers in evaluation, too
    with mock.patch.object(torch.nn.functional, "softmax", _softmax_in_own_dtype):
        return list(_numbers(model(**inputs), inputs.get("attention_mask")))


def _softmax_in_own_dtype(scores: torch.Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> torch.Tensor:
    """Eager attention takes the softmax in float32, whatever the model's dtype: too coarse for a judge."""
    return torch.softmax(scores, dim, dtype=None if scores.dtype == torch.float64 else dtype)


def _numbers(output: Any, mask: torch.Tensor | None) -> Any:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            # The states of padding mean nothing.
            yield output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output
    elif isinstance(output, dict):
        for name, part in output.items():
            if "key_values" not in name:
                yield from _numbers(part, mask)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _numbers(part, mask)


def _implementations(model: Any) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def _assert_equal(actual: Any, expected: Any, *, exact: bool = False, atol: float = 1e-6) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": atol}
    assert len(actual[0]) == len(expected[0])
    for number, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        torch.testing.assert_close(x, y, equal_nan=True, msg=lambda m, n=number: f"output {n}: {m}", **tolerance)
    largest = max((g.abs().max().item() for g in expected[1].values() if g.numel()), default=0.0)
    for name, gradient in expected[1].items():
        # A weight that attention does not need, e.g. the bias of keys, has a gradient of rounding errors or none.
        other = actual[1].get(name, torch.zeros_like(gradient))
        bound = tolerance if exact else {"rtol": 1e-4, "atol": 1e-9 + 1e-5 * largest}
        torch.testing.assert_close(other, gradient, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **bound)


def _assert_name_is_refused(model: Any) -> None:
    """Set by name alone, top-k is refused where `convert` refuses it, if there is attention at all."""
    before = _implementations(model)
    has_attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    try:
        model.set_attn_implementation("topk")
    except ValueError as error:
        if 'cannot run with attn_implementation="topk"' not in str(error):
            raise
        assert _implementations(model) == before
    else:
        assert not has_attention, "the name alone is accepted, convert refuses"
        model.set_attn_implementation("eager")


def _assert_generates_as_before(model_type: str, seed: int, options: dict[str, Any]) -> None:
    try:
        model = small_model(model_type, with_head=True, seed=seed)
        inputs = inputs_for(model, seed)
        inputs.pop("decoder_input_ids", None)
        if not model.can_generate() or set(inputs) - {"input_ids", "attention_mask"}:
            return
        # Eager attention gives NaN in float64 for the queries of padding on the left.
        inputs = {"input_ids": inputs["input_ids"]}
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        expected = model.generate(**inputs, **settings)
    except Exception:  # its own code does not generate from these inputs
        return
    convert(model, **options | {"attention_k": FULL})
    actual = model.generate(**inputs, **settings)
    assert torch.equal(actual, expected), "other tokens are generated"


def _assert_restored_from_disk(model: Any, inputs: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception:
            twin = copy.deepcopy(model)
            unconvert(twin)
            try:
                twin.save_pretrained(folder)
            except Exception:  # its own code cannot save it either
                return
            raise
        try:
            loaded = type(model).from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
            loaded = loaded.double().eval()  # families keep some weights in float32
            saved, read = model.state_dict(), loaded.state_dict()
            if saved.keys() != read.keys() or any(not torch.equal(saved[name], read[name]) for name in saved):
                return  # its own code does not load what it saves
        except (ImportError, RuntimeError, OSError):
            return
    convert(loaded)
    for x, y in zip(outputs_of(loaded, inputs), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m: f"loaded again: {m}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="random models per type")
    parser.add_argument("--types", nargs="*", help="model types; all by default")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for model_type in arguments.types or model_types():
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            try:
                outcome = check(model_type, seed)
            except NotBuiltError as error:
                outcome = "not built"
                print(f"{model_type}: not built: {error}", flush=True)
            except Exception as error:
                outcome = "FAILED"
                print(f"{model_type}, seed {seed}: FAILED: {type(error).__name__}: {error}", flush=True)
            outcomes[outcome] += 1
            if arguments.types:
                print(f"{model_type}: {outcome} in {time.perf_counter() - start:.2f} s")
    print(dict(outcomes))
    raise SystemExit(1 if outcomes["FAILED"] else 0)


if __name__ == "__main__":
    main()
