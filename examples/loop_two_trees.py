"""The recommended loop: two trees, of which the adapter alone is differentiated.

    python examples/loop_two_trees.py

Nothing of Optax needs wrapping, for it never sees the base. The base is an argument of the step:
XLA would spend minutes folding a large closed-over constant. The old adapter and optimizer state
are donated: their buffers become the new ones.
"""

from collections.abc import Sequence
from functools import partial

import characters
import jax
import optax

import lowrank_jax as lowrank


def main(arguments: Sequence[str] | None = None):
    steps = characters.steps_asked(arguments, default=300)
    model, params = characters.pretrained()
    before = characters.held_out_loss(model.apply, params)

    plan = lowrank.plan(model.apply, params, characters.EXAMPLE)
    config = lowrank.LoraConfig(rank=8, targets="all-linear")
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    apply = lowrank.lift(model.apply, fallback="raise")
    print(lowrank.report(apply, lowrank.combine(base, lora), characters.EXAMPLE))

    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    opt_state = tx.init(lora)

    @partial(jax.jit, donate_argnames=("lora", "opt_state"))
    def step(lora, opt_state, base, tokens):
        def loss_of(lora):
            logits = apply(lowrank.combine(base, lora), tokens[:, :-1])
            return characters.cross_entropy(logits, tokens[:, 1:])

        loss, grads = jax.value_and_grad(loss_of)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    train_ids, _ = characters.target()
    for tokens in characters.batches(train_ids, steps, "adapting"):
        lora, opt_state, loss = step(lora, opt_state, base, tokens)

    after = characters.held_out_loss(model.apply, lowrank.merge(base, lora))
    characters.show_change(before, after)
    print(f"loss of the last step: {loss:.3f}")
    return before, after, base, lora, opt_state


if __name__ == "__main__":
    main()
