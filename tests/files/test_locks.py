"""Locks of folders: a second writer errs at once, and a fork keeps none."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import checkpoint
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
