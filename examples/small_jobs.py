"""What the smaller jobs on SmolLM2 share: the model with its plan, batches, and how main ends."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from flags import Flags, number
from frozen import FORMATS, quantization
from llama import Llama
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from smollm2 import ExampleError, Pretrained

import lowrank_jax as lowrank

LOG_WIDTH = 140


@dataclass(frozen=True)
class Job:
    """A model to adapt: what its file says, its modules, its weights and how they are used."""

    pretrained: Pretrained
    model: Llama
    params: Any
    plan: Any

    @property
    def apply(self) -> Callable:
        """The model's function, for adapted weights."""
        return lowrank.lift(self.model.apply)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every job has."""
    parser = Flags(description=description)
    add = parser.add_argument
    add("--model", type=Path, help="a Llama in a GGUF file (SmolLM2-135M, fetched once)")
    add("--quantize", choices=FORMATS, default="none", help="format of the base (%(default)s)")
    add("--seed", type=number(int, above=-1), default=0, help="of all that is drawn (%(default)s)")
    return parser


def read_model(flags: argparse.Namespace, console: Console) -> Job:
    """Reads the model, and quantizes its linear layers if that is asked for."""
    file = flags.model or smollm2.fetch(console.print)
    with console.status(f"reading {file.name}"):
        pretrained = smollm2.load(file)
        model, params = Llama(pretrained.config), pretrained.variables
        plan = lowrank.plan(model.apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        if flags.quantize != "none":
            params = lowrank.quantize(params, quantization(flags.quantize), plan=plan)
    console.print(f"{pretrained.name}, base {flags.quantize}")
    return Job(pretrained, model, params, plan)


def run_steps(
    console: Console,
    name: str,
    step: Callable,
    state: Any,
    data: Iterator[Any],
    steps: int,
) -> tuple[Any, list[np.ndarray]]:
    """Runs state, value = step(state, batch) behind a progress bar; returns state and values."""
    columns = [name, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}")]
    values, began = [], time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=steps, now="compiling")
        for batch in islice(data, steps):
            state, value = step(state, batch)
            values.append(np.asarray(value))
            if not np.isfinite(values[-1]).any():
                raise ExampleError(f"no loss is finite at step {len(values)}: lower the rates")
            now = f"loss {np.nanmin(values[-1]):.3f}"
            progress.update(task, advance=1, now=now)
            if not console.is_terminal:
                console.print(f"step {len(values)}/{steps}  {now}")
    console.print(f"{steps} steps in {time.perf_counter() - began:.0f} s, compilation included")
    return state, values


def run_main(
    job: Callable[[argparse.Namespace, Console], Any],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
) -> int:
    """Runs a job; a problem the user can mend is one line and exit status 1."""
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    try:
        job(parser.parse_args(arguments), console)
    except (ExampleError, lowrank.LowrankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
