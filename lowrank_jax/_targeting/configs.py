"""LoraConfig and QuantConfig: frozen, hashable configurations that convert to and from JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lowrank_jax._checks.arguments import is_seed
from lowrank_jax._checks.fields import (
    check_alpha,
    check_choice,
    check_json,
    check_rank,
    check_scale,
    to_pairs,
)
from lowrank_jax._checks.keywords import (
    BITSANDBYTES_KEYWORDS,
    PEFT_KEYWORDS,
    check_keys,
    explain_keywords,
)
from lowrank_jax._checks.regexes import RegexBudget
from lowrank_jax._codecs import check_block_size, get_format
from lowrank_jax._codecs.packing import PACKINGS
from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError
from lowrank_jax._jax.paths import ALL_LINEAR
from lowrank_jax._nodes.methods import find_method, method_names
from lowrank_jax._targeting.values import (
    FrozenMapping,
    Readable,
    freeze,
    from_json,
    normalize_axis_pairs,
    normalize_integers,
    normalize_pattern_map,
    normalize_patterns,
    to_json,
)

FACTOR_DTYPES = ("float32", "bfloat16", "float16", "float64")
_PATTERN_MAPS = ("rank_pattern", "alpha_pattern", "stack", "axes", "train_rows")


@explain_keywords("PEFT", PEFT_KEYWORDS)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig(Readable):
    r"""Configuration of adapters: which leaves get which adapter.

    $W_\text{eff} = W + s\,a\,b$ with $s = \alpha / r$, or $\alpha / \sqrt{r}$ with `rslora`.

    Args:
      rank: r, the inner dimension of the factors, at least 1. If a leaf is too narrow for it and
        selected by "all-linear" only, it gets the largest possible rank, with the scale of this
        rank; if a pattern names the leaf, that is an error.
      alpha: numerator of the scale; None means twice the rank of the leaf.
      targets: a pattern, a sequence of patterns, or "all-linear".
      exclude: patterns of leaves that are not adapted; each must match a leaf.
      rank_pattern: pattern -> rank, the first match wins.
      alpha_pattern: pattern -> alpha, the first match wins.
      stack: pattern -> axes of the leaf that enumerate independent weights. It overrides the plan,
        which cannot tell experts made by vmap from attention heads.
      axes: pattern -> (fan_in, fan_out), each one axis or several; the other axes of the leaf
        enumerate independent weights. It overrides the plan, and makes a target of a leaf whose use
        no rule can follow, such as the experts of a kernel behind a custom_vjp.
      rslora: divide alpha by the square root of the rank (arXiv 2312.03732).
      dora: decompose weights into magnitude and direction (arXiv 2402.09353).
      method: "lora"; "loha", a Hadamard product of two low-rank products (arXiv 2108.06098);
        "vera", two trained vectors and fixed random matrices (arXiv 2310.11454), whose scale is 1
        unless alpha is given; "ia3", a factor for each output feature (arXiv 2205.05638), without
        a rank.
      projection_seed: seed of VeRA's random matrices; required with "vera".
      train: patterns of leaves trained whole beside the adapters (norms, biases, new heads), in
        promote_types(dtype of the leaf, float32); they are used and merged in the original dtype.
      train_rows: pattern -> indices of the rows of a table (its first axis) that are trained, such
        as those of new tokens. The other rows are frozen.
      factor_dtype: name of the dtype of a and b.
      extras: other fields of an adapter_config.json of PEFT (task_type, base_model_name_or_path,
        ...), as JSON values: `peft.load` keeps them, `peft.save` writes them.

    Raises:
      ConfigError: a value is of the wrong type or out of range.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> config = LoraConfig(rank=8, targets="**/kernel", rank_pattern={"**/head/*": 2})
    >>> config
    LoraConfig(rank=8, targets='**/kernel', rank_pattern={'**/head/*': 2})
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
            put(name, normalize_patterns(name, getattr(self, name)))
        if ALL_LINEAR in self.exclude + self.train:
            raise ConfigError('"all-linear" is a value of targets, not of exclude or train')
        for name in _PATTERN_MAPS:
            put(name, normalize_pattern_map(name, getattr(self, name)))
        for pattern, value in self.rank_pattern.items():
            check_rank(f"rank_pattern[{quote_value(pattern)}]", value)
        for pattern, value in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{quote_value(pattern)}]", value)
        put("stack", normalize_integers("stack", self.stack, "axes"))
        put("axes", normalize_axis_pairs("axes", self.axes))
        put("train_rows", normalize_integers("train_rows", self.train_rows, "rows"))
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, not {quote_value(getattr(self, name))}"
                )
        RegexBudget(self).spend_fields("targets", "exclude", "train", *_PATTERN_MAPS)
        self._check_method()
        check_choice("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        if not isinstance(self.extras, Mapping):
            raise ConfigError(
                f"extras takes a mapping of JSON values, not {quote_value(self.extras)}"
            )
        check_json("extras", self.extras)
        put("extras", freeze(self.extras))
        # The scale decreases with the rank and increases with alpha: only the extremes are checked.
        sizes, alphas = {self.rank, *self.rank_pattern.values()}, {*self.alpha_pattern.values()}
        alphas |= set() if self.alpha is None else {self.alpha}
        ends = {min(alphas), max(alphas)} if alphas else set()
        for size in (min(sizes), max(sizes)):
            for alpha in ends | ({None} if self.alpha is None else set()):
                check_scale(
                    f"alpha {quote_value(alpha)} and rank {size}", self.scale_of(size, alpha)
                )

    def _check_method(self) -> None:
        """Raise ConfigError if fields do not fit the method."""
        check_choice("method", self.method, method_names())
        method, seed = find_method(self.method), self.projection_seed
        if not is_seed(seed) if method.is_seeded else seed is not None:
            raise ConfigError(
                "VeRA's random matrices are drawn from projection_seed: an integer with "
                f'method="vera", and None without; it is {quote_value(seed)} with '
                f"{quote_value(self.method)}"
            )
        if not method.has_norm and (self.dora or self.rslora):
            raise ConfigError(
                f"{method.label} has no factors and no norm: dora and rslora are not for it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; a regex becomes {"re": "..."}."""
        fields = dataclasses.fields(self)
        return {field.name: to_json(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Create the configuration from the values of `to_dict`; an unknown key is an error."""
        check_keys(cls, values, PEFT_KEYWORDS)
        parsed, budget = {}, RegexBudget(cls)
        for name, value in values.items():
            if name in _PATTERN_MAPS:
                pairs = to_pairs(name, value)
                parsed[name] = {from_json(k, budget): from_json(v, budget) for k, v in pairs}
            elif name == "extras":
                parsed[name] = value
            else:
                parsed[name] = from_json(value, budget)
        return cls(**parsed)

    def scale_of(self, rank: int, alpha: float | None) -> float:
        """Compute alpha / rank, or alpha / sqrt(rank) with rslora; alpha None is twice the rank."""
        own = find_method(self.method).scale
        if own is not None and alpha is None:
            return own
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@explain_keywords("bitsandbytes", BITSANDBYTES_KEYWORDS)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QuantConfig(Readable):
    r"""Configuration of quantization: which leaves, and in which format.

    $W = \text{table}[\text{codes}] \cdot \text{absmax}$, in blocks along the contracted axes.

    Args:
      format: "nf4", "fp4" (4 bits) or "int8".
      block_size: number of elements that share a scale, a power of two from 32 to 4096.
      double_quant: store the scales as 8-bit codes too: 4.13 bits a parameter instead of 4.5.
      packing: "uint4", native 4-bit arrays, for accelerators; "uint8", two codes a byte, which
        saves memory on CPU, where a uint4 takes a byte. The default does not depend on the backend,
        since a CPU process may compile for a TPU.
      targets: a pattern, a sequence of patterns, or "all-linear".
      exclude: patterns of leaves that stay dense; each must match a leaf.

    Raises:
      ConfigError: a value is of the wrong type or out of range.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> config = QuantConfig(block_size=128, exclude="**/head/*")
    >>> config
    QuantConfig(block_size=128, exclude='**/head/*')
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
            put(name, normalize_patterns(name, getattr(self, name)))
        if ALL_LINEAR in self.exclude:
            raise ConfigError('"all-linear" is a value of targets, not of exclude')
        RegexBudget(self).spend_fields("targets", "exclude")

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; a regex becomes {"re": "..."}."""
        fields = dataclasses.fields(self)
        return {field.name: to_json(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Create the configuration from the values of `to_dict`; an unknown key is an error."""
        check_keys(cls, values, BITSANDBYTES_KEYWORDS)
        budget = RegexBudget(cls)
        return cls(**{name: from_json(value, budget) for name, value in values.items()})
