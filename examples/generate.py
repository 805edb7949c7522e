"""Asks a model without and with its adapter the same, and prints both answers.

    python examples/generate.py --adapter adapter
    python examples/generate.py --adapter adapter --prompt "What is a politician?"
    python examples/generate.py --adapter adapter --raw --prompt "POLITICIAN, n."
    python examples/generate.py --adapter peft-folder

The adapter is a folder of finetune.py, or one that PEFT can load. Without --prompt, questions are
read line by line until the input ends; each is asked by itself. With --raw a prompt is not a
question: it is continued as it stands, like the text of the training.

Both answers are one computation: jax.vmap over the adapter's scale, 0 and 1, so that the base's
weights are read once for both.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flags
import frozen
import jax
import jax.numpy as jnp
import smollm2
from llama import Llama
from sampling import decode_answers, encode_prompts, extend
from smollm2 import ExampleError, Pretrained
from texts import DICTIONARY, read_text, windows

import lowrank_jax as lowrank

Tree = Any

QUESTION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SCALES = {"base": 0.0, "adapter": 1.0}
ROUND = 32  # lengths are rounded up to it: one compiled program serves prompts of many lengths


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = flags.Flags(description="Chats with a model, without and with its adapter.")
    add, number = parser.add_argument, flags.number
    add("--adapter", type=Path, required=True, help="folder of finetune.py, or of PEFT")
    flags.add_model(parser)
    add("--prompt", action="append", help="ask this and end; may be repeated")
    add("--raw", action="store_true", help="continue the prompt as it stands, not as a question")
    add("--tokens", type=number(int), default=64, help="most tokens of an answer (%(default)s)")
    add("--temperature", type=number(float), default=0.7, help="of the sampling (%(default)s)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--seed", type=number(int, above=-1), default=0, help="of the sampling (%(default)s)")
    add(
        "--text",
        type=Path,
        default=DICTIONARY,
        help="the text of a training that began with LoftQ, whose base is made anew of it",
    )
    return parser.parse_args(arguments)


def load_adapter(folder: Path, text: Path, pretrained: Pretrained) -> tuple[Tree, Tree]:
    """Returns the base that the adapter in a folder was trained on, and the adapter."""
    model, params = Llama(pretrained.config), pretrained.variables
    plan = lowrank.plan(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    if not lowrank.checkpoint.exists(folder):
        names = lowrank.names.LLAMA
        base, lora, _ = lowrank.peft.load(folder, params, plan=plan, names=names)
        return base, lora
    found = lowrank.checkpoint.restore(folder)
    settings = found.extra if isinstance(found.extra, dict) else {}
    format = frozen.FORMATS[settings.get("quantize", 0)]
    base, how, seen = params, flags.STARTS[settings.get("start", 0)], []
    if format != "none":
        key = jax.random.key(settings["seed"])
        if how == "loftq":
            train = windows(pretrained.tokenizer, read_text(text)[0], settings["length"])
            seen = frozen.loftq_windows(train, settings["batch"], settings["seed"])
        base, _ = frozen.start(key, model.apply, params, found.config, plan, format, how, seen)
    return base, lowrank.checkpoint.restore(folder, base=base).lora


@partial(jax.jit, static_argnames=("model", "temperature"))
def extend_both(
    model: Llama,
    base: Tree,
    lora: Tree,
    prompt: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """Continues a prompt [1, t], of which `lengths` [1] tokens count, at both scales: [2, 1, t]."""

    def run(scale: jax.Array) -> jax.Array:
        tree = lowrank.combine(base, lora, scale=scale)
        options = {"length": prompt.shape[1], "temperature": temperature}
        return extend(model, tree, prompt, lengths, key, **options)

    return jax.vmap(run)(jnp.array([*SCALES.values()]))


def answer(
    chosen: argparse.Namespace, pretrained: Pretrained, base: Tree, lora: Tree, prompt: str
) -> dict[str, str]:
    """Returns what the base and the adapted model say: name of SCALES -> text."""
    tokenizer = pretrained.tokenizer
    text = prompt if chosen.raw else QUESTION.format(prompt)
    own = len(tokenizer.encode(text).ids)
    width = -(-(own + chosen.tokens) // ROUND) * ROUND
    padded, lengths = encode_prompts(tokenizer, [text], width)
    both = extend_both(
        Llama(pretrained.config),
        base,
        lora,
        padded,
        lengths,
        jax.random.key(chosen.seed),
        temperature=0.0 if chosen.greedy else chosen.temperature,
    )
    both = both[..., : own + chosen.tokens]
    answers = [decode_answers(tokenizer, one, lengths, pretrained.stop)[0] for one in both]
    return dict(zip(SCALES, answers, strict=True))


def read_prompts(given: Sequence[str] | None) -> Iterator[str]:
    """Yields the prompts given, or else the lines of the input, until it ends."""
    if given:
        yield from given
        return
    terminal = sys.stdin.isatty()
    while True:
        print("> " if terminal else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def run(chosen: argparse.Namespace) -> None:
    """Answers each prompt."""
    if not chosen.adapter.is_dir():
        raise ExampleError(
            f"--adapter {chosen.adapter} is not a folder: pass the --out of finetune.py, which "
            "makes one"
        )
    pretrained = smollm2.load(chosen.model or smollm2.fetch())
    if not chosen.raw and pretrained.tokenizer.token_to_id("<|im_start|>") is None:
        raise ExampleError(f"{pretrained.name} has no tokens for a chat: add --raw")
    base, lora = load_adapter(chosen.adapter, chosen.text, pretrained)
    for prompt in read_prompts(chosen.prompt):
        print(f"\n{prompt}")
        for name, text in answer(chosen, pretrained, base, lora, prompt).items():
            print(f"  {name:>7} | {' '.join(text.split())}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chat; a problem the user can mend is one line and exit status 1."""
    try:
        run(parse(arguments))
    except (ExampleError, lowrank.LowrankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
