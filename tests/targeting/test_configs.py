"""LoraConfig: frozen, hashable, and through JSON unchanged."""

import dataclasses
import json
import re

import pytest

import lowrank_jax as lowrank

FULL = lowrank.LoraConfig(
    rank=4,
    alpha=6.5,
    targets=["**/kernel", re.compile(r"a/(b|c)", re.IGNORECASE)],
    exclude="**/head/*",
    rank_pattern={re.compile(r".*q"): 8, "**/k": 2},
    alpha_pattern={"**/k": 3.0},
    stack={"experts/*": (0, 1), "one": 0},
    rslora=True,
    train=("**/bias",),
    factor_dtype="bfloat16",
)


@pytest.mark.parametrize("config", [lowrank.LoraConfig(), FULL])
def test_json_round_trip(config):
    text = json.dumps(config.to_dict())
    again = lowrank.LoraConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.rank_pattern.items()) == list(config.rank_pattern.items())


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.rank = 3
    with pytest.raises(TypeError):
        lowrank.LoraConfig(8)  # keyword-only


def test_order_of_patterns_is_part_of_the_configuration():
    one = lowrank.LoraConfig(rank_pattern={"a": 1, "b": 2})
    two = lowrank.LoraConfig(rank_pattern={"b": 2, "a": 1})
    assert one != two


def test_scale():
    assert lowrank.LoraConfig().scale_of(8, None) == 2.0
    assert lowrank.LoraConfig().scale_of(8, 12) == 1.5
    assert lowrank.LoraConfig(rslora=True).scale_of(16, 8) == 2.0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rank": 0}, r"rank must be an integer of at least 1 and below 2\*\*31, not 0"),
        ({"rank": 2.0}, "not 2.0"),
        ({"rank": True}, "not True"),
        ({"alpha": 0}, "alpha must be a finite number above 0"),
        ({"alpha": float("nan")}, "not nan"),
        ({"targets": 3}, "targets takes a pattern"),
        ({"targets": "a//b"}, "empty segment"),
        ({"exclude": "all-linear"}, "value of targets"),
        ({"rank_pattern": {"a": -1}}, r"rank_pattern\['a'\]"),
        ({"rank_pattern": ["a"]}, "takes a mapping"),
        ({"alpha_pattern": {"a": "2"}}, r"alpha_pattern\['a'\]"),
        ({"stack": {"a": 0.5}}, "stack"),
        ({"rslora": 1}, "rslora must be True or False"),
        ({"factor_dtype": "int8"}, "factor_dtype must be one of"),
    ],
)
def test_bad_values_are_named(bad, words):
    with pytest.raises(lowrank.LowrankError, match=words):
        lowrank.LoraConfig(**bad)


def test_unknown_keys_are_named():
    with pytest.raises(lowrank.ConfigError, match=r"unknown LoraConfig keys \['rnak'\]"):
        lowrank.LoraConfig.from_dict({"rnak": 3})
