"""The sharded example, in short: its losses are those of one device, and its base is split."""

import jax
import numpy as np
import pytest

pytest.importorskip("rich")

import characters
import sharded

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]


def test_losses_are_those_of_one_device(monkeypatch, capsys):
    monkeypatch.setattr(characters, "PRETRAINING_STEPS", 20)
    base, lora, losses, alone = sharded.main(["--mesh", "2x4", "--steps", "4"])
    assert len(losses) == 4
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    assert all(leaf.any() for leaf in jax.tree.leaves(lora))
    pieces = {
        leaf.addressable_shards[0].data.size * 8 / leaf.size for leaf in jax.tree.leaves(base)
    }
    assert pieces == {1.0, 8.0}  # every kernel and the table in eight; norms whole
    kernel = lora["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.a.sharding.spec == jax.P(None, "data", None)
    printed = capsys.readouterr().out
    assert "on one device" in printed
    assert "step   4: loss" in printed
