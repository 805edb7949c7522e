"""The fields of adapter_config.json, and the text of that file for an adapter."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_jax._checks.fields import check_json
from lowrank_jax._errors import CheckpointError, ConfigError

# The defaults of LoraConfig in peft 0.21.2, as save_pretrained writes them.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields that save derives from the adapter. All others are kept in LoraConfig.extras.
WRITTEN_FIELDS = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}


def to_json(
    scales: Mapping[str, tuple[int, float]], rslora: bool, extras: Mapping[str, Any], **own: Any
) -> str:
    """Write the text of the file; scales: module -> (rank, alpha)."""
    if clash := sorted(set(extras) & WRITTEN_FIELDS):
        raise ConfigError(f"extras has {clash}, which save writes from the adapter itself")
    # The most common rank becomes "r", and the modules that differ get a pattern of their own:
    # ranks a: 8, b: 8, c: 4 become "r": 8 and "rank_pattern": {"^c": 4}.
    rank, alpha = (
        _pick_most_common(values) if scales else DEFAULTS[field]
        for values, field in zip(_unzip(scales.values()), ("r", "lora_alpha"), strict=True)
    )
    exactly = lambda module: "^" + re.escape(module)
    values = {
        **DEFAULTS,
        **_to_json_value(extras),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(m): r for m, (r, _) in sorted(scales.items()) if r != rank},
        "alpha_pattern": {exactly(m): a for m, (_, a) in sorted(scales.items()) if a != alpha},
        "target_modules": sorted(scales),
        "use_rslora": rslora,
        **own,
    }
    try:
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"extras holds values that are not JSON: {error}") from error


def _pick_most_common(values: Iterable[Any]) -> Any:
    """Return the most common value; among several, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _to_json_value(value: object) -> Any:
    """Convert hashable mappings and tuples to dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _to_json_value(item) for key, item in value.items()}
    return list(map(_to_json_value, value)) if isinstance(value, tuple) else value


def _unzip(rows: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    ranks, alphas = [], []
    for rank, alpha in rows:
        ranks.append(rank)
        alphas.append(alpha)
    return ranks, alphas


def compute_alpha(scale: float, rank: int, rslora: bool) -> float:
    """Return the alpha of a scale, as an integer if dividing that gives exactly the scale."""
    root = math.sqrt(rank) if rslora else rank
    if not math.isfinite(scale * root):
        raise CheckpointError(f"an adapter has the scale {scale}, for which alpha is not finite")
    # scale 1/3 and rank 3: the product is 1.0, and 1 / 3 == 1/3, so alpha is the integer 1
    whole = round(scale * root)
    return whole if whole / root == scale else scale * root


def collect_extras(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file that save does not derive and that differ from the defaults."""
    differs = lambda field, value: field not in DEFAULTS or value != DEFAULTS[field]
    extras = {k: v for k, v in values.items() if k not in WRITTEN_FIELDS and differs(k, v)}
    try:
        check_json("the configuration", extras)
    except ConfigError as error:  # Python reads NaN and Infinity, which are not JSON
        raise CheckpointError(str(error)) from error
    return extras
