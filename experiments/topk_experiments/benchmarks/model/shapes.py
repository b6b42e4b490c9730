"""Whole models with random weights, built from configurations, and one batch of input for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.pretrained import load_config
from .points import Point

# Tokens below are special in most vocabularies (padding, start, end, unknown).
_FIRST_WORD = 4


def new_config(point: Point) -> Any:
    """The configuration of a point's model: enough positions for its input, its dropout, and no cache."""
    from transformers import BertConfig, T5Config

    if point.source is not None:
        config = load_config(point.source)
    elif point.shape == "t5-base":
        # Raffel et al. 2020, table 9: "base".
        config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    else:
        config = BertConfig()  # 12 layers, 12 heads of 64, 3,072 neurons: the paper's 12-layer model
    config.use_cache = False
    # RoBERTa counts positions from the number of its padding token plus one.
    longest = max(point.length, point.decoder_length) + 1 + (getattr(config, "pad_token_id", None) or 0)
    if (getattr(config, "max_position_embeddings", None) or longest) < longest:
        config.max_position_embeddings = longest
    for name, value in config.to_dict().items():
        if "dropout" in name or name.endswith(("_drop", "_pdrop")):
            # None refers to another dropout of the configuration.
            setattr(config, name, value if value is None else point.dropout_p)
    return config


def is_smoothed(point: Point) -> bool:
    """Whether `new_model` replaces an activation if it is asked for a smooth one."""
    return bool(_names_of_relu(new_config(point)))


def _names_of_relu(config: Any) -> list[str]:
    return [
        name for name in ("dense_act_fn", "hidden_act", "activation_function") if getattr(config, name, "") == "relu"
    ]


def new_model(point: Point, attn_implementation: str, *, smooth: bool = False) -> Any:
    """A model of a point's shape in training mode, its weights random.

    A model with an encoder and a decoder generates text. Any other model classifies tokens (one of two labels for each)
    or, where transformers offers only a language model, predicts the next token. A head over two labels adds almost
    nothing to the memory and time that are compared.

    smooth  use GELU instead of ReLU. Where a neuron's input is zero except for rounding, two correct answers differ by
            all of its gradient: in T5-base's shape at 96 tokens PyTorch's attention differs from float64 by up to 6e-2
            of a gradient's largest entry for that reason alone.

    Raises:
        ValueError: transformers has no such model for the configuration.
    """
    import transformers

    config = new_config(point)
    if smooth:
        for field in _names_of_relu(config):
            setattr(config, field, "gelu")
    name = model_class(config)
    try:
        with torch.device(point.device):
            model = getattr(transformers, name).from_config(
                config, attn_implementation=attn_implementation, dtype=getattr(torch, point.dtype)
            )
    except ValueError as error:
        raise ValueError(
            f"config {point.shape} makes no model of {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    if point.checkpointing:
        # Since 5.23 transformers warns about the older name.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{kind}_checkpointing_enable")
        enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    return model.train()


def new_inputs(point: Point, model: Any) -> dict[str, Tensor]:
    """One random sequence and its labels."""
    config = model.config

    def random_words(length: int) -> Tensor:
        return torch.randint(_FIRST_WORD, config.vocab_size, (1, length), device=point.device)

    input_ids = random_words(point.length)
    if config.is_encoder_decoder:
        return {"input_ids": input_ids, "labels": random_words(point.decoder_length)}
    if "TokenClassification" in type(model).__name__:
        return {"input_ids": input_ids, "labels": torch.randint(2, (1, point.length), device=point.device)}
    return {"input_ids": input_ids, "labels": input_ids}


def model_class(config: Any) -> str:
    """The class of transformers that builds the model of a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        return "AutoModelForSeq2SeqLM"
    # Encoders are in both mappings. As language models they would hold a number for each token and each word.
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return "AutoModelForCausalLM" if is_decoder else "AutoModelForTokenClassification"
