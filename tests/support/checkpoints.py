"""Checkpoints under test: bases, adapters, and ways to read and edit what was saved."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import lowrank_jax as lowrank
from lowrank_jax.checkpoint import _archive

CONFIG = lowrank.LoraConfig(rank=2, alpha=3, targets=("**/kernel",), train=("**/bias",))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(5)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)])


def drawn(tree, seed=2):
    """Numbers in the place of the leaves of a tree, which may be abstract."""
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(normal(size=leaf.shape), leaf.dtype), tree)


@functools.cache
def initialized():
    return drawn(jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((1, 3))))


def linen_base():
    return jax.tree.map(lambda leaf: leaf, initialized())


def nnx_base():
    return drawn(nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))))


def list_base():
    array = lambda *shape: jnp.asarray(np.ones(shape, np.float32))
    leaf = lambda *shape: {"kernel": array(*shape), "bias": array(*shape[-1:])}
    return [leaf(3, 4), (leaf(4, 5), None), jnp.asarray(np.int32(7))]


BASES = {"linen": linen_base, "nnx": nnx_base, "list": list_base}


def made(base, **options):
    """An adapter whose factors are all non-zero, with its config."""
    config = lowrank.LoraConfig(**{**CONFIG.to_dict(), **options})
    return drawn(jax.eval_shape(lambda: lowrank.init(jax.random.key(1), base, config)[1])), config


def same(one, other):
    """Same structure (static fields of nodes too), dtypes and bytes."""
    leaves, treedef = jax.tree.flatten(one)
    others, other_treedef = jax.tree.flatten(other)
    assert treedef == other_treedef
    for leaf, found in zip(leaves, others, strict=True):
        assert (leaf.shape, leaf.dtype) == (found.shape, found.dtype)
        assert np.asarray(leaf).tobytes() == np.asarray(found).tobytes()


def entries(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def edit(path, change):
    """Change a manifest's body, and make its own hash right again."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    (path / "manifest.json").write_bytes(_archive.serialize_manifest(body))
