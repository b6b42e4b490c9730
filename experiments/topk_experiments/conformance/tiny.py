"""Tiny models with random weights: any configuration of transformers, with every size in it shrunk."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from .catalogue import Model
from .overrides import AS_DECODER, OVERRIDES

VOCABULARY = 99
END = VOCABULARY - 1
# Names of fields -> the most that they may hold.
_SIZES = {
    32: """hidden_size d_model n_embd dim model_dim embed_dim word_embed_proj_dim embedding_size hidden_dim_base
        attn_hidden_size encoder_hidden_size decoder_hidden_size projection_dim output_dim text_hidden_size
        vision_hidden_size n_state dim_model width emb_dim audio_hidden_size out_hidden_size lru_width d_embed
        vision_embed_dim mm_hidden_size classifier_proj_size tdnn_dim xvector_output_dim backbone_hidden_size latent_dim
        proj_codevector_dim codevector_dim cross_attention_hidden_size""",
    48: """intermediate_size ffn_dim n_inner ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim
        dim_feedforward d_inner intermediate_dim text_intermediate_size ffn_size mlp_dim dim_ff
        encoder_intermediate_size decoder_intermediate_size""",
    24: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size intermediate_size_mlp expert_hidden_dim moe_latent_size""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        encoder_num_attention_heads decoder_num_attention_heads num_attention_heads_encoder resampler_n_heads
        vision_heads text_num_attention_heads swa_num_attention_heads mamba_n_heads mamba_num_heads n_mamba_heads
        linear_num_key_heads linear_num_value_heads num_v_heads index_n_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_routed_experts moe_num_primary_experts patch_size spatial_patch_size
        mamba_dt_rank dt_rank num_frames index_topk""",
    2: """num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num encoder_num_key_value_heads
        decoder_num_key_value_heads swa_num_key_value_heads global_num_key_value_heads num_global_key_value_heads
        resampler_n_kv num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers text_num_hidden_layers resampler_depth
        depth n_encoder_layers n_decoder_layers vision_layers encoder_depth num_experts_per_tok num_experts_per_token
        moe_topk moe_k top_k_experts num_activated_experts tubelet_size num_conv_pos_embedding_groups""",
    8: """head_dim d_kv attention_head_dim kv_channels attention_head_size global_head_dim swa_head_dim v_head_dim
        attn_head_dim swa_v_head_dim qk_nope_head_dim qk_rope_head_dim resampler_head_dim vision_head_dim
        linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim qk_head_dim mamba_d_state mamba_d_ssm
        state_size ssm_state_size d_state hidden_size_per_layer_input num_queries num_query_tokens num_object_queries
        relative_attention_num_buckets""",
    16: """q_lora_rank kv_lora_rank o_lora_rank mla_lora_rank image_size img_size input_size video_size crop_size
        num_mel_bins num_mels n_mels feature_size mamba_d_head mamba_head_dim mamba_headdim num_conv_pos_embeddings""",
    VOCABULARY: """vocab_size text_vocab_size encoder_vocab_size decoder_vocab_size n_vocab src_vocab_size
        tgt_vocab_size audio_vocab_size vocab_size_per_layer_input output_vocab_size num_audio_tokens
        unpadded_vocab_size""",
    128: """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions
        max_2d_position_embeddings max_seq_len max_sequence_length seq_length original_max_position_embeddings
        max_seqlen max_encoder_position_embeddings max_decoder_position_embeddings text_max_position_embeddings""",
    1: "n_group topk_group num_expert_groups first_k_dense_replace",
    6: """sliding_window attention_window_size window_size local_attention attention_chunk_size attention_window
        sliding_window_size block_size""",
    64: "codebook_size",
    20: "relative_attention_max_distance",
}
_LIMITS = {name: size for size, names in _SIZES.items() for name in names.split()}
_PER_AXIS = ("image_size", "patch_size", "input_size")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": 1}
_GENERAL = ("AutoConfig", "PreTrainedConfig", "PretrainedConfig")
# One-dimensional parameters with a meaning of their own, such as decays; noise would make them overflow.
_KEPT = (
    *("a_log", "dt_bias", ".d", "time_decay", "lambda", "conv1d", "e_score", "logit_scale", "recurrent_param"),
    *("logit_bias", "temperature"),
)


def tiny_model(model: Model, seed: int = 0) -> Any:
    """The model with random weights in float32, in eval mode. Nothing in it is left to chance in training either.

    Raises:
        Exception: whatever transformers raises where it cannot build it this small.
    """
    over = AS_DECODER.get(model.model_type) if model.is_decoder else None
    over = OVERRIDES.get(model.model_type, {}) if over is None else over
    torch.manual_seed(seed)
    built = model.load()(tiny_configuration(model.configuration(), over))
    randomize(built, seed)
    built = built.float().eval()
    generation = getattr(built, "generation_config", None)
    if generation is not None:  # generates to the end
        generation.pad_token_id, generation.bos_token_id, generation.decoder_start_token_id = 0, 1, 1
        generation.eos_token_id = generation.forced_eos_token_id = generation.forced_bos_token_id = None
    return built


def tiny_configuration(kind: Any, over: Mapping[str, Any] | None = None) -> Any:
    """A configuration of this class with small sizes, without dropout, its parts likewise.

    over  fields that are given; a dictionary for a part gives fields of that part
    """
    given = {name: value() if inspect.isfunction(value) else value for name, value in (over or {}).items()}
    small: dict[str, Any] = {}
    for name, default in _defaults(kind).items():
        if name not in given and (value := _shrunk(name, default)) is not None:
            small[name] = value
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in given and not isinstance(given[name], dict):
            continue
        of_part = dict(given.pop(name, {}))
        if "model_type" in of_part:
            part = CONFIG_MAPPING[of_part["model_type"]]
        if part is None or part.__name__ in _GENERAL:
            part = _part_by_default(kind, name)
        if part is not None:
            small[name] = tiny_configuration(part, of_part)
    return kind(**small | given)


def _part_by_default(kind: Any, name: str) -> Any:
    """The class of the configuration that a part has by default; None where it has none."""
    try:
        part = type(getattr(kind(), name, None))
    except (TypeError, ValueError, AttributeError):
        return None  # a configuration that cannot be made without arguments
    return part if hasattr(part, "sub_configs") and part.__name__ not in _GENERAL else None


def _shrunk(name: str, default: Any) -> Any:
    """The value of a field in a tiny configuration; None: as it is."""
    if isinstance(default, bool):
        return False if name == "apply_spec_augment" and default else None
    if isinstance(default, float):  # dropout and masking at random
        is_chance = "drop" in name or name in ("mask_time_prob", "mask_feature_prob", "router_jitter_noise")
        return 0.0 if is_chance and default > 0 else None
    if name in _TOKENS:
        if isinstance(default, list) or (isinstance(default, int) and default >= VOCABULARY - 9):
            return _TOKENS[name]
        return None
    limit = _LIMITS.get(name)
    if limit is None:
        return None
    if isinstance(default, int):
        return limit if default > limit or name == "sliding_window" else None
    if isinstance(default, list | tuple) and default and name in _PER_AXIS and all(isinstance(x, int) for x in default):
        return type(default)([limit] * len(default))
    return None


def _defaults(kind: Any) -> dict[str, Any]:
    """The fields of a class of configurations with their defaults, where these are known without making one."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if isinstance(parameter.default, bool | int | float | list | tuple)
    }
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
    return defaults


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, gain: float = 1.3) -> None:
    """Random weights that keep the size of what passes through them, zeros and ones of the initialisation included."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in _floating(model):
        lower = name.lower()
        if parameter.ndim <= 1 and any(word in lower for word in _KEPT):
            if not parameter.isfinite().all():
                parameter.fill_(0.1)
            continue
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
        if parameter.ndim >= 2:
            parameter.copy_(noise * gain / _inputs_of(lower, parameter) ** 0.5)
        elif "norm" in lower or "ln" in lower:
            is_scale = lower.endswith("weight") and float(parameter.mean()) != 0
            parameter.copy_(float(is_scale) + 0.1 * noise)
        else:
            mean = float(parameter.float().mean()) if parameter.isfinite().all() else 0.0
            parameter.copy_(mean + 0.1 * noise)


@contextlib.contextmanager
def nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Within this context every weight is larger or smaller by some two roundings, by chance."""
    draw = torch.Generator().manual_seed(seed)
    before = [(one, one.detach().clone()) for _, one in _floating(model)]
    try:
        with torch.no_grad():
            for one, weight in before:
                noise = torch.randn(weight.shape, generator=draw, dtype=torch.float32).sign()
                one.copy_(weight * (1 + 2 * torch.finfo(weight.dtype).eps * noise))
        yield
    finally:
        with torch.no_grad():
            for one, weight in before:
                one.copy_(weight)


def _inputs_of(name: str, weight: Tensor) -> float:
    """How many products a number of the output is the sum of; 1 for tables of embeddings."""
    if weight.ndim == 2 and any(word in name for word in ("embed", "wte", "wpe", "shared.weight")):
        return 1.0
    if weight.ndim > 3:
        return max(1, weight[0].numel())
    return max(1, weight.shape[-1])


def _floating(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights that train: others are made anew where a model is loaded, as Marian's positions."""
    return ((name, one) for name, one in model.named_parameters() if one.is_floating_point() and one.requires_grad)
