"""What runs here: versions, processor, backends."""

from __future__ import annotations

from ..backends import BACKENDS, choose_backend, cpu
from ..convert.settings import NAME
from ..environment import environment, package_version


def describe_environment() -> str:
    """Lines for a person, or for a bug report: nothing in them names a person or a folder."""
    import torch

    here = environment()
    chosen = choose_backend("auto")
    lines = [
        f"topk_attention  {here['topk_attention']}" + (f" ({here['commit']})" if here["commit"] else ""),
        f"python          {here['python']}",
        f"torch           {here['torch'] or 'not installed'}",
        f"transformers    {here['transformers'] or 'not installed'}",
        f"system          {here['system']}",
        f"cpu             {here['cpu']}",
        f"threads         {torch.get_num_threads()} of {here['num_cpus']}",
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
    return problem or f"{cpu.cpu_target()} in use; this processor can run {', '.join(cpu.cpu_targets())}"


def _can_run(backend: str) -> str:
    try:
        choose_backend(backend)
    except RuntimeError as error:
        return f"cannot run here, {error}"
    return "runs here"


def _registration() -> str:
    if package_version("transformers") is None:
        return "not available: transformers is not installed"
    # Importing it is what registers; this also finds an installation that does not import.
    from transformers import AttentionInterface, AttentionMaskInterface

    names = (("attention", AttentionInterface()), ("mask", AttentionMaskInterface()))
    missing = [name for name, interface in names if NAME not in interface]
    return "is registered with transformers" if not missing else f"is NOT registered: {', '.join(missing)} missing"
