"""Entries of a manifest: fields and nodes that fit, each array of one leaf."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint
from lowrank_jax.checkpoint import _archive

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = lowrank.LoraConfig(rank=2, targets=("**/w",))


def adapter(value=1.0):
    full = lambda *shape: jnp.asarray(np.full(shape, value, np.float32))
    return {"w": lowrank.LowRank(full(16, 2), full(2, 8), scale=2.0)}


def save(directory, value=1.0, **options):
    options = {"lora": adapter(value), "config": CONFIG, "step": int(value), **options}
    return checkpoint.save(directory, **options)


def edit(directory, change):
    """Change a manifest's body, and make its own hash right again."""
    body = json.loads((directory / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    (directory / "manifest.json").write_bytes(_archive.serialize_manifest(body))


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
