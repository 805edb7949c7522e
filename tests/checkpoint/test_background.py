"""Asynchronous saves: what is saved, in which order, and where errors are raised."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint

pytestmark = pytest.mark.usefixtures("fast_compile")
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
