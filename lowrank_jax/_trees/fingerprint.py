"""The fingerprint of a tree of arrays: a content hash of each leaf."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, describe_value, tree_of_arrays
from lowrank_jax._errors import TreeError
from lowrank_jax._jax.paths import flatten, rename_legacy_paths
from lowrank_jax._jax.processes import gather_shards
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import UNADAPTED, Normed, find_adapters, is_node, strip_norms


@dataclasses.dataclass(frozen=True, repr=False)
class Fingerprint:
    """Identity of a tree; equal for trees with equal paths, shapes, dtypes and bytes.

    Args:
      leaves: (path, shape, dtype name, SHA-256 of the bytes in hex) of each leaf, sorted by path.

    >>> one, other = fingerprint({"w": jnp.ones(3)}), fingerprint({"w": jnp.zeros(3)})
    >>> one.differences(other)
    ['w: float32[3] of SHA-256 15ec7bf0b507, expected float32[3] of SHA-256 8a31a40ecac0']
    """

    leaves: tuple[tuple[str, tuple[int, ...], str, str], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all leaves, in hex."""
        return hashlib.sha256(repr(self.leaves).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Fingerprint({len(self.leaves)} leaves, {self.digest[:16]})"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        leaves = {path: [list(shape), dtype, sha] for path, shape, dtype, sha in self.leaves}
        return {"algorithm": "sha256", "leaves": leaves}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Create the fingerprint from the values of `to_dict`.

        Raises:
          TreeError: values is not a dictionary of `to_dict`, or is of another hash algorithm.
        """
        try:
            algorithm = values["algorithm"]
            leaves = [
                (str(path), tuple(int(size) for size in shape), str(dtype), str(sha))
                for path, (shape, dtype, sha) in values["leaves"].items()
            ]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise TreeError(
                f"values is {describe_value(values)}, not a dictionary of Fingerprint.to_dict "
                f"({type(error).__name__}: {error})"
            ) from error
        if algorithm != "sha256":
            raise TreeError(f"fingerprints are by 'sha256', not {algorithm!r}")
        return cls(tuple(sorted(leaves)))

    def differences(self, other: Fingerprint) -> list[str]:
        """List the differences to `other`, one line for each path."""
        show = lambda leaf: f"{leaf[1]}{list(leaf[0])} of SHA-256 {leaf[2][:12]}"
        mine, theirs = ({p: show(rest) for p, *rest in f.leaves} for f in (self, other))
        return list_differences(rename_legacy_paths(mine, theirs), theirs)


def list_differences(expected: Mapping[str, str], came: Mapping[str, str]) -> list[str]:
    """List the differences, one line for each key that is missing, unexpected or unequal."""
    lines = []
    for key in sorted(expected.keys() | came.keys()):
        if key not in came:
            lines.append(f"{key}: missing, expected {expected[key]}")
        elif key not in expected:
            lines.append(f"{key}: unexpected, {came[key]}")
        elif came[key] != expected[key]:
            lines.append(f"{key}: {came[key]}, expected {expected[key]}")
    return lines


@check_arguments(tree=tree_of_arrays)
def fingerprint(tree: PyTree) -> Fingerprint:
    """Compute the fingerprint of a base: path, shape, dtype and SHA-256 of the bytes of each leaf.

    At most a few leaves are copied to the host at once, and none stays there. The result does not
    depend on the order of keys, sharding or kind of container (dict, nnx.State). Compute it once
    and pass it to `checkpoint.save` in place of the tree.

    Args:
      tree: any pytree of arrays of any dtype. Typed PRNG keys are hashed by their data; the norms
        that DoRA adds to a base are ignored.

    Returns:
      A small frozen object: compare it with ==, store it with to_dict and from_dict.

    Raises:
      TreeError: a leaf has no values (traced, abstract, deleted, not numeric), or the tree holds
        adapters.

    Source: SHA-256, FIPS 180-4.

    >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16), "step": jnp.array(3)}
    >>> fingerprint(params)
    Fingerprint(2 leaves, 497348a38e8647fe)
    >>> fingerprint(params) == fingerprint({**params, "step": jnp.array(4)})
    False
    """
    own, treedef = flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Normed))
    plain = jax.tree.unflatten(treedef, [strip_norms(leaf) for _, leaf in own])
    if adapted := find_adapters(flatten(plain, is_leaf=is_node)[0]):
        raise TreeError(
            f"a fingerprint is of weights without adapters, and {adapted[0]!r} has one: pass "
            f"{UNADAPTED}"
        )
    # other nodes (quantized leaves) are hashed array by array
    leaves = flatten(plain)[0]
    if jax.process_count() > 1:  # leaves are gathered by all processes, in one order
        return Fingerprint(tuple(sorted(_describe_leaf(path, leaf) for path, leaf in leaves)))
    # hashlib releases the GIL, so threads read and hash several leaves at once
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return Fingerprint(
            tuple(sorted(pool.map(_describe_leaf, *zip(*leaves, strict=True)))) if leaves else ()
        )


def _describe_leaf(path: str, leaf: object) -> tuple[str, tuple[int, ...], str, str]:
    """Return path, shape, dtype name and content hash of one leaf."""
    array = to_numpy(path, leaf)
    return path, array.shape, array.dtype.name, sha256(array)


def to_numpy(path: str, leaf: Any) -> np.ndarray:
    """Convert a leaf to a contiguous NumPy array that no jax.Array keeps alive.

    Of an array that spans several processes, all of them take part.

    Raises:
      TreeError: the leaf has no values, or is not numeric.
    """
    try:
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = gather_shards(leaf)
        if isinstance(leaf, jax.Array):
            # numpy.asarray caches its host copy in the jax.Array: use a new one on the same buffers
            shards = [shard.data for shard in leaf.addressable_shards]
            leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
        array = np.asarray(leaf, order="C")
    except Exception as error:
        raise TreeError(
            f"{path!r} has no values to read ({type(error).__name__}): {error}"
        ) from error
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise TreeError(
            f"{path!r} is {type(leaf).__name__}, not an array of numbers with values; take it out "
            "of the tree, or make it one"
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def sha256(array: np.ndarray) -> str:
    """Compute the SHA-256 of the bytes of a contiguous array, in hex."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
