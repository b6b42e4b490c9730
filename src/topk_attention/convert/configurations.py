"""The configurations of transformers models: objects that hold others, and that several models may share."""

from __future__ import annotations

from typing import Any


def is_config(value: object) -> bool:
    """Whether this is a configuration of transformers."""
    return hasattr(type(value), "sub_configs") and hasattr(value, "_attn_implementation_internal")


def parts_of(config: Any) -> list[Any]:
    """A configuration of transformers and those inside it, in their order; none for anything else."""
    if not is_config(config):
        return []
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for one in inner for part in parts_of(one))]
