"""Models that hold the model to convert: those of sentence-transformers and of PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The transformers model inside a SentenceTransformer or a PeftModel; any other model as it is.

    The k that a model remembers are then those of the model that is saved. A PeftModel that puts prompts before the
    input stays: the model inside it alone would not see them.
    """
    if _is_of(model, "peft", "PeftModel"):
        is_prompt_learning = getattr(model.active_peft_config, "is_prompt_learning", False)
        return model if is_prompt_learning else model.get_base_model()
    if _is_of(model, "sentence_transformers", "SentenceTransformer"):
        inner = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
        if not inner:
            raise TypeError(
                "model must hold a transformers model, got a SentenceTransformer without one: "
                f"{', '.join(type(module).__name__ for module in model.children())}"
            )
        return inner[0]  # the outermost one comes first
    return model


def _is_of(model: object, package: str, name: str) -> bool:
    """Whether the model is of this class or one that is built on it, without an import of its package."""
    return isinstance(model, nn.Module) and any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(model).__mro__
    )
