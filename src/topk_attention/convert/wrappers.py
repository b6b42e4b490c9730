"""Models that hold the model to convert: those of sentence-transformers, of PEFT, and of data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .configurations import parts_of


def unwrapped(model: Any) -> Any:
    """The transformers model inside a SentenceTransformer, a PeftModel or DistributedDataParallel; any other model as
    it is.

    The k that a model remembers are then those of the model that is saved.
    """
    if _is_of(model, "torch", "DistributedDataParallel"):
        return unwrapped(model.module)
    if _is_of(model, "peft", "PeftModel"):
        return model.get_base_model()
    if _is_of(model, "sentence_transformers", "SentenceTransformer"):
        inner = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
        if not inner:
            raise TypeError(
                "model must hold a transformers model, got a SentenceTransformer without one: "
                f"{', '.join(type(module).__name__ for module in model.children())}"
            )
        return inner[0]  # the outermost one comes first
    return model


@contextmanager
def config_followed_by(outer: Any, model: Any) -> Iterator[None]:
    """Let the modules around a model that hold its configuration, as some versions of PEFT do, hold the one it gets."""
    former = parts_of(getattr(model, "config", None))
    yield
    if outer is model or not former:
        return
    now = {id(part): new for part, new in zip(former, parts_of(model.config), strict=True)}
    for module in outer.modules():
        for name, value in list(vars(module).items()):
            if id(value) in now:
                module.__dict__[name] = now[id(value)]


def puts_prompts(model: Any) -> bool:
    """Whether this is a PeftModel with prompts, or a prefix, that the model inside it does not see by itself."""
    return _is_of(model, "peft", "PeftModel") and bool(getattr(model.active_peft_config, "is_prompt_learning", False))


def _is_of(model: object, package: str, name: str) -> bool:
    """Whether the model is of this class or one that is built on it, without an import of its package."""
    return isinstance(model, nn.Module) and any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(model).__mro__
    )
