"""adapter_config.json as other programs write it: null, and integers as floats."""

import math

import chex
import pytest
from peft_files import LLAMA, load, params_of, plan_of, refusal, rewritten

from lowrank_jax.peft._config import DEFAULTS


def loaded(directory):
    return load(directory, params_of(False), plan=plan_of(False), names=LLAMA)


@pytest.mark.parametrize("field", sorted(DEFAULTS))
def test_null_is_the_default_of_a_field(field, tmp_path):
    given = {"target_modules": None, "r": 2, "lora_alpha": 8}
    null = rewritten(tmp_path / "null", **{**given, field: None})
    default = rewritten(tmp_path / "default", **{**given, field: DEFAULTS[field]})
    if field == "r":  # the default is another rank than the tensors have
        assert refusal(null).split(":", 1)[1] == refusal(default).split(":", 1)[1]
    else:
        chex.assert_trees_all_equal(loaded(null)[1], loaded(default)[1])
        assert loaded(null)[2] == loaded(default)[2]


def test_floats_of_integral_value_are_integers(tmp_path):
    fields = {"r": 8, "rank_pattern": {"[a-z]*_proj": 2}, "layers_to_transform": [0, 1]}
    floats = {"r": 8.0, "rank_pattern": {"[a-z]*_proj": 2.0}, "layers_to_transform": [0.0, 1.0]}
    one = loaded(rewritten(tmp_path / "integers", **fields))
    two = loaded(rewritten(tmp_path / "floats", **floats))
    chex.assert_trees_all_equal(one[1], two[1])
    assert one[2] == two[2]
    assert type(two[2].rank) is int


NO_INTEGERS = [
    ("r", 8.5),
    ("r", 1e308),
    ("r", math.nan),
    ("r", True),
    ("rank_pattern", {"q_proj": 2.5}),
    ("layers_to_transform", [0.5]),
    ("trainable_token_indices", [0.5]),
]


@pytest.mark.parametrize(("field", "value"), NO_INTEGERS)
def test_numbers_that_are_no_integers_are_refused(field, value, tmp_path):
    assert f"{field}={value!r}: expected " in refusal(rewritten(tmp_path, **{field: value}))
