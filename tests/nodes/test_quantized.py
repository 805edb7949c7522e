"""Quantized nodes: any layout holds the numbers of the flat order; bits for each parameter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_reference import decoded

import lowrank_jax as lowrank
from lowrank_jax._codecs import host, scales

pytestmark = pytest.mark.usefixtures("fast_compile")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


SHAPES = {  # shape, fan-in, stack
    "dense": ((128, 24), (0,), ()),
    "kernel of heads": ((128, 4, 3), (0,), ()),
    "scanned": ((3, 128, 5), (1,), (0,)),
    "scanned, out of heads": ((2, 4, 32, 10), (1, 2), (0,)),
    "transposed": ((24, 128), (1,), ()),
    "heads of whole blocks": ((2, 3, 64, 5), (1, 2), (0,)),
    "convolution": ((3, 3, 64, 8), (0, 1, 2), ()),
    "ragged": ((5, 30), (0,), ()),
    "ragged, scanned": ((2, 5, 30), (1,), (0,)),
    "ragged convolution": ((3, 3, 3, 8), (0, 1, 2), ()),
    "many second-level blocks": ((256, 300), (0,), ()),
}


def reference(weight, fan_in, stack, format, double):
    """Flatten to [out, in], encode in torch's order, decode, and put the axes back; in NumPy."""
    if stack:
        inner = tuple(axis - 1 for axis in fan_in)
        return np.stack([reference(w, inner, (), format, double) for w in weight])
    order = (*(axis for axis in range(weight.ndim) if axis not in fan_in), *fan_in)
    torch = np.transpose(weight, order)
    codes, absmax = host.encode_flat(torch.reshape(-1), format, 64)
    if double:
        eighths, nested, offset = host.encode_scales(absmax)
        absmax = scales.DYNAMIC_MAP[eighths] * np.repeat(nested, 256)[: absmax.size] + offset
    flat = decoded(codes.reshape(-1, 64), absmax, format).reshape(-1)[: weight.size]
    return np.transpose(flat.reshape(torch.shape), np.argsort(order))


# every layout with scales that have an order and bytes that are halves of an axis; the rest where
# blocks fill a row, and where they straddle rows, in a stack
LAYOUTS = [
    *((name, "nf4", True, "uint8") for name in SHAPES),
    *(
        (name, *options)
        for name in ("kernel of heads", "ragged, scanned")
        for options in [
            ("nf4", False, "uint4"), ("fp4", True, "uint4"), ("int8", True, "uint8"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format", "double", "packing"), LAYOUTS)
def test_any_layout_holds_the_numbers_of_the_flat_order(
    name, format, double, packing, full_compile
):
    from lowrank_jax._nodes.quantized import dequantize_node, quantize_array

    shape, fan_in, stack = SHAPES[name]
    weight = normal(*shape)
    make = lambda w: quantize_array(
        w, fan_in, stack, format=format, double_quant=double, packing=packing
    )
    there_and_back = lambda w: (node := make(w), dequantize_node(node))
    node, got = jax.jit(there_and_back)(weight)
    assert (node.shape, node.dtype) == (shape, jnp.float32)
    np.testing.assert_array_equal(got, reference(weight, fan_in, stack, format, double))
    assert node.codes.dtype == {"int8": "int8"}.get(format, packing)
    assert (node.scales.dtype == jnp.uint8) is double
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(make, weight), node)


@pytest.mark.parametrize(("packing", "bits"), [("uint8", 4.13), ("uint4", 8.13)])
def test_bits_a_parameter_as_this_device_holds_them(packing, bits):
    params = {"w": normal(1024, 512)}
    quant = lowrank.QuantConfig(targets="w", packing=packing)
    frozen = lowrank.quantize(params, quant)
    leaf = lowrank.report(lambda p, x: x @ p["w"], frozen, np.ones((1, 1024)))["w"]
    assert leaf.bits <= bits  # a uint4 takes a byte on CPU
    assert sum(a.nbytes for a in jax.tree.leaves(frozen)) * 8 / params["w"].size == leaf.bits
