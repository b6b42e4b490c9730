"""The ways through a converted model, each with a model that goes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rivals run up to here; their time and memory grow with the square of the length.
LONGEST_RIVAL = 8192
METHODS = ("top-k", "dense")
ATTENTION_K, NEURONS_SHARE = 64, 12
_VOCABULARY = 97

Inputs = Callable[[int], dict[str, Tensor]]


class Path(NamedTuple):
    """
    label    what the table calls it
    model    class of transformers
    sizes    fields of its configuration; other names for what `_USUAL` has stand there too
    length   field that holds the largest length; none where there is no such field
    networks whether its networks are converted too, and its rival has PyTorch's attention instead of eager's
    inputs   of a length
    """

    label: str
    model: str
    sizes: Mapping[str, Any]
    length: str = "max_position_embeddings"
    networks: bool = False
    inputs: Inputs | None = None

    @property
    def rival(self) -> str:
        """What the rival's attention is."""
        return "sdpa" if self.networks else "eager"


def _tokens(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _VOCABULARY, (1, length))}


def _document(length: int) -> dict[str, Tensor]:
    return _tokens(length) | {"bbox": torch.randint(0, 1000, (1, length, 4)).sort(-1).values}


def _sound(length: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 8 * length, 16)}


_USUAL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_KEY_HEADS = {"num_key_value_heads": 4, "head_dim": 64, "pad_token_id": 0}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 256,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "max_relative_positions": 512,
}
_GPT = {"vocab_size": _VOCABULARY, "n_embd": 256, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# The layers of these alternate between a window and all tokens.
_TWO = {**_USUAL, **_KEY_HEADS, "num_hidden_layers": 2}

PATHS = {
    "sinks": Path("sinks (gpt-oss)", "GptOssModel", _TWO | _EXPERTS | {"intermediate_size": 256}),
    "soft-cap": Path("soft cap (Gemma 2)", "Gemma2Model", _TWO | {"attention_dropout": 0.0}),
    "fused": Path("fused network (Phi-3)", "Phi3Model", _USUAL | _KEY_HEADS, networks=True),
    "experts": Path("experts (Mixtral)", "MixtralModel", _USUAL | _KEY_HEADS | _EXPERTS, networks=True),
    "parakeet": Path(
        "mask with a gradient, made by the model for every head, query and key (Parakeet)",
        "ParakeetEncoder",
        {
            **{name: size for name, size in _USUAL.items() if name != "vocab_size"},
            "num_attention_heads": 1,
            "hidden_size": 64,
            "num_key_value_heads": 1,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "layerdrop": 0.0,
        },
        inputs=_sound,
    ),
    "mpnet": Path("MPNet", "MPNetModel", _USUAL),
    "deberta": Path("DeBERTa v3", "DebertaV2Model", _USUAL | _DEBERTA, length=""),
    "bloom": Path(
        "BLOOM", "BloomModel", {"vocab_size": _VOCABULARY, "hidden_size": 256, "n_layer": 1, "n_head": 4}, length=""
    ),
    "falcon": Path(
        "Falcon", "FalconModel", {name: size for name, size in _USUAL.items() if name != "intermediate_size"}
    ),
    "gpt-j": Path("GPT-J", "GPTJModel", _GPT | {"rotary_dim": 32}, length="n_positions"),
    "gpt-neo": Path(
        "GPT-Neo",
        "GPTNeoModel",
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 256,
            "num_layers": 1,
            "num_heads": 4,
            "attention_types": [[["global"], 1]],
        },
    ),
    "layoutlmv3": Path(
        "LayoutLMv3",
        "LayoutLMv3Model",
        _USUAL | {"visual_embed": False, "coordinate_size": 44, "shape_size": 40},
        inputs=_document,
    ),
}


def new_model(path: Path, longest: int) -> Any:
    """With random weights, without dropout, for inputs up to this length."""
    import transformers

    kind = getattr(transformers, path.model)
    sizes = dict(path.sizes) | ({path.length: longest + 2} if path.length else {})
    config = kind.config_class(**sizes)
    config.use_cache = False
    return kind(config).float().eval()


def inputs(path: Path, length: int) -> dict[str, Tensor]:
    return (path.inputs or _tokens)(length)
