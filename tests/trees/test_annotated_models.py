"""Models whose authors named their axes, in the manner of others, run sharded as they come."""

import functools
import re

import annotated_models as models
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import NamedSharding, P
from models import noisy

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

TOKENS = np.random.default_rng(0).integers(0, models.VOCAB, (8, 6))
COMMON = {"vocab": "tp", "embed": "fsdp", "mlp": "tp"}
RULES = {
    "boxes": COMMON | {"kv": "tp"},
    "scan": COMMON | {"heads": "tp", "kv": None, "norm": None, "layers": None},
    "variables": None,
}


def annotated(kind):
    """Return the function, its parameters, and what carries the annotations."""
    if kind == "variables":
        with nnx.use_eager_sharding(False):
            model = nnx.eval_shape(lambda: models.NnxLlama(nnx.Rngs(0)))
        graph, state = nnx.split(model)
        shapes = nnx.to_pure_dict(state)
        run = lambda params, tokens: nnx.merge(graph, with_values(state, params))(tokens)
        return run, fill(shapes), state
    module = models.BoxedTransformer() if kind == "boxes" else models.ScannedTransformer()
    boxed = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    return module.apply, fill(nn.unbox(boxed)), boxed


def with_values(state, params):
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return state


def fill(shapes):
    return noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def loss(logits):
    return jnp.square(jax.nn.log_softmax(logits)).mean()


@functools.cache
def one_device(kind, quantized, dora):
    """Function, annotations, base, adapter, and on one device the loss and the gradient."""
    fn, params, annotations = annotated(kind)
    plan = lowrank.plan(fn, params, TOKENS)
    if quantized:
        quant = lowrank.QuantConfig(block_size=32, packing="uint8")
        params = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=3, alpha=5, dora=dora)
    base, lora = jax.jit(lambda p: lowrank.init(0, p, config, plan=plan))(params)
    lora = noisy(lora)
    merged = lambda lora: loss(fn(lowrank.merge(base, lora), TOKENS))
    return fn, annotations, base, lora, jax.jit(jax.value_and_grad(merged))(lora)


SHORT = [("boxes", False, False)]  # quantized, DoRA; test_annotations.py has a scan
CASES = [(kind, *rest) for kind in RULES for rest in [(False, False), (True, False), (True, True)]]


@pytest.mark.parametrize(
    ("kind", "quantized", "dora"),
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow) for case in CASES],
)
def test_annotations_are_all_that_is_needed(kind, quantized, dora):
    fn, annotations, base, lora, want = one_device(kind, quantized, dora)
    # the second name of [heads, kv, embed] would split a block of NF4
    rules = RULES[kind] | {"kv": None} if kind == "boxes" and quantized else RULES[kind]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(tree):
        specs = lowrank.specs(tree, annotations, rules=rules)
        named = lambda spec: NamedSharding(mesh, spec)
        is_spec = lambda leaf: isinstance(leaf, P)
        return jax.device_put(jax.device_get(tree), jax.tree.map(named, specs, is_leaf=is_spec))

    base, lora = place(base), place(lora)
    for leaf in jax.tree.leaves(base):
        if leaf.size >= models.DIM * models.HIDDEN // 2:  # codes too, two in a byte
            wanted = leaf.size // (8 if kind != "boxes" or leaf.ndim == 2 else 4)
            assert leaf.addressable_shards[0].data.size <= wanted, leaf.shape
    step = lambda lora, base, tokens: loss(
        lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), tokens)
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules([*(rules or {}).items(), ("batch", "fsdp")]):
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("fsdp")))
        got = jax.jit(jax.value_and_grad(step))(lora, base, tokens)
    scale = lambda leaf: np.asarray(leaf) / np.abs(leaf).max()
    chex.assert_trees_all_close(*(jax.tree.map(scale, tree) for tree in (got, want)), atol=3e-5)


def find_copies(compiled, size):
    """Instructions that make an array of so many elements of the numbers of others."""
    found = re.findall(
        r"= \w+\[([\d,]+)\]\S* (copy|concatenate|transpose|pad)\((.*)", compiled.as_text()
    )
    count = lambda shape: np.prod([int(n) for n in shape.split(",")])
    # a gradient begins as a copy of zeros
    return [name for shape, name, of in found if count(shape) == size and "broadcast" not in of]


@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_adapters_of_scanned_layers_are_not_restacked_nor_is_the_base(axis):
    """A stack along another axis than the first is transposed by Linen's scan itself, once."""
    module = models.ScannedTransformer(axis=axis, layers=5)
    params = fill(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), TOKENS)))
    plan = lowrank.plan(module.apply, params, TOKENS)
    base, lora = lowrank.init(0, params, lowrank.LoraConfig(rank=3), plan=plan)
    lifted = lowrank.lift(module.apply, fallback="raise")
    live = lambda lora, base: loss(lifted(lowrank.combine(base, lora), TOKENS))
    # the model's own step, its layers frozen
    plain = lambda table, rest: loss(
        module.apply({"params": {**rest["params"], "table": table}}, TOKENS)
    )
    programs = [
        jax.jit(jax.grad(fn)).lower(*args).compile()
        for fn, args in [(live, (lora, base)), (plain, (params["params"]["table"], params))]
    ]
    stacks = jax.tree.leaves(params["params"]["layers"])
    for size in {leaf.size for leaf in stacks if leaf.ndim > 2}:
        mine, own = (find_copies(program, size) for program in programs)
        assert len(mine) <= len(own)
        assert axis or not mine
    for leaf in jax.tree.leaves(lora["params"]["layers"]):
        assert axis or not find_copies(programs[0], leaf.size)
    mine, own = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert mine < own + min(leaf.nbytes for leaf in stacks if leaf.ndim > 2)
