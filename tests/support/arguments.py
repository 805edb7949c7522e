"""Valid calls of the public functions, and wrong values of any argument."""

import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import P

import lowrank_jax as lowrank
from lowrank_jax import bitsandbytes, checkpoint, huggingface, initializers, names, peft

MODULES = (lowrank, peft, huggingface, bitsandbytes, checkpoint, initializers, names)
CONFIGS = (lowrank.LoraConfig, lowrank.QuantConfig)


def public_functions():
    """name -> function, by introspection: what has no underscore and is defined in the package."""
    found = {}
    for module in MODULES:
        own = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for name in own:
            value = getattr(module, name)
            at_home = module is lowrank or hasattr(module, "__all__")
            if inspect.isfunction(value) and (
                at_home or value.__module__.startswith(module.__name__)
            ):
                found[f"{module.__name__}.{name}".removeprefix("lowrank_jax.")] = value
    for kind in (*CONFIGS, lowrank.Fingerprint):
        found[f"{kind.__name__}.from_dict"] = kind.from_dict
    return found


def users_function(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def options_of(function):
    """argument -> default, of those that can be given by keyword, from the signature."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in found if parameter.kind not in kinds}


class Model:
    """One small model and all that can be made of it."""

    def __init__(self, root):
        self.root = Path(root)
        self.count = 0
        self.params = {"w": jnp.ones((64, 4)), "v": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        self.x = jnp.ones((2, 64))
        self.config = lowrank.LoraConfig(rank=2, targets="w")
        self.base, self.lora = lowrank.init(jax.random.key(0), self.params, self.config)
        self.tree = lowrank.combine(self.base, self.lora)
        dora = lowrank.LoraConfig(rank=2, targets="w", dora=True)
        self.normed = lowrank.init(jax.random.key(0), self.params, dora)
        self.quant = lowrank.QuantConfig(targets="w")
        self.frozen = lowrank.quantize(self.params, self.quant)
        self.plan = lowrank.plan(users_function, self.params, self.x)
        self.names = {"w": "model.w", "v": "model.v", "bias": "model.b"}
        self.tensors = bitsandbytes.to_state_dict(self.frozen["w"], "q.weight")
        self.model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.layers = {"head": {"kernel": jnp.ones((4, 3))}}
        node = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)
        self.adapter = {"head": {"kernel": node}}
        self.written = {name: str(self.root / name) for name in ("hf", "peft", "saved", "bnb")}
        huggingface.save(self.written["hf"], self.layers)
        peft.save(self.written["peft"], self.adapter, lowrank.LoraConfig(rank=2))
        checkpoint.save(self.written["saved"], lora=self.lora, config=self.config, step=1)
        self._write_four_bits(Path(self.written["bnb"]))

    def _write_four_bits(self, folder):
        from safetensors.numpy import save_file

        folder.mkdir()
        config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, folder / "model.safetensors")

    def place(self):
        """A folder that is not there yet."""
        self.count += 1
        return str(self.root / f"new{self.count}")

    def call(self, name):
        """A valid call of a function, by keyword."""
        key, weight = jax.random.key(0), jnp.ones((6, 4)) + jnp.eye(6, 4)
        drawn = {"key": key, "weight": weight, "rank": 2, "scale": 2.0}
        both = {"base": self.base, "lora": self.lora}
        covariances = {"w": jnp.eye(64)}
        calls = {
            "combine": lambda: both,
            "merge": lambda: both,
            "fold_norms": lambda: dict(zip(("base", "lora"), self.normed, strict=True)),
            "partition": lambda: {"tree": self.tree},
            "stack": lambda: {"loras": [self.lora, self.lora]},
            "select": lambda: {"many": lowrank.stack([self.lora, self.lora]), "index": 1},
            "blend": lambda: {"loras": [self.lora, self.lora], "weights": [0.5, 0.5]},
            "compress": lambda: {"lora": self.lora, "rank": 1},
            "extract": lambda: {
                "base": self.params, "tuned": jax.tree.map(lambda x: x + 1, self.params), "rank": 1,
            },
            "quantize_adapter": lambda: {"lora": self.lora, "quant": lowrank.QuantConfig()},
            "pool": lambda: {"lora_like": self.lora, "slots": 2},
            "covariances": lambda: {"fn": users_function, "config": self.config},
            "fingerprint": lambda: {"tree": self.params},
            "functional": lambda: {"model": self.model},
            "functional_with_state": lambda: {"model": self.model},
            "init": lambda: {"key": key, "params": self.params, "config": self.config},
            "lift": lambda: {"fn": users_function},
            "factor_labels": lambda: {"lora": self.lora},
            "trainable_mask": lambda: {"tree": self.tree},
            "lora_plus": lambda: {"make_tx": optax.sgd, "learning_rate": 0.1},
            "checkpoint_policy": lambda: {"policy": jax.checkpoint_policies.dots_saveable},
            "map_adapters": lambda: {"fn": lambda nodes: nodes, "tree": self.tree},
            "only_adapters": lambda: {"tx": optax.sgd(0.1)},
            "offload_state": lambda: {"tx": optax.sgd(0.1)},
            "quantize_state": lambda: {"tx": optax.sgd(0.1)},
            "plan": lambda: {"fn": users_function, "params": self.params, "x": self.x},
            "estimate": lambda: {"step": lambda: jnp.ones(2)},
            "report": lambda: {"fn": users_function, "tree": self.tree, "x": self.x},
            "quantization_error": lambda: {"dense": self.params, "frozen": self.frozen},
            "quantize": lambda: {
                "params": jax.tree.map(jnp.copy, self.params), "quant": self.quant,
            },
            "dequantize": lambda: {"frozen": self.frozen},
            "tabulate": lambda: {"tree": self.tree},
            "specs": lambda: {"tree": self.base, "dense_specs": {"w": P(), "v": P(), "bias": P()}},
            "peft.save": lambda: {
                "directory": self.place(), "lora": self.adapter, "config": self.config,
            },
            "peft.load": lambda: {"directory": self.written["peft"], "params": self.layers},
            "peft.servable": lambda: both,
            "peft.tensors": lambda: {"lora": self.adapter, "config": self.config},
            "huggingface.load": lambda: {"folder": self.written["hf"], "like": self.layers},
            "huggingface.save": lambda: {"folder": self.place(), "params": self.layers},
            "huggingface.merge": lambda: {
                "base": self.written["hf"], "adapter": self.written["peft"],
                "folder": self.place(),
            },
            "bitsandbytes.from_state_dict": lambda: {"tensors": self.tensors, "name": "q.weight"},
            "bitsandbytes.to_state_dict": lambda: {"node": self.frozen["w"], "name": "q.weight"},
            "bitsandbytes.load": lambda: {"directory": self.written["bnb"]},
            "checkpoint.save": lambda: {
                "directory": self.place(), "lora": self.lora, "config": self.config,
            },
            "checkpoint.save_async": lambda: {
                "directory": self.place(), "lora": self.lora, "config": self.config,
            },
            "checkpoint.restore": lambda: {"directory": self.written["saved"]},
            "checkpoint.exists": lambda: {"directory": self.written["saved"]},
            "initializers.corda": lambda: {"covariances": covariances},
            "initializers.eva": lambda: {"covariances": covariances, "config": self.config},
            "initializers.loftq": lambda: {"quant": self.quant},
            "initializers.lora_ga": lambda: {"gradients": {"w": jnp.ones((64, 4))}},
            "initializers.randomized_pissa": dict,
            "names.parameter": lambda: {"path": "head/kernel"},
            "LoraConfig.from_dict": lambda: {"values": self.config.to_dict()},
            "QuantConfig.from_dict": lambda: {"values": self.quant.to_dict()},
            "Fingerprint.from_dict": lambda: {
                "values": lowrank.fingerprint(self.params).to_dict()
            },
        }  # fmt: skip
        drawing = ("gaussian", "kaiming", "lookup", "olora", "orthogonal", "pissa")
        calls |= {f"initializers.{name}": lambda: drawn for name in drawing}
        return dict(calls[name]())


def wrong_values():
    """name -> a value that few arguments take."""
    node = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
    return {
        "None": None,
        "True": True,
        "False": False,
        "-1": -1,
        "0": 0,
        "3": 3,
        "2**70": 2**70,
        "-2**70": -(2**70),
        "1.5": 1.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": float("-inf"),
        "1e-60": 1e-60,
        "1j": 1j,
        "empty text": "",
        "text": "nonsense",
        "text with NUL": "non\0sense",
        "lone surrogate": "\ud800",
        "glob": "**",
        "bytes": b"",
        "path": Path("nowhere", "at", "all"),
        "list": [],
        "list of None": [None],
        "list of list": [[]],
        "list of text": ["nonsense"],
        "tuple": (),
        "mixed tuple": (1, "a", None, 2.5),
        "dict": {},
        "dict of None": {"w": None},
        "dict of number": {"w": -1},
        "dict of True": {"w": True},
        "dict of text": {"w": "nonsense"},
        "dict of list": {"w": [1, "a"]},
        "dict of nan": {"w": float("nan")},
        "dict of object": {"w": object()},
        "dict of function": {"w": lambda *args, **kwargs: None},
        "dict of dict": {"w": {"w": {}}},
        "dict of array": {"w": jnp.ones((2, 3, 5))},
        "dict of text array": {"w": np.array(["a", "b"])},
        "mixed keys": {1: jnp.ones((4, 3)), "a": jnp.ones((4, 3))},
        "inner mixed keys": {"w": {1: jnp.ones((4, 3)), "a": jnp.ones((4, 3))}},
        "keys None": {None: 1},
        "set": {1, 2},
        "set of text": {"w"},
        "object": object(),
        "function": lambda *args, **kwargs: None,
        "regex": re.compile("w"),
        "bytes regex": re.compile(b"w"),
        "float16 array": np.ones((3, 1), np.float16),
        "complex array": np.ones((64, 4), np.complex64),
        "bool array": np.ones(3, bool),
        "int array": np.arange(2),
        "scalar array": jnp.float32(0.5),
        "nan array": jnp.full((64, 4), jnp.nan),
        "empty array": np.ones((0, 4), np.float32),
        "integer array": jnp.int32(3),
        "bfloat16": np.ones((), jnp.bfloat16)[()],
        "text array": np.array(["a", "b"]),
        "object array": np.array([None, {}], object),
        "dates": np.array(["2020-01-01"], "datetime64[D]"),
        "NumPy nan": np.float64("nan"),
        "NumPy True": np.bool_(True),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0), 3),
        "old key": jax.random.PRNGKey(0),
        "shape": jax.ShapeDtypeStruct((4, 3), jnp.float32),
        "iterator": iter(()),
        "node": node,
        "dict of node": {"w": node},
        "LoraConfig": lowrank.LoraConfig(),
        "QuantConfig": lowrank.QuantConfig(),
        "dtype": np.dtype("float32"),
        "spec": P("data"),
    }
