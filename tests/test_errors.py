"""Mistakes people make, and the one clear message each gives.

`python tests/test_errors.py` writes them, with their whole messages, to docs/mistakes.md.
"""

import dataclasses
import re
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import P

import lowrank_jax as lowrank

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mistakes.md"
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "examples")]  # for the page, by itself

from command_mistakes import COMMANDS, empty_folder, run_command, saved  # noqa: E402

IDS = np.zeros((1, 4), np.int32)
KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(7, 6, name="embed")(ids)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(h)
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(8, name="body")(h)))


def ones(shapes):
    """Arrays of these shapes; nothing is compiled when the tests are collected."""
    return jax.device_put(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))


VARIABLES = ones(jax.eval_shape(Net().init, KEY, IDS))
PLAN = lowrank.plan(Net().apply, VARIABLES, IDS)


def init(variables=VARIABLES, plan=PLAN, **options):
    return lowrank.init(KEY, variables, lowrank.LoraConfig(**{"rank": 2, **options}), plan=plan)


BASE, LORA = ones(jax.eval_shape(init))


def other_model():
    return jax.tree.map(lambda leaf: jnp.ones((*leaf.shape[:-1], leaf.shape[-1] + 1)), VARIABLES)


def another_magnitude():
    base, lora = lowrank.init(
        KEY, {"w": jnp.ones((4, 3))}, lowrank.LoraConfig(rank=2, targets="w", dora=True)
    )
    wrong = {"w": dataclasses.replace(lora["w"], magnitude=jnp.ones(7))}
    return lowrank.lift(lambda p, x: x @ p["w"])(lowrank.combine(base, wrong), jnp.ones((1, 4)))


def dropping_out():
    fn, params = lowrank.functional(nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    ))  # fmt: skip
    return fn(params, jnp.ones((2, 4)))


class Modern(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.body(x)


def adapted_module():
    module, x = Modern(), jnp.ones((1, 6))
    plan = lowrank.plan(Modern.__call__, module, x)
    config = lowrank.LoraConfig(rank=2, targets="body/kernel")
    return lowrank.combine(*lowrank.init(KEY, module, config, plan=plan))(x)


def state_left_out():
    fn, params, _ = lowrank.functional_with_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    return fn(params, jnp.ones((2, 3)))


# name -> (the mistake, the kind of error, words of its text)
MISTAKES = {
    "misspelt target": (
        lambda: init(targets="**/bdoy/kernel"),
        lowrank.PatternError,
        r"targets pattern '\*\*/bdoy/kernel' matches none .* 'params/body/kernel'",
    ),
    "pattern without the level above": (
        lambda: init(targets="body/kernel"),
        lowrank.PatternError,
        r"whole path.*\(try '\*\*/body/kernel'\)",
    ),
    "misspelt exclude": (
        lambda: init(exclude="**/hed/*"),
        lowrank.PatternError,
        r"exclude pattern '\*\*/hed/\*' matches none",
    ),
    "rank pattern of nothing adapted": (
        lambda: init(rank_pattern={"**/head/kernel": 4}),
        lowrank.PatternError,
        r"rank_pattern \(over the adapted leaves\) pattern '\*\*/head/kernel'",
    ),
    "bias as target": (
        lambda: init(targets="**/body/bias"),
        lowrank.AxesError,
        r"'params/body/bias' has shape \(8,\).*op 'other'.*train it whole",
    ),
    "several bad targets at once": (
        lambda: init(targets="**/bias"),
        lowrank.AxesError,
        r"(?s)3 leaves cannot be adapted:.*attention/out/bias.*body/bias.*head/bias",
    ),
    "n-D kernel without a plan": (
        lambda: init(targets="**/attention/query/kernel", plan=None),
        lowrank.AxesError,
        r"'params/attention/query/kernel' has shape \(6, 2, 3\).*pass plan=lowrank.plan",
    ),
    "all-linear without a plan": (
        lambda: init(plan=None),
        lowrank.AxesError,
        r'targets="all-linear" needs to know.*pass plan=lowrank.plan',
    ),
    "plan of another level of the tree": (
        lambda: init(VARIABLES["params"]),
        lowrank.TreeError,
        r"(?s)another tree than params.*params/embed/embedding: in the plan, not in params",
    ),
    "plan of another model": (
        lambda: init(other_model()),
        lowrank.TreeError,
        r"params/body/kernel: shape \(6, 9\), but \(6, 8\) in the plan",
    ),
    "rank larger than the weight": (
        lambda: init(rank=7, targets="**/body/kernel"),
        lowrank.ConfigError,
        r"rank 7 is larger than 'params/body/kernel' can have: its fan-in is 6 .*rank_pattern",
    ),
    "integer leaf as target": (
        lambda: init({"table": jnp.ones((4, 4), jnp.int32)}, None, targets="table"),
        lowrank.PatternError,
        r"matches only leaves that are not floating, like 'table' \(int32\)",
    ),
    "8-bit leaf as target": (
        lambda: init({"w": jnp.ones((4, 4), jnp.float8_e4m3fn)}, None, targets="w"),
        lowrank.AxesError,
        r"'w' has dtype float8_e4m3fn.*cast the leaf to bfloat16",
    ),
    "adapted and trained whole": (
        lambda: init(targets="**/body/kernel", train="**/body/*"),
        lowrank.ConfigError,
        r"'params/body/kernel' is to be trained in two ways",
    ),
    "everything excluded": (
        lambda: init(exclude="**"),
        lowrank.PatternError,
        r"no leaf is left to adapt: ",
    ),
    "only a final projection": (
        lambda: lowrank.init(
            KEY,
            {"w": jnp.ones((4, 3))},
            lowrank.LoraConfig(rank=1),
            plan=lowrank.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))),
        ),
        lowrank.PatternError,
        r"leaves out the final projection, here 'w'.*name the leaf in targets",
    ),
    "stack axis out of range": (
        lambda: init(targets="**/body/kernel", stack={"**/body/kernel": 2}),
        lowrank.AxesError,
        r"stack=\(2,\) for 'params/body/kernel': the leaf has 2 axes",
    ),
    "nothing but stack axes": (
        lambda: init(targets="**/body/kernel", stack={"**/body/kernel": 0}),
        lowrank.AxesError,
        r"has no fan-in axes",
    ),
    "config in the wrong place": (
        lambda: lowrank.init(KEY, lowrank.LoraConfig(), VARIABLES),
        lowrank.ConfigError,
        r"init takes \(key, params, config\): config is a dict; expected a LoraConfig",
    ),
    "initializing on a combined tree": (
        lambda: init(lowrank.combine(BASE, LORA), None, targets="**"),
        lowrank.TreeError,
        r"params already holds adapters \('params/attention/key/kernel'",
    ),
    "initializer of wrong shapes": (
        lambda: lowrank.init(
            KEY,
            {"w": jnp.ones((4, 3))},
            lowrank.LoraConfig(rank=2, targets="w"),
            initializer=lambda key, w, r, s: (jnp.ones((r, 4)), jnp.ones((r, 3)), None),
        ),
        lowrank.LowrankError,
        r"returned a \(2, 4\) and b \(2, 3\); expected \(4, 2\) and \(2, 3\)",
    ),
    "initializer for a leaf that is no target": (
        lambda: lowrank.init(
            KEY,
            {"w": jnp.ones((4, 3))},
            lowrank.LoraConfig(rank=2, targets="w"),
            initializer={"v": lowrank.initializers.gaussian},
        ),
        lowrank.PatternError,
        r"initializer \(over the adapted leaves\) pattern 'v' matches none.*nearest paths are 'w'",
    ),
    "a wrong key": (
        lambda: lowrank.init(True, VARIABLES, lowrank.LoraConfig(rank=2), plan=PLAN),
        lowrank.ConfigError,
        r"key is True; expected a PRNG key \(jax.random.key\(0\)\) or an integer seed in \[0, 2",
    ),
    "an integer for the key of dropout": (
        lambda: lowrank.combine(BASE, LORA, dropout=0.1, key=0),
        lowrank.ConfigError,
        r"combine: key is an int, 0; expected a PRNG key \(jax.random.key\(0\)\)",
    ),
    "names of PEFT's in LoraConfig": (
        lambda: lowrank.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj"],
            lora_dropout=0.1,
            modules_to_save=["head"],
        ),
        lowrank.ConfigError,
        r"other names than PEFT: r is rank; lora_alpha is alpha; target_modules is targets, pat.*; "
        r"lora_dropout is an argument of combine: .*; modules_to_save is train",
    ),
    "PEFT's configuration for from_dict": (
        lambda: lowrank.LoraConfig.from_dict({"peft_type": "LORA", "r": 8}),
        lowrank.ConfigError,
        r"keys \['peft_type', 'r'\]; peft_type is of an adapter_config.json, which lowrank.peft",
    ),
    "names of bitsandbytes in QuantConfig": (
        lambda: lowrank.QuantConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        lowrank.ConfigError,
        r'names than bitsandbytes: load_in_4bit is format="nf4"; bnb_4bit_use_double_quant is doub',
    ),
    "a plan that is a tree": (
        lambda: init(plan=VARIABLES),
        lowrank.ConfigError,
        r"init: plan is a dict; expected a Plan or None",
    ),
    "an unknown name of an initializer": (
        lambda: lowrank.init(
            KEY,
            {"w": jnp.ones((4, 3))},
            lowrank.LoraConfig(rank=2, targets="w"),
            initializer="pisa",
        ),
        lowrank.ConfigError,
        r"initializer is a str, 'pisa'; expected a function .*, one of the names .*'pissa'",
    ),
    "keys that cannot be sorted": (
        lambda: init({"params": {0: jnp.ones((4, 3)), "head": jnp.ones((3, 2))}}, None),
        lowrank.TreeError,
        r"a dict at 'params' whose keys are of types that cannot be sorted \(int and str\)",
    ),
    "a rank that no array has": (
        lambda: lowrank.LoraConfig(rank=2**70),
        lowrank.ConfigError,
        r"rank must be an integer of at least 1 and below 2\*\*31, not 1180591620717411303424",
    ),
    "a bool for an axis": (
        lambda: lowrank.LoraConfig(stack={"**/kernel": True}),
        lowrank.ConfigError,
        r"stack\['\*\*/kernel'\] takes axes \(integers\), not True",
    ),
    "an alpha whose scale is 0": (
        lambda: lowrank.LoraConfig(rank=16, alpha=1e-38),
        lowrank.ConfigError,
        r"alpha 1e-38 and rank 16 give the scale 6.25e-40, which is 0 or infinite in float32",
    ),
    "NaN in extras": (
        lambda: lowrank.LoraConfig(extras={"bias": [1.0, float("nan")]}),
        lowrank.ConfigError,
        r"extras\['bias'\]\[1\] is a float, nan, which is not a JSON value",
    ),
    "a configuration of wrong JSON": (
        lambda: lowrank.LoraConfig.from_dict([1, 2]),
        lowrank.ConfigError,
        r"LoraConfig.from_dict takes a mapping, as to_dict returns it, not a list",
    ),
    "a scale of None": (
        lambda: lowrank.combine(BASE, LORA, scale=None),
        lowrank.ConfigError,
        r"combine: scale is None; expected a finite number or an array of real numbers",
    ),
    "an Optax wrapper around a function": (
        lambda: lowrank.only_adapters(optax.adam),
        lowrank.ConfigError,
        r"only_adapters takes \(tx\): tx is a function; expected an Optax transformation",
    ),
    "combine of swapped arguments": (
        lambda: lowrank.combine(LORA, BASE),
        lowrank.TreeError,
        r"first argument is the adapter, not a base: the order is \(base, lora\)",
    ),
    "combine of one adapter twice": (
        lambda: lowrank.combine(lowrank.combine(BASE, LORA), LORA),
        lowrank.TreeError,
        r"already combined with this adapter \(see 'params/attention/key/kernel'\)",
    ),
    "combine with a combined tree as the adapter": (
        lambda: lowrank.combine(BASE, lowrank.combine(BASE, LORA)),
        lowrank.TreeError,
        r"lora is a combined tree \(see 'params/attention/key/kernel'\): pass its adapter",
    ),
    "fingerprint of a combined tree": (
        lambda: lowrank.fingerprint(lowrank.combine(BASE, LORA)),
        lowrank.TreeError,
        r"without adapters, and 'params/attention/key/kernel' has one: pass the base from before",
    ),
    "combine with a tree of arrays": (
        lambda: lowrank.combine(BASE, BASE),
        lowrank.TreeError,
        r"not LowRank, Full or None: pass the second result of init",
    ),
    "combine with nothing": (
        lambda: lowrank.combine(BASE, {}),
        lowrank.TreeError,
        r"the adapter holds no node",
    ),
    "adapter of another model": (
        lambda: lowrank.combine(other_model(), LORA),
        lowrank.TreeError,
        r"params/body/kernel: the adapter is for shape \(6, 8\), the base has \(6, 9\)",
    ),
    "adapter of another level": (
        lambda: lowrank.merge(BASE["params"], LORA),
        lowrank.TreeError,
        r"(?s)another level.*params/body/kernel: in the adapter, not in the base",
    ),
    "dropout without a key": (
        lambda: lowrank.combine(BASE, LORA, dropout=0.1),
        lowrank.ConfigError,
        r"dropout needs a key",
    ),
    "dropout of everything": (
        lambda: lowrank.combine(BASE, LORA, dropout=1.0, key=KEY),
        lowrank.ConfigError,
        r"dropout is a static rate in \[0, 1\), not 1.0",
    ),
    "a scale for each leaf": (
        lambda: lowrank.combine(BASE, LORA, scale=jnp.ones(3)),
        lowrank.ConfigError,
        r"scale is one number, not an array of shape \(3,\)",
    ),
    "forgotten combine": (
        lambda: lowrank.lift(lambda p, x: x @ p["w"])(
            {"w": lowrank.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)))}, jnp.ones((2, 4))
        ),
        lowrank.TreeError,
        r"'w' is a LowRank adapter without its base: pass lowrank.combine",
    ),
    "forgotten lift": (
        lambda: Net().apply(lowrank.combine(BASE, LORA), IDS),
        lowrank.LowrankError,
        r"the function that uses the parameters must be lifted",
    ),
    "an adapted NNX module, called": (
        adapted_module,
        lowrank.LowrankError,
        r"for an NNX module lowrank.lift\(type\(module\).__call__\)\(module, ...\)",
    ),
    "lift of what is not a function": (
        lambda: lowrank.lift({"model": Net()}),
        lowrank.ConfigError,
        r"lift takes \(fn\): fn is a dict; expected a function of \(params, \*args\): model",
    ),
    "lift of a Linen module": (
        lambda: lowrank.lift(Net()),
        lowrank.ConfigError,
        r"lift takes \(fn\): fn is a Net; expected .*: model.apply of a Linen module",
    ),
    "lift of an NNX module": (
        lambda: lowrank.lift(Modern()),
        lowrank.ConfigError,
        r"fn is a Modern; expected .* `fn, params = lowrank.functional\(model\)` .* an NNX module",
    ),
    "plan of an NNX module": (
        lambda: lowrank.plan(Modern(), jnp.ones((1, 6))),
        lowrank.ConfigError,
        r"plan takes \(fn, params\): fn is a Modern; expected .* lowrank.functional\(model\)",
    ),
    "unknown fallback": (
        lambda: lowrank.lift(lambda p: p, fallback="ignore"),
        lowrank.ConfigError,
        r"fallback must be one of",
    ),
    "partition of an adapter": (
        lambda: lowrank.partition(LORA),
        lowrank.TreeError,
        r"is an adapter without its base",
    ),
    "an optimizer for adapters, given the base": (
        lambda: lowrank.only_adapters(optax.adam(1e-3)).init(BASE),
        lowrank.TreeError,
        r"initialized on a tree without adapters: pass lowrank.combine\(base, lora\)",
    ),
    "report of an adapter alone": (
        lambda: lowrank.report(Net().apply, LORA, IDS),
        lowrank.TreeError,
        r"is a LowRank adapter without its base",
    ),
    "specs of another level of the tree": (
        lambda: lowrank.specs(BASE, {"embed": P(), "body": P()}),
        lowrank.TreeError,
        r"(?s)same level of the tree:.*params/attention/key/bias: no spec.*embed: a spec, but no",
    ),
    "functional of a Linen module": (
        lambda: lowrank.functional(Net()),
        lowrank.TreeError,
        r"takes an instance of nnx.Module, not Net: for a Linen module, lift its apply method",
    ),
    "an NNX model in training mode": (
        dropping_out,
        lowrank.StateError,
        r"(?s)Call model.eval\(\) before.*functional_with_state.*RngCount",
    ),
    "a function with state, called without it": (
        state_left_out,
        lowrank.TreeError,
        r"(?s)takes it after params, out, state = fn\(params, state, \*args\).*mean .*: missing",
    ),
    "PEFT's folder for checkpoint.restore": (
        lambda: lowrank.checkpoint.restore(saved("peft-folder")),
        lowrank.CheckpointError,
        r"peft-folder: it holds a PEFT adapter, not a checkpoint: lowrank.peft.load\(direc",
    ),
    "a checkpoint for peft.load": (
        lambda: lowrank.peft.load(saved("adapter"), {"head": {"kernel": jnp.ones((4, 3))}}),
        lowrank.CheckpointError,
        r"holds a checkpoint of lowrank_jax, not a PEFT adapter: lowrank.checkpoint.restore\(",
    ),
    "an adapter for huggingface.load": (
        lambda: lowrank.huggingface.load(saved("peft-folder"), {"w": jnp.ones((4, 3))}),
        lowrank.CheckpointError,
        r"peft-folder holds neither .*: it holds a PEFT adapter, not a model",
    ),
    "restoring where nothing was saved": (
        lambda: lowrank.checkpoint.restore("nowhere"),
        lowrank.CheckpointError,
        r"there is no checkpoint at .*nowhere: it does not exist; pass the directory given to save",
    ),
    "folding the norms of an adapter without DoRA": (
        lambda: lowrank.fold_norms(*init()),
        lowrank.TreeError,
        r"the adapter has no magnitude: there is nothing to fold",
    ),
    "training a quantized adapter": (
        lambda: lowrank.trainable_mask(lowrank.quantize_adapter(LORA, lowrank.QuantConfig())),
        lowrank.TreeError,
        r"is an adapter with quantized factors, which has no gradient: train lowrank.dequantize",
    ),
    "quantize_adapter of parameters": (
        lambda: lowrank.quantize_adapter(BASE, lowrank.QuantConfig()),
        lowrank.TreeError,
        r"not LowRank, Full or None: pass .* init; lowrank.quantize is for parameters",
    ),
    "a magnitude of another model": (
        another_magnitude,
        lowrank.TreeError,
        r"'w': DoRA's magnitude has shape \(7,\), but the output features of the base have \(3,\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake):
    make, kind, words = MISTAKES[mistake]
    with empty_folder(), pytest.raises(kind, match=words):
        make()


@pytest.mark.parametrize("mistake", COMMANDS)
def test_mistaken_command(mistake):
    require_examples()
    status, printed, _ = run_command(mistake)
    assert status == 1
    assert re.search(COMMANDS[mistake][2], printed)
    assert printed.startswith(("lowrank_jax: ", "error: "))
    assert printed.count("\n") == 1


def require_examples():
    """Skip a test where what the examples import is not installed."""
    for name in ("rich", "tokenizers", "gguf"):
        pytest.importorskip(name)


def page():
    """The mistakes as a page of the documentation."""
    lines = [
        "# Mistakes and what they say",
        "",
        "Every error is a {py:class}`~lowrank_jax.LowrankError`, which is a `ValueError`. It names",
        "the path, what was given, what was expected, and the remedy; where several things are",
        "wrong, it lists them all. These are common mistakes, and the message each gives.",
    ]
    for name, (make, kind, _) in MISTAKES.items():
        with empty_folder(), pytest.raises(kind) as caught:
            make()
        message = re.sub(r"\S*/(nowhere|adapter|peft-folder)\b", r"\1", str(caught.value))
        lines += format_entry(name, f"{kind.__name__}: {message}")
    lines += ["", "## On the command line"]
    for name in COMMANDS:
        _, printed, command = run_command(name)
        lines += format_entry(name, printed.rstrip("\n"), f"{command}\n", level="###")
    return "\n".join(lines) + "\n"


def format_entry(name, message, before="", level="##"):
    """The lines of a heading and of a message below it, wrapped."""
    wrap = lambda line: textwrap.wrap(line, 98, subsequent_indent="    ")
    text = [part for line in (before + message).split("\n") for part in wrap(line)]
    return ["", f"{level} {name[0].upper()}{name[1:]}", "", "```text", *text, "```"]


def test_the_documentation_shows_these_messages():
    require_examples()
    assert page() == PAGE.read_text()


def test_every_error_is_a_value_error():
    for _, kind, _ in MISTAKES.values():
        assert issubclass(kind, lowrank.LowrankError)
        assert issubclass(kind, ValueError)


if __name__ == "__main__":
    PAGE.write_text(page())
