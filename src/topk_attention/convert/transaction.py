"""What makes `convert` and `unconvert` all or nothing: whatever is raised, the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .configurations import is_config, parts_of


@contextmanager
def all_or_nothing(model: object) -> Iterator[None]:
    """Put the model back as it was if anything is raised inside, also by Ctrl-C.

    What is noted are references: modules, weights, hooks and settings by name. Of the weights only the order in memory
    is noted, because nothing here changes a value.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    before = _Before(model)
    try:
        yield
    except BaseException:
        try:
            before.restore()
        except KeyboardInterrupt:  # a second Ctrl-C: half of it put back would be worse than all or nothing
            before.restore()
        raise


class _Before:
    """A model's modules and configurations, attribute by attribute."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(every_module(model))
        values = (value for module in modules for value in vars(module).values())
        configs = {id(config): config for value in values for config in parts_of(value)}
        self.classes = [(module, type(module)) for module in modules]
        self.attributes = [_Attributes(vars(holder)) for holder in (*modules, *configs.values())]
        self.strides = [(parameter, parameter.stride()) for parameter in model.parameters() if _has_strides(parameter)]

    def restore(self) -> None:
        for module, its_class in self.classes:
            if type(module) is not its_class:
                module.__class__ = its_class
        for attributes in self.attributes:
            attributes.restore()
        for parameter, stride in self.strides:
            if parameter.stride() != stride:
                parameter.data = torch.empty_strided(
                    parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                ).copy_(parameter.data)


class _Attributes:
    """An object's attributes. Dictionaries among them, such as hooks and submodules, are noted entry by entry: others
    know these very dictionaries."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.owner = attributes
        self.values = dict(attributes)
        self.entries = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]

    def restore(self) -> None:
        for dictionary, values in ((self.owner, self.values), *self.entries):
            if len(dictionary) != len(values) or any(
                name not in values or values[name] is not value for name, value in dictionary.items()
            ):
                dictionary.clear()
                dictionary.update(values)


def give_own_configuration(model: nn.Module) -> None:
    """Replace the configurations of a model by copies: another model may share the objects, and must not change."""
    copies: dict[int, Any] = {}
    for module in every_module(model):
        for name, value in list(vars(module).items()):
            if is_config(value):
                module.__dict__[name] = copy.deepcopy(value, copies)


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, and the original ones that converted modules keep in tuples."""
    seen, pending = set(), [model]
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        pending += [child for child in module._modules.values() if child is not None]
        for value in vars(module).values():
            if isinstance(value, tuple):
                pending += [item for item in value if isinstance(item, nn.Module)]
                # A tuple of tuples: the original parts of a network inside a layer.
                pending += [part for item in value if isinstance(item, tuple) for part in item if _is_module(part)]


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _has_strides(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and not parameter.is_meta and parameter.layout == torch.strided
