"""Compile the Triton kernels for GPUs that are not here, and read what the compilers say of them.

`launches` runs the backend on tensors without memory and notes every launch, so what is compiled is what a call would
run. A process does this without Triton's interpreter. Run as a program it writes the whole table:

    PYTHONPATH=build/triton python tests/support/compile_triton.py results/triton/compile.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from topk_attention.backends.triton import attention, keys

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program can have; of gfx942 its local data share.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KERNELS = {
    attention: (
        "measure_keys_kernel",
        "score_tiles_kernel",
        "thresholds_kernel",
        "list_candidates_kernel",
        "score_candidates_kernel",
        "cut_in_passes_kernel",
        "cut_kernel",
        "sum_values_kernel",
        "differentiate_rows_kernel",
    ),
    keys: ("sum_entries_kernel", "sum_scalars_kernel", "join_segments_kernel"),
}
_DTYPES = {
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


class Launch(NamedTuple):
    kernel: str
    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """One call: H = 32 heads, 8 key heads, of `length` queries and keys."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    k: int = 64
    length: int = 8192
    variant: str = "plain"  # or causal_mask, relative_bias, dropout, per_head_k

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} D {self.head_dim} k {self.k} {self.variant}"


class _Recorder:
    def __init__(self, name: str, function: Any, noted: list[Launch]) -> None:
        self.name, self.function, self.noted = name, function, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.noted.append(Launch(self.name, self.function, grid, arguments, options))

        return launch


@contextmanager
def noted_launches(processors: int = 132) -> Iterator[list[Launch]]:
    """A list that receives what the backend would launch on a device with so many processors."""
    noted: list[Launch] = []
    before = attention._processors
    functions = {(module, name): getattr(module, name) for module, names in _KERNELS.items() for name in names}
    try:
        attention._processors = lambda device: processors
        for (module, name), function in functions.items():
            setattr(module, name, _Recorder(name, function, noted))
        yield noted
    finally:
        attention._processors = before
        for (module, name), function in functions.items():
            setattr(module, name, function)


def launches(case: Case, backward: bool = True) -> list[Launch]:
    """What a call with gradients launches, forward and backward, in this order."""
    heads, key_heads, length = 32, 8, case.length
    query = torch.empty(1, heads, length, case.head_dim, dtype=case.dtype, device="meta")
    key, value = (torch.empty(1, key_heads, length, case.head_dim, dtype=case.dtype, device="meta") for _ in range(2))
    mask = relative = seed = None
    if case.variant == "causal_mask":
        mask = torch.empty(1, 1, 1, length, dtype=torch.bool, device="meta")
    if case.variant == "relative_bias":
        relative = torch.empty(heads, 2 * length - 1, device="meta")
    if case.variant == "dropout":
        seed = torch.empty((), dtype=torch.int64, device="meta")
    head_k = [case.k] * heads
    if case.variant == "per_head_k":
        head_k[1] = case.k // 2
    is_causal, scale, dropout_p = "causal" in case.variant, 0.125, 0.1 if seed is not None else 0.0
    with noted_launches() as noted:
        forward = attention.topk_attention_op._init_fn
        options = (head_k, is_causal, scale, 0.0, dropout_p)
        output, indices, weights, _ = forward(query, key, value, mask, None, relative, None, seed, *options, True)
        if backward:
            attention.topk_attention_backward_op._init_fn(
                *(output, query, key, value, seed, indices, weights, head_k, scale, 0.0, dropout_p),
                *(True, True, True, False, (), relative.shape if relative is not None else ()),
            )
    return noted


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel with what Triton would fix for its arguments: ones, and what 16 divides."""
    signature, constants, attributes = {}, {}, {}
    given = dict(zip((x.name for x in launch.function.params), launch.arguments, strict=False)) | launch.options
    for position, parameter in enumerate(launch.function.params):
        x = given[parameter.name]
        is_fixed = not parameter.do_not_specialize  # whether ones and what 16 divides count as known
        if parameter.is_constexpr or x is None or (is_fixed and isinstance(x, int) and x == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = x
        elif isinstance(x, Tensor):
            signature[parameter.name] = f"*{_DTYPES[x.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(x, int):
            signature[parameter.name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if is_fixed and x % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(launch.function, signature, constants, attributes)


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """What the compilers say of a launch's kernel: registers, spilled bytes, shared memory, and more from its code."""
    options = {name: launch.options[name] for name in ("num_warps",) if name in launch.options}
    start = time.process_time()
    kernel = triton.compile(_source(launch), target=TARGETS[target], options=options)
    found: dict[str, Any] = {
        "kernel": launch.kernel,
        "target": target,
        "num_warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "tf32": "tf32" in kernel.asm["ttir"],
    }
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]

        def number(name: str) -> int:
            match = re.search(rf"\.{name}:?\s+(\d+)", code)
            assert match is not None, name
            return int(match[1])

        found |= {
            "registers": number("vgpr_count"),
            "spilled_bytes": 4 * number("vgpr_spill_count"),
            "scratch_bytes": number("private_segment_fixed_size"),
            "tensor_core": "mfma" if "v_mfma" in code else None,
            "float_atomics": bool(re.search(r"_atomic_(pk_)?(add|min|max)_f", code)),
        }
        return found | {"seconds": round(time.process_time() - start, 1)}
    ptx = kernel.asm["ptx"]
    found |= {
        "tensor_core": "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else None,
        "float_atomics": bool(re.search(r"\b(atom|red)\.[\w.]*\.(f16|f32|f64|bf16)", ptx)),
    }
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        found["spilled_bytes"] = int(re.search(r"LOCAL:(\d+)", usage)[1])  # type: ignore[index]
        found["stack_bytes"] = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        if launch.kernel == "score_tiles_kernel":
            rows, columns = launch.options["tile_rows"], launch.options["tile_keys"]
            loops = _loops_with_products(_tool("nvdisasm", "-c", str(cubin)))
            scores = rows * columns / (32 * kernel.metadata.num_warps)
            found |= {
                "pass": "bits" if launch.options["writes_bits"] else "maxima",
                "tile": [rows, columns],
                "instructions_per_score": [round(len(body) / scores, 2) for body in loops],
                "most_frequent": [Counter(x.split(".")[0] for x in body).most_common(8) for body in loops[:1]],
            }
    return found | {"seconds": round(time.process_time() - start, 1)}


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loops_with_products(code: str) -> list[list[str]]:
    """The innermost loops of disassembled code that multiply, or if none has a tensor core's product, that load; in the
    order of the code: their instructions."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if (label := re.match(r"\s*(\.L_x_\d+):", line)) is not None:
            labels[label[1]] = len(instructions)
        elif (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)) is not None:
            instructions.append(found[1].strip())
    back = [
        (labels[to[1]], at)
        for at, x in enumerate(instructions)
        if x.startswith("BRA") and (to := re.search(r"`\((\.L_x_\d+)\)", x)) and labels.get(to[1], at + 1) <= at
    ]
    products = [at for at, x in enumerate(instructions) if "MMA" in x.split()[0]]
    bodies = [(a, b) for a, b in back if any(a <= at <= b for at in products)]
    innermost = [x for x in bodies if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in bodies)]
    return [instructions[a : b + 1] for a, b in sorted(innermost)]


CASES = [
    *(Case(dtype, head_dim=d) for dtype in (torch.bfloat16, torch.float16, torch.float32) for d in (64, 80, 128, 256)),
    *(Case(k=k) for k in (16, 256)),
    *(Case(variant=variant) for variant in ("causal_mask", "relative_bias", "dropout", "per_head_k")),
    Case(torch.float32, head_dim=64, variant="relative_bias"),
]


def distinct(noted: list[Launch]) -> list[Launch]:
    """The launches that differ in what is compiled."""
    seen: dict[str, Launch] = {}
    for launch in noted:
        source = _source(launch)
        seen.setdefault(f"{launch.kernel} {source.signature} {source.constants} {source.attrs}", launch)
    return list(seen.values())


def main(path: str, targets: list[str]) -> None:
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for case in CASES:
        for launch in distinct(launches(case)):
            source = _source(launch)
            what = (launch.kernel, source.signature, source.constants, source.attrs, launch.options.get("num_warps"))
            same = repr(what)
            if same in seen:
                continue
            seen.add(same)
            for target in targets:
                try:
                    row = compiled(launch, target)
                except Exception as error:  # a compiler's fault is a result, too
                    row = {"kernel": launch.kernel, "target": target, "error": f"{type(error).__name__}: {error}"[:300]}
                rows.append({"case": str(case), **row})
                print({x: y for x, y in rows[-1].items() if x != "most_frequent"}, flush=True)
        record = {"triton": triton.__version__, "torch": torch.__version__, "kernels": rows}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(TARGETS))
