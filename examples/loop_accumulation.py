"""Gradient accumulation and clipping over the adapter alone, in a loop over two trees.

    python examples/loop_accumulation.py

Four micro-batches, accumulated by optax.MultiSteps, are one batch of four times the size, to
rounding: the script trains both ways and compares. What is accumulated and what is clipped is the
adapter's gradient, for there is no other. In a loop over one tree the embedding and the norms have
gradients too: `only_adapters` drops them first, where it is outermost, as in `norms` below.
"""

from collections.abc import Sequence
from functools import partial

import characters
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lowrank

MICRO_BATCHES = 4


def main(arguments: Sequence[str] | None = None):
    steps = characters.steps_asked(arguments, default=60)
    model, params = characters.pretrained()
    before = characters.held_out_loss(model.apply, params)

    plan = lowrank.plan(model.apply, params, characters.EXAMPLE)
    config = lowrank.LoraConfig(rank=8, targets="all-linear")
    base, start = lowrank.init(jax.random.key(0), params, config, plan=plan)
    apply = lowrank.lift(model.apply, fallback="raise")
    print(lowrank.report(apply, lowrank.combine(base, start), characters.EXAMPLE))

    def loss_of(tree, tokens):
        return characters.cross_entropy(apply(tree, tokens[:, :-1]), tokens[:, 1:])

    # Within MultiSteps the clip takes the mean of the micro-batches, not each of them.
    adamw = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    whole = optax.chain(optax.clip_by_global_norm(0.25), adamw)  # most steps are clipped
    accumulated = optax.MultiSteps(whole, every_k_schedule=MICRO_BATCHES)

    def grads_of(lora, base, tokens):
        return jax.grad(lambda lora: loss_of(lowrank.combine(base, lora), tokens))(lora)

    @partial(jax.jit, static_argnames="tx", donate_argnames=("lora", "opt_state"))
    @chex.assert_max_traces(n=2)  # one for each way of training
    def step(tx, lora, opt_state, base, tokens):
        updates, opt_state = tx.update(grads_of(lora, base, tokens), opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

    def train(tx, parts, title):
        lora = jax.tree.map(jnp.copy, start)  # the step gives away the adapter it is given
        opt_state = tx.init(lora)
        for batch in characters.batches(characters.target()[0], steps, title):
            for tokens in np.split(batch, parts):
                lora, opt_state = step(tx, lora, opt_state, base, tokens)
        return lora, opt_state, batch

    large, *_ = train(whole, 1, "whole batches")
    lora, opt_state, batch = train(accumulated, MICRO_BATCHES, "micro-batches")
    after = characters.held_out_loss(model.apply, lowrank.merge(base, lora))
    characters.show_change(before, after)

    gap, change = (jax.tree.map(jnp.subtract, lora, other) for other in (large, start))
    difference = float(optax.tree.norm(gap) / optax.tree.norm(change))
    print(f"from training on whole batches it differs by {difference:.0e} of what was learned")

    @jax.jit
    def norms(lora, base, tokens):
        tree, tx = lowrank.combine(base, lora), lowrank.only_adapters(optax.identity())
        grads = jax.grad(loss_of)(tree, tokens)
        seen, _ = tx.update(grads, tx.init(tree), tree)
        found = {
            "one tree": grads,
            "only_adapters": seen,
            "two trees": grads_of(lora, base, tokens),
        }
        return {name: optax.tree.norm(gradient) for name, gradient in found.items()}

    told = (f"{name} {norm:.4f}" for name, norm in norms(lora, base, batch).items())
    print("norm that a clip sees:", ", ".join(told))
    return before, after, base, lora, opt_state


if __name__ == "__main__":
    main()
