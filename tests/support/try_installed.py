"""Whether an installed package has its kernels and computes what the specification says.

    python -I tests/support/try_installed.py    with the Python of an environment that holds the package; a line of JSON

Needs nothing but the package and what it depends on; where transformers is there, a tiny Llama is converted too.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sysconfig
from pathlib import Path

import numpy as np
import torch

import topk_attention
from topk_attention import ALiBi, RelativeBias, topk_feed_forward
from topk_attention.backends import cpu


def _integers(*shape: int) -> torch.Tensor:
    """Scores of small integers are exact in every dtype: the same keys are the best everywhere, ties included."""
    return torch.randint(-3, 4, shape).float()


def _compare(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, specified in zip(actual, expected, strict=True):
        assert bool(ours.isfinite().all())
        # Sums of up to 1,200 products in float32: a few roundings of the largest number.
        torch.testing.assert_close(ours.double(), specified, rtol=0, atol=3e-6 * float(specified.abs().max()))


def _attend(backend: str, dtype: torch.dtype, query, key, value, **options):
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
    values = options.pop("relative", None)
    if values is not None:
        inputs.append(values.to(dtype, copy=True).requires_grad_())
        options["bias"] = RelativeBias(inputs[-1])
    if "slopes" in options:
        options["bias"] = ALiBi(options.pop("slopes").to(dtype))
    output, selection = topk_attention.topk_attention(*inputs[:3], backend=backend, return_selection=True, **options)
    (output * torch.arange(output.shape[-1], dtype=dtype)).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)], selection.indices


def _attention() -> int:
    """How many calls of attention, forward and backward, are those of the float64 reference."""
    # Head sizes of which the scale is a power of two, so that scores stay exact.
    long = [_integers(1, heads, 1_200, 64) for heads in (2, 1, 1)]
    short = [_integers(2, heads, 70, 16) for heads in (4, 2, 2)]
    calls = [
        (short, {"k": 9, "is_causal": True, "enable_gqa": True}),
        (short, {"k": [3, 70, 1, 20], "attn_mask": torch.rand(2, 1, 70, 70) < 0.6, "enable_gqa": True}),
        (short, {"k": 9, "relative": _integers(4, 139), "enable_gqa": True}),
        (short, {"k": 9, "slopes": torch.tensor([0.5, 1.0, 2.0, 4.0]), "is_causal": True, "enable_gqa": True}),
        ([long[0][:, :, :3], *long[1:]], {"k": 40, "enable_gqa": True}),  # few rows
        (long, {"k": 40, "is_causal": True, "enable_gqa": True}),  # enough keys to be screened
    ]
    for tensors, options in calls:
        ours, chosen = _attend("cpu", torch.float32, *tensors, **options)
        specified, best = _attend("reference", torch.float64, *tensors, **options)
        assert torch.equal(chosen, best)
        _compare(ours, specified)
    return len(calls)


def _feed_forward() -> int:
    """Likewise of feed-forward layers."""
    calls = [("relu", False), ("silu", True)]
    for activation, is_gated in calls:
        tensors = [_integers(50, 24), _integers(96, 24), _integers(24, 96)]
        found = []
        for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
            torch.manual_seed(1)
            inputs = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
            gate = torch.randn(96, 24, dtype=torch.float64).to(dtype).requires_grad_() if is_gated else None
            output = topk_feed_forward(*inputs, k=11, w_gate=gate, activation=activation, backend=backend)
            (output * torch.arange(24, dtype=dtype)).sum().backward()
            found.append([output.detach(), *(x.grad for x in [*inputs, *([gate] if gate is not None else [])])])
        _compare(*found)
    return len(calls)


def _llama() -> str:
    """A tiny model from a configuration: with every key the original's output, with few of them it trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        topk_attention.convert(model, attention_k="all", feed_forward_k=64)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        topk_attention.unconvert(model)
    topk_attention.convert(model, attention_k=8, feed_forward_k=16)
    model(tokens, labels=tokens).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 44)
    return "forward, backward, generate"


def main() -> None:
    folder = Path(topk_attention.__file__).parent
    assert folder.is_relative_to(sysconfig.get_path("platlib")), f"{folder} is not an installed package"
    assert cpu.problem() is None, cpu.problem()
    torch.manual_seed(0)
    targets = cpu.cpu_targets()
    for target in targets:
        with cpu.forced_cpu_target(target):
            attention, feed_forward = _attention(), _feed_forward()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "targets": list(targets),
        "attention_calls": attention,
        "feed_forward_calls": feed_forward,
    }
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        found |= {"transformers": transformers.__version__, "llama": _llama()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
