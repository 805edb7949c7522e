"""FLOPs of a LoRA train step through lift, by XLA's own count, against the same step by hand.

Run: python benchmarks/flops.py [--layers 4] [--dim 256] [--tokens 512] [--rank 16]

By hand: the same decoder block with x @ w + s * ((x @ a) @ b) written at each of its seven
linears. Printed beside it: the frozen forward, and full fine-tuning. The step is loss, gradient and
AdamW over the adapters, compiled for the default device; the count is compiled.cost_analysis().
"""

import argparse
import re

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lowrank


def block(weights, x, linear):
    """One Llama-like decoder block, x [b, t, d]; linear(weight, x) is each of the seven."""
    heads = 4
    b, t, d = x.shape
    norm = lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    h = norm(x)
    split = lambda y: y.reshape(b, t, heads, -1)
    q, k, v = (split(linear(weights[name], h)) for name in ("q", "k", "v"))
    scores = jnp.einsum("bthc,bshc->bhts", q, k) * (d // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30)
    mixed = jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores), v).reshape(b, t, -1)
    x = x + linear(weights["o"], mixed)
    h = norm(x)
    gated = jax.nn.silu(linear(weights["gate"], h)) * linear(weights["up"], h)
    return x + linear(weights["down"], gated)


def model(params, x, linear=lambda w, x: x @ w):
    """Blocks one after another, and a head."""
    for weights in params["layers"]:
        x = block(weights, x, linear)
    return x @ params["head"]


def make(layers: int, dim: int, hidden: int, vocab: int):
    """Shapes of the parameters."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    layer = {name: shape(dim, dim) for name in ("q", "k", "v", "o")}
    layer |= {"gate": shape(dim, hidden), "up": shape(dim, hidden), "down": shape(hidden, dim)}
    return {"layers": [dict(layer) for _ in range(layers)], "head": shape(dim, vocab)}


def steps(layers: int, dim: int, hidden: int, vocab: int, batch: int, tokens: int, rank: int):
    """name -> compiled train step, for the lifted, the hand-written, and the full one."""
    params = make(layers, dim, hidden, vocab)
    x = jax.ShapeDtypeStruct((batch, tokens, dim), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    plan = lowrank.plan(model, params, x)
    config = lowrank.LoraConfig(rank=rank, alpha=rank / 2)
    init = lambda p: lowrank.init(jax.random.key(0), p, config, plan=plan)
    base, lora = jax.eval_shape(init, params)
    tx = optax.adamw(1e-3)

    def loss_of(logits, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def by_hand(lora, base, x):
        linear = lambda pair, x: x @ pair[0] + 0.5 * ((x @ pair[1].a) @ pair[1].b)
        both = lambda w, l: {name: (w[name], l[name]) for name in w}
        layers = [both(w, l) for w, l in zip(base["layers"], lora["layers"], strict=True)]
        for pairs in layers:
            x = block(pairs, x, linear)
        return x @ base["head"]

    def lifted(lora, base, x):
        return lowrank.lift(model, fallback="raise")(lowrank.combine(base, lora), x)

    def step(forward):
        def train(trained, state, base, x, y):
            loss = lambda trained: loss_of(forward(trained, base, x), y)
            value, gradient = jax.value_and_grad(loss)(trained)
            updates, state = tx.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return jax.jit(train)

    def compiled(forward, trained):
        state = jax.eval_shape(tx.init, trained)
        return step(forward).lower(trained, state, base, x, y).compile()

    full = lambda trained, base, x: model(trained, x)
    frozen = jax.jit(lambda base, x, y: loss_of(model(base, x), y)).lower(base, x, y).compile()
    return {
        "lifted": compiled(lifted, lora),
        "by hand": compiled(by_hand, lora),
        "full": compiled(full, params),
        "frozen forward": frozen,
    }, base


def flops(compiled) -> float:
    """XLA's count."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return analysis["flops"]


def dense_gradients(text: str, base) -> list[str]:
    """Products in the HLO whose result has the shape of a weight, either way round."""
    weights = {leaf.shape for leaf in jax.tree.leaves(base["layers"])}
    weights |= {shape[::-1] for shape in weights}
    found = []
    for line in text.splitlines():
        made = re.search(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call|convolution)\(", line)
        if made and tuple(map(int, made[1].split(","))) in weights:
            found.append(line.strip()[:160])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    table, base = steps(
        options.layers, options.dim, 3 * options.dim, 1000, 2, options.tokens, options.rank
    )
    reference = flops(table["by hand"])
    for name, step in table.items():
        dense = len(dense_gradients(step.as_text(), base))
        print(
            f"{name:15} {flops(step) / 1e9:8.3f} GFLOP, {flops(step) / reference:.4f} of by hand; "
            f"{dense} products of a weight's shape"
        )


if __name__ == "__main__":
    main()
