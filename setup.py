"""Builds the CPU kernels in csrc/; everything else about the package is in pyproject.toml.

The sources are compiled side by side, as many as there are cores or as MAX_JOBS says; MAX_JOBS=1 saves memory.

Without torch at build time, or without a working compiler, the package installs without kernels, says so when it is
imported, and runs in plain PyTorch. Set TOPK_ATTENTION_KERNELS=required to make that an error, or =off to build no
kernels.
"""

import importlib.util
import os
import platform
import re
import site
import sys
import sysconfig
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
OLDEST_TORCH = (2, 10)  # the first with the stable ABI's parallel_for
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


def torch_folder() -> Path | None:
    """Where a torch lies whose headers will do: the one that would be imported, or one installed for this interpreter.

    Where pip builds in isolation, torch cannot be imported, but the interpreter is still that of the environment which
    the package is for. A torch among the build requirements would bring gigabytes to read some headers of it, and
    whichever they are from, the kernels are the same.
    """
    found = importlib.util.find_spec("torch")
    folders = [Path(found.origin).parent] if found is not None and found.origin else []
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += [Path(folder) / "torch" for folder in installed]
    return next((folder for folder in folders if version_of(folder) >= OLDEST_TORCH), None)


def version_of(torch: Path) -> tuple[int, ...]:
    """Major and minor number of the torch in a folder; () where there is none."""
    file = torch / "version.py"
    found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", file.read_text(), re.MULTILINE) if file.exists() else None
    return tuple(map(int, found.groups())) if found else ()


def extensions() -> list[Extension]:
    if KERNELS == "off":
        return []
    torch = torch_folder()
    if torch is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        problem = f"no torch from {oldest} on to build against, so no CPU kernels; install torch first"
        if KERNELS == "required":
            raise SystemExit(f"topk_attention: {problem}, or do not set TOPK_ATTENTION_KERNELS=required")
        print(f"topk_attention: {problem}", file=sys.stderr)
        return []
    return [
        Extension(
            "topk_attention._kernels",
            sources=["csrc/bindings.cpp", "csrc/dispatch.cpp", *(f"csrc/kernels/{name}.cpp" for name in targets())],
            depends=[
                "setup.py",
                *(str(path) for path in [*sorted(Path("csrc").rglob("*.h")), *sorted(FLAGS.iterdir())]),
            ],
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],  # in the process already when the kernels are loaded
            define_macros=[("TORCH_TARGET_VERSION", f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000")],
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
