"""Tiny models of the families that `convert` knows, and what a converted attention layer must compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VOCABULARY, HEADS, LAYERS, NEURONS = 97, 4, 2, 48


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,  # scores far from uniform, so that a wrong mask or k shows
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


def tiny_bert(**changes):
    from transformers import BertConfig, BertModel

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    return BertModel(BertConfig(**options | changes)).eval()


def tiny_mistral(**changes):
    from transformers import MistralConfig, MistralForCausalLM

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.5,
        "sliding_window": 7,
    }
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**options | changes)).eval()


def topk_eager(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    dropout=0.0,
    position_bias=None,
    s_aux=None,
    sinks=None,
    softcap=None,
    **kwargs,
):
    """What a converted layer must compute, written with a dense mask over transformers' own eager scores.

    topk_eager.k is an int, or a function that gives a layer's: an int, or one for each head.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    k = topk_eager.k(module) if callable(topk_eager.k) else topk_eager.k
    last = (torch.tensor(k).clamp(max=scores.shape[-1]) - 1).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    kth = scores.sort(-1, descending=True).values.gather(-1, last)
    scores = scores.masked_fill(scores < kth, -torch.inf)
    sinks = s_aux.view(1, -1, 1, 1) if s_aux is not None else sinks
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_SEQ2SEQ_SIZES = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS,
    "init_std": 0.5,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def _tiny(model_class: str, config_class: str, **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, model_class)(config).eval()


def tiny_t5(**changes):
    options = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": NEURONS,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "initializer_factor": 2.0,
        "decoder_start_token_id": 0,
    }
    return _tiny("T5ForConditionalGeneration", "T5Config", **_COMMON | options | changes)


def tiny_flan_t5(**changes):
    return tiny_t5(**{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | changes)


def tiny_roberta(**changes):
    options = {"max_position_embeddings": 256, "initializer_range": 0.5}
    return _tiny("RobertaModel", "RobertaConfig", **_COMMON | _SIZES | options | changes)


def tiny_distilbert(**changes):
    options = {"dim": 32, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS, "initializer_range": 0.5}
    return _tiny("DistilBertModel", "DistilBertConfig", **_COMMON | options | changes)


def tiny_gpt2(**changes):
    options = {"n_embd": 32, "n_inner": NEURONS, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": 0.5}
    return _tiny("GPT2LMHeadModel", "GPT2Config", **_COMMON | options | changes)


def tiny_qwen2(**changes):
    options = {"num_key_value_heads": 2, "initializer_range": 0.5}
    return _tiny("Qwen2ForCausalLM", "Qwen2Config", **_COMMON | _SIZES | options | changes)


def tiny_bart(**changes):
    options = {"max_position_embeddings": 64}
    return _tiny("BartForConditionalGeneration", "BartConfig", **_COMMON | _SEQ2SEQ_SIZES | options | changes)


def tiny_whisper(**changes):
    options = {
        "num_mel_bins": 8,
        "max_source_positions": 24,
        "max_target_positions": 64,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return _tiny("WhisperForConditionalGeneration", "WhisperConfig", **_COMMON | _SEQ2SEQ_SIZES | options | changes)


def tiny_vit(**changes):
    options = {"image_size": 16, "patch_size": 4, "num_channels": 1, "initializer_range": 0.5}
    return _tiny("ViTModel", "ViTConfig", **_SIZES | options | changes)


class Family(NamedTuple):
    """A tiny model, the kind of its inputs, how many layers it has, and how the paths of its linear layers end."""

    build: Callable[..., Any]
    inputs: str  # "encoder", "decoder", "seq2seq", "audio" or "image"
    num_attention: int
    num_networks: int
    linear_in: str | None  # None where the network is gated
    linear_out: str


FAMILIES = {
    "t5": Family(tiny_t5, "seq2seq", 6, 4, ".wi", ".wo"),
    "flan_t5": Family(tiny_flan_t5, "seq2seq", 6, 4, None, ".wo"),
    "bert": Family(tiny_bert, "encoder", 2, 2, ".intermediate.dense", ".output.dense"),
    "roberta": Family(tiny_roberta, "encoder", 2, 2, ".intermediate.dense", ".output.dense"),
    "distilbert": Family(tiny_distilbert, "encoder", 2, 2, ".lin1", ".lin2"),
    "gpt2": Family(tiny_gpt2, "decoder", 2, 2, ".mlp.c_fc", ".mlp.c_proj"),
    "llama": Family(tiny_llama, "decoder", 2, 2, None, ".down_proj"),
    "mistral": Family(tiny_mistral, "decoder", 2, 2, None, ".down_proj"),
    "qwen2": Family(tiny_qwen2, "decoder", 2, 2, None, ".down_proj"),
    "bart": Family(tiny_bart, "seq2seq", 6, 4, ".fc1", ".fc2"),
    "whisper": Family(tiny_whisper, "audio", 6, 4, ".fc1", ".fc2"),
    "vit": Family(tiny_vit, "image", 2, 2, ".fc1", ".fc2"),
}


def inputs_of(family: Family, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """A batch of two, the first padded on the right where the family knows padding."""
    generator = torch.Generator().manual_seed(1)
    # All different: T5 has no position embeddings, so equal tokens would tie.
    tokens, decoder_tokens = (
        3 + torch.randperm(VOCABULARY - 3, generator=generator)[: 2 * length].view(2, length) for length in (24, 15)
    )
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 17:] = 0
    match family.inputs:
        case "encoder" | "decoder":
            return {"input_ids": tokens, "attention_mask": mask}
        case "seq2seq":
            return {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": decoder_tokens}
        case "audio":
            sound = torch.randn(2, 8, 48, generator=generator, dtype=dtype)
            return {"input_features": sound, "decoder_input_ids": decoder_tokens}
    return {"pixel_values": torch.randn(2, 1, 16, 16, generator=generator, dtype=dtype)}


def output_of(model, inputs) -> torch.Tensor:
    """What the model computes for the real tokens: logits, or the last hidden states where it has no head."""
    output = model(**inputs)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        return output[inputs["attention_mask"].bool()]
    return output


def output_and_gradients(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = output_of(model, inputs)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result
