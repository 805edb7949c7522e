"""What a checkpoint costs: nothing is copied twice, and hashing goes on while Orbax writes."""

import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import lowrank_jax as lowrank
from lowrank_jax import checkpoint
from lowrank_jax.checkpoint import _archive

CONFIG = lowrank.LoraConfig(rank=2)


def adapter(count, rows=1024):
    node = lambda i: lowrank.LowRank(jnp.full((rows, 2), i), jnp.full((2, 8), -1.0))
    return {f"w{i}": node(float(i)) for i in range(count)}


def test_restoring_keeps_few_arrays_on_the_host(tmp_path, monkeypatch):
    lora = adapter(12, rows=1 << 20)  # 8 MiB each
    checkpoint.save(tmp_path / "x", lora=lora, config=CONFIG)
    alive, build_leaf = weakref.WeakValueDictionary(), checkpoint._restore.build_leaf
    most = 0

    def counted(entry, array, sharding):
        nonlocal most
        alive[entry.name] = array
        most = max(most, len(alive))
        return build_leaf(entry, array, sharding)

    monkeypatch.setattr(checkpoint._restore, "build_leaf", counted)
    found = checkpoint.restore(tmp_path / "x").lora
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), found, lora))
    assert most <= 2


def test_jax_takes_arrays_where_it_copies_them_once(tmp_path, monkeypatch):
    lora = adapter(12, rows=1 << 16)
    extra = {"half": jnp.ones((3, 5), jnp.bfloat16), "bits": np.ones(7, bool), "one": jnp.ones(())}
    checkpoint.save(tmp_path / "x", lora=lora, config=CONFIG, extra=extra)
    taken, make = [], jnp.array

    def watched(value, *args, **kwargs):
        if isinstance(value, np.ndarray):
            taken.append(value.ctypes.data)
        return make(value, *args, **kwargs)

    monkeypatch.setattr(jnp, "array", watched)
    found = checkpoint.restore(tmp_path / "x", like={"lora": lora, "extra": extra})
    monkeypatch.undo()
    assert len(taken) >= 24
    assert not any(address % 64 for address in taken)
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())
    assert jax.tree.all(jax.tree.map(same, (found.lora, found.extra), (lora, extra)))


def test_arrays_are_hashed_while_orbax_writes(tmp_path, monkeypatch):
    hashing, sha256, save = threading.Event(), _archive.sha256, ocp.Checkpointer.save
    monkeypatch.setattr(_archive, "sha256", lambda array: (hashing.set(), sha256(array))[1])

    def late(*args, **kwargs):
        assert hashing.wait(10), "Orbax writes, and nothing is hashed"
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", late)
    checkpoint.save(tmp_path / "x", lora=adapter(2), config=CONFIG)


def test_orbax_copies_no_array(tmp_path, monkeypatch):
    def refuse(array, memo):
        raise AssertionError("an array was copied")

    class Array(np.ndarray):
        __deepcopy__ = refuse

    write = checkpoint._save.write_archive
    views = lambda arrays: {name: array.view(Array) for name, array in arrays.items()}
    monkeypatch.setattr(
        checkpoint._save,
        "write_archive",
        lambda path, body, arrays: write(path, body, views(arrays)),
    )
    checkpoint.save(tmp_path / "x", lora=adapter(2), config=CONFIG)


def test_small_and_large_arrays_are_restored_in_parts(tmp_path):
    size = 1 << 22
    extra = {"many": [np.full(3, i) for i in range(50)], "none": np.zeros((0, 3), np.float32)}
    extra |= {f"big{i}": jnp.arange(size, dtype=jnp.float32) + i for i in range(3)}
    checkpoint.save(tmp_path / "x", lora=adapter(3), config=CONFIG, extra=extra)
    found = checkpoint.restore(tmp_path / "x", like={"extra": extra}).extra
    assert jax.tree.all(jax.tree.map(np.array_equal, found, extra))
