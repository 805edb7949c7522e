"""Frozen, hashable configurations that go to JSON and back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_jax._checks.arguments import is_index, is_seed
from lowrank_jax._checks.fields import (
    MAX_DEPTH,
    check_alpha,
    check_choice,
    check_json,
    check_keys,
    check_rank,
    check_scale,
    to_pairs,
)
from lowrank_jax._codecs import check_block_size, get_format
from lowrank_jax._codecs.packing import PACKINGS
from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError
from lowrank_jax._jax.paths import ALL_LINEAR, Pattern, check_pattern
from lowrank_jax._nodes.methods import find_method, method_names

_REGEX_FLAGS = re.ASCII | re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE | re.UNICODE
FACTOR_DTYPES = ("float32", "bfloat16", "float16", "float64")
_PATTERN_MAPS = ("rank_pattern", "alpha_pattern", "stack", "axes", "train_rows")


class FrozenMapping(Mapping):
    """An ordered, hashable mapping: order counts, for the first pattern that matches wins."""

    __slots__ = ("_items", "_values")

    def __init__(self, items: Mapping | tuple = ()):
        self._values = dict(items)
        self._items = tuple(self._values.items())

    def __getitem__(self, key: Any) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._items == tuple(other.items())

    def __repr__(self) -> str:
        return repr(dict(self._items))


def _normalize_patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    """Normalize one pattern or a sequence of them to a tuple."""
    items = (value,) if isinstance(value, str | re.Pattern) else value
    if not isinstance(items, tuple | list | set | frozenset):
        raise ConfigError(
            f"{name} takes a pattern or a sequence of patterns, not {quote_value(value)}"
        )
    items = tuple(sorted(items, key=str) if isinstance(items, set | frozenset) else items)
    for item in items:
        if not isinstance(item, str) or item != ALL_LINEAR:
            check_pattern(item)
    return items


def _normalize_pattern_map(name: str, value: Any) -> FrozenMapping:
    """Normalize a mapping of patterns."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} takes a mapping of pattern to value, not {quote_value(value)}")
    for key in value:
        check_pattern(key)
    return FrozenMapping(value)


def _normalize_integers(name: str, values: Mapping, what: str) -> FrozenMapping:
    """Normalize a mapping of patterns to integers."""
    found = {}
    for pattern, value in values.items():
        items = (value,) if isinstance(value, int) else value
        if not isinstance(items, tuple | list) or not all(map(is_index, items)):
            raise ConfigError(
                f"{name}[{quote_value(pattern)}] takes {what} (integers), not {quote_value(value)}"
            )
        found[pattern] = tuple(items)
    return FrozenMapping(found)


def _normalize_axis_pairs(name: str, values: Mapping) -> FrozenMapping:
    """Normalize a mapping of patterns to (fan_in, fan_out)."""
    found = {}
    for pattern, pair in values.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(
                f"{name}[{quote_value(pattern)}] takes (fan_in, fan_out), not {quote_value(pair)}"
            )
        named = {"fan_in": pair[0], "fan_out": pair[1]}
        parts = _normalize_integers(f"{name}[{quote_value(pattern)}]", named, "axes")
        found[pattern] = tuple(parts.values())
    return FrozenMapping(found)


def _to_json(value: Any) -> Any:
    if isinstance(value, re.Pattern):
        named = {"re": value.pattern}
        flags = value.flags & ~re.UNICODE
        return {**named, "flags": flags} if flags else named
    if isinstance(value, FrozenMapping):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(item) for key, item in value.items()}
        return [[_to_json(key), _to_json(item)] for key, item in value.items()]
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _freeze(value: Any) -> Any:
    """JSON values in a form that can be hashed."""
    if isinstance(value, Mapping):
        return FrozenMapping({key: _freeze(value[key]) for key in sorted(value, key=str)})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _from_json(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Mapping) and set(value) in ({"re"}, {"re", "flags"}):
        flags = value.get("flags", 0)
        if type(flags) is not int or flags & ~_REGEX_FLAGS:
            raise ConfigError(f"{quote_value(dict(value))} has flags that a regex of paths has not")
        try:
            return re.compile(value["re"], flags)
        except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{quote_value(dict(value))} is not a regex: {error}") from error
    if isinstance(value, list | tuple):
        if depth > MAX_DEPTH:
            raise ConfigError(f"a value is nested more than {MAX_DEPTH} deep")
        return tuple(_from_json(item, depth + 1) for item in value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""Which leaves get which adapter.

    $W_\text{eff} = W + s\,a\,b$ with $s = \alpha / r$, or $\alpha / \sqrt{r}$ with `rslora`.

    Args:
      rank: r, the inner dimension of the factors, at least 1. A leaf that "all-linear" alone
        chooses and that is too narrow for it takes the largest rank it can have, and keeps the
        scale of this one; a leaf that a pattern names is refused.
      alpha: the numerator of the scale; None means twice the rank of that leaf.
      targets: a pattern, a sequence of patterns, or "all-linear".
      exclude: patterns of leaves that are never adapted; they must match something.
      rank_pattern: pattern -> rank, the first match wins.
      alpha_pattern: pattern -> alpha, the first match wins.
      stack: pattern -> axes of the leaf that enumerate independent weights, in place of what the
        plan takes for them (experts made by vmap look like heads).
      axes: pattern -> (fan_in, fan_out), each an axis or several; the leaf's other axes enumerate
        independent weights. It makes a target of a leaf whose use no rule can follow, such as the
        experts of a kernel behind a custom_vjp, and stands before what the plan says of any leaf.
      rslora: divide alpha by the root of the rank (arXiv 2312.03732).
      dora: decompose into magnitude and direction (arXiv 2402.09353).
      method: "lora"; "loha", a Hadamard product of two low-rank products (arXiv 2108.06098);
        "vera", two vectors between fixed random matrices (arXiv 2310.11454), whose scale is 1
        unless alpha is given; "ia3", a vector on the output features (arXiv 2205.05638), which has
        no rank.
      projection_seed: of VeRA's random matrices; needed with "vera".
      train: patterns of leaves trained whole beside the adapters (norms, biases, new heads), in
        promote_types(the leaf's dtype, float32); they are used and merged in the leaf's dtype.
      train_rows: pattern -> numbers of the rows of a table (its first axis) that are trained: new
        tokens, say. It changes those rows and is no adapter of the rest.
      factor_dtype: name of the dtype of a and b.
      extras: what an adapter_config.json of PEFT says besides (task_type,
        base_model_name_or_path, ...), as JSON values: `peft.load` keeps it, `peft.save` writes it.

    Raises:
      ConfigError: a value is of the wrong type or out of range.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> config = LoraConfig(rank=8, targets="**/kernel", rank_pattern={"**/head/*": 2})
    >>> LoraConfig.from_dict(config.to_dict()) == config
    True
    """

    rank: int = 16
    alpha: float | None = None
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    rank_pattern: Mapping = dataclasses.field(default_factory=FrozenMapping)
    alpha_pattern: Mapping = dataclasses.field(default_factory=FrozenMapping)
    stack: Mapping = dataclasses.field(default_factory=FrozenMapping)
    axes: Mapping = dataclasses.field(default_factory=FrozenMapping)
    rslora: bool = False
    dora: bool = False
    method: str = "lora"
    projection_seed: int | None = None
    train: Any = ()
    train_rows: Mapping = dataclasses.field(default_factory=FrozenMapping)
    factor_dtype: str = "float32"
    extras: Mapping = dataclasses.field(default_factory=FrozenMapping)

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        check_rank("rank", self.rank)
        if self.alpha is not None:
            check_alpha("alpha", self.alpha)
        for name in ("targets", "exclude", "train"):
            put(name, _normalize_patterns(name, getattr(self, name)))
        if ALL_LINEAR in self.exclude + self.train:
            raise ConfigError('"all-linear" is a value of targets, not of exclude or train')
        for name in _PATTERN_MAPS:
            put(name, _normalize_pattern_map(name, getattr(self, name)))
        for pattern, value in self.rank_pattern.items():
            check_rank(f"rank_pattern[{quote_value(pattern)}]", value)
        for pattern, value in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{quote_value(pattern)}]", value)
        put("stack", _normalize_integers("stack", self.stack, "axes"))
        put("axes", _normalize_axis_pairs("axes", self.axes))
        put("train_rows", _normalize_integers("train_rows", self.train_rows, "rows"))
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, not {quote_value(getattr(self, name))}"
                )
        self._check_method()
        check_choice("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        if not isinstance(self.extras, Mapping):
            raise ConfigError(
                f"extras takes a mapping of JSON values, not {quote_value(self.extras)}"
            )
        check_json("extras", self.extras)
        put("extras", _freeze(self.extras))
        # the scale falls with the rank and grows with alpha: its extremes are at theirs
        sizes, alphas = {self.rank, *self.rank_pattern.values()}, {*self.alpha_pattern.values()}
        alphas |= set() if self.alpha is None else {self.alpha}
        ends = {min(alphas), max(alphas)} if alphas else set()
        for size in (min(sizes), max(sizes)):
            for alpha in ends | ({None} if self.alpha is None else set()):
                check_scale(
                    f"alpha {quote_value(alpha)} and rank {size}", self.scale_of(size, alpha)
                )

    def _check_method(self) -> None:
        check_choice("method", self.method, method_names())
        method, seed = find_method(self.method), self.projection_seed
        if not is_seed(seed) if method.is_seeded else seed is not None:
            raise ConfigError(
                "VeRA's random matrices are drawn from projection_seed: an integer with "
                f'method="vera", and None without; it is {quote_value(seed)} with {quote_value(self.method)}'
            )
        if not method.has_norm and (self.dora or self.rslora):
            raise ConfigError(
                f"{method.label} has no factors and no norm: dora and rslora are not for it"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; a regex becomes {"re": "..."}."""
        fields = dataclasses.fields(self)
        return {field.name: _to_json(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """The configuration of the values of `to_dict`; an unknown key is refused by name."""
        check_keys(cls, values)
        parsed = {}
        for name, value in values.items():
            if name in _PATTERN_MAPS:
                pairs = to_pairs(name, value)
                parsed[name] = {_from_json(key): _from_json(item) for key, item in pairs}
            elif name == "extras":
                parsed[name] = value
            else:
                parsed[name] = _from_json(value)
        return cls(**parsed)

    def scale_of(self, rank: int, alpha: float | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora; alpha None is twice the rank."""
        own = find_method(self.method).scale
        if own is not None and alpha is None:
            return own
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    r"""Which leaves are kept as small integers, and how.

    $W = \text{table}[\text{codes}] \cdot \text{absmax}$, in blocks along the contracted axes.

    Args:
      format: "nf4", "fp4" (4 bits) or "int8".
      block_size: elements that share a scale: a power of two from 32 to 4096.
      double_quant: keep the scales as 8-bit codes too: 4.13 bits a parameter in place of 4.5.
      packing: "uint4", native 4-bit arrays, what accelerators want; "uint8", two codes a byte, what
        saves memory on CPU, where a uint4 takes a byte. Never chosen by the backend: what is
        compiled for a TPU from a CPU process must be the TPU's.
      targets: a pattern, a sequence of patterns, or "all-linear".
      exclude: patterns of leaves that stay dense; they must match something.

    Raises:
      ConfigError: a value is of the wrong type or out of range.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> config = QuantConfig(block_size=128, exclude="**/head/*")
    >>> QuantConfig.from_dict(config.to_dict()) == config
    True
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    packing: str = "uint4"
    targets: Any = ALL_LINEAR
    exclude: Any = ()

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        get_format(self.format)
        check_block_size(self.block_size)
        if not isinstance(self.double_quant, bool):
            raise ConfigError(
                f"double_quant must be True or False, not {quote_value(self.double_quant)}"
            )
        check_choice("packing", self.packing, PACKINGS)
        for name in ("targets", "exclude"):
            put(name, _normalize_patterns(name, getattr(self, name)))
        if ALL_LINEAR in self.exclude:
            raise ConfigError('"all-linear" is a value of targets, not of exclude')

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; a regex becomes {"re": "..."}."""
        fields = dataclasses.fields(self)
        return {field.name: _to_json(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The configuration whose `to_dict` is values; an unknown key is refused by name."""
        check_keys(cls, values)
        return cls(**{name: _from_json(value) for name, value in values.items()})
