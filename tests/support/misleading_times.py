"""Whether screening keys is ever slower than scoring all of them: times on data that mislead it.

    python tests/support/misleading_times.py [TARGET]    the best target of this processor, or one that it can run

For every family of `adversarial.py`: the median forward pass on two threads, targets taking turns.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from adversarial import FAMILIES, screening_targets
from topk_attention import topk_attention
from topk_attention.backends import cpu

_SIZES = ((12, 2048, 2048), (4, 2048, 8192))  # heads, queries, keys
_ROUNDS = 7


def _seconds(target: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[float, torch.Tensor]:
    with cpu.forced_cpu_target(target):
        begin = time.perf_counter()
        output = topk_attention(query, key, value, k=64, backend="cpu")
        return time.perf_counter() - begin, output


def main() -> None:
    targets = sys.argv[1:] or screening_targets()[:1]
    if not targets or targets[0] not in screening_targets():
        raise SystemExit(f"this processor or build has no kernels that screen keys: {', '.join(cpu.SCREENING)}")
    screened, plain = targets[0], cpu.SCREENING[targets[0]]
    torch.set_num_threads(2)
    for heads, queries, keys in _SIZES:
        print(f"{heads} heads of 64, {queries:,} queries, {keys:,} keys, k = 64: how many times as fast as {plain}")
        found = {}
        for family, mislead in FAMILIES.items():
            torch.manual_seed(0)
            query, key = mislead(torch.randn(1, heads, queries, 64), torch.randn(1, heads, keys, 64))
            tensors = [query.contiguous(), key.contiguous(), torch.randn(1, heads, keys, 64)]
            times: dict[str, list[float]] = {screened: [], plain: []}
            for turn in range(_ROUNDS + 1):
                outputs = []
                for target in (screened, plain):
                    seconds, output = _seconds(target, *tensors)
                    outputs.append(output)
                    if turn:  # the first warms up
                        times[target].append(seconds)
                assert torch.equal(*(output.nan_to_num(7) for output in outputs)), family
            found[family] = statistics.median(times[plain]) / statistics.median(times[screened])
        for family, ratio in sorted(found.items(), key=lambda item: item[1]):
            print(f"  {ratio:5.2f}  {family}")


if __name__ == "__main__":
    main()
