"""Two domains of characters, and a small Llama trained on the first of them: no download.

The source domain is Python's own documentation (pydoc_data), the target The Devil's Dictionary.
Every loss is in nats per character, over text that no step has trained on. (The documentation
differs from one Python version to another, and so do the losses, by some hundredths.)
"""

import argparse
import functools
import pydoc_data.topics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import Llama, LlamaConfig
from rich import print as show
from rich.progress import track
from rich.table import Table

CONTEXT = 64
VOCAB = 128  # ASCII; what is not is a "?"
BATCH = 8
EVALUATED_WINDOWS = 512  # of each domain
PRETRAINING_STEPS = 400
EXAMPLE = jax.ShapeDtypeStruct((BATCH, CONTEXT), jnp.int32)  # what a model is called with

Tree = Any
Apply = Callable[[Tree, jax.Array], jax.Array]


def encode(text: str) -> np.ndarray:
    """Turns a text into the numbers of its characters, [n] int32."""
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


@functools.cache
def source() -> tuple[np.ndarray, np.ndarray]:
    """Python's documentation: nine paragraphs of ten to train on, and the tenth held out."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    # Topics repeat each other's paragraphs: one that is held out must not be trained on elsewhere.
    paragraphs = list(dict.fromkeys(" ".join(part.split()) for part in text.split("\n\n")))
    held_out = paragraphs[::10]
    del paragraphs[::10]
    return encode("\n\n".join(paragraphs)), encode("\n\n".join(held_out))


@functools.cache
def target() -> tuple[np.ndarray, np.ndarray]:
    """The Devil's Dictionary: headwords A to O to train on, and P to Z held out."""
    text = (Path(__file__).parent / "data" / "devils_dictionary.txt").read_text("ascii")
    cut = text.index("\nP")
    return encode(text[:cut]), encode(text[cut:])


def batches(ids: np.ndarray, steps: int, title: str, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields so many batches [BATCH, CONTEXT + 1] of random windows, behind a progress bar."""
    starts = np.random.default_rng(seed).integers(len(ids) - CONTEXT, size=(steps, BATCH, 1))
    for first in track(starts, title):
        yield ids[first + np.arange(CONTEXT + 1)]


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss, in nats, of logits [b, t, VOCAB] that foretell tokens [b, t]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


@functools.partial(jax.jit, static_argnums=0)
def loss_of(apply: Apply, params: Tree, tokens: jax.Array) -> jax.Array:
    """Mean loss over windows [b, t] of a model, each character from those before it."""
    return cross_entropy(apply(params, tokens[:, :-1]), tokens[:, 1:])


def held_out_loss(apply: Apply, params: Tree) -> dict[str, float]:
    """Loss in nats per character on the held-out part of either domain."""
    losses = {}
    for domain in (target, source):
        ids = domain()[1]
        starts = np.linspace(0, len(ids) - CONTEXT - 1, EVALUATED_WINDOWS, dtype=int)
        windows = ids[starts[:, None] + np.arange(CONTEXT + 1)]
        losses[domain.__name__] = float(loss_of(apply, params, windows))
    return losses


def pretrain(apply: Apply, params: Tree, steps: int | None = None, seed: int = 0) -> Tree:
    """Trains every parameter on the source domain; any pytree will do, an nnx.Module too."""
    steps = steps or PRETRAINING_STEPS
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, max(1, steps // 10), steps)
    tx = optax.adamw(schedule, b2=0.95)

    @functools.partial(jax.jit, donate_argnames=("params", "opt_state"))
    def step(params: Tree, opt_state: Tree, tokens: jax.Array):
        grads = jax.grad(loss_of, argnums=1)(apply, params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for tokens in batches(source()[0], steps, "pretraining", seed):
        params, opt_state = step(params, opt_state, tokens)
    return params


def pretrained(dim: int = 64, layers: int = 2, steps: int | None = None, seed: int = 0):
    """Returns a small Llama, and its variables after training on the source domain."""
    heads = dim // 16
    sizes = {"heads": heads, "kv_heads": heads, "head_dim": 16, "hidden": 3 * dim}
    model = Llama(LlamaConfig(VOCAB, dim, layers, rope_base=CONTEXT, **sizes))
    params = jax.jit(model.init)(jax.random.key(seed), EXAMPLE)
    return model, pretrain(model.apply, params, steps, seed)


def steps_asked(arguments: Sequence[str] | None, default: int) -> int:
    """Reads the one flag of the loops."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=default, help="optimizer steps (%(default)s)")
    steps = parser.parse_args(arguments).steps
    if steps < 1:
        parser.error(f"argument --steps: expected a whole number above 0, got {steps}")
    return steps


def show_change(before: dict[str, float], after: dict[str, float]) -> None:
    """Prints what the training changed on text that it has not seen."""
    table = Table("held out, nats per character", "before", "after", "change")
    for name, label in {"target": "The Devil's Dictionary", "source": "pydoc_data"}.items():
        change = after[name] - before[name]
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f}")
    show(table)
