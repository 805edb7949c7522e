"""A run that can be killed at any time: its checkpoint says what it was and how far it came.

The flags that decide its losses are saved in the checkpoint, as its `extra`, and in no second file:
one checkpoint is replaced by one rename, so that flags and adapter always belong together.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flags import STARTS
from frozen import FORMATS
from smollm2 import ExampleError, sha256

import lowrank_jax as lowrank

Tree = Any

NUMBERS = ("steps", "learning_rate", "batch", "length", "seed")


@dataclass(frozen=True)
class Run:
    """A run: where it is saved, and everything that decides its losses."""

    folder: Path
    steps: int
    config: lowrank.LoraConfig
    settings: dict[str, Any]  # what the config does not hold: numbers, and digests [32] uint8


def describe(
    flags: argparse.Namespace, config: lowrank.LoraConfig, text: tuple[str, str], model: Path
) -> Run:
    """The run that these flags ask for; a text and a model are what they hold, not their paths."""
    settings = {name: getattr(flags, name) for name in NUMBERS}
    settings["quantize"] = FORMATS.index(flags.quantize)
    settings["start"] = STARTS.index(flags.start)
    settings["text"] = digest(hashlib.sha256("\0".join(text).encode()).hexdigest())
    settings["model"] = digest(sha256(model))
    return Run(flags.out, flags.steps, config, settings)


def digest(text: str) -> np.ndarray:
    """A SHA-256 in hexadecimal as an array [32] uint8, for a checkpoint holds no strings."""
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def goes_on(run: Run, resume: bool, announce: Callable[[str], None]) -> bool:
    """Says whether to go on from the checkpoint in the run's folder, or to start.

    Raises:
        ExampleError: the checkpoint is of another run, or starting would destroy an unfinished one.
    """
    if not lowrank.checkpoint.exists(run.folder):
        if resume:
            announce(f"no checkpoint in {run.folder} yet: starting from the beginning")
        return False
    found = lowrank.checkpoint.restore(run.folder)
    saved = found.extra
    if not isinstance(saved, dict) or saved.keys() != run.settings.keys():
        raise ExampleError(
            f"--out {run.folder} holds a checkpoint that is not of a run of this job "
            "(or of another version of it): pass another --out, or --replace to rename it first"
        )
    done = f"{found.step} of {saved['steps']} steps"
    finished = found.step == saved["steps"]
    if not resume:
        if not finished:
            raise ExampleError(
                f"--out {run.folder} holds an unfinished run ({done}): add --resume to go on with "
                "it, or pass another --out, or --replace to rename it first"
            )
        announce(f"{run.folder} holds a finished run, which this one will replace")
        return False
    if lines := differences(shown(run.config, run.settings), shown(found.config, saved)):
        raise ExampleError(
            f"--resume: {run.folder} holds a run of other flags ({done}):\n"
            + "\n".join(lines)
            + "\npass the flags it was started with, or another --out for a new run"
        )
    announce(
        f"the run in {run.folder} is finished ({done}): evaluating it again"
        if finished
        else f"going on with the run in {run.folder}: {done} are done"
    )
    return True


def shown(config: lowrank.LoraConfig, settings: dict[str, Any]) -> dict[str, str]:
    """All that decides a run's losses, as text by name."""

    def text(value: Any) -> str:
        if value is None:
            return "not given"
        if isinstance(value, list):
            return ",".join(str(item) for item in value)
        if hasattr(value, "dtype"):
            return f"of SHA-256 {np.asarray(value).tobytes().hex()[:12]}"
        return str(value)

    named = {"quantize": FORMATS[settings["quantize"]], "start": STARTS[settings["start"]]}
    return {name: text(value) for name, value in (config.to_dict() | settings | named).items()}


def differences(came: dict[str, str], expected: dict[str, str]) -> list[str]:
    """A line for each flag that is not as expected."""
    return [
        f"  --{name.replace('_', '-')}: {value}, expected {expected.get(name, 'nothing')}"
        for name, value in came.items()
        if value != expected.get(name)
    ]


def saver(run: Run, base: lowrank.Fingerprint, every: int) -> Callable[[Tree, Tree, int], bool]:
    """Returns a function of adapter, optimizer state and step: it saves where one is due.

    Its result says whether it saved. The place in the data follows from the step.
    """

    def save(lora: Tree, optimizer_state: Tree, step: int) -> bool:
        due = step % every == 0 or step == run.steps
        if due:
            lowrank.checkpoint.save(
                run.folder,
                lora=lora,
                config=run.config,
                base=base,
                opt_state=optimizer_state,
                step=step,
                extra=run.settings,
            )
        return due

    return save


def restore(
    run: Run, base: lowrank.Fingerprint, lora: Tree, optimizer_state: Tree
) -> tuple[Tree, Tree, int]:
    """Returns what was saved last: adapter and optimizer state like these, and the step."""
    like = {"lora": lora, "opt_state": optimizer_state}
    found = lowrank.checkpoint.restore(run.folder, base=base, like=like)
    return found.lora, found.opt_state, found.step
