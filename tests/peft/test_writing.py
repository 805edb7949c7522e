"""What PEFT cannot hold is refused by name; names and patterns of modules decide."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from peft_files import (
    assert_same,
    config_of,
    load,
    ones,
    peft_pattern,
    save,
    tensors_of,
)

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


def one(**fields):
    fields = {"a": ones(4, 2), "b": ones(2, 3), **fields}
    return {"layers": {"q": {"kernel": lowrank.LowRank(**fields)}}}


CANNOT = {
    "a stack of layers without a number": (
        one(a=ones(5, 4, 2), b=ones(5, 2, 3), stack=(0,), fan_in=(1,), fan_out=(2,)),
        "has 1 stack axes, and its module's name 'layers.q' has 0 times '{}'",
    ),
    "several adapters in one": (
        one(a=ones(5, 4, 2), b=ones(5, 2, 3)),
        "several adapters in one; split them",
    ),
    "folded norms": (
        one(magnitude=ones(3), folded=True),
        "save the adapter before lowrank.fold_norms",
    ),
    "another product": (
        {
            "layers": {
                "q": {"kernel": lowrank.LoHa(ones(4, 4), ones(4, 3))},
                "k": {"kernel": lowrank.LowRank(ones(4, 0), ones(0, 3), ones(3))},
            }
        },
        "'layers/q/kernel': a LoRA file cannot hold LoHa",
    ),
    "another scale": (one(scale=-1.0), "scale -1.0, but PEFT requires alpha > 0"),
    "magnitudes here and there": (
        {**one(), "p": one(magnitude=ones(3))},
        "and some, such as 'layers/q/kernel', have none",
    ),
    "a combined tree": (
        lowrank.combine({"layers": {"q": {"kernel": ones(4, 3)}}}, one()),
        "lora is a combined tree (see 'layers/q/kernel'): pass its adapter",
    ),
    "nothing": ({"layers": None}, "lora holds no adapter"),
    "a whole kernel of many axes": (
        {"q": {"kernel": lowrank.Full(ones(4, 2, 3))}},
        "which of its axes are contracted is ambiguous",
    ),
    "a part of a module": (
        {"norm": {"scale": lowrank.Full(ones(3)), "bias": None}},
        "'norm/bias': PEFT saves whole modules, and another leaf of norm is trained whole: pass",
    ),
    "a parameter that is no weight": (
        {"embeddings": {"cls_token": lowrank.Full(ones(1, 1, 3))}},
        "cls_token is a parameter of embeddings other than its weight and bias",
    ),
    "integers": (
        {"q": {"kernel": lowrank.Full(jnp.ones((4, 2), jnp.uint4))}},
        "is uint4, which the file format does not support",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_peft_cannot_hold_is_refused_by_name(case, tmp_path):
    lora, said = CANNOT[case]
    with pytest.raises(lowrank.CheckpointError) as error:
        save(tmp_path, lora, lowrank.LoraConfig())
    assert said in " ".join(str(error.value).split())
    assert not list(tmp_path.iterdir())


def test_names_decide_or_refuse(tmp_path):
    config = lowrank.LoraConfig()
    refused: Any = (
        (lambda path: None, "names has no module for it"),
        ({"layers/q/kernel": 3}, "names gives 3 for 'layers/q/kernel'"),
        (lambda path: lowrank.names.Parameter("q", "bias"), "names gives 'q.bias'"),
    )
    for names, said in refused:
        with pytest.raises(lowrank.CheckpointError, match=said):
            save(tmp_path, one(), config, names=names)
    twice = {"layers/q/kernel": "q", "p/layers/q/kernel": "q"}
    with pytest.raises(lowrank.CheckpointError, match=r"names gives both .* 'q.weight'"):
        save(tmp_path, {**one(), "p": one()}, config, names=twice)
    with pytest.raises(lowrank.ConfigError, match=r"extras has \['r'\]"):
        save(tmp_path, one(), lowrank.LoraConfig(extras={"r": 4}))
    with pytest.raises(lowrank.ConfigError, match="nan, which is not a JSON value"):
        save(tmp_path, one(), lowrank.LoraConfig(extras={"lora_dropout": math.nan}))
    save(tmp_path, one(), config, names={"layers/q/kernel": "deep.q"})
    assert config_of(tmp_path)["target_modules"] == ["deep.q"]


def test_a_module_is_completed_from_the_base(tmp_path):
    params = {"norm": {"scale": ones(3), "bias": np.full(3, 0.5, np.float32)}}
    lora = {"norm": {"scale": lowrank.Full(np.full(3, 2.0, np.float32)), "bias": None}}
    save(tmp_path, lora, lowrank.LoraConfig(), base=params)
    written = tensors_of(tmp_path)
    np.testing.assert_array_equal(written["base_model.model.norm.bias"], params["norm"]["bias"])
    assert config_of(tmp_path)["modules_to_save"] == ["norm"]


def test_patterns_are_of_one_module_each(tmp_path):
    """`layers.1.q` ends the name of another module, and `.` is any character."""
    ranks = {"layers.1.q": 1, "deep.layers.1.q": 2, "layersx1.q": 3, "q": 4, "other": 4}
    lora = {
        name: {"kernel": lowrank.LowRank(ones(9, r), ones(r, 8), scale=1.5 / r)}
        for name, r in ranks.items()
    }
    names = lambda path: path.rpartition("/")[0]
    save(tmp_path, lora, lowrank.LoraConfig(), names=names)
    written = config_of(tmp_path)
    for module, rank in ranks.items():
        assert peft_pattern(written["rank_pattern"], module, written["r"]) == rank
    params = {name: {"kernel": ones(9, 8)} for name in ranks}
    assert_same(load(tmp_path, params, names=names)[1], lora)
