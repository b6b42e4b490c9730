"""Tiny random models of as many transformers types as can be made by shrinking their default configurations."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

VOCABULARY, LENGTH, IMAGE, PATCH, MELS = 99, 12, 16, 4, 16

# What the configurations of model types call their sizes, and how large they are here.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "entity_vocab_size", "q_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "emb_dim", "projection_dim"), 32
    ),
    **dict.fromkeys(("word_embed_proj_dim", "encoder_hidden_size", "decoder_hidden_size", "out_hidden_size"), 32),
    **dict.fromkeys(
        ("conv_dim_out", "text_embed_dim", "entity_emb_size", "pooler_hidden_size", "text_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 2
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("max_source_positions",), 24),
    **dict.fromkeys(("max_target_positions",), 64),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "kv_channels", "d_head"), 8),
    **dict.fromkeys(("image_size", "input_size"), IMAGE),
    **dict.fromkeys(("patch_size",), PATCH),
    **dict.fromkeys(("num_mel_bins", "feature_size", "input_feat_per_channel"), MELS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "conv_depthwise_kernel_size": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "subsampling_conv_channels": 8,
    "depths": [1, 1],
    "window_size": 2,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# Types whose sizes hang together otherwise: what differs from the table.
_OWN: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "num_heads": [2, 4]},
    "prophetnet": {"num_hidden_layers": None},
    "hubert": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "wav2vec2": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "unispeech": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "wavlm": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "data2vec-audio": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "sew": {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "swinv2": {"embed_dim": 8, "num_heads": [2, 4]},
    "donut-swin": {"embed_dim": 8, "num_heads": [2, 4]},
    "maskformer-swin": {"embed_dim": 8, "num_heads": [2, 4]},
    "hiera": {"image_size": [32, 32]},
}


def small_config(model_type: str) -> Any:
    """The type's configuration with small sizes."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(config_class: Any) -> Any:
    default = config_class()
    sizes = {name: size for name, size in _SIZES.items() if getattr(default, name, None) is not None}
    if isinstance(getattr(default, "layer_types", None), list):
        # Both kinds of layer, if there are two.
        kinds = list(dict.fromkeys(default.layer_types))
        sizes["layer_types"] = (kinds * 2)[:2]
    for name in ("num_key_value_heads", "n_head_kv"):
        if getattr(default, name, None) is not None and getattr(default, name) == getattr(
            default, "num_attention_heads", None
        ):
            sizes[name] = 4
    own = _OWN.get(config_class.model_type, {})
    # Some names stand for others.
    sizes = {name: size for name, size in sizes.items() if config_class.attribute_map.get(name) not in own} | own
    for name in config_class.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            sizes[name] = _shrunk(type(inner)).to_dict()
    return config_class(**{name: size for name, size in sizes.items() if name not in _read_only(config_class)})


def _read_only(config_class: Any) -> set[str]:
    return {
        name
        for base in config_class.__mro__
        for name, value in vars(base).items()
        if isinstance(value, property) and value.fset is None
    }


def _parts(config: Any) -> Any:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name))


class TooLargeError(Exception):
    """A model has more parameters than were allowed."""


@contextlib.contextmanager
def at_most(num_parameters: int) -> Iterator[None]:
    """Models that are built meanwhile are given up at the first parameter too many, before it has numbers.

    Raises:
        TooLargeError: one has more.
    """
    seen: dict[int, torch.Tensor] = {}  # shared ones count once
    total = 0

    def count(module: Any, name: str, parameter: torch.Tensor | None) -> None:
        nonlocal total
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = parameter
            total += parameter.numel()
            if total > num_parameters:
                raise TooLargeError(f"it has more than {num_parameters:,} parameters")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def small_model(model_type: str, *, with_head: bool = False, seed: int = 0) -> Any:
    """A random model of this type, in float64 and in evaluation mode."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = small_config(model_type)
    classes = [MODEL_MAPPING]
    if with_head:
        classes = [MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, *classes]
    for mapping in classes:
        if type(config) in mapping:
            model_class = mapping[type(config)]
            break
    else:
        raise KeyError(f"no model class for {model_type}")
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    config._attn_implementation = "eager"
    for part in _parts(config):
        part._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(seed)
    return model_class(config).double().eval()


def inputs_for(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of two, chosen by the arguments that the model's forward takes; the first row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    names = inspect.signature(model.forward).parameters
    tokens = 3 + torch.randperm(VOCABULARY - 3, generator=generator)[: 2 * LENGTH].view(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = tokens
        if "attention_mask" in names:
            inputs["attention_mask"] = mask
    elif "pixel_values" in names:
        size = getattr(model.config, "image_size", IMAGE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(2, channels, height, width, generator=generator).double()
    elif "input_features" in names:
        bins = getattr(model.config, "num_mel_bins", None) or getattr(model.config, "feature_size", MELS)
        frames = 48
        shape = (2, bins, frames) if model.config.model_type in ("whisper",) else (2, frames, bins)
        inputs["input_features"] = torch.randn(*shape, generator=generator).double()
    elif "input_values" in names:
        inputs["input_values"] = torch.randn(2, 400, generator=generator).double()
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens[:, :7]
    if "pixel_values" in names and "input_ids" in names and "return_loss" in names:
        channels = 3
        inputs["pixel_values"] = torch.randn(2, channels, IMAGE, IMAGE, generator=generator).double()
    return inputs
