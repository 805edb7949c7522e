"""The sharded example, in short: its losses are those of one device, and its base is split."""

import functools

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


def test_losses_are_those_of_one_device_also_after_a_restart(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(characters, "PRETRAINING_STEPS", 20)
    monkeypatch.setattr(characters, "pretrained", functools.cache(characters.pretrained))
    flags = ["--steps", "4", "--checkpoint", str(tmp_path / "adapter")]
    base, lora, losses, alone = sharded.main(["--mesh", "2x4", *flags])
    np.testing.assert_allclose([losses[number] for number in (1, 2, 3, 4)], alone, rtol=1e-4)
    assert all(leaf.any() for leaf in jax.tree.leaves(lora))
    pieces = lambda leaf: leaf.size // leaf.addressable_shards[0].data.size
    kernel = base["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.format, pieces(kernel.codes), pieces(kernel.scales)) == ("nf4", 8, 8)
    assert pieces(base["params"]["embed_tokens"]["embedding"]) == 8
    assert lora["params"]["layers"]["mlp"]["up_proj"]["kernel"].a.sharding.spec[1] == "data"
    printed = capsys.readouterr().out
    assert "on one device" in printed
    assert "step   4: loss" in printed
    flags[1] = "5"
    _, _, more, alone = sharded.main(["--mesh", "4x2", *flags])
    assert [*more] == [5]
    np.testing.assert_allclose(more[5], alone[4], rtol=1e-4)
    assert "going on from step 4" in capsys.readouterr().out
