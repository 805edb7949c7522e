"""LoraConfig: frozen, hashable, and through JSON unchanged."""

import dataclasses
import json
import re

import numpy as np
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


BY_POSITION = {
    "a rank": (
        lowrank.LoraConfig,
        (8,),
        r"as in LoraConfig\(rank=...\): the first .* is an int, 8,",
    ),
    "a rank and an alpha": (lowrank.LoraConfig, (8, 16), r"LoraConfig\(rank=..., alpha=...\)"),
    "patterns": (lowrank.LoraConfig, (["**/kernel"],), r"is a list, without a name"),
    "a dict": (
        lowrank.LoraConfig,
        ({"rank": 8},),
        r"as in LoraConfig.from_dict\(values\): .*a dict",
    ),
    "a format": (lowrank.QuantConfig, ("int8",), r"QuantConfig\(format=...\): .* a str, 'int8'"),
    "too many": (lowrank.QuantConfig, range(20), r"targets=..., exclude=...\): .* an int, 0"),
    "an array": (lowrank.QuantConfig, (np.ones(2),), r"a ndarray of shape \(2,\)"),
    "another config": (lowrank.QuantConfig, (FULL,), r"is a LoraConfig, without a name"),
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_arguments_by_position_are_refused_in_one_sentence(name):
    config, given, words = BY_POSITION[name]
    with pytest.raises(lowrank.ConfigError, match=words) as info:
        config(*given)
    assert str(info.value).startswith(f"{config.__name__} takes its fields by keyword, as in ")
    assert "\n" not in str(info.value)


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


COSTLY = {
    "a range of any case, by the text": {"re": "(?i)" + r"[\0-\uffff]" * 10},
    "a range of any case, by the flag": {"re": "[\0-\U0010ffff]" * 10, "flags": int(re.I)},
    "a range of any case in a group": {
        "re": r"(?s-m:a)(?mi:[\x00-\N{BOX DRAWINGS LIGHT DOWN}]b)" * 10
    },
    "ranges that share an end": {"re": "[^a-ÿ-\uffff]" * 10, "flags": int(re.I)},
    "classes of any character": {"re": "[\u0100\u0300\u0500]" * 400},
    "a long regex": {"re": "a" * 70_000},
    "many regexes": [{"re": f"a{i}"} for i in range(5000)],
    "ranks": [[{"re": f"a{i}"}, 2] for i in range(5000)],
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_regex_that_is_costly_to_compile_is_refused_uncompiled(name, monkeypatch):
    value, compiled = COSTLY[name], []
    field = "rank_pattern" if name == "ranks" else "targets"
    compile_ = re.compile
    counted = lambda *args: compiled.append(args) or compile_(*args)
    with pytest.raises(lowrank.ConfigError) as error, monkeypatch.context() as patch:
        patch.setattr(re, "compile", counted)
        lowrank.LoraConfig.from_dict({field: value})
    assert "too large to compile" in str(error.value)
    assert "expected at most" in str(error.value)
    assert len(compiled) < 5000
    if field == "targets" and isinstance(value, dict):
        assert not compiled
        # the constructor refuses it too, so that every configuration can be written and read again
        regex = compile_(value["re"], value.get("flags", 0))
        with pytest.raises(lowrank.ConfigError, match="too large to compile"):
            lowrank.LoraConfig(exclude=[regex])
        with pytest.raises(lowrank.ConfigError, match="too large to compile"):
            lowrank.QuantConfig.from_dict({"targets": value})


def test_regexes_that_name_the_layers_of_large_models_are_taken():
    each = [re.compile(rf"model/layers_{i}/(self_attn|mlp)/[qkv]_proj/kernel") for i in range(200)]
    any_case = re.compile(r"(?i)layers_[0-9]+/[a-z]+/[^/]+")
    config = lowrank.LoraConfig(targets=[*each, any_case], rank_pattern=dict.fromkeys(each, 4))
    assert lowrank.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
