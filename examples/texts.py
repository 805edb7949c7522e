"""A text to learn: the part held out of it, its windows of tokens, and the order of batches."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from smollm2 import ExampleError
from tokenizers import Tokenizer

DICTIONARY = Path(__file__).parent / "data" / "devils_dictionary.txt"
HELD_OUT = 0.1  # of another text than the dictionary: its last tenth


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
    """Yields batches [size, length] without end, in a new order at every pass.

    What it yields n-th follows from the arguments and n: a resumed run skips the batches it had.
    """
    order = np.random.default_rng(seed)
    while True:
        shuffled = order.permutation(data)
        for start in range(0, len(data) - size + 1, size):
            yield shuffled[start : start + size]


def sample_prompts(held_out: str, count: int = 4) -> list[str]:
    """The first two words of paragraphs spread over the held-out text."""
    paragraphs = [p for p in re.split(r"\n+", held_out) if len(p.split()) > 2]
    chosen = paragraphs[:: max(1, len(paragraphs) // count)][:count]
    return [" ".join(paragraph.split()[:2]) for paragraph in chosen]
