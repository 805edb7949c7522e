"""Invariants of bad input: every wrong value of every argument is refused with one clear error.

The functions and their arguments are those that introspection finds: a new argument is tested
without being listed. A value that an argument takes is listed here, by its name.
"""

import dataclasses
import json
import re
import traceback
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arguments import CONFIGS, Model, options_of, public_functions, wrong_values

import lowrank_jax as lowrank

VALUES = wrong_values()
FUNCTIONS = public_functions()

# those that tell most, for the default run; all of them in the slow one
FEW = (
    "None", "True", "-1", "2**70", "1.5", "nan", "empty text", "text", "list", "mixed tuple",
    "dict of None", "dict of object", "mixed keys", "object", "function", "float16 array",
    "text array", "key", "node",
)  # fmt: skip

ABOVE_0 = {"3", "1.5", "bfloat16"}
SCALARS = ABOVE_0 | {"1e-60", "scalar array", "integer array"}
NUMBERS = SCALARS | {"-1", "0", "2**70", "-2**70"}
BOOLS = {"True", "False"}
KEYS = {"key", "old key"}
PLACES = {"text", "glob", "path"}
TEXTS = {"text", "text with NUL", "lone surrogate", "glob"}
EMPTY = {"list", "list of None", "list of list", "tuple", "dict", "dict of None", "dict of dict"}
# trees whose leaves NumPy can save; a leaf that is not an array passes through everywhere
ARRAYS = {
    "float16 array", "complex array", "bool array", "int array", "scalar array", "nan array",
    "empty array", "integer array", "bfloat16", "key", "keys", "old key", "NumPy nan",
    "NumPy True", "dict of array",
}  # fmt: skip
SAVED = EMPTY | ARRAYS | {"dict of number", "dict of True", "dict of nan", "keys None"}
STATE = SAVED | BOOLS | {"-1", "0", "3", "1.5", "nan", "inf", "-inf", "1e-60", "1j"}
STATE |= {"None", "node", "dict of node"}
PASSED = SAVED | {
    "list of text", "mixed tuple", "dict of text", "dict of list", "dict of object",
    "dict of function", "dict of text array", "shape", "spec",
}  # fmt: skip
NODES = {"node", "dict of node"}

# argument -> the values that it takes, of whatever function; or (function, argument) -> these
TAKEN = {
    "config": {"LoraConfig"},
    "quant": {"QuantConfig"},
    "fn": {"function"},
    "method": {"function"},
    "directory": PLACES,
    "folder": PLACES,
    "like_folder": PLACES,
    "donate": BOOLS,
    "dequantize": BOOLS,
    "for_serving": BOOLS,
    "transpose": BOOLS,
    "check_base": BOOLS,
    "scale": NUMBERS,
    "key": KEYS,
    "wrt": {"True"},
    "opt_state": STATE,
    "extra": STATE,
    "step": {"-1", "0", "3", "2**70", "-2**70", "integer array"},
    "weight": {"nan array"},
    "rank": {"3"},
    ("combine", "dropout"): {"0"},
    ("estimate", "step"): {"function"},
    ("estimate", "donate"): {"list", "tuple"},
    ("init", "key"): KEYS | {"0", "3"},
    ("init", "initializer"): {"dict", "dict of None"},
    ("lora_plus", "learning_rate"): NUMBERS - {"2**70", "-2**70"} | {"function"},
    ("lora_plus", "ratio"): SCALARS,
    ("quantize_state", "min_size"): {"0", "3"},
    ("map_adapters", "tree"): {"node"},
    ("compress", "lora"): NODES,
    ("pool", "lora_like"): NODES,
    ("quantize_adapter", "lora"): NODES,
    ("pool", "slots"): {"3"},
    ("select", "index"): {"0", "int array", "old key"},
    ("blend", "weights"): {"old key"},
    ("checkpoint_policy", "policy"): {"function"},
    ("partition", "tree"): PASSED | {"dict of text"},
    ("trainable_mask", "tree"): PASSED | NODES,
    ("tabulate", "tree"): PASSED | NODES,
    ("fingerprint", "tree"): SAVED,
    ("dequantize", "frozen"): PASSED,
    ("factor_labels", "lora"): {"None"} | EMPTY | NODES,
    ("specs", "tree"): {"dict of node"},
    ("specs", "dense_specs"): {"None", "spec"},
    ("huggingface.load", "dtype"): {"dtype"},
    ("huggingface.load", "ignore"): TEXTS | {"empty text", "list", "list of text", "tuple"},
    ("huggingface.save", "max_shard"): {"3", "2**70"},
    ("bitsandbytes.to_state_dict", "name"): TEXTS,
    ("checkpoint.save", "lora"): NODES,
    ("checkpoint.save_async", "lora"): NODES,
    ("initializers.corda", "damping"): ABOVE_0 | {"2**70"},
    ("initializers.eva", "rho"): ABOVE_0 | {"2**70"},
    ("initializers.loftq", "iterations"): {"3"},
    ("initializers.lora_ga", "gamma"): ABOVE_0 | {"2**70"},
    ("initializers.lora_ga", "gradients"): {"dict of array"},
    ("initializers.randomized_pissa", "iterations"): {"0", "3"},
    ("names.parameter", "path"): TEXTS | {"empty text"},
    ("names.parameter", "names"): {name for name in VALUES if name.startswith("dict")}
    | {"mixed keys", "inner mixed keys", "keys None", "function"},
    ("LoraConfig.from_dict", "values"): {"dict"},
    ("QuantConfig.from_dict", "values"): {"dict"},
}
for name in ("kaiming", "gaussian", "lookup", "orthogonal"):
    TAKEN[f"initializers.{name}", "scale"] = SCALARS | {"None"}  # unused
    TAKEN[f"initializers.{name}", "weight"] = {"float16 array", "nan array", "shape"}
for name in ("pissa", "olora"):
    TAKEN[f"initializers.{name}", "scale"] = SCALARS
    TAKEN[f"initializers.{name}", "key"] = KEYS | {"None"}  # unused


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("arguments"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def takes(function, argument, value):
    """Whether a value is a right one of an argument."""
    default = options_of(FUNCTIONS[function])[argument]
    taken = TAKEN.get((function, argument), TAKEN.get(argument, ()))
    return value in taken or (default is None and value == "None")


def outcome(function, arguments):
    """None where a call succeeds, "clear" where it raises the library's error, else the error."""
    try:
        result = function(**arguments)
        getattr(result, "wait", lambda: None)()
    except lowrank.LowrankError as error:
        return "clear" if len(str(error)) > 20 else f"no words: {error!r}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "users_function" for frame in frames):
            return "clear"  # the user's own
        where = f"{frames[-1].filename}:{frames[-1].lineno}"
        return f"{type(error).__name__}: {str(error)[:80]} ({where})"
    return None


def problems_of(model, function, names):
    """What is wrong with the calls of a function with wrong values of each argument in turn."""
    found = []
    for argument in options_of(FUNCTIONS[function]):
        for name in names:
            result = outcome(FUNCTIONS[function], {**model.call(function), argument: VALUES[name]})
            if result is None and not takes(function, argument, name):
                found.append(f"{argument}={name}: accepted")
            elif result not in (None, "clear"):
                found.append(f"{argument}={name}: {result}")
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_valid_calls_are_accepted(model, function):
    assert outcome(FUNCTIONS[function], model.call(function)) is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_values_are_refused_clearly(model, function):
    assert not problems_of(model, function, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_wrong_values_are_refused_clearly(model, function):
    assert not problems_of(model, function, VALUES)


def test_a_forgotten_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'params'"):
        lowrank.init(0, config=lowrank.LoraConfig())
    with pytest.raises(TypeError, match="unexpected keyword argument 'scales'"):
        lowrank.combine({}, {}, scales=1)


# the constructors of configurations

ODD = [*VALUES.items(), *((f"mapping to {name}", {"w": VALUES[name]}) for name in VALUES)]
ODD += [("large axes", {"w": (0, 2**70)}), ("bool axes", {"w": (True, 0)})]
ODD += [("1e-40", 1e-40), ("1e38", 1e38), ("10**400", 10**400), ("list of nan", [float("nan")])]


def fields():
    return [(kind, field.name) for kind in CONFIGS for field in dataclasses.fields(kind)]


each_field = pytest.mark.parametrize(
    ("kind", "name"), fields(), ids=lambda part: getattr(part, "__name__", part)
)


def has_type(value, hint):
    """Whether a value is of a type, where True is not an integer."""
    options = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in options or hint is typing.Any
    if float in options and isinstance(value, int):
        return True
    return hint is typing.Any or isinstance(value, options)


@pytest.mark.parametrize(
    ("kind", "name"), fields(), ids=lambda part: getattr(part, "__name__", part)
)
def test_what_a_configuration_takes_is_right(kind, name):
    hint = typing.get_type_hints(kind)[name]
    others = {"method": "vera"} if name == "projection_seed" else {}
    wrong = []
    for label, value in ODD:
        try:
            config = kind(**{name: value}, **others)
        except lowrank.LowrankError:
            continue
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
            continue
        if problem := flaw_of(config, name, hint):
            wrong.append(f"{label}: {problem}")
    assert not wrong


def flaw_of(config, name, hint):
    """What is wrong with a configuration that was accepted, or None."""
    if not has_type(getattr(config, name), hint):
        return f"{getattr(config, name)!r} is not a {hint}"
    text = json.dumps(config.to_dict(), allow_nan=False)
    if type(config).from_dict(json.loads(text)) != config or hash(config) is None:
        return "it does not come back from JSON"
    if isinstance(config, lowrank.LoraConfig):
        numbers = [config.rank, *config.rank_pattern.values()]
        numbers += [
            n for axes in (*config.stack.values(), *config.train_rows.values()) for n in axes
        ]
        if any(isinstance(number, bool) or abs(number) >= 2**31 for number in numbers):
            return f"no array has such sizes or axes: {numbers}"
        alphas = [config.alpha, *config.alpha_pattern.values()]
        scales = np.float32([config.scale_of(r, a) for r in numbers[:1] for a in alphas])
        if not (np.isfinite(scales) & (scales >= np.finfo(np.float32).tiny)).all():
            return f"scales {scales}"
    return None


@pytest.mark.parametrize(
    ("kind", "name"), fields(), ids=lambda part: getattr(part, "__name__", part)
)
def test_from_dict_refuses_wrong_values_clearly(kind, name):
    wrong = []
    more = [("pairs", [[1, 2]]), ("pair of regexes", [[{"re": "("}, 1]]), ("short", [["w"]])]
    more += [
        ("no regex", {"re": "("}),
        ("regex of number", {"re": 5}),
        ("flags", {"re": "w", "flags": "x"}),
    ]
    for label, value in [*ODD, *more]:
        try:
            kind.from_dict({name: value})
        except lowrank.LowrankError:
            continue
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
    assert not wrong


# what is accepted since it was asked for


def test_an_integer_is_a_seed():
    params, config = {"w": jnp.ones((6, 4))}, lowrank.LoraConfig(rank=2, targets="w")
    for seed in (0, 7, np.int64(7), 2**32 - 1):
        _, lora = lowrank.init(seed, params, config)
        _, same = lowrank.init(jax.random.key(int(seed)), params, config)
        assert (lora["w"].a == same["w"].a).all()


def test_initializers_go_by_name_and_by_pattern():
    params = {name: jnp.eye(6, 4) + jnp.ones((6, 4)) for name in ("a1", "a2", "b", "c")}
    config = lowrank.LoraConfig(rank=2, targets="*")
    pissa, gaussian = lowrank.initializers.pissa, lowrank.initializers.gaussian
    init = lambda initializer: lowrank.init(0, params, config, initializer=initializer)
    same = lambda one, other: jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), one, other))
    assert same(init("pissa"), init(pissa))
    exact = {"a1": gaussian, "a2": pissa, "b": pissa}
    patterns = {"a*": "pissa", "a1": "gaussian", re.compile("b"): pissa}
    assert same(init(patterns), init(exact))  # a leaf's own path goes before patterns
    with pytest.raises(lowrank.PatternError, match=r"pattern 'd\*' matches none of the 4 leaves"):
        init({"a*": "pissa", "d*": "pissa"})
    with pytest.raises(lowrank.ConfigError, match=r"initializer\['a\*'\] is a str, 'loftq'"):
        init({"a*": "loftq"})


@pytest.mark.parametrize(
    "made",
    [None, 1.0, "abc", (), (None, None, None), (1.0, 2.0, None), (jnp.ones((6, 2)),) * 2,
     (jnp.ones((6, 2)), jnp.ones((2, 4), int), None), (jnp.ones((6, 2)), jnp.ones((2, 4)), 0.0),
     (jnp.ones((6, 2)), jnp.ones((2, 4)), jnp.ones(())), (jnp.ones(3), jnp.ones(3), None)],
)  # fmt: skip
def test_an_initializer_that_returns_something_else_is_named(made):
    own = lambda key, weight, rank, scale: made
    config = lowrank.LoraConfig(rank=2, targets="w")
    with pytest.raises(lowrank.LowrankError, match=r"the initializer '<lambda>' returned"):
        lowrank.init(0, {"w": jnp.ones((6, 4))}, config, initializer=own)


def test_every_initializer_that_is_a_function_has_a_name():
    public = {name: getattr(lowrank.initializers, name) for name in lowrank.initializers.__all__}
    drawing = {name for name, own in public.items() if next(iter(options_of(own)), "") == "key"}
    assert drawing == {*lowrank.initializers.BY_NAME}


def test_an_optimizer_of_nothing_is_refused():
    with pytest.raises(lowrank.ConfigError, match=r"make_tx returned None; expected an Optax"):
        lowrank.lora_plus(lambda rate: None, 0.1)
    lowrank.only_adapters(optax.chain(optax.clip(1.0), optax.sgd(0.1)))


def test_a_dict_that_cannot_be_sorted_is_named_by_its_path():
    tree = {"params": [{"w": {0: jnp.ones(3), "a": jnp.ones(3)}}]}
    for call in (lowrank.fingerprint, lowrank.trainable_mask, lowrank.dequantize):
        with pytest.raises(lowrank.TreeError, match=r"at 'params/0/w' .* \(int and str\)"):
            call(tree)


def test_traced_values_and_shapes_are_accepted_as_before(model):
    init = lambda key, params: lowrank.init(key, params, model.config)
    shapes = jax.eval_shape(init, jax.random.key(0), model.params)
    assert shapes[1]["w"].a.shape == (64, 2)
    scaled = jax.jit(lambda scale: lowrank.merge(model.base, model.lora, scale=scale)["w"])
    assert scaled(jnp.float32(0.5)).shape == (64, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: lowrank.init(key, model.params, model.config)[1])(keys)
    assert many["w"].a.shape == (3, 64, 2)
    rate = jax.jit(lambda rate: lowrank.lora_plus(optax.sgd, rate).init(model.lora))
    rate(0.1)
    draw = jax.vmap(lambda key: lowrank.initializers.kaiming(key, jnp.ones((6, 4)), 2, 1.0)[0])
    assert draw(keys).shape == (3, 6, 2)
