"""Loading what transformers has, for commands."""

from __future__ import annotations

from typing import Any


def load(loader: Any, model: str, **options: Any) -> Any:
    """What `from_pretrained` returns; its errors in one line.

    Raises:
        ValueError: transformers loads no such model.
    """
    try:
        return loader.from_pretrained(model, **options)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{model} does not load as a transformers model: {first_line}") from error
