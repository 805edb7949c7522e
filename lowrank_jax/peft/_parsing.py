"""Parse and check adapter_config.json, and answer questions about each module."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.json_text import parse_json
from lowrank_jax.peft._config import DEFAULTS
from lowrank_jax.peft._patterns import Automaton, Budget, ModulePatterns, Suffixes
from lowrank_jax.peft._regex import RegexError, parse_regex

# Fields that change the mathematics of an adapter in a way that is not supported, and how.
REFUSED = {
    "alora_invocation_tokens": "the adapter acts after some tokens only",
    "arrow_config": "a router mixes several adapters",
    "kasa_config": "the base is truncated",
    "layer_replication": "layers are repeated",
    "megatron_config": "layers are Megatron's",
    "monteclora_config": "factors are sampled",
    "target_parameters": "parameters of mixtures of experts are targeted by name",
    "use_bdlora": "factors are block-diagonal",
    "use_qalora": "inputs are pooled by groups",
    "velora_config": "activations are compressed",
}
BASE_PRESERVING = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json.

    Args:
      values: field -> value.
      patterns: rank_pattern and alpha_pattern, compiled.
      budget: the steps that matching regexes may still take.
    """

    values: Mapping[str, Any]
    patterns: Mapping[str, ModulePatterns]
    budget: Budget

    def __getitem__(self, field: str) -> Any:
        return self.values[field]

    def rank(self, module: str) -> int:
        """Return a module's rank; the first pattern that matches wins."""
        return self._match_pattern("rank_pattern", module, self["r"])

    def alpha(self, module: str) -> float:
        """Return a module's alpha; the first pattern that matches wins."""
        return self._match_pattern("alpha_pattern", module, self["lora_alpha"])

    def _match_pattern(self, field: str, module: str, default: float) -> Any:
        """Return the value of the first pattern of a field that matches a module."""
        number = self.patterns[field].first(module)
        return default if number is None else self._pattern_values[field][number]

    @functools.cached_property
    def _pattern_values(self) -> dict[str, list[Any]]:
        return {field: [*self[field].values()] for field in _PATTERNS}

    def scale(self, module: str, rank: int) -> float:
        """Return a module's scale: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.alpha(module) / (math.sqrt(rank) if self["use_rslora"] else rank)

    def is_target(self, module: str) -> bool:
        """Whether the file should have factors for a module; False if that is unknown."""
        if self._names is None or self._names.is_saved(module) or self._names.is_excluded(module):
            return False
        if not self._names.is_targeted(module):
            return False
        return isinstance(self["target_modules"], str) or self._is_in_layers(module)

    @functools.cached_property
    def _names(self) -> _ModuleFilters | None:
        """Filters made of target_modules and similar fields; None if they cannot be evaluated."""
        targets, excluded = self["target_modules"], self["exclude_modules"] or ()
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return None
        try:
            saved = Automaton(False, "modules_to_save", self.budget)
            for name in self["modules_to_save"] or ():
                saved.append(parse_regex(rf"(^|.*\.){name}($|\..*)"))
            return _ModuleFilters(
                lambda module: saved.first(module) is not None,
                _make_filter(excluded, "exclude_modules", self.budget),
                _make_filter(targets, "target_modules", self.budget),
            )
        except RegexError:
            return None

    def _is_in_layers(self, module: str) -> bool:
        """Whether a module belongs to one of layers_to_transform."""
        layers, patterns = self["layers_to_transform"], self["layers_pattern"] or None
        if layers is None or layers == []:
            return True
        # layers_pattern names the lists that hold layers. For "layers":
        #   model.layers.3.mlp.up    keys[2] is the number and keys[1:2] the list: layer 3
        #   layers.3                 the number is last, so it is not within the module: no layer
        keys = module.split(".")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            # without a name, any list inside of another module
            names = [] if pattern is None else pattern.split(".")
            for place in range(2 if pattern is None else len(names), len(keys) - 1):
                number = keys[place]
                if (
                    number.isdecimal()
                    and len(number) < 10
                    and keys[place - len(names) : place] == names
                ):
                    return int(number) in ([layers] if isinstance(layers, int) else layers)
        return False

    def is_saved_whole(self, module: str) -> bool:
        """Whether modules_to_save includes a module."""
        return any(module == x or module.endswith(f".{x}") for x in self["modules_to_save"] or ())

    def token_rows(self, module: str) -> list[int] | None:
        """Return the rows of a module in trainable_token_indices, or None."""
        tokens = self["trainable_token_indices"]
        if not isinstance(tokens, dict):
            return tokens
        named = (v for k, v in tokens.items() if module == k or module.endswith(f".{k}"))
        return next(named, None)


class _ModuleFilters(NamedTuple):
    """Predicates of module names, from fields of a configuration."""

    is_saved: Callable[[str], bool]
    is_excluded: Callable[[str], bool]
    is_targeted: Callable[[str], bool]


def _make_filter(targets: str | Iterable[str], what: str, budget: Budget) -> Callable[[str], bool]:
    """Make a predicate that tells whether target_modules or exclude_modules includes a module."""
    if isinstance(targets, str):
        automaton = Automaton(True, what, budget)
        automaton.append(parse_regex(targets))
        return lambda module: automaton.first(module) is not None
    names = Suffixes()
    for name in targets:
        names.append(name, 0)
    return lambda module: names.first(module) is not None


def parse_config(text: bytes, where: str) -> AdapterConfig:
    """Parse and check the file; one error lists all problems."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds {type(values).__name__}, not an object")
    if values.get("peft_type", "") not in ("LORA", None):
        raise CheckpointError(
            f"{where} is of peft_type {str(values.get('peft_type'))[:40]!r}; only 'LORA' is read"
        )
    problems = [
        f"{field}={_shorten(values[field])}: {why}; this is not supported"
        for field, why in REFUSED.items()
        if values.get(field)
    ]
    problems += [
        f"{field}={_shorten(value)}: a field that peft 0.21.2 does not have; remove it from the "
        "file if it does not change the meaning of the tensors"
        for field, value in values.items()
        if field not in DEFAULTS and field not in ("runtime_config", "merge_weights") and value
    ]
    given = values
    # null stands for the default: some programs write it for fields that were not set
    values = {**DEFAULTS, **{field: value for field, value in given.items() if value is not None}}
    values |= {field: _as_integers(values[field]) for field in _INTEGERS}
    problems += [
        f"{field}={_shorten(given.get(field, values[field]))}: expected {kind}"
        for field, (kind, right) in _CHECKS.items()
        if not right(values[field])
    ]
    patterns, budget = {}, Budget()
    for field in _PATTERNS:
        if isinstance(values[field], dict):
            try:
                patterns[field] = ModulePatterns(values[field], field, budget)
            except RegexError as error:
                problems.append(
                    f"{field}: the regex {error}; the regex is malformed or not supported: use the "
                    "names of the modules"
                )
    if values["lora_bias"] is True and values["use_dora"] is True:
        problems.append("lora_bias and use_dora: PEFT does not support both")
    if problems:
        raise CheckpointError(f"{where} cannot be read:\n{list_problems(problems)}")
    return AdapterConfig(values, patterns, budget)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_integers(value: object, depth: int = 2) -> Any:
    """Convert floats with integral values to integers, also within lists and objects."""
    if depth and isinstance(value, list):
        return [_as_integers(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {key: _as_integers(item, depth - 1) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _is_init(value: object) -> bool:
    return any(
        value is kept or (isinstance(kept, str) and value == kept) for kept in BASE_PRESERVING
    )


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_list_of_rows(value: Any) -> bool:
    return _is_list_of(int, value) and all(0 <= row < 1 << 62 for row in value)


def _is_mapping_to(is_valid: Callable[[Any], bool], value: object) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


_PATTERNS = ("rank_pattern", "alpha_pattern")
_INTEGERS = ("r", "rank_pattern", "layers_to_transform", "trainable_token_indices")
_NAMES = "a list of names", lambda x: x is None or _is_list_of(str, x)
_PATTERN = (
    "a list of names or a regex",
    lambda x: x is None or isinstance(x, str) or _is_list_of(str, x),
)
_FLAG = "true or false", lambda x: isinstance(x, bool)
_CHECKS: dict[str, tuple[str, Any]] = {
    "r": ("an integer of at least 1", _is_rank),
    "lora_alpha": ("a number above 0", _is_alpha),
    "rank_pattern": ("names with integers of at least 1", lambda x: _is_mapping_to(_is_rank, x)),
    "alpha_pattern": ("names with numbers above 0", lambda x: _is_mapping_to(_is_alpha, x)),
    "bias": ("'none', 'all' or 'lora_only'", lambda x: x in ("none", "all", "lora_only")),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), _FLAG),
    "ensure_weight_tying": _FLAG,
    "target_modules": _PATTERN,
    "exclude_modules": _PATTERN,
    "layers_pattern": _PATTERN,
    "modules_to_save": _NAMES,
    "layers_to_transform": (
        "an integer or a list of them",
        lambda x: x is None or type(x) is int or _is_list_of(int, x),
    ),
    "trainable_token_indices": (
        "a list of rows, or names with such lists",
        lambda x: x is None or _is_list_of_rows(x) or _is_mapping_to(_is_list_of_rows, x),
    ),
    "init_lora_weights": (
        "an initializer that leaves the base unchanged; with peft, save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...) writes such an adapter",
        _is_init,
    ),
}
