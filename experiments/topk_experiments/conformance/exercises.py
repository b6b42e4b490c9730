"""What a model does in every way that its attention may differ: each exercise gives tensors to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import NUM_TOKENS, Inputs, arguments_of, likely_images, likely_inputs, token_ids

Results = dict[str, Tensor]
Exercise = Callable[[Any], Results]
PADDING = 6
GENERATED = {
    "generation": {},
    "generation, no cache": {"use_cache": False},
    "generation, static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "max_new_tokens": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
# The exercises that whatever does not touch masks and caches is tried on.
FEW = ("plain", "right padding", "images", "gradients")
_OUTPUTS = (
    *("logits", "last_hidden_state", "prediction_logits", "prediction_outputs", "reconstruction", "logits_per_image"),
    *("pred_masks", "predicted_depth", "lm_logits", "start_logits", "spectrogram", "pooler_output"),
)
_LONGEST_PROMPT = 14
# The same mask [B, 1, N, M] in two forms. Eager attention adds truth values to scores as if they were numbers: what
# they mean, it says where it is given numbers.
OF_TRUTHS, OF_NUMBERS = "a mask of truth values", "a mask of numbers"


class NoInputsError(ValueError):
    """Of all likely inputs a model took none."""


@dataclass(frozen=True)
class Given:
    """What a model is given.

    forward  arguments of its forward
    images   arguments of its get_image_features; None where it takes none of those tried
    """

    forward: Inputs
    images: Inputs | None

    def shapes(self) -> dict[str, list[int]]:
        named = {**self.forward, **{f"images: {name}": value for name, value in (self.images or {}).items()}}
        return {name: list(value.shape) for name, value in named.items()}


def forget(model: Any) -> None:
    """Take away what an earlier call has left for the next one: the positions of images in Qwen's kind."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def find_inputs(model: Any) -> Given:
    """The first likely inputs from which the model computes numbers.

    Raises:
        NoInputsError: it takes none of them; the message has the first error.
    """
    errors: list[str] = []
    for inputs in likely_inputs(model):
        try:
            if _is_finite(_forward(inputs, None, model)):
                return Given(inputs, _find_images(model))
        except Exception as error:  # whatever a model raises at what it does not take
            errors.append(str(error).strip().split("\n")[0][:120])
        else:
            errors.append("it gives numbers that are not finite")
    needed = [
        name
        for name, one in arguments_of(model.forward).items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    said = "; ".join(f"{number} times: {error}" for error, number in Counter(errors).most_common(3))
    raise NoInputsError(
        f"takes none of the likely inputs ({said}); it needs {', '.join(needed) or 'no argument by name'}"
    )


def _find_images(model: Any) -> Inputs | None:
    for inputs in likely_images(model):
        try:
            if _is_finite(_image_features(inputs, model)):
                return inputs
        except Exception:
            continue
    return None


def exercises(model: Any, given: Given, *, generating: Mapping[str, Any] = GENERATED) -> dict[str, Exercise]:
    """All exercises that a model's forward has the arguments for. Some may still fail in the original model itself."""
    inputs, names = given.forward, arguments_of(model.forward)
    forward = dict(_ways_of_forward(inputs, names))
    found: dict[str, Exercise] = {name: partial(_forward, *way) for name, way in forward.items()}
    if given.images is not None:
        found["images"] = partial(_image_features, given.images)
    generates = hasattr(model, "generate") and model.can_generate()
    if generates and set(inputs) <= {"input_ids", "attention_mask"}:
        found["in pieces"] = partial(_in_pieces, False)
        found["in pieces, padded"] = partial(_in_pieces, True)
    padded = forward.get("right padding") or forward["plain"]
    found["gradients"] = partial(_gradients, *padded)
    if getattr(model, "supports_gradient_checkpointing", False):
        found["gradients, checkpointing"] = partial(_gradients_with_checkpoints, *padded)
    if generates:
        prompt = dict((forward.get("left padding") or forward["plain"])[0])
        prompt.pop("decoder_input_ids", None)
        if set(prompt) <= {"input_ids", "attention_mask"}:
            prompt = {name: value[:, :_LONGEST_PROMPT] for name, value in prompt.items()}
        for name, options in generating.items():
            found[name] = partial(_generate, prompt, options)
    return found


def _ways_of_forward(inputs: Inputs, names: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Inputs, Tensor | None]]]:
    """Name -> arguments of forward and which positions [B, N] of the output count; None: all."""
    yield "plain", (inputs, None)
    ids = inputs.get("input_ids")
    if ids is None or "attention_mask" not in names:
        return
    decoded = inputs.get("decoder_input_ids")
    for side in ("right", "left"):
        mask = _padded(ids, 0, side, PADDING)
        yield f"{side} padding", ({**inputs, "attention_mask": mask}, mask.bool() if decoded is None else None)
        if decoded is not None and "decoder_attention_mask" in names:
            of_decoder = _padded(decoded, 1, side, PADDING // 2)
            masks = {"attention_mask": mask, "decoder_attention_mask": of_decoder}
            yield f"{side} padding of the decoder", ({**inputs, **masks}, of_decoder.bool())
    if set(inputs) - {"attention_mask"} != {"input_ids"}:
        return
    if "position_ids" in names:
        positions = torch.cat([torch.arange(8), torch.arange(NUM_TOKENS - 8)])[None]
        if ids.shape[1] == NUM_TOKENS:
            yield "packed", ({"input_ids": ids[:1], "position_ids": positions}, None)
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    visible[:, 3] = False
    visible[3, 3] = True
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for name, mask in ((OF_TRUTHS, visible), (OF_NUMBERS, hidden)):
        yield name, ({**inputs, "attention_mask": mask[None, None].expand(len(ids), 1, -1, -1)}, None)


def _padded(ids: Tensor, row: int, side: str, number: int) -> Tensor:
    mask = torch.ones_like(ids)
    mask[row, -number:] = 0
    return mask if side == "right" else mask.flip(1)


def _forward(inputs: Inputs, counting: Tensor | None, model: Any) -> Results:
    torch.manual_seed(0)
    with torch.no_grad():
        output = main_output(model(**_without_cache(model, inputs)))
    return {"output": _counted(output, counting)}


def _image_features(inputs: Inputs, model: Any) -> Results:
    torch.manual_seed(0)
    with torch.no_grad():
        return {"output": main_output(model.get_image_features(**inputs))}


def _in_pieces(is_padded: bool, model: Any) -> Results:
    """The prompt in pieces of 12, 5 and 1 tokens, each after those that are cached."""
    ids = token_ids()
    mask = _padded(ids, 0, "left", PADDING) if is_padded else torch.ones_like(ids)
    cache, outputs, start = None, [], 0
    with torch.no_grad():
        for end in (12, 17, 18):
            part = model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
            cache, start = part.past_key_values, end
            outputs.append(part.logits)
    return {"output": _counted(torch.cat(outputs, 1), mask[:, :start].bool())}


def _gradients(inputs: Inputs, counting: Tensor | None, model: Any) -> Results:
    """The gradients of all weights, and of the first input that has one."""
    torch.manual_seed(0)
    model.zero_grad()
    inputs, leaf = dict(inputs), None
    for name, value in inputs.items():
        if value.is_floating_point() and "mask" not in name:
            leaf = inputs[name] = value.clone().requires_grad_()
            break
    output = _counted(main_output(model(**_without_cache(model, inputs))), counting)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if leaf is not None and leaf.grad is not None:
        gradients["(input)"] = leaf.grad
    model.zero_grad()
    return gradients


def _gradients_with_checkpoints(inputs: Inputs, counting: Tensor | None, model: Any) -> Results:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # its statistics would change with every call
            module.eval()
    try:
        return _gradients(inputs, counting, model)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def _generate(prompt: Inputs, options: Mapping[str, Any], model: Any) -> Results:
    first = int("prompt_lookup_num_tokens" in options)  # of one sequence alone
    prompt = {name: value[first:].clone() for name, value in prompt.items()}  # BLIP writes into its prompt
    torch.manual_seed(0)
    made = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        found = model.generate(**prompt, **made | dict(options))
    results = {"tokens": found.sequences}
    for number, logits in enumerate(getattr(found, "logits", None) or ()):
        results[f"logits {number}"] = logits
    return results


def _without_cache(model: Any, inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "use_cache": False} if "use_cache" in arguments_of(model.forward) else dict(inputs)


def main_output(output: Any) -> Tensor:
    """The tensor of a model's output that is compared: logits, hidden states, or whatever it has.

    Raises:
        ValueError: it has no tensor of numbers.
    """
    for name in _OUTPUTS:
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    found = next(_tensors(list(output.to_tuple()) if hasattr(output, "to_tuple") else output), None)
    if found is None:
        raise ValueError(f"the output, {type(output).__name__}, holds no tensor of numbers")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _counted(output: Tensor, counting: Tensor | None) -> Tensor:
    fits = counting is not None and output.shape[: counting.ndim] == counting.shape
    return output[counting] if fits else output


def _is_finite(results: Results) -> bool:
    return all(bool(value.isfinite().all()) for value in results.values())
