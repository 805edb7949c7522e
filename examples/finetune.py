"""Fine-tunes SmolLM2-135M on The Devil's Dictionary, and says what it learned and forgot.

    python examples/finetune.py
    python examples/finetune.py --text my.txt --targets q_proj,v_proj --rank 8 --steps 200
    python examples/finetune.py --quantize nf4
    python examples/finetune.py --dora --rank 4
    python examples/finetune.py --resume

Killed at any time, it goes on by the same flags and --resume, and comes to the same losses and the
same adapter, bit for bit (on the same machine, with the same JAX). Its log tells the loss of every
step, to the last bit: nine digits tell every float32 from its neighbors.

With --quantize the adapter learns on a base of 4 or 8 bits (QLoRA), and starts at what quantizing
lost (LoftQ): the losses tell what quantizing cost and what the training gained, the table of memory
what a step takes, beside a dense base's. The base is SmolLM2-135M-Instruct decoded from Q4_1, so
"dense" here is of weights that had 4 bits before, and the cost is that of rounding them again.

Losses are in nats per token, over windows the model has not trained on: of the target text, and of
Python's own documentation (pydoc_data), which stands for all that the model knew before. (That text
differs from one Python version to another, and so does its loss, by some hundredths.)
"""

import argparse
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import endings
import folders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import resume
import smollm2
from flags import check_rank, parse, target_patterns
from frozen import compiled, loftq_windows, memory, memory_table, start
from llama import Llama
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sampling import generate
from smollm2 import ExampleError, Pretrained
from texts import batches, read_text, sample_prompts, windows

import lowrank_jax as lowrank

EVALUATED_WINDOWS = 48  # of each text: a paired difference in loss is known to about 0.02
SAMPLE_TOKENS = 48
LOG_WIDTH = 140  # a log is as wide as it has to be: tables need not fold
SAMPLE_TEMPERATURE = 0.7  # a small model that always takes the likeliest token repeats itself

Tree = Any
Apply = Callable[[Tree, jax.Array], jax.Array]


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
    began = time.perf_counter()
    # A log has no bar to redraw, so there a line tells.
    log = (lambda line: None) if console.is_terminal else console.print
    with Progress(*columns, console=console) as progress:
        now = "" if steps else "nothing left to do"
        task = progress.add_task("training", total=last, completed=steps.start - 1, now=now)
        for count, tokens in zip(steps, data, strict=False):
            lora, opt_state, loss = step(base, lora, opt_state, tokens)
            losses[count] = float(loss)
            if not np.isfinite(losses[count]):
                raise ExampleError(
                    f"the loss is {losses[count]} at step {count}: lower --learning-rate"
                )
            speed = len(losses) * tokens.size / (time.perf_counter() - began)
            progress.update(task, advance=1, now=f"loss {losses[count]:.3f}  {speed:,.0f} tokens/s")
            log(f"step {count}/{last}  loss {losses[count]:.9g}  {speed:,.0f} tokens/s")
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


def print_losses(console: Console, title: str, stages: dict[str, dict[str, float]]) -> None:
    """Prints the losses of each stage, and in brackets what each changed."""
    table = Table("nats per token", *stages)
    for name, label in {"held out": title, "other": "pydoc_data"}.items():
        losses = [stage[name] for stage in stages.values()]
        changes = [f"{loss:.3f} ({loss - last:+.3f})" for last, loss in pairwise(losses)]
        table.add_row(label, f"{losses[0]:.3f}", *changes)
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


def run(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; returns what it measured."""
    began = time.perf_counter()
    targets = target_patterns(flags.targets)
    config = lowrank.LoraConfig(
        rank=flags.rank, alpha=flags.alpha, targets=targets, dora=flags.dora
    )
    announce = partial(console.print, soft_wrap=True)
    text = read_text(flags.text)  # a wrong path should not cost a download first
    if not flags.resume and not flags.replace:
        folders.check(flags.out)
    file = flags.model or smollm2.fetch(console.print)
    with console.status(f"reading {file.name}"):
        pretrained = smollm2.load(file)
    this_run = resume.describe(flags, config, text, file)
    going_on = not flags.replace and resume.goes_on(this_run, flags.resume, announce)
    model, params = Llama(pretrained.config), pretrained.variables
    data, prompts = prepare(flags, text, pretrained)
    announce(f"{pretrained.name}: {size(params)[0]:,} parameters, decoded from {pretrained.stored}")

    # The adapter: which weights are multiplied, what mirrors them, and the model that knows both.
    apply = lowrank.lift(model.apply)
    shape = jax.ShapeDtypeStruct((flags.batch, flags.length), jnp.int32)
    plan = lowrank.plan(model.apply, params, shape)
    key = jax.random.key(flags.seed)
    check_rank(config, params, plan)
    jax.eval_shape(lambda tree: lowrank.init(key, tree, config, plan=plan), params)  # mistakes show
    folders.make(flags.out, flags.replace, announce)

    loss = jax.jit(partial(next_token_loss, apply))
    stages: dict[str, dict[str, float]] = {}

    def evaluate(stage: str, variables: Tree) -> None:
        with console.status(f"losses {stage}"):
            stages[stage] = {
                name: mean_loss(loss, variables, data[name], flags.batch)
                for name in ("held out", "other")
            }

    def look(stage: str, variables: Tree) -> None:
        with console.status(f"samples {stage}"):
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
        print_samples(console, stage, prompts, answers)
        evaluate(stage, variables)

    # Merged, the weights have the shapes they had: what was compiled for the first look serves the
    # second. A quantized base is not merged, for it would be dense again.
    whole, base_name, measured = lowrank.merge, "", []
    if flags.quantize != "none":
        whole, base_name = lowrank.combine, f", {flags.quantize}"
        evaluate("before, dense", params)
        measured = loftq_windows(data["train"], flags.batch, flags.seed)
    with console.status("starting"):
        base, lora = start(
            key, model.apply, params, config, plan, flags.quantize, flags.start, measured
        )
    optimizer = make_optimizer(flags.learning_rate, flags.steps)
    opt_state = optimizer.init(lora)
    report = lowrank.report(model.apply, lowrank.combine(base, lora), shape)
    console.print(report)
    with console.status("compiling"):
        step, temporaries = compiled(
            make_step(apply, optimizer), flags.quantize, base, lora, opt_state, shape
        )
    held = memory(report, size(opt_state)[1], temporaries)
    console.print(memory_table(held))

    look(f"before{base_name}", whole(base, lora))
    print_losses(console, f"{flags.text.name}, held out", stages)
    fingerprint, done = lowrank.fingerprint(base), 0
    if going_on:
        lora, opt_state, done = resume.restore(this_run, fingerprint, lora, opt_state)
    order = islice(batches(data["train"], flags.batch, flags.seed), done, None)
    left = range(done + 1, flags.steps + 1)
    save = resume.saver(this_run, fingerprint, flags.save_every)
    lora, opt_state, losses = train(console, step, base, lora, opt_state, order, left, save)

    look(f"after{base_name}", whole(base, lora))
    print_losses(console, f"{flags.text.name}, held out", stages)

    restored, *_ = resume.restore(this_run, fingerprint, lora, opt_state)
    probe = data["held out"][: flags.batch]
    kept, found = (loss(whole(base, adapter), probe) for adapter in (lora, restored))
    if not same(lora, restored) or kept != found:
        raise ExampleError(f"the adapter in {flags.out} is not the one saved: {found} != {kept}")
    announce(
        f"adapter saved in {flags.out}, loaded back, equal: {found:.4f} nats per token on the "
        f"first {len(probe)} held-out windows"
    )
    endings.print_end(announce, flags, stages, pretrained.stored)
    console.print(f"done in {time.perf_counter() - began:.0f} s")
    return {"stages": stages, "losses": losses, "memory": held}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; a problem the user can mend is one line and exit status 1."""
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    try:
        run(parse(arguments), console)
    except (ExampleError, lowrank.LowrankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same flags and --resume go on from the last save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
