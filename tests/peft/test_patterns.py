"""Regexes of configurations: what the automaton says is what Python's `re` says, and soon."""

import json
import random
import re
import time

import pytest

import lowrank_jax as lowrank
from lowrank_jax.peft._parsing import parse_config
from lowrank_jax.peft._patterns import Budget, ModulePatterns

# as adapters on the Hub have them
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.self_attn.v_proj",
    "model.vision_tower.layers.3.self_attn.q_proj",
    "model.language_model.layers.11.mlp.down_proj",
    "model.layers.25.mlp.experts.6.gate_proj",
    "transformer.h.3.attn.c_attn",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "single_blocks.attn_2.x.to_q",
    "unet.down_blocks.0.attentions.1.to_out.0",
    "vision_model.encoder.k_proj.x",
    "lm_head",
    "",
]


def get_pattern_key(keys, module):
    """As peft.utils has it."""
    return next((i for i, k in enumerate(keys) if re.match(rf"(.*\.)?({k})$", module)), None)


KEYS = ["q_proj", r"^model\.layers\.0\.self_attn\.q_proj", "layers.17.self_attn.v_proj", "proj"]
KEYS += [r"experts\.\d+\.gate_proj", "h.*", "lm_head|embed", r"mlp\.", "q", "^lm_head$", "k_proj.x"]
KEYS += ["se.f_attn.._proj$", "^model.layers.0.self_attn.q_proj", ".._proj", "......."]
KEYS += ["(q|v)_proj", "self_attn.q_proj", "^", "", "layers.(1|3).*q_proj$", "c_attn", "[^.]*_proj"]


def test_the_first_key_that_matches_a_module_counts():
    chance = random.Random(0)
    for _ in range(150):
        keys = chance.sample(KEYS, chance.randint(1, 8))
        patterns = ModulePatterns(keys, "rank_pattern", Budget())
        for module in MODULES:
            assert patterns.first(module) == get_pattern_key(keys, module), (keys, module)


WILD = {
    "optional letters": {"target_modules": "a?" * 200 + "a" * 200 + "b"},
    "alternatives alike": {"target_modules": "(a|a)*" * 20 + "b"},
    "a repeat of a repeat": {"target_modules": "((a+)+)+b"},
    "many stars": {"target_modules": ".*.*.*.*.*.*.*.*.*.*x"},
    "lookaheads": {"target_modules": "(?=(a|a)*b)" * 30 + "(?!(a?a?)*c).*"},
    "saved": {"target_modules": ["x"], "modules_to_save": ["(a|a)*b"]},
    "ranks": {"rank_pattern": {"(a*)*b": 2, "(a|a|a)*c": 3}},
    "names": {"rank_pattern": {f"l.{i}.q": 1 + i % 9 for i in range(40_000)}},
    "targets": {"target_modules": [f"l.{i}.q" for i in range(40_000)]},
    "layers": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "(a|a)*"},
}


@pytest.mark.parametrize("case", WILD)
def test_no_configuration_takes_long_to_match(case):
    """Thousands of modules in less than a second; backtracking would take ages."""
    text = json.dumps({"peft_type": "LORA", **WILD[case]}).encode()
    modules = ["a" * 250, *(f"model.l.{i}.{'a' * (i % 60)}" for i in range(3000))]
    start = time.process_time()
    config = parse_config(text, "adapter_config.json")
    found = [(config.is_target(module), config.rank(module)) for module in modules]
    assert time.process_time() - start < 5
    assert len(found) == len(modules)


def test_patterns_that_take_too_many_steps_are_refused():
    keys = {f"(.*a){{{i}}}.{{{i}}}b": 2 for i in range(1, 40)}
    config = parse_config(
        json.dumps({"peft_type": "LORA", "rank_pattern": keys}).encode(), "config"
    )
    start = time.process_time()
    with pytest.raises(lowrank.CheckpointError, match="rank_pattern take too many steps"):
        for i in range(3000):
            config.rank("".join(random.Random(i).choices("ab", k=100)))
    assert time.process_time() - start < 5
