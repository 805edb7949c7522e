"""Trains every rank with every learning rate at once, on one base, in one jitted step.

    python examples/sweep.py
    python examples/sweep.py --ranks 4,16,64 --rates 3e-4,1e-3,3e-3 --steps 100

Each adapter has its own rank and its own rate; the base and its products are shared by all. The
table and the curves tell which of them learned The Devil's Dictionary best, and that one is written
to a folder that PEFT reads.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetune import next_token_loss
from flags import number
from rich.console import Console
from rich.table import Table
from small_jobs import make_parser, read_model, run_main, run_steps
from smollm2 import ExampleError
from texts import DICTIONARY, batches, read_text, windows

import lowrank_jax as lowrank

Tree = Any


def numbers(kind: type) -> Callable[[str], tuple]:
    """A flag's type: numbers above 0, with commas."""
    return lambda text: tuple(number(kind)(word) for word in text.split(","))


def make_arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=numbers(int), default=(4, 16), help="with commas (4,16)")
    add("--rates", type=numbers(float), default=(5e-4, 1e-3, 2e-3), help="(5e-4,1e-3,2e-3)")
    add("--steps", type=number(int), default=20, help="optimizer steps (%(default)s)")
    add("--batch", type=number(int), default=2, help="windows in a step (%(default)s)")
    add("--length", type=number(int, above=1), default=128, help="tokens (%(default)s)")
    add("--windows", type=number(int), default=16, help="held-out windows (%(default)s)")
    add("--text", type=Path, default=DICTIONARY, help="text to learn (The Devil's Dictionary)")
    add("--out", type=Path, default=Path("sweep"), help="folder of the winner (%(default)s)")
    return parser


def make_optimizer() -> optax.GradientTransformation:
    """AdamW whose learning rate is in its state, so that each adapter may have another."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)


def make_states(many: Tree, rates: jax.Array) -> Tree:
    """One optimizer state for each adapter of a stack, with its rate, [n, ...]."""

    def start(lora: Tree, rate: jax.Array) -> Tree:
        state = make_optimizer().init(lora)
        return state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})

    return jax.vmap(start)(many, rates)


def make_step(apply: Callable) -> Callable:
    """A jitted step of all adapters: state is (base, adapters, optimizer states)."""
    optimizer = make_optimizer()

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(base: Tree, many: Tree, states: Tree, tokens: jax.Array) -> tuple[Tree, Tree, Any]:
        def one(lora: Tree, state: Tree) -> tuple[Tree, Tree, Any]:
            loss = lambda lora: next_token_loss(apply, lowrank.combine(base, lora), tokens)
            value, gradients = jax.value_and_grad(loss)(lora)
            updates, state = optimizer.update(gradients, state, lora)
            return optax.apply_updates(lora, updates), state, value

        return jax.vmap(one)(many, states)

    def run(state: tuple[Tree, Tree, Tree], tokens: np.ndarray) -> tuple[Any, Any]:
        base, many, states = state
        many, states, values = step(base, many, states, tokens)
        return (base, many, states), values

    return run


def evaluate(apply: Callable, base: Tree, many: Tree, data: np.ndarray) -> np.ndarray:
    """Mean held-out loss of each adapter, [n]."""
    loss = lambda lora, tokens: next_token_loss(apply, lowrank.combine(base, lora), tokens)
    all_losses = jax.jit(jax.vmap(loss, (0, None)))
    return np.mean([all_losses(many, data[i : i + 1]) for i in range(len(data))], 0)


def draw(curves: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draws the loss of each adapter at each step, [steps, n], if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for curve, label in zip(curves.T, labels, strict=True):
        axes.plot(np.arange(1, len(curve) + 1), curve, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="training loss of each adapter")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def job(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; returns what it measured."""
    train_text, held_out_text = read_text(flags.text)
    model = read_model(flags, console)
    cut = partial(windows, model.pretrained.tokenizer, length=flags.length)
    data, held_out = cut(train_text), cut(held_out_text)[: flags.windows]
    if len(data) < flags.batch or not len(held_out):
        raise ExampleError(f"{flags.text} is too short for windows of {flags.length} tokens")

    grid = [(rank, rate) for rank in flags.ranks for rate in flags.rates]
    # alpha = rank: all scales are 1, so that Adam's steps have one meaning
    configs = [lowrank.LoraConfig(rank=rank, alpha=rank) for rank, _ in grid]
    start = lambda config: lowrank.init(flags.seed, model.params, config, plan=model.plan)
    base, _ = start(configs[0])
    many = lowrank.stack([start(config)[1] for config in configs])
    states = make_states(many, jnp.array([rate for _, rate in grid], jnp.float32))

    step, order = make_step(model.apply), batches(data, flags.batch, flags.seed)
    state, values = run_steps(console, "sweep", step, (base, many, states), order, flags.steps)
    many, curves = state[1], np.stack(values)
    losses = evaluate(model.apply, base, many, held_out)

    table = Table("rank", "learning rate", "first loss", "last loss", "held out")
    for (rank, rate), curve, loss in zip(grid, curves.T, losses, strict=True):
        table.add_row(f"{rank}", f"{rate:g}", f"{curve[0]:.3f}", f"{curve[-1]:.3f}", f"{loss:.3f}")
    console.print(table)
    flags.out.mkdir(parents=True, exist_ok=True)
    labels = [f"rank {rank}, rate {rate:g}" for rank, rate in grid]
    draw(curves, labels, flags.out / "curves.png")

    best = int(np.nanargmin(losses))
    # what padding added is zero: the adapter of its own rank is the same one
    winner, _ = lowrank.compress(lowrank.select(many, best), grid[best][0])
    lowrank.peft.save(flags.out, winner, configs[best], plan=model.plan, names=lowrank.names.LLAMA)
    console.print(f"the best: {labels[best]}, written to {flags.out}")
    return {"losses": losses, "curves": curves, "best": best, "many": many, "base": base}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return run_main(job, make_arguments(), arguments)


if __name__ == "__main__":
    sys.exit(main())
