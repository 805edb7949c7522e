"""A Llama in plain Flax Linen: nothing in this file knows of adapters.

Shapes: b batch, t tokens, s keys (t, or the cache's length), h heads, k key-value heads, g = h / k.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

Cache = tuple[jax.Array, jax.Array]  # keys and values, each [layers, b, s, k, head_dim]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama; scan_layers stacks the layers' parameters and compiles one layer."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_base: float = 10_000.0
    eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    scan_layers: bool = True
    remat: bool = False


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates feature j with feature j + head_dim/2: x [b, t, h, head_dim], positions [t]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, None] * frequencies  # [t, 1, head_dim/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rms_norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    """The normalization of this model, computed in float32."""
    return nn.RMSNorm(config.eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def dense(config: LlamaConfig, features: int, name: str, bias: bool = False) -> nn.Dense:
    """A projection with a kernel [in, out]."""
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.Dense(features, use_bias=bias, name=name, **dtypes)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, after the keys of `cache` where there is one."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array | int, cache: Cache | None):
        """Attends x [b, t, dim] at positions start..start+t: [b, t, dim] and the new cache."""
        c = self.config
        batch, length, _ = x.shape

        def project(name: str, heads: int) -> jax.Array:
            flat = dense(c, heads * c.head_dim, name, c.attention_bias)(x)
            return flat.reshape(batch, length, heads, c.head_dim)

        positions = start + jnp.arange(length)
        query = rope(project("q_proj", c.heads), positions, c.rope_base)
        key = rope(project("k_proj", c.kv_heads), positions, c.rope_base)
        value = project("v_proj", c.kv_heads)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key, start, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value, start, axis=1)
            cache = (key, value)

        query = query.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
        visible = jnp.arange(key.shape[1]) <= positions[:, None]  # [t, s]
        scores = jnp.where(visible, scores * c.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, -1)
        return dense(c, c.dim, "o_proj", c.attention_bias)(mixed), cache


class Mlp(nn.Module):
    """The gated feed-forward layer."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [b, t, dim] to [b, t, dim]."""
        c = self.config
        gate = dense(c, c.hidden, "gate_proj", c.mlp_bias)(x)
        up = dense(c, c.hidden, "up_proj", c.mlp_bias)(x)
        return dense(c, c.dim, "down_proj", c.mlp_bias)(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized before and added to the stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array | int, cache: Cache | None):
        """Maps x [b, t, dim] and this layer's cache [b, s, k, head_dim] to the same two."""
        c = self.config
        normed = rms_norm(c, "input_layernorm")(x)
        attended, cache = Attention(c, name="self_attn")(normed, start, cache)
        x = x + attended
        return x + Mlp(c, name="mlp")(rms_norm(c, "post_attention_layernorm")(x)), cache


class Llama(nn.Module):
    """The language model: tokens in, logits of the next token out."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, start: jax.Array | int = 0, cache: Cache | None = None):
        """Maps tokens [b, t] to logits [b, t, vocab]; with a cache, also returns the new one."""
        c = self.config
        dtypes = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        embed = nn.Embed(c.vocab, c.dim, name="embed_tokens", **dtypes)
        x, cached = embed(tokens), cache
        # Inside a scan the loop itself keeps XLA from undoing the rematerialization.
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.layers,
            )
            x, cached = stack(c, name="layers")(x, start, cache)
        else:
            caches = []
            for i in range(c.layers):
                layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
                x, layer_cache = block(c, name=f"layers_{i}")(x, start, layer_cache)
                caches.append(layer_cache)
            cached = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        x = rms_norm(c, "norm")(x)
        logits = embed.attend(x) if c.tie_embeddings else dense(c, c.vocab, "lm_head")(x)
        return logits if cache is None else (logits, cached)


def empty_cache(config: LlamaConfig, batch: int, length: int) -> Cache:
    """Room for keys and values of `length` tokens, each [layers, batch, length, k, head_dim]."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
