"""Fields of tiny configurations that no rule can give: sizes that must fit others, and what makes a model show more.

A function stands for a configuration that is made anew for each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ResNetConfig, SwinConfig

Fields = dict[str, Any]


def _resnet(*stages: str) -> Any:
    return ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=list(stages))


def _swin_of_four() -> Any:
    return SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 2, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _resnet_of_last() -> Any:
    return _resnet("stage4")


def _resnet_of_three() -> Any:
    return _resnet("stage2", "stage3", "stage4")


_ROTARY: Fields = {"rope_type": "default", "rope_theta": 10000.0}
_ROTARY_OF_AXES: Fields = {**_ROTARY, "mrope_section": [2, 1, 1]}
_WHOLE_ROTARY: Fields = {**_ROTARY_OF_AXES, "partial_rotary_factor": 1.0}
_TEXT_OF_AXES: Fields = {"rope_parameters": _ROTARY_OF_AXES, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT_WHOLE: Fields = {**_TEXT_OF_AXES, "rope_parameters": _WHOLE_ROTARY}
# Heads with a part that rotates and one that does not, whose keys and values come from a few numbers.
_LATENT: Fields = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_LINEAR_AND_FULL: Fields = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_LINEAR_AND_GROUPED: Fields = {**_LINEAR_AND_FULL, "num_key_value_heads": 2}
_WINDOWS_IN_ONE: Fields = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "num_key_value_heads": 2,
}
_WAVES: Fields = {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
_SHIFTED: Fields = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
}
_SERIES: Fields = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_OWN_BACKBONE: Fields = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
_DETECTOR: Fields = {**_OWN_BACKBONE, "backbone_config": _resnet_of_last}
# With random weights that are read out too, larger embeddings make every token repeat itself: beams that leave the
# first one at different places then have the same score, and rounding decides which of them are kept.
_UNSCALED: Fields = {"scale_embedding": False}
_CODEC: Fields = {"num_filters": 8, "hidden_size": 32, "upsample_groups": 32, "num_residual_layers": 1}
_LOCAL_AND_FULL = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

OVERRIDES: Mapping[str, Fields] = {
    "autoformer": _SERIES,
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LINEAR_AND_FULL, **_LATENT},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "big_bird": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 4},
    "bridgetower": {"hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}},
    "bros": {"dim_bbox": 8, "hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "codegen": {"rotary_dim": 4},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "conditional_detr": _DETECTOR,
    "cosmos3_edge": {"text_config": {"rope_parameters": _ROTARY_OF_AXES}},
    "cosmos3_edge_text": {"rope_parameters": _ROTARY_OF_AXES},
    "csm": {"codec_config": _CODEC},
    "dab-detr": _DETECTOR,
    "data2vec-audio": {
        "conv_dim": [32, 32],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "num_conv_pos_embeddings": 3,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_topk": 6},
    "deformable_detr": {**_OWN_BACKBONE, "backbone_config": _resnet_of_three, "num_feature_levels": 3},
    "detr": {**_DETECTOR, "encoder_ffn_dim": 48},
    "donut-swin": _SHIFTED,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 99, "token_dropout": False},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "florence2": {
        "vision_config": {
            "embed_dim": [8, 8, 16, 16],
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "depths": [1] * 4,
            "projection_dim": 32,
        }
    },
    "gemma2": {"sliding_window": 6},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": _LOCAL_AND_FULL,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "intermediate_size": 48,
    },
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": _LOCAL_AND_FULL, "num_kv_shared_layers": 2},
    "glm46v": {"text_config": _TEXT_WHOLE},
    "glm4_moe_lite": _LATENT,
    "glm4v": {"text_config": _TEXT_WHOLE},
    "glm4v_moe": {"text_config": _TEXT_WHOLE},
    "glm4v_moe_text": _TEXT_WHOLE,
    "glm4v_text": _TEXT_WHOLE,
    "glm_image": {"text_config": _TEXT_WHOLE},
    "glm_image_text": _TEXT_WHOLE,
    "glm_moe_dsa": {**_LATENT, "index_topk": 6},
    "glm_ocr": {"text_config": _TEXT_WHOLE},
    "glm_ocr_text": _TEXT_WHOLE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "gpt_oss": {"num_hidden_layers": 2, "sliding_window": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _LINEAR_AND_GROUPED,
    "hiera": {
        "image_size": [16, 16],
        "patch_kernel": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "masked_unit_size": [2, 2],
        "query_stride": [2, 2],
        "num_query_pool": 1,
        "mlp_ratio": 2.0,
    },
    "hubert": _WAVES,
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": _ROTARY},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": _ROTARY},
    "informer": _SERIES,
    "instructblip": {"image_token_index": 4},
    "instructblipvideo": {"video_token_index": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_k25": {"text_config": _LATENT},
    "kimi_linear": {**_LINEAR_AND_FULL, **_LATENT},
    "kyutai_speech_to_text": {"codec_config": _CODEC, "audio_pad_token_id": 0, "audio_bos_token_id": 1},
    "layoutlmv3": {
        "coordinate_size": 5,
        "shape_size": 6,
        "max_2d_position_embeddings": 128,
        "visual_embed": False,
        "input_size": 16,
    },
    "led": {"attention_window": 6},
    "lfm2": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lilt": {
        "channel_shrink_ratio": 4,
        "max_2d_position_embeddings": 128,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
    "llama": {"num_key_value_heads": 2},
    "llama4_text": {
        "attention_chunk_size": 6,
        "num_hidden_layers": 4,
        "moe_layers": [1, 3],
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    },
    "longformer": {"attention_window": [6, 6]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "lxmert": {"num_attention_heads": 4, "l_layers": 2, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16},
    "m2m_100": _UNSCALED,
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "backbone_config": _swin_of_four},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32, "backbone_config": _swin_of_four},
    "maskformer-swin": _SHIFTED,
    "mimi": _CODEC,
    "mimi_decoder": _CODEC,
    "mimi_encoder": _CODEC,
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 8, "rope_parameters": _ROTARY, "sliding_window": 6},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "mistral4": _LATENT,
    "mistral_large4": {"text_config": _LATENT},
    "mistral_large4_text": _LATENT,
    "mixtral": {"sliding_window": 6, "num_key_value_heads": 2},
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    "moonshine": {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "n_groups": 2,
        "mamba_n_groups": 2,
    },
    "nllb-moe": _UNSCALED,
    "paddleocr_vl": {"text_config": _TEXT_OF_AXES},
    "perceiver": {
        "d_model": 32,
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "num_blocks": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 32,
        "v_channels": 32,
    },
    "phi3": {"sliding_window": 6, "num_key_value_heads": 2, "original_max_position_embeddings": 128},
    "qwen2": _WINDOWS_IN_ONE,
    "qwen2_5_omni_thinker": {"text_config": _TEXT_OF_AXES},
    "qwen2_5_vl": {
        "text_config": _TEXT_OF_AXES,
        "vision_config": {
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 4,
            "depth": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen2_5_vl_text": _TEXT_OF_AXES,
    "qwen2_5_vl_vision": {"window_size": 16, "fullatt_block_indexes": [1], "num_heads": 4, "depth": 2},
    "qwen2_moe": _WINDOWS_IN_ONE,
    "qwen2_vl": {
        "text_config": _TEXT_OF_AXES,
        "vision_config": {"embed_dim": 32, "hidden_size": 32, "num_heads": 4, "depth": 2},
    },
    "qwen2_vl_text": _TEXT_OF_AXES,
    "qwen3": {**_WINDOWS_IN_ONE, "head_dim": 8},
    "qwen3_5": {"text_config": _LINEAR_AND_GROUPED},
    "qwen3_5_moe": {"text_config": _LINEAR_AND_GROUPED},
    "qwen3_5_moe_text": _LINEAR_AND_GROUPED,
    "qwen3_5_text": _LINEAR_AND_GROUPED,
    "qwen3_next": _LINEAR_AND_GROUPED,
    "qwen4_exp_text": _LINEAR_AND_GROUPED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "hidden_size": 32},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False, "concat_input": False},
    "sew": {**_WAVES, "squeeze_factor": 1},
    "sew-d": _WAVES,
    "speech_to_text": _UNSCALED,
    "starcoder2": {"sliding_window": 6, "num_key_value_heads": 2},
    "swin": _SHIFTED,
    "swin2sr": {**_SHIFTED, "patch_size": 1},
    "swinv2": _SHIFTED,
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "table-transformer": _DETECTOR,
    "time_series_transformer": _SERIES,
    "udop": {"relative_attention_num_buckets": 32, "max_2d_position_embeddings": 1024},
    "unispeech": _WAVES,
    "unispeech-sat": _WAVES,
    "vit_mae": {"mask_ratio": 0.0},
    "wav2vec2": _WAVES,
    "wavlm": _WAVES,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "layers_block_type": None},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 2],
    },
}

_ENCODERS = (
    *("bert", "roberta", "camembert", "electra", "ernie", "xlm-roberta", "xlm-roberta-xl", "data2vec-text"),
    *(
        "bert-generation",
        "megatron-bert",
        "rembert",
        "roberta-prelayernorm",
        "roformer",
        "roc_bert",
        "big_bird",
        "xmod",
    ),
)
_PAIRS = (
    *("bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "marian", "mvp", "plbart", "bigbird_pegasus"),
)
# The same for the class for causal language modelling, of types that are encoders or pairs otherwise.
AS_DECODER: Mapping[str, Fields] = {
    **{name: {**OVERRIDES.get(name, {}), "is_decoder": True} for name in _ENCODERS},
    "reformer": {**OVERRIDES["reformer"], "is_decoder": True},
    **{name: {"is_decoder": True, "is_encoder_decoder": False, "scale_embedding": False} for name in _PAIRS},
}
