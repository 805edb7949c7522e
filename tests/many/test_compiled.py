"""A compiled step of many adapters uses the base as often as a step of one adapter does.

Counted in the compiler's program, on CPU and, with `pytest -m slow`, for chips that are not there:
benchmarks/aot.py prints the commands that make an environment with their compilers.
"""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_jax as lowrank
from lowrank_jax._estimate.chips import CHIPS
from lowrank_jax._estimate.placement import place_on_chips
from lowrank_jax._nodes.sizes import count_packed_bytes

FAN_IN, FAN_OUT, TOKENS, LAYERS = 256, 640, 24, 3
WEIGHT = FAN_IN * FAN_OUT  # as large as no activation and no factor of one adapter or of eight
# %name = bf16[24,640]{1,0} dot(%x, %y), ...; of a tuple the first array
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%([\w.-]+) = \(?\w+\[([\d,]*)\]\S* (?:.*?\) )?([\w-]+)\((.*)", re.MULTILINE
)
# a TPU multiplies by convolutions, a GPU by its library
PRODUCT = re.compile(r"dot|convolution|custom-call")

CASES = [
    pytest.param(kind, target, marks=() if (kind, target) == ("nf4", "cpu") else pytest.mark.slow)
    for kind in ("dense", "nf4")
    for target in ("cpu", "h100", "v5e")
]


def model(params, x):
    layer = lambda x, w: (jnp.tanh(jnp.tanh(x @ w["up"]) @ w["down"]), None)
    return jax.lax.scan(layer, x, params)[0]


def train(apply, base, many, x):
    """The gradient of each adapter's loss, for its own tokens x [n, t, in]."""
    loss = lambda lora, x: apply(lowrank.combine(base, lora), x).astype(jnp.float32).sum()
    return jax.vmap(jax.grad(loss))(many, x)


def compile_text(count, is_quantized, target):
    """The program of a step of `count` adapters."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    params = {"up": shape(LAYERS, FAN_IN, FAN_OUT), "down": shape(LAYERS, FAN_OUT, FAN_IN)}
    plan = lowrank.plan(model, params, shape(TOKENS, FAN_IN))
    config = lowrank.LoraConfig(rank=4, targets=["up", "down"])
    packing = "uint8" if target == "cpu" else "uint4"
    quant = lowrank.QuantConfig(targets=["up", "down"], packing=packing)

    def start(params):
        if is_quantized:
            params = lowrank.quantize(params, quant, plan=plan)
        make = lambda key: lowrank.init(key, params, config, plan=plan)
        return make(0)[0], jax.vmap(lambda key: make(key)[1])(
            jax.random.split(jax.random.key(0), count)
        )

    args = (*jax.eval_shape(start, params), shape(count, TOKENS, FAN_IN))
    apply = lowrank.lift(model, fallback="raise")
    step = jax.jit(lambda *args: train(apply, *args))
    if target == "cpu":
        return step.lower(*args).compile().as_text()
    try:
        args = place_on_chips(args, CHIPS[target])
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    return step.lower(*args).compile(compiler_options=CHIPS[target].options).as_text()


def read_instructions(text):
    """(name, size of the result, operation, operands) of each instruction."""
    count = lambda dims: math.prod(map(int, filter(None, dims.split(","))))
    return [
        (name, count(dims), kind, re.findall(r"%([\w.-]+)", rest.split("), ")[0]))
        for name, dims, kind, rest in INSTRUCTION.findall(text)
    ]


@pytest.mark.parametrize(("base", "target"), CASES)
def test_the_base_is_multiplied_and_decoded_once_for_all_adapters(base, target):
    is_quantized, made = base == "nf4", {}
    for count in (1, 8):
        found = read_instructions(compile_text(count, is_quantized, target))
        sizes = {name: size for name, size, _, _ in found}
        # two weights, forward and backward, each with the tokens of all adapters
        products = [
            size
            for _, size, kind, operands in found
            if PRODUCT.fullmatch(kind) and WEIGHT in [sizes.get(name) for name in operands]
        ]
        assert len(products) == 4
        # rows times fan-in or fan-out; a GPU may sum parts of a product, and writes each part
        rows = count * TOKENS * math.gcd(FAN_IN, FAN_OUT)
        assert not any(size % rows for size in products)
        # nor are they in a loop over adapters: one loop over layers, and one backward
        assert sum(kind == "while" for _, _, kind, _ in found) == 2
        # a bitcast computes and moves nothing
        weights = (kind for _, size, kind, _ in found if size == WEIGHT)
        made[count] = Counter(kind for kind in weights if kind != "bitcast")
        assert not any(size == 8 * WEIGHT for size in sizes.values())
    assert made[1] == made[8]
    if is_quantized:  # each time a weight is decoded it is multiplied by its scales
        assert made[8]["multiply"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_dpo_step_for_a_chip_holds_the_base_once(base, target):
    """The reference is the policy without its adapter: the step of examples/dpo.py has one base."""
    pytest.importorskip("rich")
    pytest.importorskip("tokenizers")
    import dpo
    import many_memory
    from llama import Llama, LlamaConfig

    heads = {"heads": 4, "kv_heads": 4, "head_dim": 128}
    llama = Llama(LlamaConfig(vocab=1024, dim=512, layers=2, hidden=1024, **heads))
    args = many_memory.make_shapes(llama, many_memory.BASES[base](target), 8, None)
    batch = tuple(jax.ShapeDtypeStruct((1, 2, 8), kind) for kind in (jnp.int32, bool))
    apply = lowrank.lift(llama.apply, fallback="raise")
    step = dpo.make_step(apply, optax.adamw(1e-3), 0.1)
    try:
        found = lowrank.estimate(step, *args, batch, target=target)
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    size = lambda tree: sum(map(count_packed_bytes, jax.tree.leaves(tree)))
    own = found.groups["base"] + found.groups["scales"]
    assert own == size(args[0])
    # what the compiler counts beyond the given arguments is no other base
    assert found.groups["padding"] + found.groups["closed over"] < own / 8
    assert found.arguments < 1.5 * own
    # nor do temporaries hold one; those of NF4 are decoded layers, of which this base has two
    assert base == "nf4" or found.temporaries < 0.75 * own
