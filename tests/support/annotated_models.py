"""Small decoders whose authors named the axes of their weights, each in the manner of its kind.

Shapes: b batch, t tokens, d embedding, h heads, k features of a head, f hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, DIM, HEADS, HEAD_DIM, HIDDEN = 64, 128, 4, 32, 256
normal = nn.initializers.normal


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q, k, v [b, t, h, k]."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e9))
    return jnp.einsum("bhts,bshk->bthk", weights, v)


# Flax's lm1b example: modules of Linen, their initializers boxed. An attention's kernels have three
# axes, of which the boxes name two.


def boxed(init: Callable, *names: str) -> Any:
    return nn.with_logical_partitioning(init, names)


class BoxedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        norm = {
            "scale_init": boxed(nn.initializers.ones, "embed"),
            "bias_init": boxed(nn.initializers.zeros, "embed"),
        }
        y = nn.LayerNorm(**norm)(x)
        kernel = boxed(normal(0.1), "embed", "kv")
        y = nn.SelfAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, kernel_init=kernel, use_bias=False
        )(y, mask)
        x = x + y
        y = nn.LayerNorm(**norm)(x)
        up, down = boxed(normal(0.1), "embed", "mlp"), boxed(normal(0.1), "mlp", "embed")
        y = nn.Dense(HIDDEN, kernel_init=up, bias_init=boxed(normal(0.1), "mlp"))(y)
        y = nn.Dense(DIM, kernel_init=down, bias_init=boxed(normal(0.1), "embed"))(nn.relu(y))
        return x + y


class BoxedTransformer(nn.Module):
    """One block, an untied head."""

    @nn.compact
    def __call__(self, tokens):
        table = boxed(normal(1.0), "vocab", "embed")
        x = nn.Embed(VOCAB, DIM, embedding_init=table, name="embed")(tokens)
        x = BoxedBlock(name="block")(x, nn.make_causal_mask(tokens))
        head = boxed(normal(0.1), "embed", "vocab")
        return nn.Dense(
            VOCAB, kernel_init=head, bias_init=boxed(normal(0.1), "vocab"), name="logits"
        )(x)


# MaxText: one projection module with kernels of any number of axes, all of them named; layers under
# remat and scan, stacked along an axis of the user's choice, whose name the scan adds.


class Projection(nn.Module):
    features: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", boxed(normal(0.1), *self.axes), shape)
        over = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
        return jax.lax.dot_general(x, kernel, (over, ((), ())))


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        y = nn.RMSNorm(scale_init=boxed(nn.initializers.ones, "norm"))(x)
        heads, axes = (HEADS, HEAD_DIM), ("embed", "heads", "kv")
        q, k, v = (Projection(heads, axes, name=name)(y) for name in ("query", "key", "value"))
        x = x + Projection((DIM,), ("heads", "kv", "embed"), 2, name="out")(attend(q, k, v))
        y = nn.RMSNorm(scale_init=boxed(nn.initializers.ones, "norm"))(x)
        hidden = [
            Projection((HIDDEN,), ("embed", "mlp"), name=name)(y) for name in ("wi_0", "wi_1")
        ]
        return x + Projection((DIM,), ("mlp", "embed"), name="wo")(
            nn.silu(hidden[0]) * hidden[1]
        ), None


class ScannedTransformer(nn.Module):
    axis: int = 1
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        table = self.param("table", boxed(normal(1.0), "vocab", "embed"), (VOCAB, DIM))
        policy = jax.checkpoint_policies.nothing_saveable
        layer = nn.remat(ScannedLayer, prevent_cse=False, policy=policy)
        scan = nn.scan(
            layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(name="layers")(table[tokens], None)
        return Projection((VOCAB,), ("embed", "vocab"), name="logits")(x)


# Tunix: modules of NNX whose variables carry the axes of the mesh.


class Einsum(nnx.Module):
    def __init__(self, equation, shape, sharding, rngs):
        self.equation = equation
        self.w = nnx.Param(normal(0.1)(rngs.params(), shape), out_sharding=sharding)

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (
            Einsum("btd,hdk->bthk", (HEADS, DIM, HEAD_DIM), ("tp", "fsdp", None), rngs)
            for _ in range(3)
        )
        self.o = Einsum("bthk,hkd->btd", (HEADS, HEAD_DIM, DIM), ("tp", None, "fsdp"), rngs)
        linear = lambda *sizes, axes: nnx.Linear(
            *sizes,
            use_bias=False,
            kernel_init=nnx.with_partitioning(normal(0.1), axes),
            rngs=rngs,
        )
        self.gate, self.up = (linear(DIM, HIDDEN, axes=("fsdp", "tp")) for _ in range(2))
        self.down = linear(HIDDEN, DIM, axes=("tp", "fsdp"))
        self.norm = nnx.RMSNorm(DIM, rngs=rngs)

    def __call__(self, x):
        y = self.norm(x)
        x = x + self.o(attend(self.q(y), self.k(y), self.v(y)))
        return x + self.down(nnx.silu(self.gate(x)) * self.up(x))


class NnxLlama(nnx.Module):
    """A list of layers, a tied head."""

    def __init__(self, rngs):
        table = normal(1.0)(rngs.params(), (VOCAB, DIM))
        self.table = nnx.Param(table, out_sharding=("tp", "fsdp"))
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(1)])

    def __call__(self, tokens):
        x = self.table[...][tokens]
        for layer in self.layers:
            x = layer(x)
        return x @ self.table[...].T
