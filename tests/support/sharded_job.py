"""A job on a mesh of eight devices, of one process or of several; run by test_processes.

    python sharded_job.py PORT PROCESSES PROCESS write|laws|train FOLDER [STEPS]

Prints a line of JSON for everything that the test compares.
"""

import functools
import json
import sys
from pathlib import Path

import jax

ARGUMENTS = sys.argv[1:] if __name__ == "__main__" else ["0", "1", "0", "", "."]
port, processes, process, job, folder, *rest = ARGUMENTS
if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    jax.config.update("jax_disable_most_optimizations", True)  # values are compared, and not speed
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import NamedSharding, P  # noqa: E402

import lowrank_jax as lowrank  # noqa: E402

folder = Path(folder)
AUTO = (jax.sharding.AxisType.Auto,) * 2
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=AUTO)
at = lambda *spec: NamedSharding(MESH, P(*spec))
SHARDINGS = {
    "up": {"kernel": at(None, "data", "model")},
    "down": {"kernel": at(None, "model", "data")},
    "stages": {"kernel": at("data", None, "model")},  # a stack that is itself split
    "norm": at(),
    "head": {"kernel": at(None, ("data", "model"))},
}
FILE = "model.safetensors"
QUANT = lowrank.QuantConfig(targets="**/kernel", packing="uint8", block_size=32)
CONFIG = lowrank.LoraConfig(rank=4, targets=("up/kernel", "down/kernel", "head/kernel"))


def arrays() -> dict:
    """The dense parameters: scanned layers, stages, and a head."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32) / 8
    return {
        "up": {"kernel": normal(2, 128, 64)},
        "down": {"kernel": normal(2, 64, 128)},
        "stages": {"kernel": normal(4, 128, 32)},
        "norm": np.ones((2, 128), np.float32),
        "head": {"kernel": normal(128, 16)},
    }


def fn(params, x):
    """A residual network whose layers are scanned."""

    def layer(x, w):
        return x + jax.nn.gelu(x * w["norm"] @ w["up"]["kernel"]) @ w["down"]["kernel"], None

    layers = {name: params[name] for name in ("up", "down", "norm")}
    x, _ = jax.lax.scan(layer, x, layers)
    stages = jnp.stack([x] * 4) @ params["stages"]["kernel"]
    x = x + jnp.tile(stages.sum(0), 4)
    return x @ params["head"]["kernel"]


PLAN = lowrank.plan(fn, arrays(), jax.ShapeDtypeStruct((8, 128), np.float32))


def tell(name: str, value: object) -> None:
    print(json.dumps([name, value]), flush=True)


def compare(name: str, got: object, wanted: object, shardings: object) -> None:
    """Tell whether the shards of this process are those of the wanted arrays, and lie there."""
    problems, (leaves, treedef) = [], jax.tree.flatten(wanted)
    if jax.tree.structure(got) != treedef:
        problems.append(f"{jax.tree.structure(got)}, wanted {treedef}")
    places = jax.tree.leaves(shardings)
    for one, other, place in zip(jax.tree.leaves(got), leaves, places, strict=True):
        if not one.sharding.is_equivalent_to(place, one.ndim):
            problems.append(f"{one.shape} at {one.sharding}, wanted {place}")
        for shard in one.addressable_shards:
            if not (np.asarray(shard.data) == np.asarray(other)[shard.index]).all():
                problems.append(f"other values in {one.shape}{shard.index}")
    tell(name, sorted({*problems}))


def write() -> None:
    """Write the parameters, for laws: files to map, and a model's folder."""
    name = lambda path: folder / f"{jax.tree_util.keystr(path)}.npy"
    jax.tree.map_with_path(lambda path, x: np.save(name(path), x), arrays())
    lowrank.huggingface.save(folder / "model", arrays(), names=NAMES)


def laws() -> None:
    """Each function that makes a tree makes the shards that it makes on one device."""
    raw = arrays()
    whole = lowrank.quantize(raw, QUANT, plan=PLAN)
    places = lowrank.specs(whole, SHARDINGS)
    name = lambda path: folder / f"{jax.tree_util.keystr(path)}.npy"
    mapped = jax.tree.map_with_path(lambda path, _: np.load(name(path), mmap_mode="r"), raw)
    got = lowrank.quantize(mapped, QUANT, plan=PLAN, shardings=SHARDINGS)
    compare("quantize of mapped files", got, whole, places)
    put = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), raw,
                       SHARDINGS)  # fmt: skip
    compare("quantize of sharded arrays", lowrank.quantize(put, QUANT, plan=PLAN), whole, places)
    config = lowrank.LoraConfig(rank=4, targets=CONFIG.targets, train=("norm",), dora=True)
    base, lora = lowrank.init(0, whole, config, plan=PLAN)
    base_at, lora_at = (lowrank.specs(tree, SHARDINGS) for tree in (base, lora))
    got_base, got_lora = lowrank.init(0, got, config, plan=PLAN)
    compare("init of a quantized base: factors", factors(got_lora), factors(lora), factors(lora_at))
    tell("init of a quantized base", placed(got_base, base_at) + placed(got_lora, lora_at))
    _, lora = lowrank.init(0, raw, CONFIG, plan=PLAN)
    lora_at = lowrank.specs(lora, SHARDINGS)
    got_base, got_lora = lowrank.init(0, mapped, CONFIG, plan=PLAN, shardings=SHARDINGS)
    compare("init of mapped files: base", got_base, raw, SHARDINGS)
    compare("init of mapped files: lora", got_lora, lora, lora_at)
    lora = jax.tree.map(lambda x: jnp.asarray(x) + 0.5, lora)
    got_lora = jax.tree.map(lambda x: x + 0.5, got_lora)
    shapes = jax.eval_shape(lambda: raw)
    for quant in (None, QUANT):
        wanted, wanted_at = (raw, SHARDINGS) if quant is None else (whole, places)
        got = lowrank.huggingface.load(
            folder / "model", shapes, names=NAMES, quant=quant, plan=PLAN, shardings=SHARDINGS
        )
        compare(f"huggingface.load, quant={quant is not None}", got, wanted, wanted_at)
    lowrank.peft.save(folder / "adapter", got_lora, CONFIG, plan=PLAN, names=NAMES)
    _, again, _ = lowrank.peft.load(
        folder / "adapter", shapes, plan=PLAN, names=NAMES, shardings=SHARDINGS
    )
    compare("peft.save, peft.load", again, lora, lora_at)
    lowrank.huggingface.save(folder / "again", got, names=NAMES, plan=PLAN, dequantize=True)
    lowrank.huggingface.save(folder / "put", put, names=NAMES, plan=PLAN)
    same = lambda one, two: (one / FILE).read_bytes() == (two / FILE).read_bytes()
    tell("huggingface.save", [] if same(folder / "put", folder / "model") else ["differs"])
    try:
        lowrank.huggingface.save(folder / "again" / FILE, put, names=NAMES, plan=PLAN)
    except lowrank.CheckpointError as error:
        tell("error", str(error))
    errors = lowrank.quantization_error(put, got)
    alone = lowrank.quantization_error(raw, whole)
    tell("quantization_error", max(abs(errors[p].relative - alone[p].relative) for p in alone))
    tell("fingerprint", lowrank.fingerprint(got) == lowrank.fingerprint(whole))


NAMES = {
    "up/kernel": "layers.{}.up",
    "down/kernel": "layers.{}.down",
    "stages/kernel": "stages.{}.proj",
    "norm": "layers.{}.norm",
    "head/kernel": "head",
}


def factors(tree):
    """The low-rank factors alone, whose values do not depend on where the base lies."""
    is_node = lambda leaf: isinstance(leaf, lowrank.LowRank)
    nodes = jax.tree.leaves(tree, is_leaf=is_node)
    return [(node.a, node.b) for node in nodes if is_node(node)]


def placed(tree, shardings) -> list[str]:
    """The arrays that are not where they should be."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return [str(x.sharding) for x, at in pairs if not x.sharding.is_equivalent_to(at, x.ndim)]


def train(steps: int) -> None:
    """Train from the checkpoint if there is one, saving in the background after every step."""
    frozen = lowrank.quantize(arrays(), QUANT, plan=PLAN, shardings=SHARDINGS)
    base, lora = lowrank.init(0, frozen, CONFIG, plan=PLAN)
    tx, apply = optax.adam(1e-2), lowrank.lift(fn)
    lora_at = lowrank.specs(lora, SHARDINGS)
    state_at = optax.tree.map_params(
        tx, lambda _, place: place, jax.eval_shape(tx.init, lora), lora_at,
        transform_non_params=lambda _: at(),
    )  # fmt: skip
    state, first = jax.jit(tx.init, out_shardings=state_at)(lora), 0
    if lowrank.checkpoint.exists(folder):
        like = {"lora": lora, "opt_state": state}
        found = lowrank.checkpoint.restore(folder, base=base, like=like)
        lora, state, first = found.lora, found.opt_state, found.step
    tell("first", first)
    mark = lowrank.fingerprint(base)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(lora_at, state_at, at()))
    def update(lora, state, base, x):
        loss_of = lambda lora: jnp.mean((apply(lowrank.combine(base, lora), x) - x[:, :16]) ** 2)
        loss, grads = jax.value_and_grad(loss_of)(lora)
        change, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, change), state, loss

    for step in range(first, steps):
        data = np.random.default_rng(step).standard_normal((8, 128), np.float32)
        x = jax.make_array_from_callback(data.shape, at("data"), data.__getitem__)
        lora, state, loss = update(lora, state, base, x)
        saving = lowrank.checkpoint.save_async(
            folder, lora=lora, config=CONFIG, base=mark, opt_state=state, step=step + 1
        )
        tell(f"loss {step}", float(loss).hex())
    saving.wait()
    tell("done", saving.done())


if __name__ == "__main__":
    {"write": write, "laws": laws, "train": lambda: train(int(rest[0]))}[job]()
