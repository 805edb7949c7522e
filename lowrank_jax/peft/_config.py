"""The fields of adapter_config.json, and the file's text for an adapter."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_jax._checks.fields import check_json
from lowrank_jax._errors import CheckpointError, ConfigError

# LoraConfig of peft 0.21.2, as save_pretrained writes it
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
# what save decides by itself; all else in a file is carried from one to the next
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
    """The file's text; scales: each module's rank and alpha."""
    if clash := sorted(set(extras) & WRITTEN_FIELDS):
        raise ConfigError(f"extras has {clash}, which save writes from the adapter itself")
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
        raise ConfigError(f"extras holds what JSON does not: {error}") from error


def _pick_most_common(values: Iterable[Any]) -> Any:
    """The value that most have; of several the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _to_json_value(value: Any) -> Any:
    """A hashable mapping as JSON takes it."""
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
    """The alpha of a scale; an integer where its quotient is the scale to the last bit."""
    root = math.sqrt(rank) if rslora else rank
    if not math.isfinite(scale * root):
        raise CheckpointError(f"an adapter has the scale {scale}, of which no alpha is finite")
    whole = round(scale * root)
    return whole if whole / root == scale else scale * root


def collect_extras(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says besides: to be carried into the next."""
    differs = lambda field, value: field not in DEFAULTS or value != DEFAULTS[field]
    extras = {k: v for k, v in values.items() if k not in WRITTEN_FIELDS and differs(k, v)}
    try:
        check_json("the configuration", extras)
    except ConfigError as error:  # Python reads NaN and Infinity, which JSON has not
        raise CheckpointError(str(error)) from error
    return extras
