"""Fine-tunes SmolLM2-135M with LoRA on The Devil's Dictionary, and says what it learned and forgot.

    python examples/finetune.py
    python examples/finetune.py --text my.txt --targets q_proj,v_proj --rank 8 --steps 200

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
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
from generate import generate
from llama import Llama
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from smollm2 import ExampleError, Pretrained
from tokenizers import Tokenizer

import lowrank_jax as lowrank

DICTIONARY = Path(__file__).parent / "data" / "devils_dictionary.txt"
HELD_OUT = 0.1  # of another text than the dictionary: its last tenth
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
    add("--out", type=Path, default=Path("adapter"), help="folder of the adapter (%(default)s)")
    add(
        "--seed",
        type=number(int, above=-1),
        default=0,
        help="of the adapter's start and the order (%(default)s)",
    )
    return parser.parse_args(arguments)


def target_patterns(text: str) -> tuple[str, ...]:
    """Turns the flag into patterns of the library; a bare name means the kernels of that module."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ExampleError("--targets is empty: expected all-linear, or patterns with commas")
    bare = re.compile(r"\w+")
    return tuple(f"**/{word}/kernel" if bare.fullmatch(word) else word for word in words)


# Texts


def read_text(path: Path) -> tuple[str, str]:
    """Returns the part to train on and the part held out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExampleError(f"cannot read the text {path}: {error}") from error
    if path == DICTIONARY:
        cut = text.index("\nP")  # headwords A to O, and P to Z
    else:
        cut = text.find("\n", int(len(text) * (1 - HELD_OUT)))
    return (text[:cut].strip(), text[cut:].strip()) if cut > 0 else (text, "")


def windows(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """Cuts a text into windows of tokens, [n, length] int32."""
    ids = tokenizer.encode(text).ids
    count = len(ids) // length
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def batches(data: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches [size, length] without end, in a new order at every pass."""
    order = np.random.default_rng(seed)
    while True:
        shuffled = order.permutation(data)
        for start in range(0, len(data) - size + 1, size):
            yield shuffled[start : start + size]


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
    steps: int,
) -> tuple[Tree, Tree]:
    """Runs the steps behind a progress bar; returns the trained adapter and the optimizer state."""
    columns = ["training", BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[now]}"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, now="compiling")
        began = time.perf_counter()
        for count in range(1, steps + 1):
            tokens = next(data)
            lora, opt_state, loss = step(base, lora, opt_state, tokens)
            now = f"loss {float(loss):.3f}"
            if count == 1:  # this one includes compilation, so speed counts from its end
                compiled = time.perf_counter()
                console.print(f"first step, with compilation: {compiled - began:.1f} s")
            else:
                seconds = time.perf_counter() - compiled
                now += f"  {(count - 1) * tokens.size / seconds:,.0f} tokens/s"
            progress.update(task, advance=1, now=now)
            # A log has no bar to redraw, so there a line tells now and then.
            if not console.is_terminal and (count % 10 == 0 or count == steps):
                console.print(f"step {count}/{steps}  {now}")
    return lora, opt_state


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


def sample_prompts(held_out: str, count: int = 4) -> list[str]:
    """The first two words of paragraphs spread over the held-out text."""
    paragraphs = [p for p in re.split(r"\n+", held_out) if len(p.split()) > 2]
    chosen = paragraphs[:: max(1, len(paragraphs) // count)][:count]
    return [" ".join(paragraph.split()[:2]) for paragraph in chosen]


def print_sizes(console: Console, base: Tree, lora: Tree, opt_state: Tree) -> None:
    """Prints counts and bytes of what is frozen and of what is trained."""
    table = Table("", "values", "MB")
    rows = {"base, frozen": base, "adapter, trained": lora, "optimizer state": opt_state}
    for name, tree in rows.items():
        count, number = size(tree)
        table.add_row(name, f"{count:,}", f"{number / 1e6:.1f}")
    console.print(table)
    console.print(f"trainable: {100 * size(lora)[0] / size(base)[0]:.2f}% of the base")


def same(left: Tree, right: Tree) -> bool:
    """Says whether two trees are equal in structure and in every bit."""
    pairs = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))
    return jax.tree.structure(left) == jax.tree.structure(right) and all(pairs)


# The job


def prepare(flags: argparse.Namespace, pretrained: Pretrained) -> tuple[dict, list[str]]:
    """Returns windows to train on and to evaluate on, and prompts to sample from."""
    train_text, held_out_text = read_text(flags.text)
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
    read_text(flags.text)  # a wrong path should not cost a download first
    pretrained = smollm2.load(flags.model or smollm2.fetch(console.print))
    model, params = Llama(pretrained.config), pretrained.variables
    data, prompts = prepare(flags, pretrained)
    console.print(f"{pretrained.name}: {size(params)[0]:,} parameters")

    # The adapter: which weights are multiplied, what mirrors them, and the model that knows both.
    apply = lowrank.lift(model.apply)
    shape = jax.ShapeDtypeStruct((flags.batch, flags.length), jnp.int32)
    config = lowrank.LoraConfig(rank=flags.rank, alpha=flags.alpha, targets=targets)
    plan = lowrank.plan(model.apply, params, shape)
    base, lora = lowrank.init(jax.random.key(flags.seed), params, config, plan=plan)
    optimizer = make_optimizer(flags.learning_rate, flags.steps)
    opt_state = optimizer.init(lora)
    print_sizes(console, base, lora, opt_state)

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
    step = make_step(apply, optimizer)
    order = batches(data["train"], flags.batch, flags.seed)
    lora, opt_state = train(console, step, base, lora, opt_state, order, flags.steps)

    # Merged, the weights have the shapes they had: what was compiled for `before` serves again.
    after = look("after", lowrank.merge(base, lora))
    table = Table("nats per token", "before", "after", "change")
    for name, label in [("held out", f"{flags.text.name}, held out"), ("other", "pydoc_data")]:
        change = after[name] - before[name]
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f}")
    console.print(table)

    lowrank.checkpoint.save(flags.out, lora=lora, config=config, base=base)
    restored = lowrank.checkpoint.restore(flags.out, base=base)
    probe = data["held out"][: flags.batch]
    kept = loss(lowrank.merge(base, lora), probe)
    found = loss(lowrank.merge(base, restored.lora), probe)
    if not same(lora, restored.lora) or kept != found:
        raise ExampleError(f"the adapter in {flags.out} is not the one saved: {found} != {kept}")
    console.print(
        f"adapter saved in {flags.out}, loaded back, equal: loss {found:.4f}", soft_wrap=True
    )
    console.print(f"done in {time.perf_counter() - began:.0f} s")
    return {"before": before, "after": after}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; a problem the user can mend is one line and exit status 1."""
    try:
        run(parse(arguments), Console())
    except (ExampleError, lowrank.LowrankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
