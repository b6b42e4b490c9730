"""What the wheel of the product holds."""

import tomllib
from pathlib import Path

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
