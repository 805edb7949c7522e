r"""QLoRA on eight devices, the base split by FSDP and by tensor parallelism together.

    python examples/sharded.py
    python examples/sharded.py --mesh 2x4 --format int8

Where there are fewer devices, eight of the host's stand in. Two processes on one host, of four
devices each, and two hosts of which the first is named:

    for i in 0 1; do python examples/sharded.py --processes 2 --process $i & done; wait
    python examples/sharded.py --processes 2 --process 0 --coordinator first:1234
    python examples/sharded.py --processes 2 --process 1 --coordinator first:1234

A cluster tells JAX itself who is who. Two nodes of four GPUs under Slurm, and a slice of eight
TPUs, as JAX documents them (neither was run for this example):

    srun --nodes 2 --ntasks 2 --gpus-per-node 4 python examples/sharded.py --cluster
    gcloud compute tpus tpu-vm ssh NAME --worker=all \
        --command "python examples/sharded.py --cluster"

The base is a small Llama that knows Python's documentation; it learns The Devil's Dictionary. The
same steps are taken on one device too, to show that the losses are the same. With --checkpoint the
adapter is saved in the background every ten steps, and a run that was stopped goes on from there,
on another mesh and another number of processes if need be.
"""

import argparse
from functools import partial

import characters
import jax
import numpy as np
import optax
import rich
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
SAVE_EVERY = 10


def make_step(apply, tx, **shardings):
    """Makes the training step; shardings: those of its results."""

    @partial(jax.jit, donate_argnums=(0, 1), **shardings)
    def step(lora, opt_state, base, tokens):
        loss_of = lambda lora: characters.loss_of(apply, lowrank.combine(base, lora), tokens)
        loss, grads = jax.value_and_grad(loss_of)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return step


def read_flags(arguments):
    """Reads the flags; the mesh as two numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="4x2", help="devices along data and model (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    parser.add_argument("--format", default="nf4", choices=("nf4", "fp4", "int8"))
    parser.add_argument("--checkpoint", metavar="FOLDER", help="save there, and go on from there")
    parser.add_argument("--processes", type=int, default=1, help="how many run (%(default)s)")
    parser.add_argument("--process", type=int, default=0, help="which of them this is")
    parser.add_argument("--coordinator", default="127.0.0.1:23456", help="address of process 0")
    parser.add_argument("--cluster", action="store_true", help="ask the cluster for these three")
    flags = parser.parse_args(arguments)
    try:
        flags.shape = tuple(int(size) for size in flags.mesh.split("x"))
        assert len(flags.shape) == 2
        assert min(flags.shape) > 0
    except (ValueError, AssertionError):
        parser.error(f"argument --mesh: expected two numbers like 4x2, got {flags.mesh!r}")
    flags.count = flags.shape[0] * flags.shape[1]
    if flags.processes < 1 or flags.count % flags.processes:
        parser.error(f"argument --processes: {flags.processes} cannot share {flags.count} devices")
    return parser, flags


def make_mesh(parser, flags):
    """Starts the processes' runtime if there are several; returns the mesh."""
    several = flags.processes > 1 or flags.cluster
    if flags.cluster:
        jax.distributed.initialize()
    elif several:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    enough = several or jax.device_count() >= flags.count
    devices = jax.devices() if enough else jax.devices("cpu")
    if len(devices) < flags.count:
        wanted = f"{flags.mesh} is {flags.count} devices"
        parser.error(f"argument --mesh: {wanted}, there are {len(devices)}")
    automatic = (AxisType.Auto, AxisType.Auto)  # Flax's layers leave the layout to the compiler
    return jax.make_mesh(flags.shape, ("data", "model"), automatic, devices=devices[: flags.count])


def main(arguments=None):
    """Trains on a mesh, and on one device; prints both."""
    parser, flags = read_flags(arguments)
    mesh = make_mesh(parser, flags)
    rich.get_console().quiet = jax.process_index() > 0
    at = partial(NamedSharding, mesh)
    everywhere, rows = at(P()), at(P("data"))

    model, params = characters.pretrained(dim=128)  # four blocks of 32 for four devices
    apply, tx = lowrank.lift(model.apply), optax.adam(5e-3)
    ids = jax.ShapeDtypeStruct((characters.BATCH, characters.CONTEXT), np.int32)
    plan = lowrank.plan(model.apply, params, ids)
    config = lowrank.LoraConfig(rank=8)
    quant = lowrank.QuantConfig(format=flags.format, packing="uint8", block_size=32)
    batches = partial(characters.batches, characters.target()[0], flags.steps)

    # One device, where each process takes the same steps by itself
    frozen, lora = lowrank.init(0, lowrank.quantize(params, quant, plan=plan), config, plan=plan)
    step, state, alone = make_step(apply, tx), tx.init(lora), []
    for tokens in batches("on one device"):
        lora, state, loss = step(lora, state, frozen, tokens)
        alone.append(float(loss))

    # The mesh: from arrays on the host, each process encodes and keeps what its devices hold
    host = jax.tree.map(np.asarray, params)
    named = jax.tree.map(at, {"params": SPECS})
    frozen = lowrank.quantize(host, quant, plan=plan, shardings=named)
    base, lora = lowrank.init(0, frozen, config, plan=plan)  # sharded as its base
    lora_at = lowrank.specs(lora, named)
    state_at = optax.tree.map_params(
        tx,
        lambda _, place: place,
        jax.eval_shape(tx.init, lora),
        lora_at,
        transform_non_params=lambda _: everywhere,
    )
    state, first = jax.jit(tx.init, out_shardings=state_at)(lora), 0
    if flags.checkpoint and lowrank.checkpoint.exists(flags.checkpoint):
        like = {"lora": lora, "opt_state": state}
        found = lowrank.checkpoint.restore(flags.checkpoint, base=base, like=like)
        lora, state, first = found.lora, found.opt_state, found.step
        show(f"going on from step {first}")
    show(lowrank.report(model.apply, lowrank.combine(base, lora), ids))
    mark = lowrank.fingerprint(base)

    step, losses = make_step(apply, tx, out_shardings=(lora_at, state_at, everywhere)), {}
    for number, tokens in enumerate(batches(f"on {flags.mesh}"), 1):
        if number <= first:
            continue
        tokens = jax.make_array_from_callback(tokens.shape, rows, tokens.__getitem__)
        lora, state, loss = step(lora, state, base, tokens)
        losses[number] = float(loss)
        if flags.checkpoint and (number % SAVE_EVERY == 0 or number == flags.steps):
            saving = lowrank.checkpoint.save_async(
                flags.checkpoint, lora=lora, config=config, base=mark, opt_state=state, step=number
            )
    if flags.checkpoint and losses:
        saving.wait()
    for number in sorted({1, (flags.steps + 1) // 2, flags.steps} & losses.keys()):
        one = alone[number - 1]
        show(f"step {number:3}: loss {losses[number]:.5f}, on one device {one:.5f}")
    return base, lora, losses, alone


if __name__ == "__main__":
    known = read_flags(None)[1]
    if not known.cluster:  # before anything asks for a device
        jax.config.update("jax_num_cpu_devices", known.count // known.processes)
    main()
