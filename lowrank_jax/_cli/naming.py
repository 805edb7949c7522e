"""Choose the table that names the modules of a checkpoint's leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank_jax import names
from lowrank_jax._display.text import to_printable
from lowrank_jax._errors import CheckpointError
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import is_node
from lowrank_jax.huggingface._folder import read_model_config

TABLES = {
    name.lower(): value
    for name, value in sorted(vars(names).items())
    if isinstance(value, names.Table)
}
PATHS = "paths"  # the value of --names for a leaf's path with dots

# model_type of a config.json -> table
_TABLE_OF_MODEL = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma2",
    "gpt2": "gpt2",
    "bert": "bert",
    "vit": "vit",
}


def choose_names(lora: Any, given: str | None, base: Path | None = None) -> str:
    """Choose how the modules of an adapter are named: a key of TABLES, or PATHS.

    Args:
      lora: the adapter.
      given: the choice of the user, or None.
      base: the folder of the model that the adapter is for, if there is one: its config.json names
        the model, which determines the table.

    Returns:
      The choice of the user; else the table of the model; else the only table that names all
      leaves; else PATHS.

    Raises:
      CheckpointError: nothing of these names a leaf that stacks layers.
    """
    nodes = {path: node for path, node in flatten(lora, is_leaf=is_node)[0] if is_node(node)}
    if given is not None:
        return given
    model_type = read_model_config(base).get("model_type") if base is not None else None
    table = _TABLE_OF_MODEL.get(model_type) if isinstance(model_type, str) else None
    if table is not None and _names_all(table, nodes):
        return table
    fitting = [name for name in TABLES if _names_all(name, nodes)]
    if _are_module_paths(fitting, nodes):
        return PATHS
    if fitting and all(_name(fitting[0], nodes) == _name(other, nodes) for other in fitting):
        return "llama" if "llama" in fitting else fitting[0]
    stacked = [path for path, node in nodes.items() if getattr(node, "stack", ())]
    if not stacked:
        return PATHS
    fit = f"; its leaves fit {', '.join(fitting)}" if fitting else ""
    raise CheckpointError(
        f"'{to_printable(stacked[0])}' stacks layers, so its path alone names no module: pass "
        f"--names TABLE, one of {', '.join(TABLES)}{fit}"
    )


def _names_all(table: str, paths: Iterable[str]) -> bool:
    """Whether a table names all leaves."""
    return all(TABLES[table](path) is not None for path in paths)


def _name(table: str, paths: Iterable[str]) -> list[str]:
    """Return the names of all leaves by a table that names them."""
    return [parameter.key for path in paths if (parameter := TABLES[table](path)) is not None]


def _are_module_paths(fitting: Iterable[str], nodes: Mapping[str, Any]) -> bool:
    """Whether the paths are names of modules already, as those of a converted PEFT adapter are."""
    # model/layers/0/self_attn/q_proj/kernel is model.layers.0.self_attn.q_proj, the name that the
    # table has; a longer or shorter one, such as language_model.model.layers.0..., is of a model
    # around that of the table, or inside of it.
    own = [path.rpartition("/")[0].replace("/", ".") for path in nodes]
    for table in fitting:
        pairs = zip(own, (name.rpartition(".")[0] for name in _name(table, nodes)), strict=True)
        if all(
            f".{one}".endswith(f".{two}") or f".{two}".endswith(f".{one}") for one, two in pairs
        ):
            return True
    return False
