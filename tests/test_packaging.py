"""What the wheel of the product holds, and when it has kernels. `make check-wheel` tries the wheel itself."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]


def packages_of(project):
    """Names of the packages that setuptools puts into the wheel of a project in this folder."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    names = []
    for where in settings.get("where", ["."]):
        names += find_packages(str(project / where), include=settings.get("include", ["*"]))
    return names


def test_no_package_of_the_experiments_is_in_the_products_wheel():
    packages = packages_of(ROOT)
    assert "topk_attention.backends.cpu" in packages
    assert {name.partition(".")[0] for name in packages} == {"topk_attention"}


def test_the_products_files_are_all_in_packages_of_the_wheel():
    packages = set(packages_of(ROOT))
    folders = {path.parent for path in (ROOT / "src").rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT / "src").parts) for folder in folders} == packages


def test_no_package_of_the_product_is_in_the_wheel_of_the_experiments():
    packages = packages_of(ROOT / "experiments")
    assert {name.partition(".")[0] for name in packages} == {"topk_experiments"}


def test_no_extra_of_the_product_depends_on_the_experiments():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert not [name for name in wanted if name.startswith("topk-experiments")]


# What setup.py builds, asked as pip builds in isolation: setuptools can be imported, what is installed cannot.
EXTENSIONS = """
import sys

import setuptools

sys.path = [path for path in sys.path if not path.endswith("site-packages")]
sys.modules.pop("torch", None)
setuptools.setup = lambda ext_modules, **_: print([extension.include_dirs for extension in ext_modules])
if {folder!r}:
    import site, sysconfig
    sysconfig.get_path = lambda name: {folder!r}
    site.getusersitepackages = lambda: {folder!r}
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__name__": "__main__"}})
assert "torch" not in sys.modules
"""


def extensions_in_isolation(folder="", **variables):
    """The include folders of each extension; `folder` stands for that of the installed packages."""
    code = EXTENSIONS.format(folder=str(folder))
    environment = {**os.environ, "TOPK_ATTENTION_KERNELS": "optional", **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_an_isolated_build_takes_the_headers_of_the_torch_that_is_installed():
    done = extensions_in_isolation()
    assert done.returncode == 0, done.stderr
    ((include, api),) = ast.literal_eval(done.stdout)
    assert (Path(include) / "torch/csrc/stable/library.h").exists()
    assert Path(api).is_relative_to(include)


@pytest.mark.parametrize("version", [None, "1.13.1", "2.9.1+cpu"])
def test_without_a_torch_of_the_stable_interface_no_kernels_are_built_unless_they_are_required(tmp_path, version):
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    done = extensions_in_isolation(tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "no torch from 2.10 on to build against, so no CPU kernels; install torch first" in done.stderr
    done = extensions_in_isolation(tmp_path, TOPK_ATTENTION_KERNELS="required")
    assert done.returncode == 1
    assert "or do not set TOPK_ATTENTION_KERNELS=required" in done.stderr


def test_a_wheel_is_built_for_the_oldest_python_and_torch_that_the_project_names():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["requires-python"] == ">=3.11"
    assert 'py_limited_api": "cp311"' in (ROOT / "setup.py").read_text()
    assert settings["tool"]["cibuildwheel"]["build"] == "cp311-*"
    assert "torch>=2.10" in settings["project"]["dependencies"]
    assert "OLDEST_TORCH = (2, 10)" in (ROOT / "setup.py").read_text()
