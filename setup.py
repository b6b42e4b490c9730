"""Builds the CPU kernels in csrc/; everything else about the package is in pyproject.toml.

The sources are compiled side by side, as many as there are cores or as MAX_JOBS says; MAX_JOBS=1 saves memory.

Without torch at build time, or without a working compiler, the package installs without kernels and runs in plain
PyTorch. Set TOPK_ATTENTION_KERNELS=required to make that an error, or =off to build no kernels.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = os.environ.get("TOPK_ATTENTION_KERNELS", "optional")
X86_TARGETS = ["baseline", "avx2", "avx2screen", "avxvnni", "avx512", "avx512screen", "avx512vnni"]
ARM_TARGETS = ["neon", "neondot"]
TARGETS = {"x86_64": X86_TARGETS, "amd64": X86_TARGETS, "aarch64": ARM_TARGETS, "arm64": ARM_TARGETS}
# Left out where the compiler does not know their flags: -mavxvnni needs g++ 11 or clang 12.
OPTIONAL_TARGETS = ["avxvnni"]
FLAGS = Path("csrc/flags")  # a file of compiler flags for all sources, and one for each target that needs more


class BuildKernels(build_ext):
    """Compiles each kernels/<target>.cpp with that target's flags."""

    def build_extension(self, ext: Extension) -> None:
        for name in OPTIONAL_TARGETS:
            source = f"csrc/kernels/{name}.cpp"
            if source in ext.sources and not self.knows_flags(flags_of(name)):
                print(f"topk_attention: no kernels for {name}, the compiler does not know its flags", file=sys.stderr)
                ext.sources.remove(source)
                ext.define_macros.append((f"TOPK_WITHOUT_{name.upper()}", None))
        compile_all, compile_one = self.compiler.compile, self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            more = flags_of(Path(src).stem) if Path(src).parent.name == "kernels" else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *more], pp_opts)

        def compile_side_by_side(*args, **options):
            waiting = []
            self.compiler._compile = lambda *job: waiting.append(job)
            objects = compile_all(*args, **options)
            # Threads wait for compilers. The kernels, which take longest, come after the other sources: they begin.
            with ThreadPoolExecutor(jobs()) as pool:
                for _ in pool.map(lambda job: compile_with_flags(*job), reversed(waiting)):
                    pass  # an error is raised here, and what has not begun is left
            return objects

        self.compiler.compile = compile_side_by_side
        super().build_extension(ext)

    def knows_flags(self, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "nothing.cpp"
            source.touch()
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


def jobs() -> int:
    """How many sources are compiled at the same time: MAX_JOBS, as for PyTorch's own extensions, or one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("MAX_JOBS") or cores))


def targets() -> list[str]:
    return TARGETS.get(platform.machine().lower(), ["baseline"])


def flags_of(name: str) -> list[str]:
    return (FLAGS / name).read_text().split() if (FLAGS / name).exists() else []


def extensions() -> list[Extension]:
    if KERNELS == "off":
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        if KERNELS == "required":
            raise
        print("topk_attention: no torch to build against, the CPU kernels are not built", file=sys.stderr)
        return []
    return [
        Extension(
            "topk_attention._kernels",
            sources=["csrc/bindings.cpp", "csrc/dispatch.cpp", *(f"csrc/kernels/{name}.cpp" for name in targets())],
            depends=[
                "setup.py",
                *(str(path) for path in [*sorted(Path("csrc").rglob("*.h")), *sorted(FLAGS.iterdir())]),
            ],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],  # in the process already when the kernels are loaded
            # torch 2.10 is the first with the stable ABI's parallel_for.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[*flags_of("all"), "-g0"],
            extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--as-needed"],
            py_limited_api=True,
            optional=KERNELS != "required",
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python from 3.11 on
)
