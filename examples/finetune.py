"""Fine-tunes SmolLM2-135M with LoRA on The Devil's Dictionary, and says what it learned and forgot.

    python examples/finetune.py
    python examples/finetune.py --text my.txt --targets q_proj,v_proj --rank 8 --steps 200
    python examples/finetune.py --resume

Killed at any time, it goes on by the same flags and --resume, and comes to the same losses and the
same adapter, bit for bit (on the same machine, with the same JAX). Its log tells the loss of every
step, to the last bit: nine digits tell every float32 from its neighbors.

Losses are in nats per token, over windows the model has not trained on: of the target text, and of
Python's own documentation (pydoc_data), which stands for all that the model knew before. (That text
differs from one Python version to another, and so does its loss, by some hundredths.)
"""

import argparse
import os
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resume
import smollm2
from generate import generate
from llama import Llama
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from smollm2 import ExampleError, Pretrained
from texts import DICTIONARY, batches, read_text, sample_prompts, windows

import lowrank_jax as lowrank

EVALUATED_WINDOWS = 48  # of each text: a paired difference in loss is known to about 0.02
SAMPLE_TOKENS = 48
SAMPLE_TEMPERATURE = 0.7  # a small model that always takes the likeliest token repeats itself

Tree = Any
Apply = Callable[[Tree, jax.Array], jax.Array]


# What is asked for


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Flags(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--rank", type=number(int), default=16, help="rank of every adapter (%(default)s)")
    add("--alpha", type=number(float), help="scale is alpha / rank (twice the rank)")
    add(
        "--targets",
        default="all-linear",
        help="all-linear, or patterns with commas: q_proj,v_proj or **/mlp/*/kernel (%(default)s)",
    )
    add("--steps", type=number(int), default=40, help="optimizer steps (%(default)s)")
    add("--learning-rate", type=number(float), default=1e-3, help="peak rate (%(default)s)")
    add("--batch", type=number(int), default=4, help="windows in a step (%(default)s)")
    add("--length", type=number(int, above=1), default=128, help="tokens in a window (%(default)s)")
    add("--model", type=Path, help="a Llama in a GGUF file (SmolLM2-135M, fetched once)")
    add("--text", type=Path, default=DICTIONARY, help="text to learn (The Devil's Dictionary)")
    add(
        "--out",
        type=Path,
        default=Path("adapter"),
        help="folder of the adapter; a finished run in it is replaced, an unfinished one is not "
        "(%(default)s)",
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
    return parser.parse_args(arguments)


def target_patterns(text: str) -> tuple[str, ...]:
    """Turns the flag into patterns of the library; a bare name means the kernels of that module."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ExampleError("--targets is empty: expected all-linear, or patterns with commas")
    bare = re.compile(r"\w+")
    return tuple(f"**/{word}/kernel" if bare.fullmatch(word) else word for word in words)


# The loss, and one step of training


def next_token_loss(apply: Apply, variables: Tree, tokens: jax.Array) -> jax.Array:
    """Mean negative log-likelihood, in nats per token, of tokens [b, t] after their first."""
    logits = apply(variables, tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW, its rate rising over the first tenth of the steps and falling along a cosine."""
    warmup, total = max(1, steps // 10), max(2, steps)
    schedule = optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, total)
    return optax.adamw(schedule)


def make_step(apply: Apply, optimizer: optax.GradientTransformation) -> Callable:
    """A jitted step of training, which differentiates the adapter alone.

    The base is an argument, for XLA would spend minutes folding a closed-over constant. The old
    adapter and optimizer state are donated: their buffers become the new ones.
    """

    @partial(jax.jit, donate_argnames=("lora", "opt_state"))
    def step(base: Tree, lora: Tree, opt_state: Tree, tokens: jax.Array):
        def loss_of(lora):
            return next_token_loss(apply, lowrank.combine(base, lora), tokens)

        loss, gradients = jax.value_and_grad(loss_of)(lora)
        updates, opt_state = optimizer.update(gradients, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return step


def train(
    console: Console,
    step: Callable,
    base: Tree,
    lora: Tree,
    opt_state: Tree,
    data: Iterator[np.ndarray],
    steps: range,
    save: Callable[[Tree, Tree, int], bool],
) -> tuple[Tree, Tree, dict[int, float]]:
    """Runs the steps behind a progress bar; returns adapter, optimizer state and losses by step.

    After each step, `save` may save; its result says whether it did.
    """
    columns = ["training", BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[now]}"), TimeRemainingColumn()]
    losses, last = {}, steps.stop - 1
    # A log has no bar to redraw, so there a line tells.
    log = (lambda line: None) if console.is_terminal else console.print
    with Progress(*columns, console=console) as progress:
        now = "compiling" if steps else "nothing left to do"
        task = progress.add_task("training", total=last, completed=steps.start - 1, now=now)
        began = time.perf_counter()
        for count, tokens in zip(steps, data, strict=False):
            lora, opt_state, loss = step(base, lora, opt_state, tokens)
            losses[count] = float(loss)
            if not np.isfinite(losses[count]):
                raise ExampleError(
                    f"the loss is {losses[count]} at step {count}: lower --learning-rate"
                )
            speed = ""
            if count == steps.start:  # compilation is in this one, so speed counts from its end
                compiled = time.perf_counter()
                console.print(f"first step, with compilation: {compiled - began:.1f} s")
            else:
                seconds = time.perf_counter() - compiled
                speed = f"  {(count - steps.start) * tokens.size / seconds:,.0f} tokens/s"
            progress.update(task, advance=1, now=f"loss {losses[count]:.3f}{speed}")
            log(f"step {count}/{last}  loss {losses[count]:.9g}{speed}")
            if save(lora, opt_state, count):
                log(f"step {count}/{last}  saved")
    return lora, opt_state, losses


# What is told


def size(tree: Tree) -> tuple[int, int]:
    """Number of values and of bytes in a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)


def mean_loss(loss: Callable, variables: Tree, data: np.ndarray, batch: int) -> float:
    """Mean loss over data [n, length], n a multiple of the batch."""
    return float(np.mean([loss(variables, part) for part in np.split(data, len(data) // batch)]))


def print_samples(console: Console, title: str, prompts: list[str], answers: list[str]) -> None:
    """Prints how the model goes on after each prompt, to the end of the paragraph."""
    console.print(f"\n[bold]{title}[/bold]")
    for prompt, answer in zip(prompts, answers, strict=True):
        paragraph = " ".join(answer.lstrip("\n").split("\n\n")[0].split())
        console.print(f"  {prompt} |", paragraph, markup=False, highlight=False, soft_wrap=True)


def print_change(console: Console, title: str, before: dict, after: dict) -> None:
    """Prints what the training changed."""
    table = Table("nats per token", "before", "after", "change")
    for name, label in {"held out": title, "other": "pydoc_data"}.items():
        change = after[name] - before[name]
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f}")
    console.print(table)


def same(left: Tree, right: Tree) -> bool:
    """Says whether two trees are equal in structure and in every bit."""
    bits = lambda leaf: np.asarray(leaf).tobytes()
    pairs = jax.tree.leaves(jax.tree.map(lambda a, b: bits(a) == bits(b), left, right))
    return jax.tree.structure(left) == jax.tree.structure(right) and all(pairs)


# The job


def prepare(
    flags: argparse.Namespace, text: tuple[str, str], pretrained: Pretrained
) -> tuple[dict, list[str]]:
    """Returns windows to train on and to evaluate on, and prompts to sample from."""
    train_text, held_out_text = text
    cut = partial(windows, pretrained.tokenizer, length=flags.length)
    other = "".join(pydoc_data.topics.topics.values())
    data = {"train": cut(train_text), "held out": cut(held_out_text), "other": cut(other)}
    for name in ("train", "held out"):
        if len(data[name]) < flags.batch:
            raise ExampleError(
                f"{flags.text} is too short: its {name} part fills {len(data[name])} windows of "
                f"{flags.length} tokens, and a batch needs {flags.batch}; "
                "pass a longer text, or a smaller --length or --batch"
            )
    most = max(1, EVALUATED_WINDOWS // flags.batch) * flags.batch
    for name in ("held out", "other"):
        whole = len(data[name]) // flags.batch * flags.batch
        data[name] = data[name][: min(whole, most)]
    return data, sample_prompts(held_out_text)


def make_folder(path: Path) -> None:
    """Makes the folder to save in, for it is better to fail before the training than after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExampleError(f"--out {path} cannot be made a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ExampleError(f"--out {path} is not writable")


def run(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; returns what it measured."""
    began = time.perf_counter()
    targets = target_patterns(flags.targets)
    config = lowrank.LoraConfig(rank=flags.rank, alpha=flags.alpha, targets=targets)
    text = read_text(flags.text)  # a wrong path should not cost a download first
    file = flags.model or smollm2.fetch(console.print)
    pretrained = smollm2.load(file)
    this_run = resume.describe(flags, config, text, file)
    going_on = resume.goes_on(this_run, flags.resume, partial(console.print, soft_wrap=True))
    model, params = Llama(pretrained.config), pretrained.variables
    data, prompts = prepare(flags, text, pretrained)
    console.print(f"{pretrained.name}: {size(params)[0]:,} parameters")

    # The adapter: which weights are multiplied, what mirrors them, and the model that knows both.
    apply = lowrank.lift(model.apply)
    shape = jax.ShapeDtypeStruct((flags.batch, flags.length), jnp.int32)
    plan = lowrank.plan(model.apply, params, shape)
    base, lora = lowrank.init(jax.random.key(flags.seed), params, config, plan=plan)
    optimizer = make_optimizer(flags.learning_rate, flags.steps)
    opt_state = optimizer.init(lora)
    console.print(lowrank.report(model.apply, lowrank.combine(base, lora), shape))
    console.print(f"optimizer state: {size(opt_state)[1] / 2**20:.2f} MiB")

    make_folder(flags.out)

    loss = jax.jit(partial(next_token_loss, model.apply))

    def look(title: str, variables: Tree) -> dict[str, float]:
        answers = generate(
            model,
            variables,
            pretrained.tokenizer,
            prompts,
            length=SAMPLE_TOKENS,
            key=jax.random.key(flags.seed),
            temperature=SAMPLE_TEMPERATURE,
            stop=pretrained.stop,
        )
        print_samples(console, title, prompts, answers)
        return {
            name: mean_loss(loss, variables, data[name], flags.batch)
            for name in ("held out", "other")
        }

    before = look("before", params)
    console.print(f"\nheld-out loss {before['held out']:.3f}, other domain {before['other']:.3f}")
    fingerprint, done = lowrank.fingerprint(base), 0
    if going_on:
        lora, opt_state, done = resume.restore(this_run, fingerprint, lora, opt_state)
    order = islice(batches(data["train"], flags.batch, flags.seed), done, None)
    left = range(done + 1, flags.steps + 1)
    step, save = make_step(apply, optimizer), resume.saver(this_run, fingerprint, flags.save_every)
    lora, opt_state, losses = train(console, step, base, lora, opt_state, order, left, save)

    # Merged, the weights have the shapes they had: what was compiled for `before` serves again.
    after = look("after", lowrank.merge(base, lora))
    print_change(console, f"{flags.text.name}, held out", before, after)

    restored, *_ = resume.restore(this_run, fingerprint, lora, opt_state)
    probe = data["held out"][: flags.batch]
    kept = loss(lowrank.merge(base, lora), probe)
    found = loss(lowrank.merge(base, restored), probe)
    if not same(lora, restored) or kept != found:
        raise ExampleError(f"the adapter in {flags.out} is not the one saved: {found} != {kept}")
    console.print(
        f"adapter saved in {flags.out}, loaded back, equal: loss {found:.4f}", soft_wrap=True
    )
    console.print(f"done in {time.perf_counter() - began:.0f} s")
    return {"before": before, "after": after, "losses": losses}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; a problem the user can mend is one line and exit status 1."""
    try:
        run(parse(arguments), Console())
    except (ExampleError, lowrank.LowrankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same flags and --resume go on from the last save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
