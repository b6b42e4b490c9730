"""Tiny models of the families that `convert` knows."""

from __future__ import annotations

import torch

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
