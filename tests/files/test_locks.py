"""Locks of folders: one writer at a time, to the end of its process, and no fork keeps one."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import checkpoint
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.locks import lock_folder

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = lowrank.LoraConfig(rank=2, targets=("**/w",))


def adapter(value=1.0):
    full = lambda *shape: jnp.asarray(np.full(shape, value, np.float32))
    return {"w": lowrank.LowRank(full(16, 2), full(2, 8), scale=2.0)}


def save(directory, value=1.0, **options):
    options = {"lora": adapter(value), "config": CONFIG, "step": int(value), **options}
    return checkpoint.save(directory, **options)


def test_a_fork_does_not_keep_the_lock(tmp_path, monkeypatch):
    save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", lambda handle: None)  # a fork has its own copy of the handle
        with lock_folder(tmp_path):
            pass
    save(tmp_path, 2)


def test_one_holds_a_folder_at_a_time(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with lock_folder(one):
        with lock_folder(other):  # each folder has a lock of its own
            pass
        with pytest.raises(CheckpointError, match="another save is writing to"), lock_folder(one):
            pass
    with pytest.raises(KeyError), lock_folder(one):
        raise KeyError  # an error lets go too
    with lock_folder(one):
        pass


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lowrank_jax._files.locks import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError), lock_folder(tmp_path):
                pass
        finally:
            holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            pass
