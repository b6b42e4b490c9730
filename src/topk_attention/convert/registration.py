"""Registers `attn_implementation="topk"` with transformers, whichever of the two libraries is imported first."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from .attention_function import topk_attention_forward
from .by_name import watch
from .cache import grow_caches_of_converted_models
from .masks import compact_mask
from .settings import NAME

_MODELING_UTILS = "transformers.modeling_utils"


def register() -> None:
    """Register the attention and its mask under one name, and watch over its use.

    With one of the two alone padding or causality would be lost.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_utils import PreTrainedModel

    AttentionInterface.register(NAME, topk_attention_forward)
    AttentionMaskInterface.register(NAME, compact_mask)
    watch(PreTrainedModel, PreTrainedConfig)
    grow_caches_of_converted_models(GenerationMixin)


def register_when_transformers_is_imported() -> None:
    """Register now if transformers is imported already, otherwise as soon as it is imported.

    To import transformers at this point would cost every user of the plain functions several seconds.
    """
    if _MODELING_UTILS in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves the import of transformers' attention registry to the usual finders, and registers after it."""

    is_searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODELING_UTILS or self.is_searching:
            return None
        self.is_searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()

    def __getattr__(self, name: str) -> object:  # e.g. get_source, which tracebacks and inspect use
        return getattr(self.loader, name)
