"""Imports run one way, and the oracle shares no code with what it checks."""

import ast
import graphlib
import importlib.util
import sys
from pathlib import Path

import pytest

import klquant
import klquant.backends

CORE = Path(klquant.__file__).parent
ON_TOP = {"__main__"}  # only this and the folders cli, demo and plots may import the backends
TESTING = sorted((CORE / "testing").glob("*.py"))
LAYERS = [
    {"errors"},
    {"_namespace"},
    {"_validate"},
    {"divergence", "histogram", "_search.prefix_sums"},
    {"merging", "_search.candidates", "_search.squared_errors"},
    {"_search.bin_by_bin"},
    {"_search.chains", "_result"},
    {"_search.closed_form"},
    {"affine", "threshold", "criteria", "presets"},
    {"__init__"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in sorted(names)}
CORE_FILES = {path.stem: path for path in sorted(CORE.glob("*.py")) if path.stem not in ON_TOP}
CORE_FILES |= {
    f"_search.{path.stem}": path for path in sorted((CORE / "_search").glob("*.py")) if path.stem != "__init__"
}
BACKEND_FILES = sorted(path for folder in klquant.backends.__path__ for path in Path(folder).rglob("*.py"))


def module_name(path):
    """Return the import name of a file."""
    for root, name in ((Path(klquant.backends.__file__).parent, "klquant.backends"), (CORE, "klquant")):
        if path.is_relative_to(root):
            parts = path.relative_to(root).with_suffix("").parts
            return ".".join([name, *(part for part in parts if part != "__init__")])
    raise AssertionError(path)


def imported(path):
    """Return the modules and names that a file imports absolutely, and those that it imports relatively."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names}
            (relative if node.level else absolute).update(names)
    return absolute, relative


def imported_modules(path, known):
    """Return which of the `known` modules a file imports, at its top or in a function, by full name."""
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for name in (f"{base}.{alias.name}" for alias in node.names):
                found |= {name if name in known else base} & known
    return found


def test_no_circle():
    """Imports inside functions and for type checkers count too."""
    paths = [*CORE.rglob("*.py"), *BACKEND_FILES]
    known = {module_name(path) for path in paths}
    graph = {module_name(path): imported_modules(path, known) for path in paths}
    assert "klquant.backends.calibration" in graph["klquant.backends.torch.pipeline"]
    graphlib.TopologicalSorter(graph).prepare()


def core_modules(names):
    """Return the modules of klquant to which the imported names belong."""
    modules = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "klquant":
            is_module = len(parts) > 1 and (parts[1] in CORE_FILES or (CORE / parts[1]).is_dir() or parts[1] in ON_TOP)
            inner = ".".join(parts[1:3]) if parts[1:2] == ["_search"] else "".join(parts[1:2])
            modules.add(inner if is_module or parts[1:2] == ["backends"] else "__init__")
    return modules


def test_every_module_has_a_layer():
    assert set(CORE_FILES) == set(LAYER) | {"reference"}


@pytest.mark.parametrize("name", CORE_FILES)
def test_the_core_needs_numpy_only(name):
    absolute, relative = imported(CORE_FILES[name])
    assert not relative
    external = {module.partition(".")[0] for module in absolute} - set(sys.stdlib_module_names)
    assert external <= {"numpy", "klquant"}


@pytest.mark.parametrize("name", LAYER)
def test_the_core_imports_only_lower_layers(name):
    used = core_modules(imported(CORE_FILES[name])[0])
    assert used <= set(LAYER)
    assert all(LAYER[module] < LAYER[name] for module in used)


def test_the_reference_stands_alone():
    assert core_modules(imported(CORE_FILES["reference"])[0]) == {"errors"}


@pytest.mark.parametrize("path", TESTING, ids=lambda path: path.stem)
def test_the_oracles_for_users_share_no_code_with_what_they_check(path):
    assert core_modules(imported(path)[0]) <= {"errors", "reference", "testing", "__init__"}
    names = {name for name in imported(path)[0] if name.startswith("klquant")}
    assert all(name.startswith(("klquant.errors", "klquant.reference", "klquant.testing")) for name in names)


def test_nobody_imports_the_reference():
    users = [path for path in (*CORE.rglob("*.py"), *BACKEND_FILES) if "reference" in core_modules(imported(path)[0])]
    assert set(users) <= set(TESTING)


@pytest.mark.parametrize("path", BACKEND_FILES, ids=lambda path: "-".join(path.parts[-2:]))
def test_backends_use_the_public_api(path):
    absolute, _ = imported(path)
    assert core_modules(absolute) <= {"__init__", "errors"}
    private = {name for name in absolute if name.startswith("klquant.") and name.split(".")[1] not in klquant.__all__}
    assert all(name.startswith("klquant.errors.") for name in private)


def test_only_the_namespace_module_names_jax():
    """All other code is the same for NumPy and JAX. Docstrings and messages may name JAX."""
    for name, path in CORE_FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert name == "_namespace" or not (names | modules) & {"jax", "jnp", "jax.numpy"}
