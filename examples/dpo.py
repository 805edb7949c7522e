"""Preference tuning (DPO) of SmolLM2: which of two answers is the better one.

    python examples/dpo.py
    python examples/dpo.py --quantize nf4 --steps 60 --beta 0.2

The loss compares the policy with the model that it started from. That model is the base without its
adapter, so that no second model is held: one tree of weights serves both.

For each headword of The Devil's Dictionary the better answer is its own entry, the worse one the
entry of another word. Source: Direct Preference Optimization, arXiv 2305.18290, equation 7.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import number
from rich.console import Console
from rich.table import Table
from small_jobs import make_parser, read_model, run_main, run_steps
from smollm2 import ExampleError
from texts import DICTIONARY, read_text
from tokenizers import Tokenizer

import lowrank_jax as lowrank

Tree = Any


def make_arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--rank", type=number(int), default=16, help="rank of the adapter (%(default)s)")
    add("--steps", type=number(int), default=20, help="optimizer steps (%(default)s)")
    add("--learning-rate", type=number(float), default=5e-4, help="(%(default)s)")
    add("--beta", type=number(float), default=0.1, help="the loss's temperature (%(default)s)")
    add("--batch", type=number(int), default=2, help="pairs in a step (%(default)s)")
    add("--length", type=number(int, above=1), default=64, help="tokens (%(default)s)")
    add("--pairs", type=number(int), default=16, help="held-out pairs (%(default)s)")
    add("--text", type=Path, default=DICTIONARY, help="paragraphs that begin with their word")
    add("--out", type=Path, default=Path("dpo"), help="folder of the adapter (%(default)s)")
    return parser


# The pairs


def read_pairs(tokenizer: Tokenizer, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [n, 2, length], better and worse, and which of them are of the answers."""
    entries = [re.split(r"(?<=\w),? ", " ".join(p.split()), maxsplit=1) for p in text.split("\n")]
    entries = [entry for entry in entries if len(entry) == 2 and len(entry[1].split()) > 4]
    tokens = np.zeros((len(entries), 2, length), np.int32)
    answers = np.zeros(tokens.shape, bool)
    for k, (word, own) in enumerate(entries):
        other = entries[(k + len(entries) // 2) % len(entries)][1]
        start = len(tokenizer.encode(word).ids)
        for side, answer in enumerate((own, other)):
            ids = tokenizer.encode(f"{word} {answer}").ids[:length]
            tokens[k, side, : len(ids)] = ids
            answers[k, side, start : len(ids)] = True
    return tokens, answers


def make_batches(
    pairs: tuple[np.ndarray, np.ndarray], size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of pairs without end, in a new order at every pass."""
    order = np.random.default_rng(seed)
    while True:
        shuffled = order.permutation(len(pairs[0]))
        for start in range(0, len(shuffled) - size + 1, size):
            chosen = shuffled[start : start + size]
            yield pairs[0][chosen], pairs[1][chosen]


# The loss


def score(apply: Callable, variables: Tree, tokens: jax.Array, answers: jax.Array) -> jax.Array:
    """Log-probability of each answer, [b, 2], of tokens [b, 2, length]."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    logits = apply(variables, flat[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, flat[:, 1:])
    return -(losses * answers.reshape(flat.shape)[:, 1:]).sum(-1).reshape(tokens.shape[:2])


def preference_loss(
    apply: Callable, base: Tree, lora: Tree, batch: tuple[jax.Array, jax.Array], beta: float
) -> tuple[jax.Array, jax.Array]:
    r"""The DPO loss, and the share of pairs whose better answer has the larger reward.

    $-\log\sigma(\beta\,(r_w - r_l))$ with the rewards $r = \log\pi(y|x) - \log\pi_0(y|x)$.
    """
    policy = score(apply, lowrank.combine(base, lora), *batch)
    reference = jax.lax.stop_gradient(score(apply, base, *batch))  # the same weights, no adapter
    better, worse = jnp.moveaxis(policy - reference, -1, 0)
    return -jax.nn.log_sigmoid(beta * (better - worse)).mean(), (better > worse).mean()


def make_step(apply: Callable, optimizer: optax.GradientTransformation, beta: float) -> Callable:
    """A jitted step: (base, adapter, optimizer state, batch) -> adapter, state, loss."""

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(base: Tree, lora: Tree, opt_state: Tree, batch: Any) -> tuple[Tree, Tree, jax.Array]:
        loss = lambda lora: preference_loss(apply, base, lora, batch, beta)
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(lora)
        updates, opt_state = optimizer.update(gradients, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    return step


def evaluate(
    apply: Callable, base: Tree, lora: Tree, pairs: tuple[np.ndarray, np.ndarray], beta: float
) -> tuple[float, float]:
    """Mean loss and share of pairs put in order, over all pairs."""
    one = jax.jit(partial(preference_loss, apply, beta=beta))
    parts = [
        one(base, lora, (pairs[0][k : k + 1], pairs[1][k : k + 1])) for k in range(len(pairs[0]))
    ]
    loss, share = np.mean(parts, 0)
    return float(loss), float(share)


def job(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; returns what it measured."""
    train_text, held_out_text = read_text(flags.text)
    model = read_model(flags, console)
    tokenizer = model.pretrained.tokenizer
    pairs = read_pairs(tokenizer, train_text, flags.length)
    held_out = tuple(
        part[: flags.pairs] for part in read_pairs(tokenizer, held_out_text, flags.length)
    )
    if len(pairs[0]) < flags.batch or not len(held_out[0]):
        raise ExampleError(f"{flags.text} has too few paragraphs for a batch of {flags.batch}")

    config = lowrank.LoraConfig(rank=flags.rank)
    base, lora = lowrank.init(flags.seed, model.params, config, plan=model.plan)
    optimizer = optax.adamw(flags.learning_rate)
    step = make_step(model.apply, optimizer, flags.beta)
    before = evaluate(model.apply, base, lora, held_out, flags.beta)

    def run(state: tuple[Tree, Tree], batch: Any) -> tuple[Any, jax.Array]:
        lora, opt_state, value = step(base, *state, batch)
        return (lora, opt_state), value

    order = make_batches(pairs, flags.batch, flags.seed)
    start = lora, optimizer.init(lora)
    (lora, _), values = run_steps(console, "DPO", run, start, order, flags.steps)
    after = evaluate(model.apply, base, lora, held_out, flags.beta)
    table = Table("held-out pairs", "before", "after")
    table.add_row("loss", f"{before[0]:.3f}", f"{after[0]:.3f}")
    # at the start the policy is its reference, and all rewards are equal
    table.add_row("put in order", "all equal", f"{after[1]:.0%}")
    console.print(table)
    lowrank.peft.save(flags.out, lora, config, plan=model.plan, names=lowrank.names.LLAMA)
    console.print(f"adapter written to {flags.out}")
    return {"before": before, "after": after, "losses": values, "step": step}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return run_main(job, make_arguments(), arguments)


if __name__ == "__main__":
    sys.exit(main())
