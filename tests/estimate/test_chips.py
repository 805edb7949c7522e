"""What fits a chip and what does not, by its own compiler: `pytest -m slow tests/estimate`.

benchmarks/aot.py prints the commands that make an environment with these compilers.
"""

import argparse
import json

import jax
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
    params = {"w": jax.ShapeDtypeStruct((1024, 8192), jax.numpy.bfloat16, sharding=sharding)}
    x = jax.ShapeDtypeStruct((128, 1024), jax.numpy.bfloat16)
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
