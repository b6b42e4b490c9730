"""Fine-tune a model with top-k attention and top-k feed-forward layers, save it, and load it again.

python examples/finetune_with_topk.py --text book.txt --steps 20 --out tuned
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from small_model import load
from transformers import AutoModelForCausalLM

from topk_attention import convert


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model with top-k attention and feed-forward layers.")
    parser.add_argument("--model", help="folder or Hugging Face id of a causal language model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; by default Python's own documentation")
    parser.add_argument("--k", type=int, default=32, help="keys kept per query")
    parser.add_argument("--neurons", type=int, help="neurons kept per token; by default half of them")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    neurons = options.neurons or model.config.intermediate_size // 2
    print(convert(model, attention_k=options.k, feed_forward_k=neurons))

    text = options.text.read_text(encoding="utf-8") if options.text else "\n".join(topics.values())
    token_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    windows = token_ids[:, : token_ids.shape[1] // options.tokens * options.tokens].split(options.tokens, dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model.train()
    for step in range(options.steps):
        window = windows[step % len(windows)]
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    again = AutoModelForCausalLM.from_pretrained(options.out)
    report = convert(again)  # every k, as it was saved
    print(f"{options.out}: {len(report.replaced)} layers remember their k")


if __name__ == "__main__":
    main()
