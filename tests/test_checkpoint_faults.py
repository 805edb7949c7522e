"""What a checkpoint survives, the short form of tests/benchmarks/faults.py; what it resumes."""

import functools
import json
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint
from lowrank_jax._files.locks import lock_folder
from lowrank_jax.checkpoint import _archive

pytestmark = pytest.mark.usefixtures("fast_compile")

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import faults  # noqa: E402
import forms  # noqa: E402

CONFIG = lowrank.LoraConfig(rank=2, targets=("**/w",))


def adapter(value=1.0):
    full = lambda *shape: jnp.asarray(np.full(shape, value, np.float32))
    return {"w": lowrank.LowRank(full(16, 2), full(2, 8), scale=2.0)}


def save(directory, value=1.0, **options):
    options = {"lora": adapter(value), "config": CONFIG, "step": int(value), **options}
    return checkpoint.save(directory, **options)


def save_async(directory, value=1.0, **options):
    options = {"lora": adapter(value), "config": CONFIG, "step": int(value), **options}
    return checkpoint.save_async(directory, **options)


def run(*arguments):
    """The output of a Python program of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


def edit(directory, change):
    """Change a manifest's body, and make its own hash right again."""
    body = json.loads((directory / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    (directory / "manifest.json").write_bytes(_archive.serialize_manifest(body))


@pytest.fixture
def old(tmp_path):
    """A folder with a checkpoint, as the functions of faults.py want it."""
    checkpoint.save(tmp_path / "checkpoint", **forms.contents(1))
    return tmp_path


# Faults


def test_kills_and_rival_writers():
    killed, rivals = run(
        BENCHMARKS / "faults.py", "--kills", 12, "--writers", 2
    ).stdout.splitlines()
    assert re.fullmatch(
        r"kills: 12, \d+ of them amid a save: 0 torn, 0 of another step, 0 orphans after the next "
        "save",
        killed,
    )
    # whether both meet is a matter of the machine; that none is torn or hangs is not
    assert re.match(r"two writers: 2 rounds: \{('saved': \d|'refused': \d|, )+\}", rivals)
    assert rivals.endswith("the last is whole")


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="LD_PRELOAD and cc"
)
def test_errors_of_the_file_system_reach_the_caller():
    lines = run(BENCHMARKS / "faults.py", "--errors", 13).stdout.splitlines()
    assert [line.split(" (")[0].split(":")[0] for line in lines] == [
        "errors",
        "errors",
        "limited size of files",
        "full disks",
    ]
    for line in lines:
        assert "0 old ones changed" in line or "not allowed" in line
        assert set(re.findall(r"'([^']+)': \d+", line.split("}: ")[-1].split("}")[0])) <= {
            "CheckpointError",
            "saved",
            "in place",  # the very last flush failed, and nothing could be undone: said so
        }
    for line in lines[:3]:
        assert ", 0 torn, 0 orphans after the next save" in line


def test_one_error_at_any_call_leaves_the_old_one(old, monkeypatch):
    before, count, failing = forms.entries(old / "checkpoint"), 0, None

    def counted(call, *args, **kwargs):
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(5, "Input/output error")
        return call(*args, **kwargs)

    for name in ("rename", "replace", "fsync", "mkdir", "open"):
        call = (lambda handle: None) if name == "fsync" else getattr(os, name)
        monkeypatch.setattr(os, name, functools.partial(counted, call))
    failing, raised, turn = 0, [], old / "turn"
    while failing <= count:
        shutil.rmtree(turn, ignore_errors=True)
        shutil.copytree(old / "checkpoint", turn)
        failing, count = failing + 1, 0
        try:
            checkpoint.save(turn, **forms.contents(2))
            assert forms.whole(turn) == 2
        except CheckpointError as error:
            raised.append(str(error))
            assert forms.entries(turn) == before
    assert len(raised) > 20
    assert all("Input/output error" in text for text in raised)


@pytest.mark.parametrize("undone", [True, False])
def test_nothing_is_removed_before_the_names_are_surely_on_disk(old, monkeypatch, undone):
    """The directory cannot be flushed once the new manifest is there; nor undone, in one case."""
    replace, fsync, broken = os.replace, os.fsync, False

    def late(*args):
        nonlocal broken
        if broken and not undone:
            raise OSError(5, "Input/output error")
        replace(*args)
        broken |= str(args[1]).endswith("manifest.json")

    def flush(handle):
        if broken and stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(5, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", late)
    text = "unchanged.*Input/output error" if undone else "the new checkpoint, complete.*Input"
    with pytest.raises(CheckpointError, match=text):
        checkpoint.save(old / "checkpoint", **forms.contents(2))
    assert forms.whole(old / "checkpoint") == (1 if undone else 2)
    # either manifest may be the one on disk: the arrays of both are there
    assert len(list((old / "checkpoint").glob("arrays-*"))) == 2
    monkeypatch.undo()
    checkpoint.save(old / "checkpoint", **forms.contents(3))
    assert forms.orphans(old / "checkpoint") == 0


def test_a_manifest_that_cannot_be_read_costs_no_arrays(old, monkeypatch):
    before = forms.entries(old / "checkpoint")

    def unreadable(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    checkpoint.save(old / "checkpoint", **forms.contents(2))
    monkeypatch.undo()
    del before["manifest.json"]
    assert before.items() <= forms.entries(old / "checkpoint").items()
    assert forms.whole(old / "checkpoint") == 2
    checkpoint.save(old / "checkpoint", **forms.contents(3))
    assert forms.orphans(old / "checkpoint") == 0


def test_a_fork_does_not_keep_the_lock(tmp_path, monkeypatch):
    save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", lambda handle: None)  # a fork has its own copy of the handle
        with lock_folder(tmp_path):
            pass
    save(tmp_path, 2)


def test_flipped_bits(old):
    line = faults.flips(250, old, 0)
    assert re.match(r"flipped bits, of \d+: 250: \{'CheckpointError': 250\}", line)


def test_a_flip_that_leaves_the_content_is_caught_too(tmp_path):
    save(tmp_path, lora={"w": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), scale=1e-7)})
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"1e-07", b"1E-07"))
    with pytest.raises(CheckpointError, match="its text does not match its sha256"):
        checkpoint.restore(tmp_path)


def test_forged_manifests_and_links(old):
    manifests, linked = faults.manifests(300, old, 0).splitlines()
    outcomes = lambda line: set(re.findall(r"'([^']+)': \d+", line))
    # a sealed manifest may say another step or path: the arrays are those saved all the same
    assert outcomes(manifests) == {"CheckpointError", "restored"}
    assert outcomes(linked) == {"CheckpointError"}


def test_no_payload_runs(old, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    directory, array = old / "checkpoint", np.array([Payload()], object)
    folder = next(directory.glob("arrays-*"))
    contents = forms.entries(directory)
    np.save(tmp_path / "payload.npy", array, allow_pickle=True)
    payloads = [pickle.dumps(Payload()), (tmp_path / "payload.npy").read_bytes()]
    for payload in payloads:
        for name in [*contents, f"{folder.name}/payload.npy", f"{folder.name}/d/payload.pkl"]:
            (directory / name).write_bytes(payload)
            with pytest.raises(CheckpointError):
                checkpoint.restore(directory)
            if name != "manifest.json":  # and with a manifest that vouches for it
                path = directory / name
                found = [path.stat().st_size, _archive._hash_file(path)]
                edit(directory, lambda body: body["files"].update({name.split("/", 1)[1]: found}))
                # Orbax does without some of its files: then the arrays are those saved
                assert forms.whole(directory) in (None, 1)
                (directory / "manifest.json").write_bytes(contents["manifest.json"])
            if name in contents:
                (directory / name).write_bytes(contents[name])
            else:
                (directory / name).unlink()
    assert forms.whole(directory) == 1
    assert not (tmp_path / "ran").exists()
    pickle.loads(payloads[0])  # the payload is one
    assert (tmp_path / "ran").exists()


# What fits


def test_a_field_of_later_has_its_default_and_an_unknown_one_is_refused(tmp_path):
    save(tmp_path)
    static = lambda body: body["lora"][0]["static"]
    edit(tmp_path, lambda body: static(body).pop("kind"))
    assert checkpoint.restore(tmp_path).lora["w"].kind == "dot"
    edit(tmp_path, lambda body: body.pop("extra"))
    assert checkpoint.restore(tmp_path).extra is None
    edit(tmp_path, lambda body: static(body).update(gated=True))
    with pytest.raises(
        CheckpointError, match=r"'w' is a LowRank with \['gated'\], unknown to this"
    ):
        checkpoint.restore(tmp_path)
    edit(tmp_path, lambda body: static(body).pop("gated"))
    edit(tmp_path, lambda body: body.update(history=[]))
    with pytest.raises(CheckpointError, match=r"has \['history'\], unknown to this"):
        checkpoint.restore(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda node: node["static"].update(scale="2.0"), "scale: '2.0', expected a float"),
        (lambda node: node["static"].update(stack=[True]), r"stack: \(True,\), expected a tuple"),
        (lambda node: node["static"].update(fan_in=[1]), "do not fit each other or their axes"),
        (lambda node: node["static"].update(kind="sum"), "do not fit each other or their axes"),
        (lambda node: node.update(path="w"), "has the path 'w', expected a list"),
    ],
)
def test_a_node_is_as_its_fields_say(tmp_path, change, text):
    save(tmp_path)
    edit(tmp_path, lambda body: change(body["lora"][0]))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.restore(tmp_path)


def test_each_array_is_of_one_leaf(tmp_path):
    save(tmp_path, opt_state={"m": jnp.ones((16, 2)), "count": 3})
    original = (tmp_path / "manifest.json").read_bytes()
    for change, text in (
        (lambda body: body["opt_state"][1].update(name="lora/w/a"), "lora/w/a: used 2 times"),
        (lambda body: body["opt_state"].pop(), "opt_state/m: used 0 times"),
        (lambda body: body["lora"].append(body["lora"][0]), "has 'w' twice"),
        (
            lambda body: body["opt_state"][1].update(form="int"),
            r"'opt_state/m' is float32\[16, 2\]",
        ),
    ):
        edit(tmp_path, change)
        with pytest.raises(CheckpointError, match=text):
            checkpoint.restore(tmp_path)
        (tmp_path / "manifest.json").write_bytes(original)


def test_factors_that_do_not_fit_are_not_saved(tmp_path):
    for a, b in (((16, 2), (3, 8)), ((2,), (2, 8)), ((5, 16, 2), (4, 2, 8))):
        lora = {"w": lowrank.LowRank(jnp.ones(a), jnp.ones(b))}
        with pytest.raises(CheckpointError, match=rf"w: a {re.escape(str(a))}, b .*stack \(\)"):
            save(tmp_path / "x", lora=lora)
    lora = {"w": lowrank.LowRank(jnp.ones((16, 2)), jnp.ones((2, 8)), jnp.ones(7))}
    with pytest.raises(CheckpointError, match=r"magnitude \(7,\)"):
        save(tmp_path / "x", lora=lora)


def test_what_like_asks_for_in_vain(tmp_path):
    save(tmp_path, opt_state={"m": jnp.ones((3, 2))})
    mesh = jax.make_mesh((8,), ("x",))
    split = NamedSharding(mesh, PartitionSpec("x"))
    like = lambda *args, **options: {"opt_state": {"m": jax.ShapeDtypeStruct(*args, **options)}}
    for asked, text in (
        (like((3, 2), jnp.uint8), r"m: float32\[3, 2\], expected uint8\[3, 2\]"),
        (like((2, 3), jnp.float32), r"m: float32\[3, 2\], expected float32\[2, 3\]"),
        (like((3, 2), jnp.float32, sharding=split), r"divide .*:\n  - m: float32\[3, 2\] by Named"),
        (adapter(), "like is a dict that holds none of lora, opt_state, extra"),
        ({"lora": {"w": jnp.ones((16, 8))}}, "lora holds ArrayImpl at 'w'"),
    ):
        with pytest.raises(CheckpointError, match=text):
            checkpoint.restore(tmp_path, like=asked)


# In the background


def test_async_saves_what_was_there_at_the_call(tmp_path, monkeypatch):
    write, go = checkpoint._save.write_archive, threading.Event()
    monkeypatch.setattr(checkpoint._save, "write_archive", lambda *args: (go.wait(), write(*args)))
    lora, counts = adapter(3), np.arange(4)
    saving = save_async(tmp_path, 3, lora=lora, extra={"counts": counts})
    changed = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(lora)
    jax.block_until_ready(changed)
    counts[:] = -1
    assert not saving.done()
    assert not checkpoint.exists(tmp_path)
    go.set()
    saving.wait()
    assert saving.done()
    found = checkpoint.restore(tmp_path)
    assert (np.asarray(found.lora["w"].a) == 3).all()
    assert found.extra["counts"].tolist() == [0, 1, 2, 3]
    saving.wait()  # twice is no harm


def test_async_saves_to_one_path_come_one_after_the_other(tmp_path):
    for value in range(1, 6):
        saving = save_async(tmp_path, value)
    saving.wait()
    assert checkpoint.restore(tmp_path).step == 5
    save_async(tmp_path, 6)
    save(tmp_path, 7)
    assert checkpoint.restore(tmp_path).step == 7
    assert forms.orphans(tmp_path) == 0


@pytest.mark.parametrize("again", [save, save_async])
def test_a_failed_async_save_shows_at_wait_or_at_the_next_save(tmp_path, monkeypatch, again):
    save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space")))
        first = save_async(tmp_path, 2)
        with pytest.raises(CheckpointError, match="could not be written.*No space"):
            first.wait()
        with pytest.raises(CheckpointError, match="could not be written"):
            first.wait()
        lost = save_async(tmp_path, 3)
        lost._thread.join()
    elsewhere = tmp_path.parent / "elsewhere"
    save(elsewhere)  # another path is not concerned
    with pytest.raises(CheckpointError, match=r"an earlier save_async failed.*No space"):
        again(tmp_path, 4)
    assert checkpoint.restore(tmp_path).step == 1
    again(tmp_path, 5)  # said once
    save(tmp_path, 6)
    assert checkpoint.restore(tmp_path).step == 6


def test_async_refuses_at_the_call_what_save_refuses(tmp_path):
    for options in ({"lora": {"w": jnp.ones((2, 2))}}, {"step": 1.5}, {"opt_state": {"a": "text"}}):
        with pytest.raises(CheckpointError):
            save_async(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_program_that_ends_finishes_its_saves_and_tells_of_errors(tmp_path):
    code = (
        "import sys, time, numpy as np, lowrank_jax as lowrank\n"
        "from lowrank_jax import checkpoint\n"
        "write = checkpoint._save.write_archive\n"
        "checkpoint._save.write_archive = lambda *args: (time.sleep(0.3), write(*args))\n"
        "lora = {'w': lowrank.LowRank(np.ones((4, 2), 'f'), np.ones((2, 4), 'f'))}\n"
        "config = lowrank.LoraConfig(targets='w')\n"
        "for path in sys.argv[1:]:\n"
        "    checkpoint.save_async(path, lora=lora, config=config, step=7)\n"
        "raise SystemExit(0)"
    )
    (tmp_path / "file").write_text("")
    ended = run("-c", code, tmp_path / "file" / "below", tmp_path / "x")
    assert checkpoint.restore(tmp_path / "x").step == 7
    assert re.search(r"CheckpointError: .*file/below could not be written", ended.stderr)


def test_a_python_without_the_hook_ends_and_keeps_the_older_checkpoint(tmp_path):
    """What _background asks of `threading` is private: without it an error is told, no more."""
    code = (
        "import concurrent.futures.thread, sys, threading, time\n"
        "del threading._register_atexit\n"
        "import numpy as np, lowrank_jax as lowrank\n"
        "from lowrank_jax import checkpoint\n"
        "lora = {'w': lowrank.LowRank(np.ones((4, 2), 'f'), np.ones((2, 4), 'f'))}\n"
        "save = dict(lora=lora, config=lowrank.LoraConfig(targets='w'))\n"
        "checkpoint.save(sys.argv[1], **save, step=1)\n"
        "write = checkpoint._save.write_archive\n"
        "checkpoint._save.write_archive = lambda *args: (time.sleep(0.3), write(*args))\n"
        "checkpoint.save_async(sys.argv[1], **save, step=2)\n"
    )
    ended = run("-c", code, tmp_path)
    assert re.search(r"CheckpointError: .*could not be written; an older", ended.stderr)
    assert checkpoint.restore(tmp_path).step == 1


# What resumes


def test_extra_comes_back(tmp_path):
    extra = {"position": 12, "key": jax.random.key(3), "order": np.arange(5), "rate": 0.1}
    save(tmp_path, extra=extra)
    for found in (
        checkpoint.restore(tmp_path).extra,
        checkpoint.restore(tmp_path, like={"extra": extra}).extra,
    ):
        assert (found["position"], found["rate"]) == (12, 0.1)
        assert found["order"].tolist() == [0, 1, 2, 3, 4]
        assert found["key"].dtype == extra["key"].dtype
        np.testing.assert_array_equal(*map(jax.random.key_data, (found["key"], extra["key"])))
    with pytest.raises(CheckpointError, match=r"saved extra .*like.extra(.|\n)*rate: unexpected"):
        checkpoint.restore(tmp_path, like={"extra": {**extra, "rate": {"x": 1}}})
    save(tmp_path)
    assert checkpoint.restore(tmp_path).extra is None


MESHES = {"4x2": (4, 2), "2x4": (2, 4), "8x1": (8, 1)}
SPECS = {"w": PartitionSpec("x", "y"), "v": PartitionSpec(None, "y")}


@functools.cache
def dense():
    draw = np.random.default_rng(0).normal
    return {"w": draw(size=(16, 32)).astype("f"), "v": draw(size=(32, 8)).astype("f")}


def placed(tree, name):
    """A tree on a mesh, or on one device."""
    if name == "one":
        return jax.device_put(tree, jax.devices()[0])
    mesh = jax.make_mesh(MESHES[name], ("x", "y"))
    specs = lowrank.specs(tree, SPECS)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


@pytest.mark.parametrize("name", ["2x4", "8x1", "one"])
def test_a_mesh_gives_to_another(tmp_path, name):
    config = lowrank.LoraConfig(rank=8, targets=("w",), train=("v",))
    lora = jax.eval_shape(lambda: lowrank.init(jax.random.key(0), dense(), config)[1])
    lora = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), lora)
    checkpoint.save(tmp_path, lora=placed(lora, "4x2"), config=config)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed(lora, name)
    )
    found = checkpoint.restore(tmp_path, like={"lora": like}).lora
    for leaf, was, asked in zip(*map(jax.tree.leaves, (found, lora, like)), strict=True):
        assert leaf.sharding == asked.sharding
        assert np.asarray(leaf).tobytes() == np.asarray(was).tobytes()


@pytest.mark.parametrize("name", ["one", "4x2"])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, name):
    config = lowrank.LoraConfig(rank=8, targets=("w", "v"))
    base, lora = lowrank.init(jax.random.key(0), dense(), config)
    base, lora, tx = placed(base, name), placed(lora, name), optax.adam(1e-2)
    data = np.random.default_rng(1).normal(size=(6, 8, 16)).astype("f")
    model = lowrank.lift(lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"])

    @jax.jit
    def step(lora, state, key, x):
        key, own = jax.random.split(key)
        loss = lambda lora: jnp.mean(
            model(lowrank.combine(base, lora, dropout=0.3, key=own), x) ** 2
        )
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state, key

    def trained(lora, state, key, first, last):
        for x in data[first:last]:
            lora, state, key = step(lora, state, key, x)
        return lora, state, key

    start = (lora, tx.init(lora), jax.random.key(7))
    whole = trained(*start, 0, 6)
    half = trained(*start, 0, 3)
    checkpoint.save_async(
        tmp_path, lora=half[0], config=config, base=base, opt_state=half[1], step=3,
        extra={"key": half[2], "position": 3},
    ).wait()  # fmt: skip
    like = {"lora": half[0], "opt_state": half[1], "extra": {"key": half[2], "position": 0}}
    like = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        like,
    )
    found = checkpoint.restore(tmp_path, base=base, like=like)
    resumed = trained(found.lora, found.opt_state, found.extra["key"], found.extra["position"], 6)
    bits = lambda x: np.asarray(jax.random.key_data(x) if x.dtype == whole[2].dtype else x)
    for one, other in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        assert one.sharding == other.sharding
        assert bits(one).tobytes() == bits(other).tobytes()
    assert not np.array_equal(bits(jax.tree.leaves(half)[0]), bits(jax.tree.leaves(whole)[0]))


TWO = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import lowrank_jax as lowrank
from lowrank_jax import checkpoint

mesh = jax.make_mesh((2,), ("x",))
put = lambda x, spec: jax.make_array_from_callback(
    x.shape, NamedSharding(mesh, spec), lambda index: x[index]
)
values = np.arange(32, dtype=np.float32).reshape(16, 2)
lora = {"w": lowrank.LowRank(put(values, P("x")), put(values.T.copy(), P()))}
extra = {"keys": put(jax.random.split(jax.random.key(0), 2), P("x")), "position": 3}
config = lowrank.LoraConfig(rank=2, targets="w")
square = np.arange(256, dtype=np.float32).reshape(16, 16)
base, raw = {"w": put(square, P("x"))}, {"w": square}
assert lowrank.fingerprint(base) == lowrank.fingerprint(raw)
checkpoint.save(sys.argv[3], lora=lora, config=config, base=base, extra=extra)
found = checkpoint.restore(sys.argv[3], base=base, like={"lora": lora, "extra": extra})
for one, other in zip(jax.tree.leaves(found.lora), jax.tree.leaves(lora), strict=True):
    assert one.sharding == other.sharding
    for shard, was in zip(one.addressable_shards, other.addressable_shards, strict=True):
        assert (np.asarray(shard.data) == np.asarray(was.data)).all()
assert found.extra["keys"].sharding == extra["keys"].sharding
whole = checkpoint.restore(sys.argv[3])
assert (np.asarray(whole.lora["w"].a) == values).all()
try:
    checkpoint.save(sys.argv[3] + "/manifest.json", lora=lora, config=config)
except lowrank.CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        works = [pool.submit(run, "-c", TWO, port, own, tmp_path / "x") for own in range(2)]
        first, second = [work.result().stdout for work in works]
    assert "manifest.json could not be written" in first
    assert "process 0 could not write the checkpoint" in second
    assert forms.orphans(tmp_path / "x") == 0
