"""The last lines of the main job: what each loss is, and which commands come next."""

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from smollm2 import HUB_NAME
from texts import DICTIONARY

Losses = dict[str, float]  # of the text learned, "held out", and of the "other" one


def print_end(
    announce: Callable[[str], None],
    flags: argparse.Namespace,
    stages: dict[str, Losses],
    stored: str,
) -> None:
    """Says what was learned and forgotten, and what to do with the adapter.

    Args:
      announce: prints lines.
      flags: of the job.
      stages: name -> losses, the last two before and after the training.
      stored: how the model's file has the weights.
    """
    before, after = [*stages.values()][-2:]
    change = lambda name: f"{before[name]:.3f} before, {after[name]:.3f} after the training"
    if flags.quantize != "none":
        dense, own = stages["before, dense"]["held out"], before["held out"]
        announce(
            f"{flags.quantize} costs {own - dense:+.3f} nats per token before the training, with "
            f"the adapter's start; the dense weights were decoded from {stored}"
        )
    announce(
        "mean losses in nats per token, on windows that were not trained on (lower is better):\n"
        f"  learned:   {change('held out')}, on {flags.text.name}, its held-out part\n"
        f"  forgotten: {change('other')}, on Python's documentation\n"
        "next, base against adapter in a chat:\n"
        f"  {generate_command(flags)}"
    )
    if flags.quantize != "none" and flags.start == "loftq":
        announce(
            "this adapter also corrects the quantized base, so it is for that base alone; one that "
            "PEFT can load is trained with --start zero"
        )
    else:
        announce(f"and for PEFT:\n  {convert_command(flags)}")


def generate_command(flags: argparse.Namespace) -> str:
    """The command that chats with base and adapter."""
    program = os.path.relpath(Path(__file__).with_name("generate.py"))
    words = ["python", program, "--adapter", str(flags.out)]
    words += ["--model", str(flags.model)] if flags.model else []
    rebuilt = flags.quantize != "none" and flags.start == "loftq" and flags.text != DICTIONARY
    words += ["--text", str(flags.text)] if rebuilt else []
    return shlex.join(words)


def convert_command(flags: argparse.Namespace) -> str:
    """The command that writes the adapter in PEFT's format."""
    words = ["python", "-m", "lowrank_jax", "convert", str(flags.out), "peft-folder"]
    return shlex.join([*words, "--base-model", "NAME" if flags.model else HUB_NAME])
