"""A file imports from its right: cli -> calibrate -> convert -> nn -> functional -> backends.

The experiments are a project of their own and stand on all of these; no file of the product imports them.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import topk_attention
import topk_experiments

PRODUCT = Path(topk_attention.__file__).parent
EXPERIMENTS = Path(topk_experiments.__file__).parent
# Whatever is beside these folders in a package is below all of them: versions, files.
LAYERS = {
    "topk_attention": [
        {"cli"},
        {"calibrate"},
        {"convert"},
        {"nn"},
        {"distributed"},
        {"functional"},
        {"backends"},
        {"storage"},
    ],
    "topk_experiments": [
        {"cli"},
        {"results_page"},
        {"results_conclusions"},
        {"benchmarks", "conformance", "pretrained", "language_model", "lra", "qa", "versions"},
        {"models", "rivals"},
        {"show"},
        {"runs"},
    ],
}
RANK = {
    package: {name: rank for rank, layer in enumerate(layers) for name in layer} for package, layers in LAYERS.items()
}
BACKENDS = {"reference", "chunked", "cpu", "sdpa", "triton"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules of both packages that a file imports, wherever in the file."""
    return {name for module, names in imports_of(path) for name in (module, *names)}


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(
    path: Path, inside: Callable[[ast.AST], bool] = lambda node: isinstance(node, ast.Module)
) -> list[tuple[str, list[str]]]:
    """For each import of our own modules: the module, and the absolute names that are imported from it.

    inside  look only inside the nodes for which this is true
    """
    root = EXPERIMENTS if EXPERIMENTS in path.parents else PRODUCT
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    found: list[tuple[str, list[str]]] = []
    for outer in ast.walk(ast.parse(path.read_text())):
        for node in ast.walk(outer) if inside(outer) else ():
            if isinstance(node, ast.Import):
                found += [(alias.name, []) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = parts[: len(parts) - node.level] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found.append((module, [f"{module}.{alias.name}" for alias in node.names]))
    return [(module, names) for module, names in found if module.partition(".")[0] in LAYERS]


def module_name(path: Path) -> str:
    """The absolute name under which a file is imported."""
    parts = Path(name_of(path)).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> dict[str, set[str]]:
    """For each module of a package the modules of the same package that it imports when it runs, also in functions."""
    paths = {module_name(path): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        never_run = imports_of(path, is_for_type_checkers)
        for module, names in [imported for imported in imports_of(path) if imported not in never_run]:
            submodules = {imported for imported in names if imported in paths}
            graph[name] |= submodules
            if module in paths and (not names or len(submodules) < len(names)):
                graph[name].add(module)
    return graph


def modules_on_circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that remain when those without imports, or without importers, are taken away again and again."""
    left = {name: set(imported) for name, imported in graph.items()}
    while True:
        imported_by_others = set().union(*left.values()) if left else set()
        ends = {name for name, imported in left.items() if not imported or name not in imported_by_others}
        if not ends:
            return set(left)
        left = {name: imported - ends for name, imported in left.items() if name not in ends}


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


@pytest.mark.parametrize("root", [PRODUCT, EXPERIMENTS], ids=lambda root: root.name)
def test_no_module_imports_itself_by_way_of_others(root):
    assert not modules_on_circles(import_graph(root))


def test_the_search_for_circles_finds_one():
    graph = import_graph(PRODUCT)
    assert "topk_attention.convert.sites" in graph["topk_attention.convert.search"]
    graph["topk_attention.convert.sites"].add("topk_attention.convert.search")
    assert {"topk_attention.convert.sites", "topk_attention.convert.search"} <= modules_on_circles(graph)


# Files of the product that import their own package inside a function, and why they may.
LATE_IMPORTS = {
    **dict.fromkeys(
        (
            "topk_attention/functional/attention.py",
            "topk_attention/functional/feed_forward.py",
            "topk_attention/functional/feed_forward_shard.py",
        ),
        "each case of the dispatch imports the one backend that it calls",
    ),
    "topk_attention/cli/commands.py": "the command line starts fast: a command imports what it needs when it runs",
}


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=name_of)
def test_the_product_imports_its_own_modules_at_the_top_of_a_file(path):
    late = imports_of(path, is_function)
    assert bool(late) == (name_of(path) in LATE_IMPORTS), late


def test_the_layering_test_sees_imports():
    assert "topk_attention.backends.calls" in imported_modules(PRODUCT / "functional" / "attention.py")
    assert "topk_attention.convert" in imported_modules(EXPERIMENTS / "models" / "settings.py")
