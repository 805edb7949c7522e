"""A plain Llama of the sizes of a config.json, scanned over its layers, for estimates of memory."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from lowrank_jax._errors import ConfigError
from lowrank_jax._files.json_text import read_json_object

_CONFIG_LIMIT = 1_000_000  # bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama, by the names of a config.json.

    >>> MODELS["llama-3-8b"].head_dim
    128
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False


MODELS = {
    "smollm2-135m": Sizes(49152, 576, 1536, 30, 9, 3, 64, True),
    "llama-3.2-1b": Sizes(128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": Sizes(128256, 3072, 8192, 28, 24, 8, 128, True),
    "llama-2-7b": Sizes(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-3-8b": Sizes(128256, 4096, 14336, 32, 32, 8, 128),
    "llama-2-13b": Sizes(32000, 5120, 13824, 40, 40, 40, 128),
    "llama-65b": Sizes(32000, 8192, 22016, 80, 64, 64, 128),
    "llama-2-70b": Sizes(32000, 8192, 28672, 80, 64, 8, 128),
    "llama-3-70b": Sizes(128256, 8192, 28672, 80, 64, 8, 128),
    "llama-3.1-405b": Sizes(128256, 16384, 53248, 126, 128, 8, 128),
}


def read_sizes(like: str) -> Sizes:
    """Return the sizes of a named model, or of the config.json of a folder.

    Raises:
      ConfigError: there is no such model or folder, or a size is missing or not a positive integer.
    """
    if like in MODELS:
        return MODELS[like]
    path = Path(like)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(like, MODELS, 1)
        raise ConfigError(
            f"--like {like}: neither a folder with a config.json nor one of {', '.join(MODELS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return _parse_sizes(read_json_object(file, _CONFIG_LIMIT), file)


# the types of models that have a Llama's matrices, by config.json
_LLAMAS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


def _parse_sizes(fields: Mapping[str, Any], file: Path) -> Sizes:
    """Read the sizes of a config.json, with the defaults of transformers."""
    kind = fields.get("model_type", "llama")
    if kind not in _LLAMAS:
        raise ConfigError(
            f"{file}: model_type is {kind!r}; only models with a Llama's matrices can be estimated "
            f"by their sizes ({', '.join(_LLAMAS)}): for another, pass its own step to "
            "lowrank.estimate"
        )
    given = {name: value for name, value in fields.items() if value is not None}
    heads, width = given.get("num_attention_heads"), given.get("hidden_size")
    tied = kind.startswith("gemma")  # the default of its configuration
    found = {"num_key_value_heads": heads, "tie_word_embeddings": tied, **given}
    if "head_dim" not in found and isinstance(heads, int) and isinstance(width, int):
        found["head_dim"] = width // max(1, heads)
    names = [field.name for field in dataclasses.fields(Sizes)]
    sizes: dict[str, Any] = {name: found.get(name) for name in names}
    for name, value in sizes.items():
        if name != "tie_word_embeddings" and not _is_size(value):
            raise ConfigError(
                f"{file}: {name} is {value!r}; expected a positive integer, as in a Llama's config"
            )
    if not isinstance(found["tie_word_embeddings"], bool):
        raise ConfigError(
            f"{file}: tie_word_embeddings is {found['tie_word_embeddings']!r}; expected true or "
            "false"
        )
    if sizes["head_dim"] % 2 or sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise ConfigError(
            f"{file}: head_dim is {sizes['head_dim']}, and {sizes['num_attention_heads']} heads "
            f"share {sizes['num_key_value_heads']} of keys and values; expected an even head_dim, "
            "and a number of heads that those of keys divide"
        )
    return Sizes(**sizes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def make_shapes(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """Return the parameters as jax.ShapeDtypeStruct, layers stacked along a leading axis."""
    d, h, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    heads, groups, k = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    shapes: dict[str, Any] = {
        "embed_tokens": (sizes.vocab_size, d),
        "norm": (d,),
        "layers": {
            "q_proj": (layers, d, heads * k),
            "k_proj": (layers, d, groups * k),
            "v_proj": (layers, d, groups * k),
            "o_proj": (layers, heads * k, d),
            "gate_proj": (layers, d, h),
            "up_proj": (layers, d, h),
            "down_proj": (layers, h, d),
            "input_layernorm": (layers, d),
            "post_attention_layernorm": (layers, d),
        },
    }
    if not sizes.tie_word_embeddings:
        shapes["lm_head"] = (d, sizes.vocab_size)
    to_struct = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    return jax.tree.map(to_struct, shapes, is_leaf=lambda value: isinstance(value, tuple))


# Along "model" a layer is split as by Megatron-LM, its columns and then its rows. Along "data", by
# FSDP, the rows of every weight are, and gathered where it is used: codes [rows / 64, 64, columns]
# along their first axis. If columns were gathered, XLA would first copy the whole stack of layers
# into a layout with columns first. The table and the head are split by tokens of the vocabulary,
# over all devices, and never gathered.
VOCABULARY = ("data", "model")
COLUMNS, ROWS = P(None, "data", "model"), P(None, ("model", "data"), None)
SPECS = {
    "embed_tokens": P(VOCABULARY, None),
    "lm_head": P(None, VOCABULARY),
    "norm": P(),
    "layers": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), COLUMNS),
        **dict.fromkeys(("o_proj", "down_proj"), ROWS),
        "input_layernorm": P(),
        "post_attention_layernorm": P(),
    },
}


@dataclasses.dataclass(frozen=True)
class Llama:
    """A plain Llama of these sizes, as functions of its parameters.

    Args:
      sizes: its sizes.
      remat: compute the activations of a layer again in the backward pass.
      is_sharded: whether it runs on a mesh of the axes "data" and "model".
      chunk: number of tokens of each sequence whose logits exist at a time; None for all.
    """

    sizes: Sizes
    remat: bool = True
    is_sharded: bool = False
    chunk: int | None = None

    def apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the logits [b, t, vocabulary] of tokens [b, t]."""
        return self._project(params, self._run_layers(params, tokens))

    def compute_loss(self, params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the mean cross-entropy of targets [b, t]."""
        x = self._run_layers(params, tokens)
        if self.chunk is None:
            return self._sum_losses(params, x, targets) / targets.size

        def body(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
            return total + self._sum_losses(params, *part), None

        # [b, t, ...] -> [t / chunk, b, chunk, ...]
        split = lambda y: jnp.moveaxis(y.reshape(y.shape[0], -1, self.chunk, *y.shape[2:]), 1, 0)
        total, _ = jax.lax.scan(jax.checkpoint(body), jnp.zeros(()), (split(x), split(targets)))
        return total / targets.size

    def _run_layers(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the normalized activations [b, t, d] before the head."""
        body = jax.checkpoint(self._run_layer) if self.remat else self._run_layer
        # each device looks up the tokens that its part of the table has
        x = self._constrain(params["embed_tokens"][self._constrain(tokens)])
        x, _ = jax.lax.scan(body, self._split(x), params["layers"])
        return _normalize(x, params["norm"])

    def _run_layer(self, x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        # the constraint on a quantized weight holds for its codes: those are gathered
        w = {name: self._gather(leaf, name) for name, leaf in w.items()}
        y = self._constrain(_normalize(x, w["input_layernorm"]), "data")
        x = self._split(x + _attend(y, w, self.sizes))
        y = self._constrain(_normalize(x, w["post_attention_layernorm"]), "data")
        y = (jax.nn.silu(y @ w["gate_proj"]) * (y @ w["up_proj"])) @ w["down_proj"]
        return self._split(x + y), None

    def _split(self, x: jax.Array) -> jax.Array:
        """Split activations [b, t, d] between layers by sequences, and by tokens along "model"."""
        return self._constrain(x, "data", "model")

    def _gather(self, weight: jax.Array, name: str) -> jax.Array:
        """Gather a layer's weight along "data"."""
        whole = {COLUMNS: (None, "model"), ROWS: ("model", None)}
        return self._constrain(weight, *whole.get(SPECS["layers"][name], ()))

    def _project(self, params: Any, x: jax.Array) -> jax.Array:
        """Return the logits of x [b, t, d]."""
        is_tied = "lm_head" not in params
        head = params["embed_tokens"].T if is_tied else params["lm_head"]
        return self._constrain(self._constrain(x) @ head, None, None, VOCABULARY)

    def _sum_losses(self, params: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = self._project(params, x).astype(jnp.float32)
        # a sum over a comparison, not a look-up, for which a split vocabulary would be gathered
        is_target = jnp.arange(logits.shape[-1]) == self._constrain(targets)[..., None]
        picked = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
        return jnp.sum(jax.nn.logsumexp(logits, -1) - picked)

    def _constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        """Constrain an array to be split so, and whole along its other axes."""
        return jax.lax.with_sharding_constraint(x, P(*spec)) if self.is_sharded else x


def _normalize(x: jax.Array, weight: jax.Array) -> jax.Array:
    """RMS norm, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * weight


def _attend(x: jax.Array, w: dict[str, jax.Array], sizes: Sizes) -> jax.Array:
    """Causal attention with rotary positions; key-value heads serve groups of query heads."""
    split = lambda y: y.reshape(*x.shape[:-1], -1, sizes.head_dim)  # [b, t, heads, k]
    q, k, v = (split(x @ w[name]) for name in ("q_proj", "k_proj", "v_proj"))
    out = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    return out.reshape(*x.shape[:-1], -1) @ w["o_proj"]


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions of x [b, t, heads, k]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 500_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # [t, 1, k / 2]
    left, right = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
