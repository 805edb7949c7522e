"""Shapes of quantized weights, computed without a trace, are those that decoding gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax._nodes.quantized import quantize_array
from lowrank_jax._operators.quantized import QuantizedWeight

# name -> shape, fan-in, stack, options
LEAVES = {
    "last axis": ((6, 64), (1,), (), {}),
    "codes in bytes": ((64, 6), (0,), (), {"packing": "uint8"}),
    "int8, a run of two axes": ((3, 4, 16, 5), (1, 2), (0,), {"format": "int8"}),
    "kept flat": ((2, 3, 7, 5), (1, 2), (0,), {"double_quant": False}),
    "kept flat, in bytes": ((6, 5, 7), (0,), (), {"packing": "uint8"}),
    "a stack behind": ((32, 3, 4), (0,), (1,), {}),
}
AFTER = {
    "nothing": lambda w: w,
    "cast": lambda w: w.astype(jnp.bfloat16),
    "transposed": lambda w: w.transpose(tuple(reversed(range(w.ndim)))),
    "reshaped": lambda w: w.reshape((w.shape[0], 1, *w.shape[1:])),
    "mixed": lambda w: w.reshape((*w.shape[2:], w.shape[1], w.shape[0])),
    "new axes": lambda w: w.broadcast((1, *w.shape, 1), tuple(range(1, w.ndim + 1)), None),
    "repeated": lambda w: w._transform_decoded(
        "broadcast", (3, *w.shape), tuple(range(1, w.ndim + 1))
    ),
    "sliced": lambda w: w.slice((1,) * w.ndim, w.shape, (2,) * w.ndim),
    "reversed": lambda w: w.rev(tuple(range(w.ndim))),
}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("first", AFTER)
def test_a_shape_is_that_of_the_decoded_weight(name, first):
    shape, fan_in, stack, options = LEAVES[name]
    encode = lambda leaf: quantize_array(leaf, fan_in, stack, block_size=32, **options)
    node = jax.eval_shape(encode, jax.ShapeDtypeStruct(shape, jnp.float32))

    def weights(node):
        weight = QuantizedWeight.of(node, "w")
        assert weight.shape == shape
        weight = AFTER[first](weight)
        for then in AFTER.values():
            yield then(weight)

    def check(node):
        for weight in weights(node):
            decode, parts, _ = weight.decoder
            assert decode.infer_shape(parts[0].shape) == jax.eval_shape(decode, *parts).shape
            assert weight.shape == jax.eval_shape(weight.materialize).shape
            assert weight.ndim == len(weight.shape)

    jax.eval_shape(check, node)


def test_an_entry_of_a_stack_whose_axis_is_not_the_first_of_codes():
    shape, fan_in, stack, options = LEAVES["a stack behind"]
    node = quantize_array(jnp.ones(shape), fan_in, stack, block_size=32, **options)
    weight = QuantizedWeight.of(node, "w").transpose((1, 0, 2))
    numbers, rebuild = weight.unstack()
    entry = rebuild(numbers[1])
    assert entry.selections
    assert entry.shape == entry.materialize().shape == (32, 4)
