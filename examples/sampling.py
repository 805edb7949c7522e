"""Text from a language model: one jitted loop over tokens, with a cache of keys and values."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from llama import Llama, empty_cache
from tokenizers import Tokenizer

import lowrank_jax as lowrank


@partial(jax.jit, static_argnames=("model", "length", "temperature"))
def extend(
    model: Llama,
    variables: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float,
) -> jax.Array:
    """Continues prompts [b, p] int, of which `lengths` [b] tokens count, to [b, length] tokens.

    A prompt is read token by token like what follows it: slower than at once, but one loop body
    serves prompts of any length, and compiles once. Lifted, the model also takes adapted and
    quantized variables.
    """
    apply = lowrank.lift(model.apply)
    batch, width = prompts.shape
    tokens = jnp.zeros((batch, length), prompts.dtype).at[:, :width].set(prompts)

    def step(carry, position):
        tokens, cache = carry
        current = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        logits, cache = apply(variables, current, position, cache)
        if temperature > 0:
            noise = jax.random.fold_in(key, position)
            chosen = jax.random.categorical(noise, logits[:, 0] / temperature)
        else:
            chosen = logits[:, 0].argmax(axis=-1)
        given = tokens[:, position + 1]
        following = jnp.where(position + 1 < lengths, given, chosen.astype(tokens.dtype))
        return (tokens.at[:, position + 1].set(following), cache), None

    cache = empty_cache(model.config, batch, length)
    (tokens, _), _ = jax.lax.scan(step, (tokens, cache), jnp.arange(length - 1))
    return tokens


def generate(
    model: Llama,
    variables: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    length: int,
    key: jax.Array,
    temperature: float = 0.0,
    stop: Sequence[int] = (),
) -> list[str]:
    """Returns what follows each prompt, up to `length` tokens with it or to a token of `stop`."""
    padded, lengths = encode_prompts(tokenizer, prompts)
    tokens = extend(model, variables, padded, lengths, key, length=length, temperature=temperature)
    return decode_answers(tokenizer, tokens, lengths, stop)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as tokens [b, p] int32, p at least `width`, and their lengths [b]."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded])
    padded = np.zeros((len(encoded), max(width, lengths.max())), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    return padded, lengths


def decode_answers(
    tokenizer: Tokenizer, tokens: jax.Array, lengths: np.ndarray, stop: Sequence[int]
) -> list[str]:
    """Returns the text of each row of tokens [b, t] after its prompt, up to a token of `stop`."""
    answers = []
    for row, start in zip(np.asarray(tokens), lengths, strict=True):
        answer = row[start:].tolist()
        ends = [answer.index(token) for token in stop if token in answer]
        answers.append(tokenizer.decode(answer[: min(ends, default=len(answer))]))
    return answers
