"""Trains adapters on eight devices, the base split by FSDP and by tensor parallelism together.

    python examples/sharded.py
    python examples/sharded.py --mesh 2x4

Where there are fewer devices, eight of the host's stand in. The base is a small Llama that knows
Python's documentation; it learns The Devil's Dictionary. The same steps are taken on one device
too, to show that the losses are the same.
"""

import argparse
from functools import partial

import characters
import jax
import numpy as np
import optax
from jax import NamedSharding, P
from jax.sharding import AxisType
from rich import print as show

import lowrank_jax as lowrank

# Of a kernel [layer, in, out]: one of in and out is split by "model", as Megatron-LM does, so that
# a layer needs one sum over devices; the other by "data", which is gathered when it is needed.
COLUMN, ROW = P(None, "data", "model"), P(None, "model", "data")
SPECS = {
    "embed_tokens": P(("model", "data"), None),
    "layers": {
        "self_attn": {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW},
        "mlp": {"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW},
        "input_layernorm": P(),
        "post_attention_layernorm": P(),
    },
    "norm": P(),
}


def train(apply, tx, base, lora, opt_state, data, **shardings):
    """Takes a step for each batch; returns the adapter and the losses."""

    @partial(jax.jit, donate_argnums=(0, 1), **shardings)
    def step(lora, opt_state, base, tokens):
        loss_of = lambda lora: characters.loss_of(apply, lowrank.combine(base, lora), tokens)
        loss, grads = jax.value_and_grad(loss_of)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    losses = []
    for tokens in data:
        lora, opt_state, loss = step(lora, opt_state, base, tokens)
        losses.append(float(loss))
    return lora, losses


def main(arguments=None):
    """Trains on a mesh, and on one device; prints both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mesh", default="4x2", help="devices along data and model (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    flags = parser.parse_args(arguments)
    try:
        shape = data, model = tuple(int(size) for size in flags.mesh.split("x"))
    except ValueError:
        parser.error(f"argument --mesh: expected two numbers like 4x2, got {flags.mesh!r}")
    count = data * model
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    if not 0 < count <= len(devices):
        parser.error(f"argument --mesh: {flags.mesh} is {count} devices, there are {len(devices)}")

    model, params = characters.pretrained()
    apply, tx = lowrank.lift(model.apply), optax.adam(5e-3)
    ids = jax.ShapeDtypeStruct((characters.BATCH, characters.CONTEXT), np.int32)
    plan = lowrank.plan(model.apply, params, ids)
    config = lowrank.LoraConfig(rank=8)
    make = lambda key, params: lowrank.init(key, params, config, plan=plan)[1]
    key = jax.random.key(0)

    # One device
    lora = make(key, params)
    batches = partial(characters.batches, characters.target()[0], flags.steps)
    _, alone = train(apply, tx, params, lora, tx.init(lora), batches("on one device"))

    # The mesh: a sharding for every array of the base, of the adapter and of the optimizer's state
    automatic = (AxisType.Auto, AxisType.Auto)  # Flax's layers leave the layout to the compiler
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=automatic, devices=devices[:count])
    named = jax.tree.map(partial(NamedSharding, mesh), {"params": SPECS})
    everywhere = NamedSharding(mesh, P())
    base = jax.device_put(params, lowrank.specs(params, named))
    lora_at = lowrank.specs(jax.eval_shape(make, key, base), named)
    state_at = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, lora),
        lora_at,
        transform_non_params=lambda _: everywhere,
    )
    lora = jax.jit(make, out_shardings=lora_at)(key, base)  # never whole on one device
    opt_state = jax.jit(tx.init, out_shardings=state_at)(lora)
    show(lowrank.report(model.apply, lowrank.combine(base, lora), ids))

    data = (jax.device_put(b, NamedSharding(mesh, P("data"))) for b in batches(f"on {flags.mesh}"))
    out = (lora_at, state_at, everywhere)
    lora, losses = train(apply, tx, base, lora, opt_state, data, out_shardings=out)
    for step in sorted({1, (flags.steps + 1) // 2, flags.steps}):
        show(f"step {step:3}: loss {losses[step - 1]:.5f}, on one device {alone[step - 1]:.5f}")
    return base, lora, losses, alone


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device
    main()
