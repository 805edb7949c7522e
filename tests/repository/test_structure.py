"""Structure of the package: layers, public JAX only, a cheap import, short modules."""

import ast
import graphlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_jax

PACKAGE = Path(lowrank_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Folders, and modules beside them. Each imports from lower layers and from within itself alone.
# `_transforms` (functions of functions) and `_trees` (functions of trees) are in one layer, so that
# neither imports the other.
LAYERS = [
    {"_display"},
    {"_errors"},
    {"_checks", "_codecs", "_jax"},
    {"_primitives", "names"},
    {"_nodes"},
    {"_estimate", "_files", "_operators", "_targeting", "_training"},
    {"_interpreter", "bitsandbytes", "initializers"},
    {"_transforms", "_trees"},
    {"_many", "checkpoint", "peft"},
    {"huggingface"},
    {"_cli", "__init__"},
    {"__main__"},
]
LAYER = {folder: layer for layer, folders in enumerate(LAYERS) for folder in folders}


def dotted(path):
    """A module's name within the package; an __init__ has its folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


NAMES = {dotted(path): path for path in MODULES}


def imports(path, types=True):
    """Names of all modules that a file imports, the package's own as "lowrank_jax.x.y".

    types: include imports for type checkers alone.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                ours = inner.removeprefix("lowrank_jax.") in NAMES
                yield inner if ours else node.module


def own_imports(path, types=True):
    """The modules of the package that a file imports, by their names within it."""
    found = imports(path, types)
    names = {name.removeprefix("lowrank_jax.") for name in found if "lowrank_jax" in name}
    assert names <= NAMES.keys(), names - NAMES.keys()
    return names


def test_every_folder_has_a_layer():
    assert {name.split(".")[0] for name in NAMES} == LAYER.keys()


def test_the_map_of_the_documentation_has_these_layers():
    page = (PACKAGE.parent / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`,? ?)+) \|", page.split("## To add")[0], flags=re.M)
    documented = [set(re.findall(r"\w+", row)) for row in rows]
    private = [{folder for folder in layer if "__" not in folder} for layer in LAYERS]
    assert documented == [layer for layer in private if layer]


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    folder = name.split(".")[0]
    for other in own_imports(NAMES[name]):
        below = other.split(".")[0]
        assert below == folder or LAYER[below] < LAYER[folder], f"{name} imports {other} from above"


def test_tests_are_in_the_folders_of_the_package():
    """tests/ also has a folder for invariants of all parts, and one for the repository itself."""
    files = (PACKAGE.parent / "tests").rglob("test_*.py")
    folders = {path.parent.name for path in files} - {"tests", "invariants", "repository"}
    assert folders <= {folder.strip("_") for folder in LAYER}


def test_imports_have_no_cycle():
    graph = {name: own_imports(path, types=False) - {name} for name, path in NAMES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {*order} == {*NAMES}


def test_private_modules_of_public_packages_are_used_by_few():
    users = {
        (name.split(".")[0], other.split(".")[0])
        for name, path in NAMES.items()
        for other in own_imports(path)
        if "._" in other and name.split(".")[0] != other.split(".")[0]
    }
    served = {("huggingface", "peft"), ("huggingface", "bitsandbytes")}
    served |= {("_cli", "peft"), ("_cli", "huggingface")}
    assert users <= served, users - served


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_public_jax(path):
    allowed = re.compile(r"jax(\.(numpy|lax|extend|interpreters|experimental|core)(\..*)?)?$")
    for name in imports(path):
        if name == "jax" or name.startswith("jax."):
            assert allowed.fullmatch(name), f"{dotted(path)} imports {name}"
    assert "_src" not in path.read_text()


def test_jaxpr_internals_are_read_in_one_folder():
    for name, path in NAMES.items():
        if not name.startswith("_jax."):
            assert "jax.extend" not in set(imports(path)), path
            assert "jax.core" not in set(imports(path)) or path.stem == "bilinear", path
            assert ".params[" not in path.read_text(), f"{name}: see _jax/equations.py"


def test_what_writes_files_needs_no_interpreter():
    """Functions of trees, and what saves trees, import no transformation, even indirectly."""
    writers = ("_trees", "_files", "checkpoint", "peft", "huggingface", "bitsandbytes")
    for name in NAMES:
        reached, rest = set(), {name}
        while rest:
            reached |= rest
            rest = {other for one in rest for other in own_imports(NAMES[one])} - reached
        if name.split(".")[0] in writers:
            above = {
                other for other in reached if other.startswith(("_interpreter", "_transforms"))
            }
            assert not above, f"{name} needs {above}"


def test_formats_are_named_in_their_table_alone():
    """What a comparison with a format's name decides should be a field of the format's entry."""
    for name, path in NAMES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not texts & {"nf4", "fp4", "int8"}, f"{name}, line {node.lineno}"


def test_import_loads_no_optional_package():
    code = "import sys, lowrank_jax; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "jax" in loaded
    optional = {"flax", "optax", "orbax", "chex", "rich", "gguf", "tokenizers", "safetensors"}
    assert not loaded & optional


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem == "__init__"], ids=dotted)
def test_packages_hold_imports_alone(path):
    """An __init__ imports, and sets `__all__` or `__version__`; code is in modules named for it."""
    for node in ast.parse(path.read_text()).body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0])
        known = isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
        assert known or named in ("__all__", "__version__"), f"{dotted(path)}, line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_says_what_it_provides(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert path.stem.strip("_") not in {"utils", "misc", "common", "base", "helpers"}


def test_modules_are_short():
    """One concept is in one file, and most are read in a few minutes."""
    lengths = {dotted(path): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: length for name, length in lengths.items() if length > 400}
    code = [lengths[dotted(path)] for path in MODULES if path.stem != "__init__"]
    assert statistics.median(code) < 170
