"""Serves several adapters of one base at once: each text of a batch is continued by its own.

    python examples/serve.py
    python examples/serve.py --quantize nf4 --batch 16 --adapters 4 --temperature 0.7
    python examples/serve.py --peft sweep,other_folder

Adapters stand in a pool of slots, whose shapes never change, so that one compiled program serves
whatever is put there. Told are the tokens per second of a batch with no adapter, with one, and with
a mixture, and that the mixture says what each adapter says alone.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flags import number
from llama import empty_cache
from rich.console import Console
from rich.table import Table
from small_jobs import Job, make_parser, read_model, run_main
from smollm2 import ExampleError

import lowrank_jax as lowrank

TOLERANCE = 1e-3  # of log-probabilities: the two programs round differently
PROMPTS = ("The", "Once upon a time", "A definition of", "My friend", "In the year", "To be")
Tree = Any


def make_arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--peft", help="folders of adapters, with commas; without, adapters are made up")
    add("--adapters", type=number(int), default=3, help="how many are made up (%(default)s)")
    add("--rank", type=number(int), default=16, help="of an adapter that is made up (%(default)s)")
    add("--batch", type=number(int), default=8, help="texts at once (%(default)s)")
    add("--length", type=number(int), default=48, help="tokens of a text (%(default)s)")
    add("--temperature", type=number(float, above=-1), default=0.0, help="0: greedy (%(default)s)")
    return parser


# Decoding


def continue_text(
    job: Job,
    variables: Tree,
    prompt: jax.Array,
    count: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Continues one prompt [p], of which `count` tokens are read, to [length] tokens.

    Returns the tokens, and the log-probability of each, with a cache of keys and values. It is
    written for one text; jax.vmap makes the batch, in which each text may have its own adapter.
    """
    apply = job.apply
    tokens = jnp.zeros(length, prompt.dtype).at[: prompt.size].set(prompt)

    def step(carry: Any, position: jax.Array) -> tuple[Any, jax.Array]:
        tokens, cache = carry
        logits, cache = apply(variables, tokens[position][None, None], position, cache)
        scores = jax.nn.log_softmax(logits[0, 0].astype(jnp.float32))
        if temperature > 0:
            chosen = jax.random.categorical(jax.random.fold_in(key, position), scores / temperature)
        else:
            chosen = scores.argmax()
        given = tokens[position + 1]
        following = jnp.where(position + 1 < count, given, chosen.astype(tokens.dtype))
        return (tokens.at[position + 1].set(following), cache), scores[following]

    start = tokens, empty_cache(job.model.config, 1, length)
    (tokens, _), scores = jax.lax.scan(step, start, jnp.arange(length - 1))
    return tokens, scores


def make_programs(job: Job, length: int, temperature: float) -> dict[str, Callable]:
    """Jitted functions of (base, what adapts it, slots, prompts, counts, keys) for a batch."""
    decode = partial(continue_text, job, length=length, temperature=temperature)

    def serve(base: Tree, tree: Tree, slots: jax.Array, *texts: jax.Array) -> Any:
        # select inside vmap: no example gets a copy of its adapter's factors where that is dearer
        one = lambda slot, *text: decode(lowrank.combine(base, lowrank.select(tree, slot)), *text)
        return jax.vmap(one)(slots, *texts)

    def serve_one(base: Tree, lora: Tree, slots: jax.Array, *texts: jax.Array) -> Any:
        variables = base if lora is None else lowrank.combine(base, lora)
        return jax.vmap(lambda *text: decode(variables, *text))(*texts)

    return {"mixed": jax.jit(serve), "one": jax.jit(serve_one)}


# The adapters


def make_up(job: Job, rank: int, seed: int) -> Tree:
    """An adapter that says something else than the base: its b is drawn, not zero."""
    _, lora = lowrank.init(seed, job.params, lowrank.LoraConfig(rank=rank), plan=job.plan)
    noise = lambda path, leaf: (
        0.02 * jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)
        if path[-1].name == "b"
        else leaf
    )
    return jax.tree_util.tree_map_with_path(noise, lora)


def read_adapters(flags: argparse.Namespace, job: Job) -> dict[str, Tree]:
    """The adapters by name: those of PEFT's folders, or some that are made up."""
    if not flags.peft:
        return {f"adapter {k}": make_up(job, flags.rank, k) for k in range(flags.adapters)}
    found = {}
    for folder in flags.peft.split(","):
        if not Path(folder).is_dir():
            raise ExampleError(f"there is no folder {folder}")
        _, found[folder], _ = lowrank.peft.load(
            folder, job.params, plan=job.plan, names=lowrank.names.LLAMA
        )
    return found


def read_prompts(job: Job, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of a batch as tokens [batch, p], padded with zeros, and their lengths [batch]."""
    ids = [job.pretrained.tokenizer.encode(PROMPTS[k % len(PROMPTS)]).ids for k in range(batch)]
    counts = np.array([len(row) for row in ids], np.int32)
    prompts = np.zeros((batch, counts.max()), np.int32)
    for row, own in zip(prompts, ids, strict=True):
        row[: len(own)] = own
    return prompts, counts


def measure(program: Callable, *arguments: Any) -> tuple[Any, float]:
    """Runs a program twice; returns its result, and the seconds of the second time."""
    jax.block_until_ready(program(*arguments))
    began = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return result, time.perf_counter() - began


def job(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; returns what it measured."""
    model = read_model(flags, console)
    loras = read_adapters(flags, model)
    largest = max(loras.values(), key=lambda lora: jax.tree.leaves(lora)[0].size)
    pool = lowrank.pool(largest, slots=len(loras) + 1)
    for name, lora in loras.items():
        pool.put(name, lora)
    prompts, counts = read_prompts(model, flags.batch)
    if flags.length <= prompts.shape[1]:
        raise ExampleError(f"--length {flags.length}: prompts alone have {prompts.shape[1]} tokens")
    keys = jax.random.split(jax.random.key(flags.seed), flags.batch)
    texts = prompts, counts, keys
    programs = make_programs(model, flags.length, flags.temperature)
    chosen = [[*loras, None][k % (len(loras) + 1)] for k in range(flags.batch)]
    slots = pool.index(chosen)

    results, table = {}, Table("batch", "tokens/s")
    runs = {"no adapter": ("one", None), "one adapter": ("one", next(iter(loras.values())))}
    runs[f"mixture of {len(loras)} and none"] = ("mixed", pool.tree)
    with console.status("decoding"):
        for name, (kind, tree) in runs.items():
            results[name], seconds = measure(programs[kind], model.params, tree, slots, *texts)
            speed = flags.batch * (flags.length - 1) / seconds
            table.add_row(name, f"{speed:,.0f}")
    console.print(table)

    (tokens, scores), worst = results[name], 0.0
    for who in dict.fromkeys(chosen):
        mine = np.array([k for k, other in enumerate(chosen) if other == who])
        lora = None if who is None else loras[who]
        alone, alone_scores = programs["one"](model.params, lora, slots, *texts)
        off = float(np.abs(scores[mine] - alone_scores[mine]).max())
        if not np.array_equal(tokens[mine], alone[mine]) or not off < TOLERANCE:
            raise ExampleError(
                f"{who or 'no adapter'}: the mixture says something else than it says alone "
                f"(log-probabilities differ by {off:.1e})"
            )
        worst = max(worst, off)
    console.print(f"each text is what its adapter alone says; log-probabilities within {worst:.1e}")
    for who, row in zip(chosen[: len(loras) + 1], np.asarray(tokens), strict=False):
        text = " ".join(model.pretrained.tokenizer.decode(row.tolist()).split())
        console.print(f"  {who or 'no adapter'}:", text, markup=False, highlight=False)
    return {"tokens": tokens, "scores": scores, "worst": worst, "chosen": chosen}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return run_main(job, make_arguments(), arguments)


if __name__ == "__main__":
    sys.exit(main())
