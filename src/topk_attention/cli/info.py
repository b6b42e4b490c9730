"""Describes this installation: versions, processor, backends."""

from __future__ import annotations

from ..backends import BACKENDS, choose_backend, cpu
from ..convert.settings import NAME
from ..environment import environment, package_version


def describe_environment() -> str:
    """Lines for a user to read or to put into a bug report. They name no person and no folder."""
    import torch

    versions = environment()
    chosen = choose_backend("auto")
    lines = [
        f"topk_attention  {versions['topk_attention']}" + (f" ({versions['commit']})" if versions["commit"] else ""),
        f"python          {versions['python']}",
        f"torch           {versions['torch'] or 'not installed'}",
        f"transformers    {versions['transformers'] or 'not installed'}",
        f"system          {versions['system']}",
        f"cpu             {versions['cpu']}",
        f"threads         {torch.get_num_threads()} of {versions['num_cpus']}",
        "",
        "backends",
        *(f"  {name:<12}  {_can_run(name)}: {meaning}" for name, meaning in BACKENDS.items()),
        f'  "auto" uses {chosen.name}: {chosen.reason}',
        "  (full attention, where k is at least the number of keys, uses sdpa, PyTorch's own, unless dropout, a bias,",
        "  a mask or values of another kind, or a NaN that would spread prevents it)",
        f"  kernels: {_kernels()}",
        "",
        f'attn_implementation="{NAME}"  {_registration()}',
    ]
    return "\n".join(lines)


def _kernels() -> str:
    problem = cpu.problem()
    if problem is not None:
        return problem
    target = cpu.cpu_target()
    return f"{target} in use, {_scores(target)}; this processor can run {', '.join(cpu.cpu_targets())}"


def _scores(target: str) -> str:
    """How the attention of a CPU target finds the keys to keep, and why."""
    if target in cpu.SCREENING:
        return "which screens keys by products of 8-bit integers and scores in float32 those that may be kept"
    return (
        "which scores every key, as only avx512vnni (AVX-512 with VNNI and VBMI2), avx512screen (AVX-512), avxvnni "
        "(AVX-VNNI), avx2screen (AVX2; not chosen on AMD before Zen 3 and Intel before Skylake, which it may slow) "
        "and neondot (NEON with dot products) screen them first"
    )


def _can_run(backend: str) -> str:
    try:
        choose_backend(backend)
    except RuntimeError as error:
        return f"cannot run here, {error}"
    return "runs here"


def _registration() -> str:
    if package_version("transformers") is None:
        return "not available: transformers is not installed"
    # The import registers the names. It also shows whether transformers can be imported at all.
    from transformers import AttentionInterface, AttentionMaskInterface

    names = (("attention", AttentionInterface()), ("mask", AttentionMaskInterface()))
    missing = [name for name, interface in names if NAME not in interface]
    return "is registered with transformers" if not missing else f"is NOT registered: {', '.join(missing)} missing"
