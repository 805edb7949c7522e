"""The command line: `python -m lowrank_jax inspect | merge | convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lowrank_jax import huggingface, names
from lowrank_jax._cli.converting import convert
from lowrank_jax._cli.inspecting import describe
from lowrank_jax._display.text import to_printable, to_printable_lines
from lowrank_jax._errors import LowrankError

TABLES = sorted(name for name, value in vars(names).items() if isinstance(value, names.Table))

# a printed line is cut at this length, for names come from untrusted files
_LINE_LIMIT = 4000


def _parse_table(name: str) -> names.Table:
    """Return the table of names, given its name in any case."""
    if name.upper() not in TABLES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(TABLES)}")
    return getattr(names, name.upper())


def _inspect(options: argparse.Namespace) -> list[str]:
    return describe(options.folder)


def _merge(options: argparse.Namespace) -> list[str]:
    changed = huggingface.merge(options.base, options.adapter, options.out, names=options.names)
    return [f"{options.out}: {len(changed)} tensors of {options.base} changed by {options.adapter}"]


def _convert(options: argparse.Namespace) -> list[str]:
    kind = convert(options.source, options.out, options.names)
    return [f"{options.out}: {kind}, made of {options.source}"]


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_jax",
        description="Inspect, merge and convert adapters and models on disk.",
        epilog="Tensors are read one at a time, and nothing is unpickled. The exit status is 0, or "
        "1 with the reason on standard error.",
    )
    commands = parser.add_subparsers(title="commands", required=True)
    table = {
        "type": _parse_table,
        "metavar": "TABLE",
        "help": "torch's names of a checkpoint's leaves: "
        f"{', '.join(t.lower() for t in TABLES)}; the default is a leaf's path with dots",
    }

    what = "describe what a folder holds: a PEFT adapter, a checkpoint, or a model"
    command = commands.add_parser("inspect", help=what, description=f"{what.capitalize()}.")
    command.add_argument("folder", type=Path)
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
    command.add_argument("--names", **table)
    command.set_defaults(run=_convert)
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
    """Print lines; characters that the stream cannot encode are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), file=stream)
