"""What fits a chip and what does not, by its own compiler: `pytest -m slow tests/estimate`.

benchmarks/aot.py prints the commands that make an environment with these compilers.
"""

import argparse
import json
import re

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lowrank
from lowrank_jax._cli import estimating
from lowrank_jax._estimate.chips import CHIPS, make_devices

pytestmark = pytest.mark.slow


def run(text):
    """The estimate of the command `python -m lowrank_jax estimate` with these flags."""
    options = argparse.ArgumentParser()
    estimating.add_arguments(options)
    options = options.parse_args(text.split())
    try:
        make_devices(CHIPS[options.chip], 1)
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    return estimating.estimate_llama(options)


# H100: 80 GB, of which a program may use 79.1 GiB; v5e: 15.75 GiB
@pytest.mark.parametrize(
    ("fits", "flags"),
    [
        (True, "--like llama-3-8b --chip h100"),  # 8 billion bfloat16: 15 GiB
        (True, "--like llama-2-70b --quantize nf4 --tokens 512 --chip h100"),  # 38.7 GiB
        (True, "--like llama-3.2-1b --tokens 512 --chip v5e"),
        (False, "--like llama-2-70b --tokens 512 --chip h100"),  # 70 billion bfloat16: 128 GiB
        (False, "--like llama-3.1-405b --quantize nf4 --tokens 512 --chip h100"),  # 195 GiB
        (False, "--like llama-3-8b --tokens 512 --chip v5e"),  # 15 GiB and activations
    ],
)
def test_known_models_fit_or_do_not(fits, flags):
    found = run(flags)
    assert found.fits is fits, str(found)
    assert found.arguments == sum(found.groups.values())


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_base_is_split_over_a_mesh(target):
    try:
        make_devices(CHIPS[target], 8)
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    params = {"w": jax.ShapeDtypeStruct((1024, 8192), jnp.bfloat16, sharding=sharding)}
    x = jax.ShapeDtypeStruct((128, 1024), jnp.bfloat16)
    found = lowrank.estimate(lambda params, x: x @ params["w"], params, x, target=target)
    assert found.devices == 8
    assert found.groups["base"] == 1024 * 1024 * 2
    assert found.fits


@pytest.mark.parametrize(("target", "codes"), [("h100", "s8"), ("v5e", "u4")])
def test_codes_are_gathered_and_no_weight(target, codes, tmp_path):
    """Of each layer of eight, for the forward and for the backward pass; an H100 packs two."""
    width, layers = 1024, 8
    sizes = {"vocab_size": 512, "num_hidden_layers": layers, "num_attention_heads": 8}
    sizes |= {"hidden_size": width, "intermediate_size": width}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    mesh = "--mesh 8x1 --batch 8 --tokens 8 --rank 2 --quantize nf4"
    found = run(f"--like {tmp_path} --chip {target} {mesh}")
    assert found.collectives[f"all-gather {codes}"] == 2 * layers * 7 * width**2 // 2
    floats = [
        size
        for name, size in found.collectives.items()
        if name.startswith("all-gather") and name.split()[1] in ("f32", "bf16", "f16")
    ]
    assert sum(floats) < width**2 * 2  # activations and factors, together less than one weight


@pytest.mark.parametrize("stored", [{"double_quant": False}, {"packing": "uint8"}, {}], ids=str)
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (4096, 1024)])
@pytest.mark.parametrize("is_back", [False, True])
def test_one_token_reads_codes_once(shape, stored, is_back):
    """On a GPU one instruction of a product of one token reads codes, and no weight is written."""
    try:
        (device,) = make_devices(CHIPS["h100"], 1)
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    sharding = jax.sharding.SingleDeviceSharding(device)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = {"w": array(*shape)}
    quant = lowrank.QuantConfig(targets="w", **stored)
    tree = jax.eval_shape(lambda params: lowrank.quantize(params, quant), params)
    apply = lowrank.lift(lambda params, x: x @ params["w"], fallback="raise")
    x, ct = array(1, shape[0]), array(1, shape[1])
    back = lambda tree, ct: jax.linear_transpose(lambda x: apply(tree, x), x)(ct)[0]
    fn, other = (back, ct) if is_back else (apply, x)
    program = jax.jit(fn, in_shardings=sharding).lower(tree, other).compile()
    entry = program.as_text().split("\nENTRY")[1]
    (codes,) = re.findall(r"%(\S+codes\S*) = u\d+\[.*parameter", entry)
    assert len(re.findall(rf"%{re.escape(codes)}[,)]", entry)) == 1
    # scales of 8 bits are decoded first; of sums there are at most 32,768 and as many again
    scales = 0 if "double_quant" in stored else shape[0] * shape[1] // 64 * 4
    assert program.memory_analysis().temp_size_in_bytes <= scales + 2**18
