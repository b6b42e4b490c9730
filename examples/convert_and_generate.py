"""Convert a model, generate with it, and compare its answer with that of full attention.

python examples/convert_and_generate.py --prompt "What is the capital of France?" --k 64
"""

from __future__ import annotations

import argparse

from small_model import load

from topk_attention import convert, unconvert


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a model and generate with it.")
    parser.add_argument("--model", help="folder or Hugging Face id of a causal language model")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--k", type=int, default=64, help="keys kept per query")
    parser.add_argument("--new-tokens", type=int, default=40)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    if tokenizer.chat_template is None:
        inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        conversation = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    full = answer()
    print(convert(model, attention_k=options.k))
    print(f"\nk = {options.k}: {answer()}")
    unconvert(model)
    print(f"full: {full}")


if __name__ == "__main__":
    main()
