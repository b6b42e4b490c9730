"""Measure how many keys each head needs, and compare the result with the same k for every head.

python examples/calibrate_heads.py --text book.txt --tokens 512 --mean-k 32
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from small_model import load
from torch import Tensor

from topk_attention import MeanK, calibrate, convert, unconvert


def main() -> None:
    parser = argparse.ArgumentParser(description="Give each head of a model its own k.")
    parser.add_argument("--model", help="folder or Hugging Face id of a causal language model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; by default Python's own documentation")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a window; take the length of later inputs")
    parser.add_argument("--windows", type=int, default=2, help="windows to measure; one more is held out")
    parser.add_argument("--mean-k", type=float, default=32, help="keys per query, mean over all heads")
    parser.add_argument("--out", type=Path, default=Path("k.json"))
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    text = options.text.read_text(encoding="utf-8") if options.text else "\n".join(topics.values())
    token_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    needed = (options.windows + 1) * options.tokens
    if token_ids.shape[1] < needed:
        raise SystemExit(f"the text has {token_ids.shape[1]} tokens, {needed} are needed; give a longer one")
    *measured, held_out = token_ids[:, :needed].split(options.tokens, dim=1)

    calibration = calibrate(model, measured, target=MeanK(options.mean_k))
    calibration.save(options.out)
    print(f"full attention:            perplexity {perplexity(model, held_out):.2f}")
    convert(model, attention_k=round(options.mean_k))
    print(f"k = {options.mean_k:g} for every head:    perplexity {perplexity(model, held_out):.2f}")
    unconvert(model)
    convert(model, attention_k=calibration)
    print(f"calibrated, mean k = {calibration.mean_k:.0f}:  perplexity {perplexity(model, held_out):.2f}")
    print(f"written: {options.out}")


@torch.no_grad()
def perplexity(model: Any, token_ids: Tensor) -> float:
    return math.exp(model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.item())


if __name__ == "__main__":
    main()
