"""The command line: `python -m lowrank_jax inspect | merge | convert | estimate`."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import jax

from lowrank_jax._cli import estimating
from lowrank_jax._cli.converting import convert
from lowrank_jax._cli.inspecting import describe
from lowrank_jax._cli.merging import merge
from lowrank_jax._cli.naming import PATHS, TABLES
from lowrank_jax._display.text import to_printable, to_printable_lines
from lowrank_jax._errors import LowrankError

# a printed line is cut at this length, for names come from untrusted files
_LINE_LIMIT = 4000


def _parse_names(name: str) -> str:
    """Return how modules are named, in lower case."""
    if name.lower() not in (*TABLES, PATHS):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join((*TABLES, PATHS))}")
    return name.lower()


def _inspect(options: argparse.Namespace) -> list[str]:
    return describe(options.path)


def _merge(options: argparse.Namespace) -> list[str]:
    return merge(options.base, options.adapter, options.out, options.names)


def _convert(options: argparse.Namespace) -> list[str]:
    return convert(options.source, options.out, options.names, options.base_model)


def _estimate(options: argparse.Namespace) -> list[str]:
    return str(estimating.estimate_llama(options)).split("\n")


def _describe_versions() -> str:
    """Return the versions of this package, of JAX and of Python, for a report of a problem."""
    own = importlib.import_module(__name__.partition(".")[0]).__version__
    return f"lowrank_jax {own} (JAX {jax.__version__}, Python {platform.python_version()})"


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_jax",
        description="Inspect, merge and convert adapters and models on disk; estimate memory.",
        epilog="Tensors are read one at a time, and nothing is unpickled. The exit status is 0, or "
        "1 with the reason on standard error.",
    )
    parser.add_argument("--version", action="version", version=_describe_versions())
    commands = parser.add_subparsers(title="commands", required=True)
    table = {
        "type": _parse_names,
        "metavar": "TABLE",
        "help": "the table that names the modules of a checkpoint's leaves: "
        f"{', '.join(TABLES)}; or {PATHS}, a leaf's path with dots. By default the table of the "
        "model in the base's config.json, else the only table that fits the leaves, else "
        f"{PATHS}",
    }

    what = "describe an adapter, a checkpoint or a model: a folder, a GGUF or a safetensors file"
    command = commands.add_parser("inspect", help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.add_argument("path", type=Path, help="folder or file")
    command.set_defaults(run=_inspect)

    what = "merge an adapter into a model's safetensors, tensor by tensor"
    command = commands.add_parser(
        "merge",
        help=what,
        description=f"{what.capitalize()}: W + s B A in float32, cast once to W's dtype. The "
        "model's code is not needed. Whether the adapter was trained on this model is not checked.",
    )
    command.add_argument("base", type=Path, help="folder of the model")
    command.add_argument("adapter", type=Path, help="folder of a PEFT adapter, or a checkpoint")
    command.add_argument("out", type=Path, help="folder to write to; a model in it is replaced")
    command.add_argument("--names", **table)
    command.set_defaults(run=_merge)

    what = "convert a checkpoint of lowrank_jax to a PEFT adapter, or vice versa"
    command = commands.add_parser(
        "convert",
        help=what,
        description=f"{what.capitalize()}. The leaves of a checkpoint made from a PEFT adapter "
        "are named after its modules: model/layers/0/self_attn/q_proj/kernel.",
    )
    command.add_argument("source", type=Path, help="folder of either kind")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument(
        "--base-model",
        metavar="NAME",
        help="name or folder of the model that the adapter is for, for PEFT's configuration",
    )
    command.add_argument("--names", **table)
    command.set_defaults(run=_convert)

    what = "estimate the memory of a training step over adapters on a Llama"
    command = commands.add_parser(
        "estimate",
        help=what,
        description=f"{what.capitalize()}, as the compiler assigns it: AdamW, adapters on all "
        "linear layers, layers scanned. No weights are read, and nothing runs.",
    )
    estimating.add_arguments(command)
    command.set_defaults(run=_estimate)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _build_parser().parse_args(arguments)
    try:
        _print([to_printable(line, _LINE_LIMIT) for line in options.run(options)], sys.stdout)
    except (LowrankError, OSError) as error:
        _print([to_printable_lines(f"lowrank_jax: {error}")], sys.stderr)
        return 1
    return 0


def _print(lines: list[str], stream: TextIO) -> None:
    """Print lines; characters that the stream cannot encode are escaped.

    A terminal's lines are broken between words, for it would break them anywhere.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(
            width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        lines = [wrapper.fill(part) for line in lines for part in line.split("\n")]
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), file=stream)
