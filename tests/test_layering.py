"""A file imports from its right: cli -> calibrate -> convert -> nn -> functional -> backends.

The experiments are a project of their own and stand on all of these; no file of the product imports them.
"""

import ast
from pathlib import Path

import pytest

import topk_attention
import topk_experiments

PRODUCT = Path(topk_attention.__file__).parent
EXPERIMENTS = Path(topk_experiments.__file__).parent
# Whatever is beside these folders in a package is below all of them: versions, files.
LAYERS = {
    "topk_attention": [{"cli"}, {"calibrate"}, {"convert"}, {"nn"}, {"functional"}, {"backends"}],
    "topk_experiments": [
        {"cli"},
        {"results_page"},
        {"results_conclusions"},
        {"benchmarks", "pretrained", "language_model", "lra", "qa"},
        {"models", "rivals"},
        {"show"},
        {"runs"},
    ],
}
RANK = {
    package: {name: rank for rank, layer in enumerate(layers) for name in layer} for package, layers in LAYERS.items()
}
BACKENDS = {"reference", "chunked", "cpu", "sdpa"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules of both packages that a file imports, wherever in the file."""
    root = EXPERIMENTS if EXPERIMENTS in path.parents else PRODUCT
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] in LAYERS}


def name_of(path: Path) -> str:
    return str(path.relative_to((EXPERIMENTS if EXPERIMENTS in path.parents else PRODUCT).parent))


PRODUCT_FILES = sorted(PRODUCT.rglob("*.py"))
FILES = [*PRODUCT_FILES, *sorted(EXPERIMENTS.rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_its_own_layer_or_those_below(path):
    package, layer = Path(name_of(path)).with_suffix("").parts[:2]
    rank = RANK[package]
    if layer not in rank:
        return  # files of the package itself: __init__.py may name everything
    for name in imported_modules(path):
        imported = [*name.split("."), ""][1]
        if name.startswith(f"{package}.") and imported in rank and imported != layer:
            assert rank[imported] > rank[layer], f"{path.name} ({layer}) imports {name}"


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=name_of)
def test_no_file_of_the_product_imports_the_experiments(path):
    assert not [name for name in imported_modules(path) if name.startswith("topk_experiments")]


@pytest.mark.parametrize("path", [p for p in PRODUCT_FILES if "backends" in p.parts], ids=name_of)
def test_backends_never_import_one_another(path):
    own = path.relative_to(PRODUCT / "backends").with_suffix("").parts[0]
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "topk_attention" and parts[1:2] == ["backends"] and len(parts) > 2 and own in BACKENDS:
            assert parts[2] not in BACKENDS - {own}, f"{path.name} imports {name}"


def test_the_layering_test_sees_imports():
    assert "topk_attention.backends.calls" in imported_modules(PRODUCT / "functional" / "attention.py")
    assert "topk_attention.convert" in imported_modules(EXPERIMENTS / "models" / "settings.py")
