"""EVA: initialize factors from principal components of inputs, with ranks by variance."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import anything, check_arguments
from lowrank_jax._errors import ConfigError, PatternError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import ALL_LINEAR, Pattern, matches
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax.initializers._data import validate_arrays
from lowrank_jax.initializers._random import Factors, Initializer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Eva:
    """EVA for one leaf; components are float32 [*stack, i, c], leading ones first."""

    components: jax.Array

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key, scale
        fan_in, most = self.components.shape
        if fan_in != len(weight) or rank > most:
            raise ConfigError(
                f"eva has {most} components of {fan_in} inputs for a weight of shape "
                f"{weight.shape} (fan-in, fan-out) and rank {rank}: pass the covariance of this "
                "leaf's inputs, and to init the config that eva returned"
            )
        return self.components[:, :rank], jnp.zeros((rank, weight.shape[1]), jnp.float32), None


@check_arguments(covariances=anything)
def eva(
    covariances: Mapping[str, Any], config: LoraConfig, rho: float = 2.0
) -> tuple[dict[str, Initializer], LoraConfig]:
    r"""Initialize factors from the inputs' principal directions; set ranks by explained variance.

    $C = V \Lambda V^\top$: $a = V_r$, $b = 0$. Component j of a leaf explains the share
    $\Lambda_j / \operatorname{tr} \Lambda$ of its variance. The sum of all ranks is a budget that
    is spent on the largest shares, with at most $\rho\,r$ for a leaf. Each alpha follows its rank,
    $\alpha' = \alpha\,r' / r$. Stacked layers have a common rank: their shares are averaged, and
    raising it by one costs one unit of the budget per layer.

    Args:
      covariances: path -> sum or mean of x x^T over inputs x of the leaf, [*stack, i, i]. For
        centered x the directions are principal components, as in PEFT.
      config: the initial ranks and alphas.
      rho: the largest ratio of a new rank to the old one; 1 keeps all ranks. init raises an error
        for a rank above the leaf's fan-out, which is not known here.

    Returns:
      path -> initializer, and the config with the new ranks and alphas, both for `init`. A leaf
      whose rank becomes 0 is excluded.

    Raises:
      ConfigError: rho is below 1, or covariances have a wrong shape, are traced, or have values
        that are not finite.

    Source: EVA, arXiv 2410.07170, section 3.

    >>> flat, steep = jnp.eye(8), jnp.diag(jnp.array([9.0, 9, 9, 1, 1, 1, 1, 1]))
    >>> config = LoraConfig(rank=2, targets=("p", "q"))
    >>> initializers, config = eva({"p": flat, "q": steep}, config)
    >>> dict(config.rank_pattern)
    {'p': 1, 'q': 3}
    """
    if rho < 1:
        raise ConfigError(f"rho must be a number of at least 1, not {rho!r}")
    data = validate_arrays("covariances", covariances, square=True)
    if traced := [path for path, array in data.items() if jaxprs.is_tracer(array)]:
        raise ConfigError(
            f"covariances[{traced[0]!r}] is traced: ranks are static, so call eva outside of jit"
        )
    old = {path: _match_first(config.rank_pattern, path, config.rank) for path in data}
    most = {
        path: min(round(old[path] * float(rho)), array.shape[-1]) for path, array in data.items()
    }
    initializers, shares = {}, {}
    for path, array in data.items():
        initializers[path], shares[path] = _find_components(array, most[path])
    layers = {path: math.prod(array.shape[:-2]) for path, array in data.items()}
    new = _allocate_ranks(old, shares, layers)
    kept = {path: initializers[path] for path, rank in new.items() if rank}
    return kept, _replace_ranks(config, old, new)


def _find_components(covariance: jax.Array, most: int) -> tuple[Eva, np.ndarray]:
    """Return the leading eigenvectors, and the share of variance that each explains."""
    # covariance [L, i, i] (L stacked layers) -> values [L, i], vectors [L, i, i], one per column,
    # both reversed since eigh sorts in ascending order. Kept: vectors [L, i, most], and shares
    # [L, most] averaged over the layers, which have a common rank: [most].
    values, vectors = jnp.linalg.eigh(covariance)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    values = jnp.where(values < 0, 0, values)  # XLA's maximum on CPU drops NaN
    total = jnp.sum(values, -1, keepdims=True)
    shares = (values / jnp.where(total > 0, total, 1))[..., :most]
    return Eva(vectors[..., :most]), np.asarray(shares).reshape(-1, most).mean(0)


def _allocate_ranks(
    old: dict[str, int], shares: dict[str, np.ndarray], layers: dict[str, int]
) -> dict[str, int]:
    """Spend the sum of the old ranks on the largest shares; return the new ranks."""
    # old {"p": 2, "q": 2}, one layer each: a budget of 4. The shares of p are 1/8, 1/8, ..., those
    # of q 0.28, 0.28, 0.28, 0.03, ...: three go to q and one to p. In descending order a leaf's
    # component j is bought before its j + 1, so counting them gives the rank.
    budget = sum(rank * layers[path] for path, rank in old.items())
    offers = [(share, path) for path, of_leaf in shares.items() for share in of_leaf]
    new = dict.fromkeys(old, 0)
    for _, path in sorted(offers, key=lambda offer: -offer[0]):  # stable
        if layers[path] <= budget:
            new[path] += 1
            budget -= layers[path]
    return new


def _replace_ranks(config: LoraConfig, old: dict[str, int], new: dict[str, int]) -> LoraConfig:
    """Put patterns for the new ranks before the config's own, since the first match wins."""
    exact = {path: _to_exact_pattern(path) for path in new}
    ranks = {exact[path]: rank for path, rank in new.items() if rank and rank != old[path]}
    alphas = {}
    for path, rank in new.items():
        alpha = _match_first(config.alpha_pattern, path, config.alpha)
        if alpha is not None and exact[path] in ranks:
            alphas[exact[path]] = alpha * rank / old[path]
    empty = tuple(exact[path] for path, rank in new.items() if not rank)
    others = lambda patterns, done: {
        pattern: value
        for pattern, value in patterns.items()
        if pattern not in done and pattern not in empty
    }
    return dataclasses.replace(
        config,
        exclude=(*config.exclude, *empty),
        rank_pattern=ranks | others(config.rank_pattern, ranks),
        alpha_pattern=alphas | others(config.alpha_pattern, alphas),
    )


def _match_first(patterns: Mapping[Pattern, Any], path: str, default: float | None) -> Any:
    """Return the value of the first pattern that matches, or the default."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def _to_exact_pattern(path: str) -> Pattern:
    """Return a pattern that matches one path: the path itself, or a regex if it has wildcards."""
    try:
        plain = "*" not in path and "?" not in path and path != ALL_LINEAR and matches(path, path)
    except PatternError:  # an empty segment
        plain = False
    return path if plain else re.compile(re.escape(path))
