"""Nodes and configurations as text: short enough to be read, and never an array's values."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import P

import lowrank_jax as lowrank

PARAMS = {"mlp": {"kernel": jnp.full((64, 48), 0.12345), "bias": jnp.zeros(3)}}
KERNEL = "**/kernel"


def adapter(**options):
    config = lowrank.LoraConfig(**{"rank": 4, "targets": KERNEL, **options})
    return lowrank.init(jax.random.key(0), PARAMS, config)


def kernel(tree):
    return tree["mlp"]["kernel"]


def quantized():
    return kernel(lowrank.quantize(PARAMS, lowrank.QuantConfig(targets=KERNEL)))


# name -> (the value, its text)
TEXTS = {
    "LoRA": (
        lambda: kernel(adapter()[1]),
        "LowRank(shape=(64, 48), rank=4, scale=2.0, a=float32[64, 4], b=float32[4, 48])",
    ),
    "DoRA": (
        lambda: kernel(adapter(dora=True)[1]),
        "LowRank(shape=(64, 48), rank=4, scale=2.0, a=float32[64, 4], b=float32[4, 48], "
        "magnitude=float32[48])",
    ),
    "adapters stacked into one node": (
        lambda: kernel(lowrank.stack([adapter()[1]] * 3)),
        "LowRank(rank=4, scale=2.0, a=float32[3, 64, 4], b=float32[3, 4, 48])",
    ),
    "specs in place of arrays": (
        lambda: kernel(lowrank.specs(adapter()[1], {"mlp": {"kernel": P("x"), "bias": P()}})),
        "LowRank(scale=2.0, a=P('x', None), b=P(None, None))",
    ),
    "shapes in place of arrays": (
        lambda: kernel(jax.eval_shape(lambda: adapter()[1])),
        "LowRank(shape=(64, 48), rank=4, scale=2.0, a=float32[64, 4], b=float32[4, 48])",
    ),
    "combined": (
        lambda: kernel(lowrank.combine(*adapter())),
        "Adapted(base=float32[64, 48], delta=LowRank(shape=(64, 48), rank=4, scale=2.0, "
        "a=float32[64, 4], b=float32[4, 48]))",
    ),
    "quantized": (
        quantized,
        "Quantized(shape=(64, 48), format='nf4', block_size=64, packing='uint4', "
        "weight_dtype='float32', codes=uint4[1, 64, 48], scales=uint8[1, 48], nested=float32[1], "
        "offset=float32[])",
    ),
    "LoraConfig": (
        lambda: lowrank.LoraConfig(rank=8, targets=[KERNEL, re.compile("a.b")], alpha=3),
        "LoraConfig(rank=8, alpha=3, targets=('**/kernel', re.compile('a.b')))",
    ),
    "the default LoraConfig": (lowrank.LoraConfig, "LoraConfig()"),
    "QuantConfig": (lambda: lowrank.QuantConfig(format="int8"), "QuantConfig(format='int8')"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name):
    make, expected = TEXTS[name]
    assert repr(make()) == expected


def test_a_configuration_is_read_from_its_text():
    config = lowrank.LoraConfig(
        rank=8, targets="a/*", rank_pattern={"a/b": 2}, train=("x", "y"), extras={"bias": [1.0]}
    )
    assert eval(repr(config), {"LoraConfig": lowrank.LoraConfig}) == config


def test_nodes_are_short_in_a_tree():
    base, lora = adapter(train="**/bias")
    text = str(lora)
    assert text.count("\n") == 0
    assert "0.12" not in text + str(kernel(lowrank.combine(base, lora)))
    assert len(text) < 200


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_treescope_shows_what_the_text_shows():
    treescope = pytest.importorskip("treescope")  # Flax brings it
    text = treescope.render_to_text(lowrank.combine(*adapter()))
    for words in ("shape=(64, 48),", "rank=4,", "scale=2.0,", "a=<jax.Array float32(64, 4)"):
        assert words in text
    for words in ("fan_in", "folded", "base_modified", "HTML"):
        assert words not in text
    assert "trailing" not in treescope.render_to_text(quantized())
    config = treescope.render_to_text(lowrank.LoraConfig(rank=4, rank_pattern={KERNEL: 2}))
    assert config == "LoraConfig(rank=4, rank_pattern={'**/kernel': 2})"
