"""A loop under jax.pmap: each device has a copy of base and adapter, and a part of the batch.

    python examples/loop_pmap.py

Where there are fewer devices, eight of the host's stand in. Devices exchange the gradient of the
adapter and nothing else: `pmean` of it, so that all take the same step. Base, adapter and optimizer
state are copied to the devices once, before the loop, by a pmap with the axis of the step: copies
made by other means are of another type, for which the step would be compiled a second time. For a
base that is split among devices see sharded.py.
"""

from collections.abc import Sequence
from functools import partial

import characters
import jax
import numpy as np
import optax

import lowrank_jax as lowrank


def main(arguments: Sequence[str] | None = None):
    steps = characters.steps_asked(arguments, default=300)
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    devices = devices[: next(n for n in (8, 4, 2, 1) if n <= len(devices))]  # they share 8 windows
    model, params = characters.pretrained()
    before = characters.held_out_loss(model.apply, params)

    plan = lowrank.plan(model.apply, params, characters.EXAMPLE)
    config = lowrank.LoraConfig(rank=8, targets="all-linear")
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    apply = lowrank.lift(model.apply, fallback="raise")
    print(lowrank.report(apply, lowrank.combine(base, lora), characters.EXAMPLE))

    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    pmap = partial(jax.pmap, axis_name="devices", devices=devices)
    replicate = pmap(lambda _, tree: tree, in_axes=(0, None))
    state, copies = replicate(np.arange(len(devices)), ((lora, tx.init(lora)), base))

    @partial(pmap, donate_argnums=0)
    def step(state, base, tokens):
        lora, opt_state = state

        def loss_of(lora):
            logits = apply(lowrank.combine(base, lora), tokens[:, :-1])
            return characters.cross_entropy(logits, tokens[:, 1:])

        loss, grads = jax.lax.pmean(jax.value_and_grad(loss_of)(lora), "devices")
        updates, opt_state = tx.update(grads, opt_state, lora)
        return (optax.apply_updates(lora, updates), opt_state), loss

    train_ids, _ = characters.target()
    for tokens in characters.batches(train_ids, steps, f"adapting on {len(devices)} devices"):
        state, losses = step(state, copies, tokens.reshape(len(devices), -1, tokens.shape[-1]))

    lora, opt_state = jax.tree.map(lambda leaf: leaf[0], state)  # they are equal on all devices
    after = characters.held_out_loss(model.apply, lowrank.merge(base, lora))
    characters.show_change(before, after)
    print(f"loss of the last step: {losses[0]:.3f}")
    return before, after, base, lora, opt_state


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device
    main()
