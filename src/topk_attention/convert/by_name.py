"""What `attn_implementation="topk"` alone can do for a model, and the watch over those that it cannot serve.

The name reaches the layers that ask transformers' attention interface for their function. It does not reach PyTorch's
own layers and those that compute attention in their own code: these would silently run full attention, or misread the
mask. A model that holds one is refused when it is built or when the name is set.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from . import adapters, torch_layers
from .configurations import parts_of
from .search import attention_obstacle, feed_forward_sites, reads_attention_interface
from .settings import NAME, ModelSettings

_WATCHED = "_topk_attention_watches"
_SHOWN_LAYERS = 3
_WAY_OUT = (
    "load it without attn_implementation= and call topk_attention.convert(model, attention_k=...), which says for each "
    "layer whether it can be replaced and why not"
)


def implementation_of(module: nn.Module, config: Any) -> str | None:
    """The attention implementation that is in force for a layer.

    config  the configuration of the model around it, for layers that hold none
    """
    return getattr(getattr(module, "config", None) or config, "_attn_implementation", None)


def hand_written_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers, by path, that compute attention in their own code."""
    for path, module in model.named_modules():
        name = type(module).__name__.lower()
        is_known = torch_layers.is_attention(module) or reads_attention_interface(module) or adapters.is_adapted(module)
        if ("attention" in name or "attn" in name) and not is_known and _computes_scores(type(module)):
            yield path, module


def _computes_scores(module_class: type[nn.Module]) -> bool:
    """Whether the code of a class turns scores into weights. A layer around another one does not."""
    for base in module_class.__mro__:
        if base.__module__.startswith("torch."):
            return False
        for function in vars(base).values():
            # transformers wraps methods whose arguments it renames.
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            names = " ".join(code.co_names).lower() if code is not None else ""
            if any(word in names for word in ("softmax", "logsumexp", "dot_product_attention", "attention_forward")):
                return True
    return False


def refusal_of_name(model: Any) -> str | None:
    """Why the name alone cannot serve the layers for which it is in force; None where it can."""
    if not any(implementation == NAME for _, implementation in _implementations(model)):
        return None
    around = dict(configs_around(model))
    reasons = {}
    for path, module in model.named_modules():
        if torch_layers.is_attention(module) and not torch_layers.is_converted(module):
            reasons[path] = f"is {type(module).__name__}, which the name does not reach"
        elif reads_attention_interface(module) and (obstacle := attention_obstacle(module)) is not None:
            reasons[path] = f"cannot be converted: {obstacle}"
    for path, module in hand_written_attention(model):
        reasons[path] = f"({type(module).__name__}) computes attention in its own code"
    reasons = {
        path: reason
        for path, reason in reasons.items()
        if implementation_of(model.get_submodule(path), around[path]) == NAME
    }
    if not reasons:
        return None
    shown = "; ".join(
        f"{path or 'the model itself'} {reason}" for path, reason in list(reasons.items())[:_SHOWN_LAYERS]
    )
    if len(reasons) > _SHOWN_LAYERS:
        shown += f"; and {len(reasons) - _SHOWN_LAYERS} more"
    if any(
        torch_layers.is_attention(module)
        or adapters.has_adapter(module)
        or (reads_attention_interface(module) and attention_obstacle(module) is None)
        for module in model.modules()
    ):
        way_out = _WAY_OUT
    else:
        way_out = "topk_attention.convert would replace no attention layer either; use its own attention"
    return f"{_refuses(type(model))}: {shown}; {way_out}"


def _refuses(model_class: type) -> str:
    return f'{model_class.__name__} cannot run with attn_implementation="{NAME}"'


def configs_around(model: Any) -> Iterator[tuple[str, Any]]:
    """The configuration that is in force at each path: that of the nearest module around it that has one."""
    configs = {"": getattr(model, "config", None)}
    for path, module in model.named_modules():
        around = configs[path.rpartition(".")[0]] if path else configs[""]
        configs[path] = getattr(module, "config", None) or around
        yield path, configs[path]


def every_config(model: Any) -> list[Any]:
    """The configurations of a model and of all its parts, each once."""
    configs = [part for module in model.modules() for part in parts_of(getattr(module, "config", None))]
    return list({id(config): config for config in configs}.values())


def _implementations(model: Any) -> list[tuple[Any, str | None]]:
    return [(config, config._attn_implementation) for config in every_config(model)]


def watch(model_class: Any, config_class: Any) -> None:
    """Have transformers refuse the name, and say when a converted model does not run as converted.

    model_class   transformers' PreTrainedModel
    config_class  transformers' PreTrainedConfig
    """
    if _WATCHED in vars(model_class):
        return
    setattr(model_class, _WATCHED, True)
    _refuse_before_layers_are_built(model_class)
    _refuse_when_built(model_class)
    _refuse_when_set(model_class)
    _tell_of_dense_checkpoints(model_class)
    _tell_of_switched_configs(config_class)


def _refuse_before_layers_are_built(model_class: Any) -> None:
    """Some families (Falcon, GPT-J, GPT-Neo) look the name up in a table of their own layers: a KeyError."""
    original = model_class.get_correct_attn_implementation

    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME and is_init_check and not self._can_set_attn_implementation():
            raise ValueError(f"{_refuses(type(self))}: its file computes attention in its own code; {_WAY_OUT}")
        return original(self, requested_attention, is_init_check)

    model_class.get_correct_attn_implementation = get_correct_attn_implementation


def _refuse_when_built(model_class: Any) -> None:
    original = model_class.post_init

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (reason := refusal_of_name(self)) is not None:
            raise ValueError(reason)

    model_class.post_init = post_init


def _refuse_when_set(model_class: Any) -> None:
    original = model_class.set_attn_implementation

    @functools.wraps(original)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        before = _implementations(self)
        original(self, attn_implementation, *args, **kwargs)
        if _names_topk(attn_implementation):
            reason = refusal_of_name(self)
            if reason is None and attn_implementation == NAME and self.config._attn_implementation != NAME:
                reason = f"{_refuses(type(self))}: it does not ask transformers' attention interface; {_WAY_OUT}"
            if reason is not None:
                set_implementations(before)
                raise ValueError(reason)

    model_class.set_attn_implementation = set_attn_implementation


def set_by_transformers(model: Any, implementation: str) -> None:
    """`model.set_attn_implementation` without the watch: `convert` decides layer by layer."""
    set_implementation = type(model).set_attn_implementation
    getattr(set_implementation, "__wrapped__", set_implementation)(model, implementation)


def set_implementations(implementations: list[tuple[Any, str | None]]) -> None:
    """Write attention implementations into configurations, each into its own alone."""
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _names_topk(attn_implementation: Any) -> bool:
    if isinstance(attn_implementation, Mapping):
        return any(map(_names_topk, attn_implementation.values()))
    return bool(attn_implementation == NAME)


def _tell_of_dense_checkpoints(model_class: Any) -> None:
    original = model_class.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if remembers_conversion(model) and getattr(model.config, "_attn_implementation", None) != NAME:
            warnings.warn(
                f"the configuration of this {type(model).__name__} remembers a conversion to top-k that is not in "
                "force: it runs in full until topk_attention.convert(model) restores it; "
                "topk_attention.unconvert(model) forgets it",
                stacklevel=2,
            )
        return loaded

    model_class.from_pretrained = classmethod(from_pretrained)


def _tell_of_switched_configs(config_class: Any) -> None:
    """Whisper's generate(return_token_timestamps=True) writes "eager" into its configuration and leaves it there."""
    former: property = config_class._attn_implementation
    read: Callable[[Any], Any] | None = former.fget
    write: Callable[[Any, Any], None] | None = former.fset
    assert read is not None
    assert write is not None

    def write_and_tell(self: Any, value: Any) -> None:
        was_topk = getattr(self, "_attn_implementation_internal", None) == NAME
        write(self, value)
        if was_topk and self._attn_implementation_internal != NAME and ModelSettings.from_config(self) is not None:
            warnings.warn(
                f"the attention of a converted model ({type(self).__name__}) was switched from top-k to "
                f'"{self._attn_implementation_internal}" and stays so; call topk_attention.convert(model) to return to '
                "its k, or topk_attention.unconvert(model) to forget them",
                stacklevel=3,
            )

    config_class._attn_implementation = property(read, write_and_tell)


def remembers_conversion(model: Any) -> bool:
    """Whether a model's configuration holds a k while none of its layers runs top-k."""
    stored = ModelSettings.from_config(getattr(model, "config", None))
    if stored is None or not (stored.attention_k or stored.feed_forward_k):
        return False
    return not is_in_force(model)


def is_in_force(model: nn.Module) -> bool:
    """Whether any layer of a model runs top-k now."""
    if any(implementation == NAME for _, implementation in _implementations(model)):
        return True
    return any(map(torch_layers.is_converted, model.modules())) or any(
        site.restore is not None for site in feed_forward_sites(model)
    )
