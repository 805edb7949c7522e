"""A saved checkpoint, and a copy of it for each test."""

import shutil
from pathlib import Path

import optax
import pytest
from checkpoints import linen_base, made

from lowrank_jax import checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    lora, config = made(linen_base())
    state = optax.adamw(1e-3).init(lora)
    checkpoint.save(path, lora=lora, config=config, base=linen_base(), opt_state=state, step=1)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))
