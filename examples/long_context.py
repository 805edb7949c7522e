"""Trains adapters of a 4-bit base on one long text: no array of tokens² or tokens × vocabulary.

    python examples/long_context.py
    python examples/long_context.py --tokens 65536 --steps 2
    python examples/long_context.py --estimate h100

Every product runs over chunks of tokens, attention over pairs of chunks, and the inputs of the
layers wait in the host's memory for the backward pass. All of that is the model's own: the adapters
know nothing of it. The base is random; what it learns is the rhythm of a dictionary's letters.

With --estimate, the largest number of tokens with which a Llama-3-8B trains in the memory of a
chip, which need not be here (its compiler must: docs/guides/memory.md).

Shapes: t tokens, n chunks of c tokens, k key-value heads, g query heads for each, f features.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import characters
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from rich import print as show

import lowrank_jax as lowrank


@dataclasses.dataclass(frozen=True)
class Config:
    """Dimensions of a Llama, and how many tokens a product or a block of attention has at once."""

    vocab: int = characters.VOCAB
    width: int = 64
    hidden: int = 192
    layers: int = 2
    kv_heads: int = 2
    groups: int = 2
    features: int = 16
    chunk: int = 256
    attention_chunk: int = 128
    dtype: Any = jnp.float32


LLAMA_8B = Config(128256, 4096, 14336, 32, 8, 4, 128, 4096, 512, jnp.bfloat16)

# The input of each layer goes to the host; all else of a layer is computed again.
OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(),
    names_which_can_be_offloaded=("layer_input",),
    offload_src="device",
    offload_dst="pinned_host",
)


def make_shapes(config: Config, tied: bool = False) -> dict[str, Any]:
    """Shapes of the parameters, layers stacked."""
    width, hidden, layers = config.width, config.hidden, config.layers
    keys = config.kv_heads * config.features
    shapes = {
        "q": (width, keys * config.groups),
        "k": (width, keys),
        "v": (width, keys),
        "o": (keys * config.groups, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    make = partial(jax.ShapeDtypeStruct, dtype=config.dtype)
    params = {
        "embed": make((config.vocab, width)),
        "layers": {name: make((layers, *shape)) for name, shape in shapes.items()},
    }
    return params if tied else {**params, "head": make((width, config.vocab))}


def normalize(x: jax.Array) -> jax.Array:
    """Divides by the root mean square."""
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions of x [t, heads, f]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 500_000.0 ** (-jnp.arange(half) / half)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x.dtype
    )


def by_chunks(fn: Callable, size: int, *arrays: jax.Array) -> Any:
    """fn(*arrays) over chunks of the first axis, each computed again in the backward pass."""
    split = lambda array: array.reshape(-1, size, *array.shape[1:])  # [t, ...] -> [n, c, ...]
    body = lambda _, parts: (None, jax.checkpoint(fn)(*parts))
    _, out = lax.scan(body, None, tuple(map(split, arrays)))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), out)


# Attention as in FlashAttention (arXiv 2205.14135, algorithms 1 and 4): the softmax's sums are kept
# for each query, and the backward pass computes the scores again, block by block.


def score(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Scores [k, g, c, c] of chunk i of queries with chunk j of keys, -inf for what comes later."""
    size = q.shape[0]
    s = jnp.einsum("qkgf,skf->kgqs", q, k, preferred_element_type=jnp.float32)
    at = jnp.arange(size)
    seen = j * size + at <= (i * size + at)[:, None]
    return jnp.where(seen, s * q.shape[-1] ** -0.5, -jnp.inf)


def attend_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results [n, c, k, g, f], and the logarithms of the softmax's sums [n, k, g, c]."""

    def row(part: Any) -> tuple[jax.Array, jax.Array]:
        i, q = part

        def add(j: jax.Array, carry: Any) -> Any:
            out, top, total = carry
            s = score(q, k[j], i, j)
            new = jnp.maximum(top, s.max(-1))
            p, shrink = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            y = jnp.einsum(
                "kgqs,skf->kgqf", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + y, new, total * shrink + p.sum(-1)

        shape = (q.shape[1], q.shape[2], q.shape[0])  # [k, g, c]
        start = (jnp.zeros((*shape, q.shape[-1])), jnp.full(shape, -jnp.inf), jnp.zeros(shape))
        out, top, total = lax.fori_loop(0, i + 1, add, start)
        y = jnp.einsum("kgqf->qkgf", out / total[..., None])
        return y.astype(q.dtype), top + jnp.log(total)

    return lax.map(row, (jnp.arange(q.shape[0]), q))


def attend_backward(saved: Any, dy: jax.Array) -> Any:
    """Cotangents of q, k and v."""
    q, k, v, y, sums = saved
    count = len(q)
    total = lambda a, b: jnp.einsum("nqkgf,nqkgf->nkgq", a, b, preferred_element_type=jnp.float32)
    mean = total(dy, y)

    def differentiate(i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = jnp.exp(score(q[i], k[j], i, j) - sums[i][..., None])
        dp = jnp.einsum("qkgf,skf->kgqs", dy[i], v[j], preferred_element_type=jnp.float32)
        ds = p * (dp - mean[i][..., None]) * q.shape[-1] ** -0.5
        return p.astype(q.dtype), ds.astype(q.dtype)

    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def row(i: jax.Array) -> jax.Array:
        add = lambda j, dq: dq + product("kgqs,skf->qkgf", differentiate(i, j)[1], k[j])
        return lax.fori_loop(0, i + 1, add, jnp.zeros(q.shape[1:])).astype(q.dtype)

    def column(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(i: jax.Array, carry: Any) -> Any:
            p, ds = differentiate(i, j)
            dk, dv = carry
            return dk + product("kgqs,qkgf->skf", ds, q[i]), dv + product(
                "kgqs,qkgf->skf", p, dy[i]
            )

        zeros = jnp.zeros(k.shape[1:])
        dk, dv = lax.fori_loop(j, count, add, (zeros, zeros))
        return dk.astype(k.dtype), dv.astype(v.dtype)

    chunks = jnp.arange(count)
    return lax.map(row, chunks), *lax.map(column, chunks)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q [n, c, k, g, f] to k and v [n, c, k, f]."""
    return attend_forward(q, k, v)[0]


def attend_and_save(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """The result, and what the backward pass needs."""
    y, sums = attend_forward(q, k, v)
    return y, (q, k, v, y, sums)


attend.defvjp(attend_and_save, attend_backward)


@dataclasses.dataclass(frozen=True)
class LongLlama:
    """A Llama as functions of its parameters."""

    config: Config
    policy: Callable | None = OFFLOAD

    def layer(self, x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        """One layer of x [t, width]."""
        c = self.config
        x = checkpoint_name(x, "layer_input")

        def project(x: jax.Array, positions: jax.Array) -> Any:
            x = normalize(x)
            q, k, v = ((x @ w[name]).reshape(len(x), -1, c.features) for name in "qkv")
            q = rotate(q, positions).reshape(-1, c.kv_heads, c.groups, c.features)
            return q, rotate(k, positions), v

        def finish(x: jax.Array, y: jax.Array) -> jax.Array:
            x = x + y.reshape(len(x), -1) @ w["o"]
            z = normalize(x)
            return x + (jax.nn.silu(z @ w["gate"]) * (z @ w["up"])) @ w["down"]

        qkv = by_chunks(project, c.chunk, x, jnp.arange(len(x)))
        split = lambda array: array.reshape(-1, c.attention_chunk, *array.shape[1:])
        y = attend(*map(split, qkv))
        return by_chunks(finish, c.chunk, x, y.reshape(len(x), -1)), None

    def run_layers(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Activations [t, width] after the layers."""
        body = jax.checkpoint(self.layer, policy=self.policy)
        return normalize(lax.scan(body, params["embed"][tokens], params["layers"])[0])

    def project(self, params: Any, x: jax.Array) -> jax.Array:
        """Logits [c, vocab]; the table is the head where there is none."""
        return x @ (params["head"] if "head" in params else params["embed"].T)

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """All logits [t, vocab] of tokens [t], for lowrank.plan and for texts that are short."""
        return self.project(params, self.run_layers(params, tokens))

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean cross-entropy of tokens [t + 1], each from those before it, chunk by chunk."""

        def losses(x: jax.Array, targets: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                self.project(params, x).astype(jnp.float32), targets
            )

        x = self.run_layers(params, tokens[:-1])
        return by_chunks(losses, self.config.chunk, x, tokens[1:]).mean()


def make_step(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """A step of the adapter: (base, lora, opt_state, tokens) -> (lora, opt_state, loss)."""

    def step(base: Any, lora: Any, opt_state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda lora: loss(lowrank.combine(base, lora), tokens))(
            lora
        )
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    return step


def estimate(config: Config, format: str | None, policy: Any, chip: str | None, tokens: int) -> Any:
    """The memory of a step, from shapes alone."""
    model = LongLlama(config, policy)
    params = make_shapes(config)
    plan = lowrank.plan(model.logits, params, jax.ShapeDtypeStruct((config.chunk,), jnp.int32))
    if format is not None:
        quant = lowrank.QuantConfig(format=format)
        params = jax.eval_shape(partial(lowrank.quantize, quant=quant, plan=plan), params)
    start = partial(lowrank.init, 0, config=lowrank.LoraConfig(rank=16), plan=plan)
    base, lora = jax.eval_shape(lambda params: start(params), params)
    tx = optax.adamw(1e-4)
    step = make_step(lowrank.lift(model.loss, fallback="raise"), tx)
    args = base, lora, jax.eval_shape(tx.init, lora)
    text = jax.ShapeDtypeStruct((tokens + 1,), jnp.int32)
    return lowrank.estimate(step, *args, text, target=chip, donate=(1, 2))


def find_most_tokens(run: Callable[[int], Any], chunk: int) -> tuple[int, Any]:
    """The most tokens, in whole chunks, that fit, and their estimate, by secants of the totals."""
    last, tokens = 32 * chunk, 64 * chunk
    before, found = run(last), run(tokens)
    while True:
        slope = (found.total - before.total) / (tokens - last)
        more = int((found.capacity - found.total) // (slope * chunk))
        if more == 0 or (found.fits and more < 0):
            return tokens, found
        last, before = tokens, found
        tokens += more * chunk
        found = run(tokens)


def show_most_tokens(chip: str) -> None:
    """Prints, for a dense and for a 4-bit base, how many tokens fit."""
    config = LLAMA_8B
    for name, format in (("bfloat16", None), ("NF4", "nf4")):
        for where, policy in (("device", None), ("host", OFFLOAD)):
            run = partial(estimate, config, format, policy, chip)
            most, found = find_most_tokens(run, config.chunk)
            held = most * config.layers * config.width * 2 if policy else 0
            show(
                f"{name} base, inputs of layers on the {where}: {most:,} tokens, "
                f"arguments {found.arguments / 2**30:.2f} GiB, host {held / 2**30:.0f} GiB"
            )


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, or prints what would fit; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="of the text (%(default)s)")
    add("--steps", type=int, default=20, help="optimizer steps (%(default)s)")
    add("--tied", action="store_true", help="the table is the head too")
    add("--estimate", metavar="CHIP", help="print what fits a chip, such as h100, and stop")
    flags = parser.parse_args(arguments)
    if flags.estimate:
        show_most_tokens(flags.estimate)
        return []
    config = Config()
    if flags.tokens < 1 or flags.tokens % config.chunk:
        parser.error(f"argument --tokens: expected a multiple of {config.chunk}")
    model = LongLlama(config)
    leaves, treedef = jax.tree.flatten(make_shapes(config, flags.tied))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape) * leaf.shape[-2] ** -0.5
    params = jax.tree.unflatten(treedef, map(draw, keys, leaves))

    # NF4 for the layers, int8 for the table and the head
    plan = lowrank.plan(model.logits, params, jax.ShapeDtypeStruct((config.chunk,), jnp.int32))
    layers = lowrank.quantize(params, lowrank.QuantConfig(packing="uint8"), plan=plan)["layers"]
    eight_bits = lowrank.QuantConfig(format="int8", targets=["embed", "head"][: len(params) - 1])
    base = {**lowrank.quantize(params, eight_bits, plan=plan), "layers": layers}
    base, lora = lowrank.init(0, base, lowrank.LoraConfig(rank=8), plan=plan)

    tx = optax.adam(5e-3)
    opt_state = tx.init(lora)
    step = jax.jit(make_step(lowrank.lift(model.loss, fallback="raise"), tx), donate_argnums=(1, 2))
    text = jnp.resize(characters.target()[0], flags.tokens + 1)
    losses = []
    for i in range(flags.steps):
        lora, opt_state, loss = step(base, lora, opt_state, text)
        losses.append(float(loss))
        show(f"step {i + 1:3}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
