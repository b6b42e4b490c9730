"""Whole models with random weights, their input, and who computes their attention.

Performer and RFA do it for encoders, by transformers' attention interface.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from topk_attention.convert import convert
from topk_attention.convert.masks import CompactMask, compact_mask
from topk_attention.convert.search import attention_sites

from ...models.pretrained import load_config
from ...rivals import AttentionMethod, PerformerAttention, RandomFeatureAttention, new_attention, random_feature_weights
from .points import ALL, RANDOM, Point

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


def names_of_relu(config: Any) -> list[str]:
    """The fields of a configuration that ask for ReLU, which `new_model` replaces if it is asked for a smooth model."""
    names = ("dense_act_fn", "hidden_act", "activation_function")
    return [name for name in names if getattr(config, name, "") == "relu"]


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
        for field in names_of_relu(config):
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


K = int | Literal["all"]
# What transformers calls the two ways of computing the same: in linear memory, and with every weight in memory.
NAME = "random-features"
WRITTEN_OUT = "random-features-written-out"


def prepared_model(point: Point) -> Any:
    """A model of a point's shape that runs the point's method."""
    model = new_model(point, "eager" if point.method == "vanilla" else "sdpa")
    use_method(model, point)
    return model


def use_method(model: Any, point: Point) -> None:
    """Let the point's method compute the attention of a model; method "vanilla" leaves the model as it is."""
    if point.method == "sdpa":
        model.set_attn_implementation("sdpa")
    elif point.method in RANDOM:
        use_random_features(model, point)
    elif point.method == "query-chunks":
        use_library(model, ALL, None if point.feed_forward_k is None else ALL, backend="chunked")
    elif point.method == "topk":
        use_library(model, point.k, point.feed_forward_k, backend=point.backend)


def use_library(model: Any, attention_k: K, feed_forward_k: K | None, *, backend: str) -> None:
    """Convert a model. Networks that keep every neuron are computed in token chunks on any backend."""
    convert(model, attention_k=attention_k, backend=backend)
    if feed_forward_k is not None:
        convert(model, feed_forward_k=feed_forward_k, backend="auto" if feed_forward_k == ALL else backend)


def check_family(point: Point) -> None:
    """Whether a point's method can compute the attention of its model, as far as the configuration says.

    Raises:
        ValueError: random features for a model with a decoder or a position bias.
    """
    if point.method not in RANDOM:
        return
    config = new_config(point)
    obstacles = []
    if model_class(config) != "AutoModelForTokenClassification":
        obstacles.append("a decoder")
    if hasattr(config, "relative_attention_num_buckets"):
        obstacles.append("a position bias")
    if obstacles:
        raise _misfit(point.method, config, " and ".join(obstacles))


def use_random_features(model: Any, point: Point) -> None:
    """Let the point's method compute every self-attention of a model, each with random directions of its own.

    The directions are drawn once, from the point's seed. Torch's random numbers stay untouched, so that weights, input
    and dropout equal those of other methods. The method has no attention weights to drop; every other dropout stays.

    Raises:
        ValueError: the model has a decoder or a position bias, or its attention does not use the interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    check_family(point)
    sites = list(attention_sites(model))
    if not sites or not all(site.reads_interface and site.obstacle is None for site in sites):
        raise _misfit(point.method, model.config, "attention that transformers' attention interface does not reach")
    for name, function in ((NAME, _attend), (WRITTEN_OUT, _attend_written_out)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, compact_mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(point.seed)
        for site in sites:
            head_dim = model.config.hidden_size // cast(int, site.num_heads)
            attention = new_attention(point.method, head_dim=head_dim, num_features=point.num_features)
            site.module.register_module("random_features", attention.to(point.device))
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention with the arguments of transformers v5. `dropout` among them has nothing to act on.

    B batch, H heads, L length

    query, key, value [B, H, L, D]. Returns output [B, L, H, D] and None in place of weights.
    """
    attention = cast("AttentionMethod", module.random_features)
    key_mask = _key_mask(module, query, attention_mask, arguments)
    return attention(query, key, value, key_mask=key_mask).transpose(1, 2).contiguous(), None


def _attend_written_out(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **arguments: Any
) -> tuple[Tensor, None]:
    """The same from its definition, in float64."""
    attention = cast("PerformerAttention | RandomFeatureAttention", module.random_features)
    key_mask = _key_mask(module, query, attention_mask, arguments)
    visible = None if key_mask is None else key_mask[:, None, None]
    weights = random_feature_weights(attention, query.double(), key.double(), visible=visible)
    return (weights @ value.double()).to(value.dtype).transpose(1, 2).contiguous(), None


def _key_mask(module: nn.Module, query: Tensor, mask: object, arguments: dict[str, Any]) -> Tensor | None:
    """Which keys are not padding, bool [B, L]; None where there is no padding.

    Raises:
        ValueError: the model asks for attention that these methods cannot compute.
    """
    from transformers.masking_utils import bidirectional_mask_function

    sees_all = mask is None and not getattr(module, "is_causal", False)
    if isinstance(mask, CompactMask):
        sees_all = mask.mask_function is bidirectional_mask_function
    scaling = arguments.get("scaling")
    obstacle = None
    if not sees_all:
        obstacle = "queries that do not see every key"
    elif arguments.get("position_bias") is not None:
        obstacle = "a position bias"
    elif scaling is not None and not math.isclose(scaling, query.shape[3] ** -0.5):
        obstacle = "scores that are not scaled by 1 / sqrt(head size)"
    if obstacle is not None:
        raise _misfit(type(module.random_features).__name__, getattr(module, "config", None), obstacle)
    padding = mask.key_padding() if isinstance(mask, CompactMask) else None
    return None if padding is None else padding[:, 0, 0]


def _misfit(method: str, config: Any, obstacle: str) -> ValueError:
    family = getattr(config, "model_type", "this model")
    return ValueError(
        f"method {method} is for encoders such as BERT, and {family} has {obstacle}; leave {method} out of the methods"
    )
