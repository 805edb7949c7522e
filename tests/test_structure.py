"""The house rules: layers, public JAX only, cheap import, one concept a file."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_jax

PACKAGE = Path(lowrank_jax.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))

# A module imports only from layers below its own (or its own, without a circle).
LAYERS = [
    {"_errors", "_paths", "names", "_configs", "_table", "_jaxprs", "_bilinear", "_contract"}
    | {"_dynamic", "_codecs", "_scales", "_packing"},
    {"_quantized", "_norms", "_nodes", "_family", "_virtual"},
    {
        "_tied",
        "_blocks",
        "_quantized_weight",
        "_dense",
        "_gain",
        "_magnitude",
        "_products",
        "_convolution",
        "_lookup",
        "_weight",
        "_observed",
    }
    | {"initializers", "_init_random", "_init_spectral", "_init_data", "_init_corda"}
    | {"_init_lora_ga", "_init_loftq", "_init_eva"},
    {"_interpret", "_control", "_rules", "_probe", "_lift", "_plan"},
    {"_quantize", "_targets", "_covariances", "_init", "_adapters", "_optim", "_functional"}
    | {"_report", "_specs"}
    | {"_states", "_offload"}
    | {"_quantization_error", "_fingerprint", "_archive", "_entries", "_fitting", "_background"}
    | {"_processes"}
    | {"_quant_state", "_safetensors", "_tensor_file", "_whole_files"}
    | {"_gguf", "_model_leaves", "_model_matching", "_model_reading", "_model_writing"}
    | {"_model_folder"}
    | {"_model_merging"}
    | {"_peft_config", "_peft_difference", "_peft_folder", "_peft_tensors"}
    | {"_peft_parsing", "_peft_matching", "_peft_factors", "_peft_whole", "_peft_writing"},
    {"bitsandbytes", "checkpoint", "peft", "huggingface", "_inspecting", "_converting"},
    {"_command_line"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Names of all modules a file imports, ours as "lowrank_jax._x"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lowrank_jax":
            yield from (f"lowrank_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    own = LEVEL[path.stem]
    for name in imports(path):
        if name.startswith("lowrank_jax."):
            assert LEVEL[name.split(".")[1]] <= own, f"{path.stem} imports {name} from above"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_public_jax(path):
    allowed = re.compile(r"jax(\.(numpy|lax|extend|interpreters|experimental|core)(\..*)?)?$")
    for name in imports(path):
        if name == "jax" or name.startswith("jax."):
            assert allowed.fullmatch(name), f"{path.stem} imports {name}"
    assert "_src" not in path.read_text()


def test_jaxpr_internals_stay_in_the_seam():
    for path in MODULES:
        if path.stem != "_jaxprs":
            assert "jax.extend" not in set(imports(path)), path
            assert "jax.core" not in set(imports(path)) or path.stem == "_bilinear", path


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


def test_every_file_is_of_one_concept():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 350, f"{path.stem} wants to be two files"
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.stem} says what it is"
        assert path.stem.strip("_") not in {"utils", "misc", "common", "base", "helpers"}
