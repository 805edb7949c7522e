"""A loop over one tree: Flax's TrainState holds base and adapter together.

    python examples/loop_train_state.py

`only_adapters` keeps the optimizer to the adapters: no state for the base, no change of it. The
gradients of the frozen leaves, which nothing reads, XLA leaves out. The old state is donated, and
with it the arrays of `base` and `lora` that it was made of: `partition` gives both back in the end.
"""

from collections.abc import Sequence
from functools import partial

import characters
import jax
import optax
from flax.training.train_state import TrainState

import lowrank_jax as lowrank


def main(arguments: Sequence[str] | None = None):
    steps = characters.steps_asked(arguments, default=300)
    model, params = characters.pretrained()
    before = characters.held_out_loss(model.apply, params)

    plan = lowrank.plan(model.apply, params, characters.EXAMPLE)
    config = lowrank.LoraConfig(rank=8, targets="all-linear")
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    state = TrainState.create(
        apply_fn=lowrank.lift(model.apply, fallback="raise"),
        params=lowrank.combine(base, lora),
        tx=lowrank.only_adapters(optax.adamw(schedule)),
    )
    print(lowrank.report(state.apply_fn, state.params, characters.EXAMPLE))

    @partial(jax.jit, donate_argnames="state")
    def step(state, tokens):
        def loss_of(params):
            logits = state.apply_fn(params, tokens[:, :-1])
            return characters.cross_entropy(logits, tokens[:, 1:])

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    train_ids, _ = characters.target()
    for tokens in characters.batches(train_ids, steps, "adapting"):
        state, loss = step(state, tokens)

    base, lora = lowrank.partition(state.params)
    after = characters.held_out_loss(model.apply, lowrank.merge(base, lora))
    characters.show_change(before, after)
    print(f"loss of the last step: {loss:.3f}")
    return before, after, base, lora, state.opt_state


if __name__ == "__main__":
    main()
