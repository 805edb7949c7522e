"""LoRA-GA: initialize factors so that the first step approximates full fine-tuning's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import anything, check_arguments, describe_value, positive
from lowrank_jax._errors import ConfigError
from lowrank_jax.initializers._data import validate_arrays
from lowrank_jax.initializers._random import Factors, Initializer
from lowrank_jax.initializers._spectral import compute_residual, svd

FORMS = ("peft", "paper")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraGa:
    """LoRA-GA for one leaf; gradient is float32 [*stack, i, o]."""

    gradient: jax.Array
    gamma: float = dataclasses.field(metadata={"static": True})
    form: str = dataclasses.field(metadata={"static": True})

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key
        if self.gradient.shape != weight.shape:
            raise ConfigError(
                f"a gradient of shape {self.gradient.shape} was given for a weight of shape "
                f"{weight.shape} (fan-in, fan-out): expected the same shape, after the stack axes"
            )
        if 2 * rank > min(weight.shape):
            raise ConfigError(
                f"lora_ga takes 2 * rank singular vectors, and a weight of shape {weight.shape} "
                f"(fan-in, fan-out) has {min(weight.shape)}: rank {rank} must be at most "
                f"{min(weight.shape) // 2}; set it by rank_pattern, or exclude the leaf"
            )
        # G [i, o] = U S V^T: u [i, min(i, o)] gives a [i, r], vt [min(i, o), o] gives b [r, o]. The
        # first SGD step changes a b in proportion to a a^T G + G b^T b. With the first r left and
        # the next r right vectors, that is the best approximation of G of rank 2 r.
        u, sigma, vt = svd(self.gradient)
        a, b = u[:, :rank], vt[rank : 2 * rank]
        size = weight.shape[1] ** 0.25 / self.gamma**0.5
        if self.form == "paper":
            a, b = size * a, size * b
        else:
            b = size * sigma[rank : 2 * rank, None] * b
        return a, b, compute_residual(weight, a, b, scale)


@check_arguments(gradients=anything, gamma=positive)
def lora_ga(
    gradients: Mapping[str, Any],
    gamma: float = 16.0,
    form: str = "peft",
    *,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Initializer]:
    r"""Initialize factors from singular vectors of the loss's gradient with respect to the weight.

    $\nabla_W = U S V^\top$ and $\zeta = o^{1/4} \gamma^{-1/2}$: $a = \zeta\,U_{:r}$ and
    $b = \zeta\,V_{r:2r}^\top$ in the paper, $a = U_{:r}$ and $b = \zeta\,S_{r:2r} V_{r:2r}^\top$ in
    PEFT, and the base becomes $W - s\,a\,b$. The sign of singular vectors is arbitrary, so two
    implementations may differ in the sign of each column of a.

    Args:
      gradients: path -> sum or mean of the gradients over a few batches, [*stack, i, o]; with a
        plan, in the shape of the leaf, as jax.grad returns them.
      gamma: a larger value makes smaller factors.
      form: "peft", in which b scales with the loss, or "paper", in which it does not.
      plan: the plan of the function that uses the parameters; gives the roles of a leaf's axes if
        LoraConfig.stack does not.

    Returns:
      path -> initializer, for `init(..., initializer=...)`.

    Raises:
      ConfigError: form is unknown, gradients have a wrong shape or values that are not finite, or
        plan does not have a leaf; from init, if a rank is above half of the largest one.

    Source: LoRA-GA, arXiv 2407.05000, section 3 and algorithm 1.

    >>> weight, gradient = jnp.ones((4, 6)), jnp.arange(24.0).reshape(4, 6) % 7
    >>> a, b, base = lora_ga({"w": gradient})["w"](jax.random.key(0), weight, 2, 0.5)
    >>> bool(jnp.abs(base + 0.5 * a @ b - weight).max() < 1e-5)
    True
    """
    if form not in FORMS:
        raise ConfigError(f"form must be one of {FORMS}, not {form!r}")
    data = validate_arrays("gradients", gradients, square=False)
    if plan is not None:
        data = {path: _group_axes(path, array, plan) for path, array in data.items()}
    return {path: LoraGa(array, float(gamma), form) for path, array in data.items()}


def _group_axes(path: str, array: jax.Array, plan: Mapping[str, Any]) -> jax.Array:
    """Flatten a leaf's gradient to [*stack, i, o].

    A stacked projection [d, layers, heads, dim] with stack (1,), fan_in (0,) and fan_out (2, 3)
    becomes [layers, d, heads, dim], then [layers, d, heads * dim].
    """
    if path in plan and not hasattr(plan[path], "fan_in"):
        raise ConfigError(
            f"plan[{path!r}] is {describe_value(plan[path])}, not a Use: pass lowrank.plan"
        )
    if path not in plan or tuple(plan[path].shape) != array.shape:
        known = f"shape {tuple(plan[path].shape)}" if path in plan else "no such leaf"
        raise ConfigError(f"gradients[{path!r}] has shape {array.shape}, the plan has {known}")
    use = plan[path]
    if not use.fan_in or not use.fan_out:
        if array.ndim == 2:
            return array
        raise ConfigError(f"gradients[{path!r}]: the plan found no product that takes this leaf")
    ordered = jnp.transpose(array, (*use.stack, *use.fan_in, *use.fan_out))
    stack, fan_in = len(use.stack), len(use.fan_in)
    rows = math.prod(ordered.shape[stack : stack + fan_in])
    return ordered.reshape(*ordered.shape[:stack], rows, -1)
