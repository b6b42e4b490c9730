"""What a model is given: the first of many likely inputs that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .tiny import END, VOCABULARY

Inputs = dict[str, Tensor]
NUM_TOKENS = 20
_NUM_DECODED = 9
_SIDES = (32, 64)  # of images, beside that of the configuration
_GRID = torch.tensor([[1, 4, 4], [1, 4, 4]])  # of patches of two images: frames, height, width


def token_ids(num: int = NUM_TOKENS, *, batch: int = 2, vocabulary: int = VOCABULARY, seed: int = 1) -> Tensor:
    """Tokens [batch, num], of which no two in a row are alike; the first numbers have a meaning of their own.

    The last is the token for the end in tiny configurations, and the largest: there CLIP's kind pools.
    """
    draw = torch.Generator().manual_seed(seed)
    most = min(vocabulary, VOCABULARY - 4)
    ids = 5 + torch.stack([torch.randperm(most - 5, generator=draw)[:num] for _ in range(batch)])
    if vocabulary >= VOCABULARY:
        ids[:, -1] = END
    return ids


def arguments_of(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def likely_inputs(model: Any) -> Iterator[Inputs]:
    """Arguments of a model's forward, most likely first: text, then images, sound, series, hidden states."""
    yield from _inputs_of_family(model)
    names = arguments_of(model.forward)
    make = _Maker(model.config)
    text: Inputs = {"input_ids": make.text} if "input_ids" in names else {}
    also: Inputs = {}
    if "decoder_input_ids" in names:
        also["decoder_input_ids"] = token_ids(_NUM_DECODED, vocabulary=make.vocabulary, seed=3)
    if "bbox" in names:
        also["bbox"] = make.boxes()
    seen = list(make.images(names))
    if text and ("bbox" in names or not hasattr(model, "get_image_features")):  # images come in by no other way
        yield from ({**text, **image, **also} for image in seen)
    if text:
        yield {**text, **also}
    for given in (*seen, *make.sounds(names), *make.series(names)):
        yield {**given, **also}
        if text:
            yield {**text, **given, **also}
    for name in ("hidden_states", "query_embeds", "encoder_hidden_states", "inputs_embeds"):
        if name in names:
            yield {name: make.numbers(2, NUM_TOKENS, make.field("hidden_size", "d_model", default=32)), **also}


def likely_images(model: Any) -> Iterator[Inputs]:
    """Arguments of `get_image_features`; none for a model without it."""
    if not hasattr(model, "get_image_features"):
        return
    names = arguments_of(model.get_image_features)
    make = _Maker(model.config)
    if "image_grid_thw" in names:
        for frames in (make.field("temporal_patch_size", default=2), 1):
            yield {"pixel_values": make.numbers(32, make.channels * frames * make.patch**2), "image_grid_thw": _GRID}
    for side in dict.fromkeys((make.side, *_SIDES)):
        sizes = {"image_sizes": torch.tensor([[side, side]] * 2)}
        images = [make.numbers(2, *shape, make.channels, side, side) for shape in ((), (2,))]
        yield from ({"pixel_values": pixels} for pixels in images)
        yield from ({"pixel_values": pixels, **sizes} for pixels in images)


class _Maker:
    """Makes inputs in the sizes of a configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._draw = torch.Generator().manual_seed(5)
        self.vocabulary = self.field("vocab_size", default=VOCABULARY)
        self.text = token_ids(vocabulary=self.vocabulary)
        self.channels = self.field("num_channels", "in_channels", "in_chans", default=3)
        self.side = self.field("image_size", "img_size", "input_size", default=16)
        self.patch = self.field("patch_size", "spatial_patch_size", default=4)
        self.bins = self.field(
            "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", default=16
        )

    def field(self, *names: str, default: int) -> int:
        """The first of these fields that holds a number, in the configuration or its parts; of a list the first."""
        for config in _with_parts(self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, list | tuple) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)

    def boxes(self) -> Tensor:
        """[2, tokens, 4]: left, top, right, bottom."""
        return torch.randint(0, 60, (2, NUM_TOKENS, 4), generator=self._draw).sort(-1).values

    def images(self, names: Mapping[str, Any]) -> Iterator[Inputs]:
        frames, channels = self.field("num_frames", default=4), self.channels
        for name in ("pixel_values", "pixel_values_videos", "videos"):
            if name not in names:
                continue
            if "spatial_shapes" in names:
                yield {
                    name: self.numbers(2, 16, channels * self.patch**2),
                    "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
                    "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
                }
            for side in (self.side, *_SIDES):
                image: Inputs = {name: self.numbers(2, channels, side, side)}
                if "image_sizes" in names:
                    image["image_sizes"] = torch.tensor([[side, side]] * 2)
                yield image
                for shape in ((frames, channels), (channels, frames), (1, channels)):
                    yield {name: self.numbers(2, *shape, side, side)}
        grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
        if grid is not None:
            first = next(iter(names))
            for part in (self.field("temporal_patch_size", default=2), 1):
                yield {first: self.numbers(32, channels * part * self.patch**2), grid: _GRID}
            yield {first: self.numbers(32, channels, self.patch, self.patch), grid: _GRID}

    def sounds(self, names: Mapping[str, Any]) -> Iterator[Inputs]:
        if "input_features" in names:
            masks = [n for n in ("attention_mask", "input_features_mask", "feature_attention_mask") if n in names]
            for masked in ((), *((mask,) for mask in masks)):
                for frames in (2 * self.field("max_source_positions", default=24), 48, 40, 100):
                    ones = {mask: torch.ones(2, frames, dtype=torch.long) for mask in masked}
                    yield {"input_features": self.numbers(2, self.bins, frames), **ones}
                    yield {"input_features": self.numbers(2, frames, self.bins), **ones}
        if "input_values" in names:
            longest = self.field("max_length", default=24)
            for shape in ((800,), (1, 800), (4000,), (32, self.bins), (1024, self.bins), (longest, self.bins)):
                yield {"input_values": self.numbers(2, *shape)}
        if "audio_codes" in names:
            yield {"audio_codes": torch.randint(0, 50, (2, 8, 12), generator=self._draw)}

    def series(self, names: Mapping[str, Any]) -> Iterator[Inputs]:
        if "past_values" not in names:
            return
        length = self.field("context_length", default=24)
        past = length + max(getattr(self.config, "lags_sequence", None) or [0])
        ahead, features = self.field("prediction_length", default=4), self.field("num_time_features", default=0)
        dated = {
            "past_values": self.numbers(2, past),
            "past_time_features": self.numbers(2, past, features),
            "past_observed_mask": torch.ones(2, past),
            "future_values": self.numbers(2, ahead),
            "future_time_features": self.numbers(2, ahead, features),
        }
        yield {**dated, "static_categorical_features": torch.zeros(2, 1, dtype=torch.long)}
        yield dated
        yield {"past_values": self.numbers(2, length, self.field("num_input_channels", default=1))}
        yield {"past_values": self.numbers(2, length)}


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(type(config), "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)


def _inputs_of_family(model: Any) -> Iterator[Inputs]:
    """Inputs of families that want several things that fit each other."""
    name, config, make = type(model).__name__, model.config, _Maker(model.config)
    text = make.text
    if name.startswith(("Blip2For", "InstructBlip")):
        side = config.vision_config.image_size
        pixels = make.numbers(2, 3, side, side)
        if "Video" in name:
            pixels = pixels[:, None].expand(-1, 2, -1, -1, -1).contiguous()
        asked = {"qformer_input_ids": text[:, :6]} if "Instruct" in name else {}
        with_places = text.clone()
        tokens = (
            getattr(config, f"{kind}_token_{end}", None) for kind in ("image", "video") for end in ("id", "index")
        )
        place = next((token for token in tokens if token is not None), None)
        if place is not None and place < VOCABULARY:
            with_places[:, : config.num_query_tokens] = place
        yield {"pixel_values": pixels, "input_ids": with_places, **asked}
        yield {"pixel_values": pixels, "input_ids": text, **asked}
    if name.startswith("Blip2QFormer"):
        yield {
            "query_embeds": make.numbers(2, 8, 32),
            "encoder_hidden_states": make.numbers(2, NUM_TOKENS, make.field("encoder_hidden_size", default=32)),
        }
    if name.startswith("Clap"):
        yield {"input_ids": text, "input_features": make.numbers(2, 1, 1001, 64)}
    if name.startswith("Kosmos2"):
        places = min(getattr(config, "latent_query_num", 8), 8)
        mask = torch.cat([torch.ones(2, places), torch.zeros(2, NUM_TOKENS - places)], 1).long()
        yield {"pixel_values": make.numbers(2, 3, 16, 16), "input_ids": text, "image_embeds_position_mask": mask}
    if name.startswith("Idefics") and not name.startswith(("Idefics2", "Idefics3")):
        yield {
            "input_ids": text,
            "pixel_values": make.numbers(2, 1, 3, 16, 16),
            "image_attention_mask": torch.ones(2, NUM_TOKENS, 1).long(),
            "attention_mask": torch.ones_like(text),
        }
    if name.startswith("Lxmert"):
        yield {"input_ids": text, "visual_feats": make.numbers(2, 6, 16), "visual_pos": make.numbers(2, 6, 4).sigmoid()}
    if name.lower().startswith("owlv"):
        some = token_ids(16, vocabulary=make.vocabulary)
        yield {"input_ids": some, "pixel_values": make.numbers(2, 3, 16, 16), "attention_mask": torch.ones_like(some)}
    if "detr" in name.lower() or name.startswith("TableTransformer"):
        yield {"pixel_values": make.numbers(2, 3, 64, 64)}
    if name.startswith("Perceiver"):
        yield {"inputs": make.numbers(2, NUM_TOKENS, 32)}
    if name.startswith(("Qwen2_5_VLVision", "Qwen2_5_VisionT")):
        yield {"hidden_states": make.numbers(32, 3 * 2 * config.patch_size**2), "grid_thw": _GRID}
    if name == "VitsModel":
        yield {"input_ids": text[:, :8]}
