"""Save and restore: bit-equal, atomic, verified, and only onto the base trained on."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import BASES, CONFIG, drawn, edit, entries, linen_base, list_base, made, same
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, _nodes, checkpoint
from lowrank_jax._jax.paths import join_keys
from lowrank_jax._trees import fingerprint as hashing
from lowrank_jax._trees.fingerprint import fingerprint
from lowrank_jax.checkpoint import _archive, _entries, _fitting

pytestmark = pytest.mark.usefixtures("fast_compile")


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", BASES)
def test_round_trip_is_bit_equal(tmp_path, kind, dtype):
    base = BASES[kind]()
    lora, config = made(base, factor_dtype=dtype)
    checkpoint.save(tmp_path, lora=lora, config=config, base=base, step=5)
    found = checkpoint.restore(tmp_path, base=base)
    same(lora, found.lora)
    assert (found.config, found.step, found.opt_state) == (config, 5, None)
    assert found.fingerprint == fingerprint(base)
    assert found.fingerprint == fingerprint(nnx.to_pure_dict(base) if kind == "nnx" else base)


def test_without_base_come_nested_dicts(tmp_path):
    lora, config = made(list_base())
    checkpoint.save(tmp_path, lora=lora, config=config)
    found = checkpoint.restore(tmp_path)
    assert set(found.lora) == {"0", "1"}  # untouched leaves are not there
    same(found.lora["1"]["0"], lora[1][0])
    assert found.fingerprint is None
    bare = lora[0]["kernel"]
    checkpoint.save(tmp_path / "bare", lora=bare, config=config, base=jnp.ones((3, 4)))
    same(bare, checkpoint.restore(tmp_path / "bare").lora)
    clash = {"a": bare, "a/b": bare}
    checkpoint.save(tmp_path / "clash", lora=clash, config=config)
    same(clash, checkpoint.restore(tmp_path / "clash", like={"lora": clash}).lora)


def test_odd_keys_and_axes(tmp_path):
    node = lowrank.LowRank(
        jnp.ones((3, 6, 2)), jnp.ones((3, 2, 2, 4)), None, (1,), (2, 3), (0,), 1 / 3, "dot"
    )
    lora = {"..": {"é 0": node}, "": {"a.b%": lowrank.Full(jnp.zeros((0, 3)))}, "a": {"b": node}}
    checkpoint.save(tmp_path / "x", lora=lora, config=CONFIG)
    same(lora, checkpoint.restore(tmp_path / "x").lora)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_stacked_adapters(tmp_path):
    base = linen_base()
    make = lambda seed: lowrank.init(jax.random.key(seed), base, CONFIG)[1]
    many = drawn(jax.eval_shape(jax.vmap(make), np.arange(3)))
    checkpoint.save(tmp_path, lora=many, config=CONFIG, base=base)
    same(many, checkpoint.restore(tmp_path, base=base).lora)


def test_config_with_regexes(tmp_path):
    config = lowrank.LoraConfig(
        targets=(re.compile(r"params/.*/KERNEL", re.IGNORECASE),),
        rank_pattern={re.compile(".*_1/kernel"): 3, "**": 2},
        stack={"nothing/*": (0, 1)},
    )
    lora, _ = made(linen_base())
    checkpoint.save(tmp_path, lora=lora, config=config)
    found = checkpoint.restore(tmp_path).config
    assert found == config
    assert list(found.rank_pattern) == list(config.rank_pattern)


def test_leaves_of_every_kind(tmp_path):
    lora, config = made(linen_base())
    state = {
        "count": jnp.array(3),
        "weak": jnp.asarray(0.1),
        "key": jax.random.key(3, impl="rbg"),
        "keys": jax.random.split(jax.random.key(3), 2),
        "numbers": (True, 2**60, 0.1),
        "wide": np.arange(3.0),
        "bool": jnp.array([True, False]),
        "nan": jnp.array([np.nan, -0.0, np.inf], jnp.bfloat16),
        "codes": jnp.arange(4).astype(jnp.uint4),
        "eighths": jnp.ones((2, 3), jnp.float8_e4m3fn),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    checkpoint.save(tmp_path, lora=lora, config=config, opt_state=state)
    for found in (
        checkpoint.restore(tmp_path, like={"opt_state": state}).opt_state,
        checkpoint.restore(tmp_path).opt_state,
    ):
        for name in ("count", "weak", "bool", "nan", "codes", "eighths", "empty", "wide"):
            same(state[name], found[name])
        assert found["weak"].weak_type
        assert not found["nan"].weak_type
        assert isinstance(found["wide"], np.ndarray)
        for name in ("key", "keys"):
            assert found[name].dtype == state[name].dtype
            same(jax.random.key_data(state[name]), jax.random.key_data(found[name]))
    assert checkpoint.restore(tmp_path).opt_state["numbers"] == {"0": True, "1": 2**60, "2": 0.1}
    found = checkpoint.restore(tmp_path, like={"opt_state": state}).opt_state
    assert [type(number) for number in found["numbers"]] == [bool, int, float]
    assert jax.tree.structure(found) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("kind", "abstract"), [("linen", True), ("nnx", True), ("nnx", False), ("list", False)]
)
def test_optimizer_goes_on_bit_equal(tmp_path, kind, abstract):
    base = BASES[kind]()
    lora, config = made(base, factor_dtype="bfloat16")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1, 9)))

    @jax.jit
    def step(lora, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, lora), state, lora)
        return optax.apply_updates(lora, updates), state

    state = tx.init(lora)
    for _ in range(2):
        lora, state = step(lora, state)
    checkpoint.save(tmp_path, lora=lora, config=config, base=base, opt_state=state, step=2)
    fresh, _ = made(base, factor_dtype="bfloat16")
    like = {"lora": fresh, "opt_state": tx.init(fresh)}
    like = jax.eval_shape(lambda: like) if abstract else like
    found = checkpoint.restore(tmp_path, base=base, like=like)
    for _ in range(2):
        lora, state = step(lora, state)
        found_lora, found_state = step(found.lora, found.opt_state)
        found = checkpoint.Checkpoint(found_lora, config, found_state)
    same(lora, found.lora)
    same(state, found.opt_state)
    again = checkpoint.restore(tmp_path, like=found)  # an object with the fields
    assert again.step == 2


def test_sharded_leaves_go_to_another_mesh(tmp_path):
    lora, config = made({"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)})
    place = lambda shape, names, spec: jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(jax.make_mesh(shape, names), PartitionSpec(spec))
        ),
        lora,
    )
    before, after = place((2,), ("x",), "x"), place((2, 1), ("y", "z"), ("y", "z"))
    checkpoint.save(tmp_path, lora=before, config=config)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), after
    )
    for like in (after, abstract):
        found = checkpoint.restore(tmp_path, like={"lora": like}).lora
        same(lora, found)
        assert found["kernel"].a.sharding == after["kernel"].a.sharding
    assert not checkpoint.restore(tmp_path, like={"lora": lora}).lora["kernel"].a.committed


# Refusals


def test_save_refuses_what_is_no_adapter(tmp_path):
    base = linen_base()
    lora, config = made(base)
    for options, text in (
        ({"lora": base}, "lora holds ArrayImpl at 'params/Dense_0/bias'"),
        ({"lora": lowrank.combine(base, lora)}, r"lora is a combined tree .*partition"),
        ({"lora": {"w": None}}, "no adapter"),
        ({"base": lora}, "base holds an adapter"),
        ({"base": base["params"]}, "does not fit the base"),
        ({"base": jax.eval_shape(lambda: base)}, "no.* array of numbers with values"),
        ({"config": config.to_dict()}, "config is a dict"),
        ({"step": 1.5}, "step is a float, 1.5; expected an integer"),
        ({"opt_state": {"a": "text"}}, "opt_state/a.* is str"),
        ({"lora": jax.eval_shape(lambda: lora)}, "is ShapeDtypeStruct"),
    ):
        with pytest.raises(CheckpointError, match=text):
            checkpoint.save(tmp_path / "x", **{"lora": lora, "config": config, **options})
    with pytest.raises(CheckpointError, match="tracer"):
        jax.jit(lambda lora: checkpoint.save(tmp_path / "x", lora=lora, config=config))(lora)
    assert not (tmp_path / "x").exists()
    with pytest.raises(CheckpointError, match="mounted file system"):
        checkpoint.save("gs://bucket/x", lora=lora, config=config)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.save(path, lora=lora, config=config)


# Replacement


class Killed(BaseException):
    """What ends a save at a given call: from then on, no call does anything."""


CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")


def kill_at(monkeypatch, number):
    """Let the `number`th call to the file system, and all after it, raise; return the count."""
    count = [0]

    def counted(call):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] > number:
                raise Killed
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        # a killed process loses nothing that the kernel has: syncing would only cost time
        call = (lambda handle: None) if name == "fsync" else getattr(os, name)
        monkeypatch.setattr(os, name, counted(call))
    return count


def test_killed_at_each_call_leaves_one_whole_checkpoint(tmp_path, monkeypatch):
    base = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    lora, config = made(base, targets="kernel", train="bias")
    new = jax.tree.map(lambda leaf: -leaf, lora)
    checkpoint.save(tmp_path / "old", lora=lora, config=config, base=base, step=1)
    with monkeypatch.context() as patch:
        count = kill_at(patch, 10**9)
        checkpoint.save(shutil.copytree(tmp_path / "old", tmp_path / "n"), lora=new, config=config)
    seen = []
    for number in range(count[0] + 1):
        path = shutil.copytree(tmp_path / "old", tmp_path / str(number))
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with contextlib.suppress(Killed, CheckpointError):  # Orbax's threads wrap a Killed
                checkpoint.save(path, lora=new, config=config, base=base, step=2)
        found = checkpoint.restore(path, base=base)
        same(found.lora, {1: lora, 2: new}[found.step])
        seen.append(found.step)
        if number % 3 == 0:
            checkpoint.save(path, lora=new, config=config, base=base, step=3)
            assert checkpoint.restore(path, base=base).step == 3
            assert len(list(path.iterdir())) == 2, "leftovers"
        shutil.rmtree(path)
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert len(seen) > 20


@pytest.mark.parametrize("call", ["rename", "replace", "fsync", "mkdir", "open"])
def test_input_output_errors_leave_the_old_one(tmp_path, monkeypatch, call):
    lora, config = made(linen_base())
    checkpoint.save(tmp_path / "x", lora=lora, config=config, step=1)
    before = entries(tmp_path / "x")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="could not be written") as info:
            checkpoint.save(tmp_path / "x", lora=lora, config=config, step=2)
    assert "No space left" in str(info.value)
    assert entries(tmp_path / "x") == before


def test_sigkill_of_a_saving_process(tmp_path):
    code = (
        "import sys, numpy as np, lowrank_jax as lowrank; from lowrank_jax import checkpoint\n"
        "config = lowrank.LoraConfig(targets='w')\n"
        "for step in range(1, 10**6):\n"
        "    w = np.full((64, 2), step, np.float32)\n"
        "    lora = {'w': lowrank.LowRank(w, np.full((2, 64), -step, np.float32))}\n"
        "    checkpoint.save(sys.argv[1], lora=lora, config=config, step=step)\n"
        "    print(step, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, env=env
    )
    with child:
        for _ in range(5):
            told = int(child.stdout.readline())
        time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    found = checkpoint.restore(tmp_path / "x")
    assert found.step >= told
    assert (np.asarray(found.lora["w"].a) == found.step).all()
    assert (np.asarray(found.lora["w"].b) == -found.step).all()
    checkpoint.save(tmp_path / "x", lora=found.lora, config=found.config)
    assert len(list((tmp_path / "x").iterdir())) == 2


def test_second_writer_errors_at_once(tmp_path):
    lora, config = made(linen_base())
    checkpoint.save(tmp_path, lora=lora, config=config, step=1)
    with _archive.lock_folder(tmp_path):
        began = time.perf_counter()
        with pytest.raises(CheckpointError, match="another save is writing"):
            checkpoint.save(tmp_path, lora=lora, config=config, step=2)
        assert time.perf_counter() - began < 2
        assert checkpoint.restore(tmp_path).step == 1
    checkpoint.save(tmp_path, lora=lora, config=config, step=2)
    assert checkpoint.restore(tmp_path).step == 2


def test_a_reader_that_meets_a_save_reads_the_new_one(tmp_path, monkeypatch):
    lora, config = made(linen_base())
    checkpoint.save(tmp_path, lora=lora, config=config, step=1)
    read = checkpoint._restore.read_archive

    def late(*args):
        monkeypatch.setattr(checkpoint._restore, "read_archive", read)
        checkpoint.save(tmp_path, lora=lora, config=config, step=2)
        return read(*args)

    monkeypatch.setattr(checkpoint._restore, "read_archive", late)
    assert checkpoint.restore(tmp_path).step == 2


def test_other_files_are_left_alone_and_damage_is_replaced(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "arrays-mine").mkdir()
    (copy / "manifest.json").write_text("{")
    lora, config = made(linen_base())
    checkpoint.save(copy, lora=lora, config=config, step=9)
    assert checkpoint.restore(copy).step == 9
    names = {path.name for path in copy.iterdir()}
    assert {"notes.txt", "arrays-mine", "manifest.json"} < names
    assert len(names) == 4


def test_exists_once_a_save_has_come_to_its_end(tmp_path):
    directory = tmp_path / "run"
    assert not checkpoint.exists(directory)
    (directory / ("arrays-" + "0" * 32)).mkdir(parents=True)  # what a killed first save leaves
    assert not checkpoint.exists(directory)
    config = lowrank.LoraConfig(rank=1, targets="w")
    lora = {"w": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    checkpoint.save(directory, lora=lora, config=config)
    assert checkpoint.exists(directory)


# Fields called "value"


def test_a_state_with_a_field_called_value_comes_back_without_like(tmp_path):
    lora, config = made(linen_base())
    state = optax.lbfgs().init(lora)
    checkpoint.save(tmp_path, lora=lora, config=config, opt_state=state)
    found = checkpoint.restore(tmp_path).opt_state["2"]
    assert found.keys() == {"learning_rate", "value", "grad", "info"}
    same(found["value"], state[2].value)
    same(state, checkpoint.restore(tmp_path, like={"opt_state": state}).opt_state)


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


def paths_of_older_releases(tree, is_leaf=None):
    """A last key called "value" was left out, whatever it was of, and no other."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    is_value = lambda key: isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"
    cut = lambda keys: keys[:-1] if keys and is_value(keys[-1]) else keys
    return [(join_keys(cut(keys)), leaf) for keys, leaf in keyed], treedef


def test_checkpoints_with_paths_of_older_releases_come_back(tmp_path, monkeypatch):
    """Of a quantized nnx.State, a leaf trained whole, a named tuple: base, lora and optimizer."""
    kernel = np.linspace(-1, 1, 64 * 4, dtype=np.float32).reshape(64, 4)
    params = {
        "attn": Attention(jnp.asarray(kernel), jnp.asarray(2 * kernel)),
        "layers": nnx.State({"up": nnx.Param(jnp.asarray(kernel)), "g": nnx.Param(jnp.ones(4))}),
    }
    base = lowrank.quantize(params, lowrank.QuantConfig(targets="layers/up"))
    lora, config = made(base, targets=["attn/*", "layers/up"], train="layers/g")
    state = drawn(jax.eval_shape(optax.adam(1e-3).init, lora))
    with monkeypatch.context() as older:
        for module in (_entries, _fitting, hashing, _nodes.adapted):
            older.setattr(module, "flatten", paths_of_older_releases)
        checkpoint.save(tmp_path, lora=lora, config=config, base=base, opt_state=state)
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert ["attn"] in [entry["path"] for entry in body["lora"]]
    written = {"/".join(entry["path"]) for entry in body["opt_state"]}
    assert {"0/mu/attn/value/a", "0/mu/layers/up/value/a", "0/mu/layers/g/value"} <= written
    assert "layers/up/value/codes" in body["base"]["leaves"]
    like = {"lora": lora, "opt_state": state}
    found = checkpoint.restore(tmp_path, base=base, like=like)
    same((lora, state), (found.lora, found.opt_state))
    same(lora, checkpoint.restore(tmp_path, base=base).lora)
    other = {**base, "attn": Attention(base["attn"].query, base["attn"].query)}
    with pytest.raises(CheckpointError, match="not the one the adapter was trained on"):
        checkpoint.restore(tmp_path, base=other)


def test_a_static_field_under_its_older_name_is_read(tmp_path):
    lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), base_modified=True)}
    checkpoint.save(tmp_path, lora=lora, config=CONFIG)

    def rename_field(body):
        static = body["lora"][0]["static"]
        static["moved"] = static.pop("base_modified")

    edit(tmp_path, rename_field)
    assert checkpoint.restore(tmp_path).lora["w"].base_modified
