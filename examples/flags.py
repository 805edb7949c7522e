"""The main job's command line: what is asked for, and one line for what cannot be."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from frozen import FORMATS
from smollm2 import ExampleError
from texts import DICTIONARY

import lowrank_jax as lowrank

STARTS = ("loftq", "zero")  # a checkpoint knows them by their places: append only

DESCRIPTION = """Fine-tunes SmolLM2-135M with LoRA on The Devil's Dictionary, and says what it
learned and forgot: five to ten minutes on two CPU cores."""


class Flags(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what main prints."""
        raise ExampleError(f"{message} (--help lists the flags)")


def number(kind: type, above: int = 0) -> Callable[[str], float]:
    """A flag's type: a number above a bound."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = above
        if not value > above:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} above {above}, got {text!r}")
        return value

    return convert


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the model."""
    parser.add_argument(
        "--model", type=Path, help="a Llama in a GGUF file (SmolLM2-135M, fetched once)"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Flags(description=DESCRIPTION)
    add = parser.add_argument
    add("--rank", type=number(int), default=16, help="rank of every adapter (%(default)s)")
    add("--alpha", type=number(float), help="scale is alpha / rank (twice the rank)")
    add(
        "--dora",
        action="store_true",
        help="train the magnitude of each output feature beside its direction",
    )
    add(
        "--targets",
        default="all-linear",
        help="all-linear, or patterns with commas: q_proj,v_proj or **/mlp/*/kernel (%(default)s)",
    )
    add(
        "--quantize",
        choices=FORMATS,
        default="none",
        help="keep the base's linear layers in 4 bits (nf4, fp4) or 8 (int8), whatever --targets "
        "says; the adapter is float32 all the same (%(default)s)",
    )
    add(
        "--start",
        choices=STARTS,
        default="loftq",
        help="on a quantized base: loftq, an adapter that starts at what quantizing lost (a minute "
        "or two), or zero, one that changes nothing at first (%(default)s)",
    )
    add("--steps", type=number(int), default=40, help="optimizer steps (%(default)s)")
    add("--learning-rate", type=number(float), default=1e-3, help="peak rate (%(default)s)")
    add("--batch", type=number(int), default=4, help="windows in a step (%(default)s)")
    add("--length", type=number(int, above=1), default=128, help="tokens in a window (%(default)s)")
    add_model(parser)
    add("--text", type=Path, default=DICTIONARY, help="text to learn (The Devil's Dictionary)")
    add(
        "--out",
        type=Path,
        default=Path("adapter"),
        help="folder of the adapter; a finished run in it is replaced, anything else is not "
        "(%(default)s)",
    )
    add(
        "--replace",
        action="store_true",
        help="rename what --out holds to OUT.old, and start anew",
    )
    add(
        "--seed",
        type=number(int, above=-1),
        default=0,
        help="of the adapter's start and the order (%(default)s)",
    )
    add(
        "--save-every",
        type=number(int),
        default=10,
        metavar="STEPS",
        help="steps from one checkpoint to the next; the last step is always saved (%(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, which must be of these flags (--save-every may "
        "change); without one, start from the beginning; if the run is finished, evaluate it again",
    )
    flags = parser.parse_args(arguments)
    if flags.replace and flags.resume:
        raise ExampleError("--replace starts anew and --resume goes on: pass one of them")
    return flags


def check_rank(config: lowrank.LoraConfig, params: Any, plan: lowrank.Plan) -> None:
    """Raises an error for a rank that a layer named by --targets cannot have."""
    if "all-linear" in config.targets:
        return  # which gives each layer the largest rank it can have, up to this one
    one = dataclasses.replace(config, rank=1)
    _, lora = jax.eval_shape(lambda tree: lowrank.init(0, tree, one, plan=plan), params)
    is_node = lambda leaf: isinstance(leaf, lowrank.LowRank)
    nodes = [node for node in jax.tree.leaves(lora, is_leaf=is_node) if is_node(node)]
    sizes = lambda node, axes: math.prod(node.shape[axis] for axis in axes)
    most = min(min(sizes(node, node.fan_in), sizes(node, node.fan_out)) for node in nodes)
    if config.rank > most:
        raise ExampleError(
            f"--rank {config.rank} is more than a layer of --targets can have: pass --rank {most} "
            "or less, or --targets all-linear, which gives each layer the largest rank it can have"
        )


def target_patterns(text: str) -> tuple[str, ...]:
    """Turns the flag into patterns of the library; a bare name means the kernels of that module."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ExampleError("--targets is empty: expected all-linear, or patterns with commas")
    bare = re.compile(r"\w+")
    return tuple(f"**/{word}/kernel" if bare.fullmatch(word) else word for word in words)
