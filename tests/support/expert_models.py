"""Tiny models with experts, a family for each way to hold and to call them, and what their experts must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY, MODEL, NEURONS, EXPERTS = 97, 32, 24, 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
_DEEPSEEK = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": NEURONS, **_LATENT}

# By transformers' model type: what differs from the above.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS},
    "qwen3_moe": {"moe_intermediate_size": NEURONS, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": NEURONS,
        "shared_expert_intermediate_size": 40,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "deepseek_v3": {**_DEEPSEEK, "intermediate_size": 40, "first_k_dense_replace": 1},
    "olmoe": {"intermediate_size": NEURONS, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    "llama4_text": {
        "intermediate_size": NEURONS,
        "intermediate_size_mlp": 40,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "layer_types": ["full_attention"] * 2,
    },
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": NEURONS,
        "intermediate_size": 40,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "phimoe": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS},
    "granitemoe": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "dbrx": {},
    "jamba": {
        "intermediate_size": NEURONS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS, "kv_channels": 8},
    "aria_text": {"intermediate_size": NEURONS, "moe_num_experts": EXPERTS, "moe_topk": 2},
    "longcat_flash": {
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": NEURONS,
        "n_routed_experts": EXPERTS,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 2,
        **_LATENT,
    },
}


def tiny_moe(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of this type, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config = config_of(model_type, **changes)
    config._attn_implementation = config._experts_implementation = "eager"  # others know no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # some leave theirs uninitialised or zero
                size = 1 if "embed" in name else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 / size**0.5)
            elif "expert" in name or not parameter.isfinite().all():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def config_of(model_type: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type == "dbrx":
        sizes = {"d_model": MODEL, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 128}
        sizes |= {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        sizes["ffn_config"] = {"ffn_hidden_size": NEURONS, "moe_num_experts": EXPERTS, "moe_top_k": 2}
        sizes["ffn_config"]["ffn_act_fn"] = {"name": "silu"}
        return CONFIG_MAPPING[model_type](**sizes | changes)
    return CONFIG_MAPPING[model_type](**_COMMON | FAMILIES[model_type] | changes)


def dense_experts(module: Any, arguments: tuple[Any, ...], k: int | None) -> Tensor:
    """What a module of experts must give: token by token, expert by expert, neuron by neuron, in plain PyTorch."""
    name, shared = type(module).__name__.removeprefix("TopK"), {}
    act = getattr(module, "act_fn", None) or torch.nn.functional.silu
    if "Dbrx" in name:
        inner, shape = module.mlp, (EXPERTS, NEURONS, MODEL)
        gate, up = inner.w1.view(shape), inner.v1.view(shape)
        down = inner.w2.view(shape).transpose(1, 2)
    elif "JetMoe" in name:
        gate, up = module.input_linear.weight.split(NEURONS, dim=1)
        down = module.output_linear.weight
    elif "GptOss" in name:
        gate, up = (module.gate_up_proj[..., part::2].transpose(1, 2) for part in range(2))
        shared["biases"] = module.gate_up_proj_bias[:, ::2], module.gate_up_proj_bias[:, 1::2], module.down_proj_bias
        shared["limit"], shared["alpha"] = module.limit, module.alpha
        down = module.down_proj.transpose(1, 2)
    elif "Aria" in name or "Llama4" in name:
        gate, up = (part.transpose(1, 2) for part in module.gate_up_proj.split(NEURONS, dim=2))
        down = module.down_proj.transpose(1, 2)
    else:
        gate, up = module.gate_up_proj.split(NEURONS, dim=1)
        down = module.down_proj

    def expert(number: int, x: Tensor) -> Tensor:
        if number >= EXPERTS:  # LongCat's experts that return what they are given
            return x
        gates, values = x @ gate[number].T, x @ up[number].T
        if "biases" in shared:
            b_gate, b_up, b_down = (bias[number] for bias in shared["biases"])
            limit, alpha = shared["limit"], shared["alpha"]
            gates, values = (gates + b_gate).clamp(max=limit), (values + b_up).clamp(-limit, limit)
            hidden = (values + 1) * gates * torch.sigmoid(alpha * gates)
        else:
            b_down, hidden = 0, act(gates) * values
        if k is not None:
            size = hidden.detach().abs()
            num_better = (size.unsqueeze(-2) > size.unsqueeze(-1)).sum(-1)
            hidden = hidden * (num_better < k)
        return hidden @ down[number].T + b_down

    x = arguments[0]
    if "Llama4" in name:
        parts = x.view(EXPERTS, -1, MODEL)
        return torch.cat([expert(number, parts[number]) for number in range(EXPERTS)])
    if "JetMoe" in name:
        flat = x.flatten(0, 1)
        _, tokens, weights, counts, _ = module.router(flat)
        numbers = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
        rows = [
            weight * expert(int(number), flat[token])
            for token, weight, number in zip(tokens, weights, numbers, strict=True)
        ]
        return torch.zeros_like(flat).index_add(0, tokens, torch.stack(rows)).view(x.shape) + module.bias
    flat, (index, weights) = x.reshape(-1, MODEL), arguments[1:]
    rows = [
        sum(weight * expert(int(number), token) for number, weight in zip(numbers, of_token, strict=True))
        for token, numbers, of_token in zip(flat, index, weights, strict=True)
    ]
    return torch.stack(rows).view(x.shape)


def experts_of(model: Any) -> dict[str, Any]:
    """The modules that hold experts, by path."""
    from topk_attention.convert.experts import ExpertsSite
    from topk_attention.convert.search import feed_forward_sites

    return {site.path: site.module for site in feed_forward_sites(model) if isinstance(site, ExpertsSite)}
