"""Layers that hold attention or a feed-forward network in a form that nothing here knows. The report names them too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..nn.linears import full_name, is_plain_linear, weight_and_bias
from .report import ReportEntry

# What model families call such layers. Their parts have other names, so the innermost layer that matches is meant.
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|experts?(?![a-z])|moe(?:block)?$|intermediate|glu(?![a-z])|ff(?![a-z])", re.IGNORECASE
)
# The two linear layers of a network that a whole layer computes in its own code.
_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("lin1", "lin2"), ("wi", "wo"), ("w1", "w2"))


def unknown_layers(model: nn.Module, known: Sequence[str]) -> list[ReportEntry]:
    """An entry for each layer of either kind that is at or around none of the known paths.

    known  paths of the layers that the report names already
    """
    listed: list[ReportEntry] = []
    taken = [f"{path}." for path in known]
    # From the innermost to the outermost, so that a layer around one that is named is not named again.
    for path, module in sorted(model.named_modules(), key=lambda item: -item[0].count(".")):
        if not path or any(other.startswith(f"{path}.") or f"{path}.".startswith(other) for other in taken):
            continue
        entry = _entry(path, module)
        if entry is not None:
            listed.append(entry)
            taken.append(f"{path}.")
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    return sorted(listed, key=lambda entry: (entry.kind, order[entry.path]))


def _entry(path: str, module: nn.Module) -> ReportEntry | None:
    kind = _kind_of(path, module)
    if kind is None:
        return None
    return ReportEntry(path, kind, None, _reason(kind, module))


def _kind_of(path: str, module: nn.Module) -> Literal["attention", "feed_forward"] | None:
    matrices = _matrices(module)
    if len(matrices) < 2 or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    class_name, name = type(module).__name__, path.rpartition(".")[2]
    if _ATTENTION.search(class_name):
        # Scores need queries, keys and values, be they of one matrix; then there is a second one for the output.
        return "attention"
    if _FEED_FORWARD.search(class_name) or _FEED_FORWARD.fullmatch(name):
        return "feed_forward"
    if any(set(pair) <= set(matrices) for pair in _PAIRS):
        return "feed_forward"
    return None


def _matrices(module: nn.Module) -> dict[str, Any]:
    """The weights of a layer's own linear layers by name, and its own weights with two or more axes."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2}
    of_children = {
        name: weight
        for name, child in module.named_children()
        if getattr(weight := getattr(child, "weight", None), "ndim", 0) >= 2 and not isinstance(child, nn.Embedding)
    }
    return own | of_children


def _reason(kind: str, module: nn.Module) -> str:
    name = full_name(type(module))
    if kind == "attention":
        return f"{name} computes attention in its own code and does not ask transformers' attention interface"
    matrices = _matrices(module)
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return f"{name} holds the weights of all its experts in tensors of three axes, in a form that is not known here"
    if fused := next(iter(_fused(module)), None):
        return f"{name} holds gate and up in one matrix, {fused}, and this form of network is not known here"
    return f"{name} is a form of feed-forward network that is not known here ({', '.join(matrices)})"


def _fused(module: nn.Module) -> Iterator[str]:
    """Names of linear layers whose output is twice as wide as the input of another one."""
    sizes: dict[str, tuple[int, int]] = {}  # input, output
    for name, child in module.named_children():
        if is_plain_linear(child):
            rows, columns = weight_and_bias(child)[0].shape
            sizes[name] = (columns, rows)
    for name, (_, size_out) in sizes.items():
        if any(size_out == 2 * size_in for other, (size_in, _) in sizes.items() if other != name):
            yield name
