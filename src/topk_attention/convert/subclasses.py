"""How a layer that has its own code becomes a top-k layer and remains the same module, with weights, hooks and names.

Only its class changes, to a subclass that is made of a class of this library and the original one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Subclassed(nn.Module):
    """What the made classes have in common.

    topk_base          the class of this library that a made one is derived from
    topk_former_class  the original class
    """

    topk_base: Any
    topk_former_class: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not subclass_of(self.topk_base, self.topk_former_class):
            return super().__reduce_ex__(protocol)
        return _empty, (self.topk_base, self.topk_former_class), self.__dict__.copy()


@cache
def subclass_of(base: Any, former_class: Any) -> Any:
    """The class with the code of `base`, derived from `Subclassed`, before that of the original class."""
    own = {"topk_base": base, "topk_former_class": former_class, "__module__": former_class.__module__}
    return type(f"TopK{former_class.__name__}", (base, former_class), own)


def _empty(base: Any, former_class: Any) -> Any:
    """A layer of a made class without its state: such a class cannot be found by its name."""
    made = subclass_of(base, former_class)
    return made.__new__(made)
