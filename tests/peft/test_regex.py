"""The automaton of a regex matches what Python's `re` does."""

import random
import re

import pytest

from lowrank_jax.peft._patterns import Automaton, Budget, ModulePatterns
from lowrank_jax.peft._regex import RegexError, parse_regex

# as adapters on the Hub have them
REAL = [
    r"^(?!.*vision).*\.(q_proj|v_proj)$",
    r"^(?!.*patch_embed).*(?:language_model|model).*(?:self_attn|mlp)\.(?:q_proj|k_proj|down_proj).*",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(.*(vision_model|modality_projection|perceiver_resampler).*(down_proj|up_proj|k_proj).*$)",
    r"model\.layers\.(0|1|1[0-9]|2\d)\.self_attn\.(q|k|v|o)_proj",
    r"^model\.layers\.\d+\.mlp\.experts\.[0-7]\.(?:gate|up)_proj$",
    r"layers\.[0-9]{1,2}\..*_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))".replace(r"\b", ""),
    r"transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_fc)",
    r"(?P<block>single|double)_blocks\.(?=.*attn)[^.]+\.\w+\.(to_q|to_k)",
    r"unet\.(?:down|up)_blocks.*\.to_(?:q|k|v|out\.0)",
    r"^(?=.*layers)(?!.*(?:lm_head|embed)).*proj",
]

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

ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\S",
    "[ab]",
    "[^a.]",
    "[a-c.]",
    r"[\d_]",
    "x",
    "^",
    "$",
]
ATOMS += ["$", r"\A", r"\Z", "1", "()", r"\-", "]", "{", "}", "{}", "{,", "[]a]", "[a-]", r"[^\D]"]

REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "{,}", "{1}?"]

GROUPS = ["(", "(?:", "(?=", "(?!"]

LETTERS = "aab.1x_\n-é٣ "


def regex(chance, depth=3):
    """A random regex, most of them of what is supported."""
    parts = []
    for _ in range(chance.randint(1, 3)):
        part = chance.choice(ATOMS)
        if depth and chance.random() < 0.4:
            branches = [regex(chance, depth - 1) for _ in range(chance.choice((1, 1, 2, 3)))]
            branches += [""] * (chance.random() < 0.1)
            part = chance.choice(GROUPS) + "|".join(branches) + ")"
        if chance.random() < 0.35:
            part += chance.choice(REPEATS)
        parts.append(part)
    return "".join(parts)


def matches(pattern, text, whole):
    automaton = Automaton(whole, "a field", Budget())
    automaton.append(parse_regex(pattern))
    return automaton.first(text) is not None


def agree(pattern, text):
    for whole, python in ((True, re.fullmatch), (False, re.match)):
        wanted = python(pattern, text) is not None
        assert matches(pattern, text, whole) == wanted, (pattern, text, whole)


def compare(count, seed):
    """How many random regexes are supported; each says of random texts what `re` says."""
    chance, supported = random.Random(seed), 0
    for _ in range(count):
        pattern = regex(chance)
        if chance.random() < 0.2:
            at = chance.randrange(len(pattern) + 1)
            pattern = pattern[:at] + chance.choice("()[]{}|*+?^$\\.-,:=!12a") + pattern[at:]
        try:
            parse_regex(pattern)
        except RegexError:
            continue
        supported += 1
        for _ in range(6):
            agree(pattern, "".join(chance.choices(LETTERS, k=chance.randrange(7))))
    return supported


def test_random_regexes_match_as_python_says():
    assert compare(1500, 0) > 700


@pytest.mark.slow
def test_many_random_regexes_match_as_python_says():
    assert compare(100_000, 1) > 50_000


@pytest.mark.parametrize("pattern", REAL)
def test_regexes_of_adapters_are_supported(pattern):
    for module in MODULES:
        agree(pattern, module)


REFUSED = ["(", ")", "a**", "*a", "a{2}{3}", "[a", "[b-a]", r"\q", r"(a)\1", "(?<=a)b", "(?i)a"]
REFUSED += [
    r"\bq",
    "a*+",
    "(?>a)",
    "(?P<x>a)(?P<x>b)",
    "a{3,2}",
    "a{99999}",
    "[[a]",
    "\\",
    "(?P=x)",
]
REFUSED += ["(?P=x)", "(a{1000}){1000}", "(" * 40 + ")" * 40, "a*" * 501, "((){1000}){1000}"]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_not_supported_is_refused(pattern):
    with pytest.raises(RegexError):
        ModulePatterns([pattern], "rank_pattern", Budget())
