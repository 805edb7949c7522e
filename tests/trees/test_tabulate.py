"""tabulate: what it says of each leaf, for every kind of tree."""

import re

import jax
import jax.numpy as jnp

import lowrank_jax as lowrank

KERNEL = "**/kernel"
PARAMS = {
    f"layers_{i}": {"kernel": jnp.ones((64, 32), jnp.bfloat16), "bias": jnp.zeros(32)}
    for i in range(3)
} | {"count": jnp.zeros((), jnp.int32), "rate": 0.1}


def adapter(**options):
    config = lowrank.LoraConfig(**{"rank": 4, "targets": KERNEL, **options})
    return lowrank.init(jax.random.key(0), PARAMS, config)


def test_each_kind_of_leaf_is_named():
    quant = lowrank.QuantConfig(targets="layers_0/kernel")
    frozen = lowrank.quantize(PARAMS, quant)
    base, lora = lowrank.init(
        jax.random.key(0),
        frozen,
        lowrank.LoraConfig(rank=4, targets=KERNEL, dora=True, train="layers_1/bias"),
    )
    told = lowrank.tabulate(lowrank.combine(base, lora))
    assert dict(told) == {
        "count": "int32",
        "layers_0/bias": "float32",
        "layers_0/kernel": "DoRA r=4 s=2 on nf4",
        "layers_1/bias": "trained whole on float32",
        "layers_1/kernel": "DoRA r=4 s=2 on bfloat16",
        "layers_2/bias": "float32",
        "layers_2/kernel": "DoRA r=4 s=2 on bfloat16",
    }
    assert dict(lowrank.tabulate(base))["layers_0/kernel"] == "nf4"
    assert dict(lowrank.tabulate(lora))["layers_1/bias"] == "trained whole"


def test_the_table_counts_bytes_and_joins_layers():
    base, lora = adapter()
    rows = str(lowrank.tabulate(lora)).splitlines()[2:]
    assert [re.split(r" {2,}", row) for row in rows] == [
        ["layers_{0..2}/kernel", "64×32", "LoRA r=4 s=2", "4.50 KiB"]
    ]
    text = str(lowrank.tabulate(lowrank.combine(base, lora)))
    assert re.search(r"layers_{0\.\.2}/kernel +64×32 +LoRA r=4 s=2 on bfloat16 +16.50 KiB", text)
    assert "scalar" in text
    assert "<td" in lowrank.tabulate(base)._repr_html_()


def test_shapes_stacks_and_traced_trees_are_described():
    base, lora = adapter()
    shapes = jax.eval_shape(lambda: adapter()[1])
    assert dict(lowrank.tabulate(shapes)) == dict(lowrank.tabulate(lora))
    assert "3 adapters" in str(lowrank.tabulate(lowrank.stack([lora] * 3)))
    seen = []
    arrays = {name: leaf for name, leaf in base.items() if name != "rate"}
    jax.jit(lambda tree: seen.append(str(lowrank.tabulate(tree))))(arrays)
    assert seen == [str(lowrank.tabulate(arrays))]
