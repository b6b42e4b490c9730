"""cli -> experiments -> calibrate -> tasks, convert -> nn, baselines -> functional -> backends: a file imports from its
right. Baselines are there for experiments alone."""

import ast
from pathlib import Path

import pytest

import topk_attention

PACKAGE = Path(topk_attention.__file__).parent
LAYERS = [
    {"cli"},
    {"experiments"},
    {"calibrate"},
    {"tasks", "convert"},
    {"nn", "baselines"},
    {"functional"},
    {"backends"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
BACKENDS = {"reference", "chunked", "cpu", "sdpa"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules of this package that a file imports, wherever in the file."""
    parts = ["topk_attention", *path.relative_to(PACKAGE).with_suffix("").parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("topk_attention.")}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_layer_or_those_below(path):
    layer = path.relative_to(PACKAGE).parts[0]
    if layer not in RANK:
        return  # files of the package itself: __init__.py may name everything
    for name in imported_modules(path):
        imported = name.split(".")[1]
        if imported in RANK and imported != layer:
            assert RANK[imported] > RANK[layer], f"{path.name} ({layer}) imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_experiments_and_the_command_line_import_baselines(path):
    if path.relative_to(PACKAGE).parts[0] not in ("baselines", "experiments", "cli"):
        assert not [name for name in imported_modules(path) if name.startswith("topk_attention.baselines")]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "backends" in p.parts], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_backends_never_import_one_another(path):
    own = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[1] == "backends" and len(parts) > 2 and own in BACKENDS:
            assert parts[2] not in BACKENDS - {own}, f"{path.name} imports {name}"


def test_the_layering_test_sees_imports():
    assert "topk_attention.backends.calls" in imported_modules(PACKAGE / "functional" / "attention.py")
