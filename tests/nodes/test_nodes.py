"""Nodes are pytrees: each goes wherever an array goes, and has arrays alone as leaves."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax._nodes import is_node
from lowrank_jax._nodes.serialization import Node
from lowrank_jax._training.states import Coded
from lowrank_jax.checkpoint import _archive

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"w": normal(3, 64, 8), "table": normal(9, 64), "g": normal(8)}
CONFIGS = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "LoHa": {"method": "loha"},
    "VeRA": {"method": "vera", "projection_seed": 5},
    "(IA)^3": {"method": "ia3"},
    "(IA)^3 on a table": {"method": "ia3", "targets": "table"},
    "rows": {"train_rows": {"table": [7, 1]}},
    "whole": {"train": "g"},
    "whole, bfloat16": {"train": "g"},
}
QUANTS = {
    "nf4": lowrank.QuantConfig(targets="w"),
    "nf4, uint8": lowrank.QuantConfig(packing="uint8", double_quant=False, targets="w"),
    "fp4": lowrank.QuantConfig(format="fp4", targets="w"),
    "int8": lowrank.QuantConfig(format="int8", targets="w"),
    "kept flat": lowrank.QuantConfig(targets="w"),
}


def plan_of(params):
    layer = lambda x, w: (jnp.tanh(x @ w) @ w.T, None)
    fn = lambda p, x: (jax.lax.scan(layer, x, p["w"])[0], p["table"][jnp.array([0])], p["g"] * 2)
    return lowrank.plan(fn, params, np.ones((2, params["w"].shape[1]), params["w"].dtype))


@functools.cache
def adapters():
    """name -> (base, lora, config) of every kind of adapter."""
    made = {}
    for name, options in CONFIGS.items():
        params = PARAMS
        if name.endswith("bfloat16"):
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
        config = lowrank.LoraConfig(**{"rank": 2, "targets": "w", **options})
        base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan_of(params))
        made[name] = base, noisy(lora), config
    base, lora, config = made["DoRA"]
    made["DoRA, folded"] = base, lowrank.fold_norms(base, lora), config
    return made


@functools.cache
def trees():
    """name -> a tree with nodes of every kind."""
    found = {name: lora for name, (_, lora, _) in adapters().items()}
    found["normed"] = adapters()["DoRA"][0]
    for name, quant in QUANTS.items():
        params = {**PARAMS, "w": PARAMS["w"][:, : 63 if name == "kept flat" else 64]}
        found[name] = lowrank.quantize(params, quant, plan=plan_of(params))
    base, lora, _ = adapters()["DoRA"]
    found["combined"] = lowrank.combine(base, lora, scale=0.5, dropout=0.1, key=jax.random.key(1))
    config = lowrank.LoraConfig(rank=2, targets="w")
    coded = lowrank.init(jax.random.key(0), found["nf4"], config, plan=plan_of(PARAMS))
    found["combined, coded"] = lowrank.combine(*coded)
    tx = lowrank.quantize_state(optax.adam(1e-3), min_size=16)
    found["optimizer state in codes"] = tx.init(adapters()["LoRA"][1])
    return found


key_dtype = jax.random.key(0).dtype


def assert_same(tree, wanted):
    """Of one structure, static fields included, and equal to the bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


NAMES = [
    *CONFIGS, "DoRA, folded", "normed", *QUANTS, "combined", "combined, coded",
    "optimizer state in codes",
]  # fmt: skip


def test_every_node_is_among_the_trees():
    kinds = {
        type(part)
        for tree in trees().values()
        for node in jax.tree.leaves(tree, is_leaf=is_node)
        for part in (node, getattr(node, "delta", None), getattr(node, "base", None))
    }
    coded = trees()["optimizer state in codes"]
    kinds |= {type(x) for x in jax.tree.leaves(coded, is_leaf=lambda x: isinstance(x, Coded))}
    assert set(NAMES) == trees().keys()
    own = [kind for kind in subclasses(Node) if kind.__module__.startswith("lowrank_jax.")]
    assert len(own) > 8
    assert {*filter(dataclasses.is_dataclass, own)} <= kinds


def subclasses(kind):
    found = kind.__subclasses__()
    return found + [below for one in found for below in subclasses(one)]


@pytest.mark.parametrize("name", NAMES)
def test_every_array_of_a_node_is_real(name):
    tree = trees()[name]
    for leaf in jax.tree.leaves(tree):
        assert isinstance(leaf, jax.Array)
        assert leaf.size
    assert_same(jax.tree.map(lambda x: x, tree), tree)
    assert_same(pickle.loads(pickle.dumps(tree)), tree)
    assert_same(copy.deepcopy(tree), tree)


@pytest.mark.parametrize("name", NAMES)
def test_donation(name):
    tree = trees()[name]
    given = jax.tree.map(lambda x: x.copy(), tree)
    assert_same(jax.jit(lambda tree: tree, donate_argnums=0)(given), tree)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("name", NAMES)
def test_flax_serialization(name):
    tree = trees()[name]
    state = flax.serialization.to_state_dict(tree)
    assert all(not is_node(leaf) for leaf in jax.tree.leaves(state, is_leaf=is_node))
    empty = jax.tree.map(lambda x: x if x.dtype == key_dtype else jnp.zeros_like(x), tree)
    assert_same(flax.serialization.from_state_dict(empty, state), tree)
    assert_same(flax.serialization.from_bytes(empty, flax.serialization.to_bytes(tree)), tree)


@pytest.mark.parametrize("name", NAMES)
def test_plain_orbax(name, tmp_path):
    tree = trees()[name]
    packed = any(leaf.dtype == jnp.uint4 for leaf in jax.tree.leaves(tree))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        if packed:  # Orbax has no such array, in a node or by itself: packing="uint8" is for it
            with pytest.raises(ValueError, match="uint4"):
                checkpointer.save(tmp_path / "bare", {"w": jnp.zeros(4, jnp.uint4)})
                checkpointer.wait_until_finished()
            return
        checkpointer.save(tmp_path / "standard", tree)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "standard", abstract), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        assert_same(checkpointer.restore(tmp_path / "tree", item=tree), tree)


@pytest.mark.parametrize("name", NAMES)
def test_own_checkpoint(name, tmp_path):
    tree, (_, plain, config) = trees()[name], adapters()["LoRA"]
    save, restore = lowrank.checkpoint.save, lowrank.checkpoint.restore
    save(tmp_path / "extra", lora=plain, config=config, extra=tree)
    assert_same(restore(tmp_path / "extra", like={"extra": tree}).extra, tree)
    if name not in adapters():
        return
    base, lora, config = adapters()[name]
    state = optax.adam(1e-3).init(lora)
    save(tmp_path / "lora", lora=lora, config=config, base=base, opt_state=state)
    found = restore(tmp_path / "lora", base=base, like={"opt_state": state})
    assert_same((found.lora, found.opt_state), (lora, state))
    like = jax.eval_shape(lambda: lora)
    assert_same(restore(tmp_path / "lora", like={"lora": like}).lora, lora)


@pytest.mark.parametrize("name", [*CONFIGS, "DoRA, folded"])
def test_an_adapter_is_used_by_what_merge_says(name):
    """Every kind of adapter, after it went through bytes, is the same function."""
    base, lora, _ = adapters()[name]
    fn = lambda p, x: jnp.tanh(x @ p["w"][1]) * p["g"] + jnp.sum(p["table"][jnp.array([1, 4])])
    again = flax.serialization.from_bytes(lora, flax.serialization.to_bytes(lora))
    x = np.asarray(normal(3, 64)).astype(base["g"].dtype)
    live, dense = jax.jit(
        lambda base, lora: (
            lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x),
            fn(lowrank.merge(base, lora), x),
        )
    )(base, again)
    assert live.dtype == dense.dtype
    live, dense = (np.asarray(x, np.float32) for x in (live, dense))
    np.testing.assert_allclose(live, dense, rtol=1e-5 if again["g"] is None else 1e-2, atol=1e-5)


def test_a_train_state_is_saved_and_goes_on():
    _, lora, _ = adapters()["rows"]
    tx, full = optax.adam(1e-2), lowrank.Full(jnp.ones(3), "bfloat16")
    make = lambda lora: TrainState.create(apply_fn=None, params={**lora, "g": full}, tx=tx)
    state = make(lora)
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params))  # any gradient will do
    state = step(state)
    data = flax.serialization.to_bytes(state)
    found = flax.serialization.from_bytes(make(jax.tree.map(jnp.zeros_like, lora)), data)
    assert_same(found, state)
    assert_same(step(found), step(state))


def test_flax_refuses_the_state_of_another_kind_of_node():
    dora, lora = (adapters()[name][1] for name in ("DoRA", "LoRA"))
    state = flax.serialization.to_state_dict(dora)
    with pytest.raises(ValueError, match=r"LowRank with the arrays .* at \./w: make the target"):
        flax.serialization.from_state_dict(lora, state)


def test_flax_may_be_imported_after_the_library():
    """The core does not import Flax, and Flax knows the nodes that are made from then on."""
    code = """
import lowrank_jax as lowrank, jax, jax.numpy as jnp, sys
base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((4, 3)), "g": jnp.ones(3)},
                          lowrank.LoraConfig(rank=2, targets="w", train="g"))
assert "flax" not in sys.modules
from flax import serialization
for tree in (lowrank.combine(base, lora), jax.tree.map(lambda x: x, lora), lowrank.Full(1.0)):
    serialization.from_bytes(tree, serialization.to_bytes(tree))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_checkpoints_of_older_releases_come_back_as_the_nodes_of_today(tmp_path):
    """(IA)^3 was a LowRank of rank 0, and a Full leaf said nothing of the leaf's dtype."""
    params = {"w": PARAMS["w"], "g": PARAMS["g"]}
    config = lowrank.LoraConfig(rank=2, method="ia3", targets="w", train="g")
    base, fresh = lowrank.init(jax.random.key(0), params, config, plan=plan_of_two(params))
    lora = noisy(fresh)
    node = lora["w"]
    empty = jnp.zeros((3, 64, 0)), jnp.zeros((3, 0, 8))
    static = {name: getattr(node, name) for name in ("fan_in", "fan_out", "stack", "kind", "scale")}
    old = {
        "w": lowrank.LowRank(*empty, node.magnitude, **static, folded=True),
        "g": lowrank.Full(lora["g"].value),
    }
    tx = optax.adam(1e-3)
    lowrank.checkpoint.save(tmp_path, lora=old, config=config, base=base, opt_state=tx.init(old))
    like = {"lora": lora, "opt_state": tx.init(lora)}
    found = lowrank.checkpoint.restore(tmp_path, base=base, like=like)
    assert_same((found.lora, found.opt_state), (lora, tx.init(lora)))
    alone = lowrank.checkpoint.restore(tmp_path, base=base).lora
    assert_same(alone, {"w": node, "g": old["g"]})


def test_a_field_that_an_older_release_named_otherwise_is_read(tmp_path):
    """`base_modified` was `moved`, in the manifest of a checkpoint and in a pickle."""
    config = lowrank.LoraConfig(rank=2, targets="w")
    params = {"w": normal(8, 6)}
    base, lora = lowrank.init(jax.random.key(0), params, config, initializer="pissa")
    assert lora["w"].base_modified
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config, base=base)
    manifest = tmp_path / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["sha256"]
    fields = body["lora"][0]["static"]
    assert "moved" not in fields
    fields["moved"] = fields.pop("base_modified")
    manifest.write_bytes(_archive.serialize_manifest(body))
    assert_same(lowrank.checkpoint.restore(tmp_path, base=base).lora, lora)

    fields["base_modified"] = False
    manifest.write_bytes(_archive.serialize_manifest(body))
    with pytest.raises(lowrank.CheckpointError, match=r"LowRank with \['moved'\], unknown"):
        lowrank.checkpoint.restore(tmp_path, base=base)

    older = copy.copy(lora["w"])
    vars(older)["moved"] = vars(older).pop("base_modified")
    assert_same(pickle.loads(pickle.dumps(older)), lora["w"])


def plan_of_two(params):
    layer = lambda x, w: (jnp.tanh(x @ w) @ w.T, None)
    fn = lambda p, x: (jax.lax.scan(layer, x, p["w"])[0], p["g"] * 2)
    return lowrank.plan(fn, params, np.ones((2, 64), np.float32))
