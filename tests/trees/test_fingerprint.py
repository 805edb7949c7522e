"""Fingerprints are of content, not of form, and of arrays with values alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import linen_base, made
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax import TreeError
from lowrank_jax._trees.fingerprint import Fingerprint, fingerprint

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_fingerprint_is_of_content_not_of_form():
    tree = {
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "codes": jnp.arange(4).astype(jnp.uint4),
        "count": jnp.array(3),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 2)),
    }
    found = fingerprint(tree)
    assert [leaf[:3] for leaf in found.leaves] == [
        ("codes", (4,), "uint4"),
        ("count", (), "int32"),
        ("empty", (0, 2), "float32"),
        ("half", (2, 3), "bfloat16"),
        ("key", (2,), "uint32"),
    ]
    assert found == fingerprint(dict(reversed(tree.items())))
    hosted = {
        name: np.asarray(leaf, order="F") if name != "key" else leaf for name, leaf in tree.items()
    }
    assert found == fingerprint(hosted)
    assert found == Fingerprint.from_dict(json.loads(json.dumps(found.to_dict())))
    assert hash(found) == hash(fingerprint(tree))
    assert len(repr(found)) < 60
    for name, other in (
        ("half", tree["half"].at[0, 0].set(-0.0)),  # 0.0 before: equal, and of other bytes
        ("half", tree["half"].T),
        ("count", tree["count"].astype(jnp.int8)),
        ("key", jax.random.key(1)),
    ):
        changed = fingerprint({**tree, name: other})
        assert changed != found
        assert [line.split(":")[0] for line in found.differences(changed)] == [name]
    renamed = fingerprint({"x": tree["half"], **{k: v for k, v in tree.items() if k != "half"}})
    assert [line[:16] for line in found.differences(renamed)] == [
        "half: missing, e",
        "x: unexpected, b",
    ]


def test_fingerprint_of_sharded_leaves():
    value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    count = len(jax.devices())
    split = NamedSharding(jax.make_mesh((count,), ("x",)), PartitionSpec(None, "x"))
    leaf = jax.device_put(value, split)
    assert fingerprint([value]) == fingerprint([leaf])
    whole = jax.device_put(value, NamedSharding(split.mesh, PartitionSpec()))
    assert fingerprint([value]) == fingerprint([whole])


def test_fingerprint_refuses_what_has_no_values():
    lora, _ = made(linen_base())
    gone = jnp.ones(3)
    gone.delete()
    for bad, text in (
        ("text", "is str"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "is ShapeDtypeStruct"),
        (gone, "deleted"),
        (lora, "has one: pass the base from before combine"),
    ):
        with pytest.raises(TreeError, match=text):
            fingerprint({"leaf": bad})
    with pytest.raises(TreeError, match="no values to read"):
        jax.jit(lambda x: fingerprint([x]))(1.0)
