"""Generation with an index kept beside the cache chooses, at every step, the keys that it chooses without.

python tests/support/exact_generation.py [TOKENS]    SmolLM2 reads 2,100 tokens and generates TOKENS, 1,000 by default,
                                                     greedily and with 2 beams, in float32 and bfloat16,
                                                     and greedily with completion in float32
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import topk_attention

_PROMPT = 2100
_K = 64


@dataclass
class Compared:
    """calls that read an index, their rows of queries, and the calls that differ from those without the index."""

    calls: int = 0
    rows: int = 0
    differ: int = 0


@contextmanager
def compared_with_all_scores() -> Iterator[Compared]:
    """Within this context converted models attend with the index and without, and both are compared to the bit."""
    function = importlib.import_module("topk_attention.convert.attention_function")
    real, compared = function.topk_attention, Compared()

    def attend(query, key, value, *, key_index, **options):
        output = real(query, key, value, key_index=key_index, **options)
        if key_index is not None:
            indexed, chosen = real(query, key, value, key_index=key_index, return_selection=True, **options)
            expected, best = real(query, key, value, return_selection=True, **options)
            pairs = ((output, expected), (indexed, expected), *zip(chosen, best, strict=True))
            compared.differ += not all(torch.equal(given, wanted) for given, wanted in pairs)
            compared.calls += 1
            compared.rows += query.shape[0] * query.shape[1] * query.shape[2]
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "topk_attention", attend)
        yield compared


def main(num_tokens: int) -> int:
    from topk_experiments.models.pretrained import find_model, load_model_to_run, load_tokenizer
    from topk_experiments.models.text import first_tokens, read_text

    source, differ = find_model(None), 0
    prompt = first_tokens(read_text(), load_tokenizer(source), _PROMPT).view(1, _PROMPT)
    for dtype, completion in (("float32", None), ("bfloat16", None), ("float32", topk_attention.Completion())):
        model = load_model_to_run(source, dtype=dtype)
        topk_attention.convert(model, attention_k=_K, completion=completion)
        for num_beams in (1, 2) if completion is None else (1,):
            start, how = time.monotonic(), dtype if completion is None else f"{dtype}, completed"
            options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "num_beams": num_beams}
            with compared_with_all_scores() as compared:
                model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
            print(
                f"{how}, {num_tokens} tokens, {num_beams} beams: {compared.calls:,} calls, {compared.rows:,} rows, "
                f"{compared.differ} calls differ ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            differ += compared.differ or not compared.calls
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
