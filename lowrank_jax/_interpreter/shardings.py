"""Sharding constraints on weights whose arrays have other shapes than the weight."""

from __future__ import annotations

import jax
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._operators.weight import Weight

UNCONSTRAINED = jax.sharding.PartitionSpec.UNCONSTRAINED


def constrain_weight(weight: Weight, sharding: jax.sharding.Sharding | None) -> Weight:
    """Constrain the arrays of a weight to its sharding, if its axes divide into whole shards."""
    # NF4 codes [64, 64, 14336] of W [4096, 14336], constrained to P(None, "model"), are constrained
    # to P(None, None, "model"): what moves between devices is codes, and not decoded numbers.
    kind = jax.sharding.AxisType.Explicit
    if not isinstance(sharding, jax.NamedSharding) or kind in sharding.mesh.axis_types:
        return weight
    found = weight.specs(sharding.spec)
    if found is None or not can_split(sharding.mesh, weight, found):
        return weight
    split = lambda array, spec: lax.with_sharding_constraint(
        array, jax.NamedSharding(sharding.mesh, spec)
    )
    return weight.reshard(sharding.spec, split) or weight


def can_split(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, weight: Weight, specs: PyTree
) -> bool:
    """Whether the mesh divides each array of a weight into equal shards of whole blocks."""

    def fits(array: jax.Array, spec: jax.sharding.PartitionSpec) -> bool:
        pairs = zip(array.shape, spec, strict=False)
        return all(
            size % jaxprs.count_shards(mesh, entry) == 0
            for size, entry in pairs
            if entry is not UNCONSTRAINED
        )

    return jax.tree.all(jax.tree.map(fits, weight, specs))
