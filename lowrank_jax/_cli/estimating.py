"""`estimate`: the memory of adapters on a Llama, before any of it is loaded."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax._cli.plain_llama import MODELS, make_model, make_shapes, read_sizes
from lowrank_jax._codecs.formats import FORMATS
from lowrank_jax._codecs.packing import PACKINGS
from lowrank_jax._estimate.chips import CHIPS
from lowrank_jax._estimate.estimate import Estimate, estimate
from lowrank_jax._targeting.configs import LoraConfig, QuantConfig
from lowrank_jax._training.states import quantize_state
from lowrank_jax._transforms.lift import lift
from lowrank_jax._transforms.plan import plan
from lowrank_jax._trees.adapters import combine
from lowrank_jax._trees.init import init
from lowrank_jax._trees.quantize import quantize

DTYPES = ("bfloat16", "float32")


def _parse_count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = command.add_argument
    what = "a folder with a config.json, or " + ", ".join(MODELS)
    add("--like", required=True, metavar="MODEL", help=what)
    add("--chip", choices=sorted(CHIPS), help="compile for it; the default is this machine")
    add("--quantize", choices=(*FORMATS, "none"), default="none")
    add("--packing", choices=PACKINGS, default="uint4", help="of codes of 4 bits; on a CPU, uint8")
    add("--rank", type=_parse_count, default=16)
    add("--dora", action="store_true")
    add("--batch", type=_parse_count, default=1, help="sequences in a step")
    add("--tokens", type=_parse_count, default=1024, help="tokens of a sequence")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the base and of activations")
    add("--optimizer-bits", type=int, choices=(8, 32), default=32, help="of AdamW's states")
    add("--no-remat", action="store_true", help="keep each layer's activations for backward")


def estimate_llama(options: argparse.Namespace) -> Estimate:
    """Estimate a step of AdamW over adapters on all linear layers of a Llama of these sizes."""
    sizes = read_sizes(options.like)
    apply = make_model(sizes, remat=not options.no_remat)
    params = make_shapes(sizes, jnp.dtype(options.dtype))
    tokens = jax.ShapeDtypeStruct((options.batch, options.tokens), jnp.int32)
    found = plan(apply, params, tokens)
    if options.quantize != "none":
        quant = QuantConfig(format=options.quantize, packing=options.packing)
        params = jax.eval_shape(lambda params: quantize(params, quant, plan=found), params)
    config = LoraConfig(rank=options.rank, dora=options.dora)
    start = lambda params: init(jax.random.key(0), params, config, plan=found)
    base, lora = jax.eval_shape(start, params)
    tx = optax.adamw(1e-4)
    tx = quantize_state(tx) if options.optimizer_bits == 8 else tx
    state = jax.eval_shape(tx.init, lora)
    step = _make_step(lift(apply, fallback="raise"), tx)
    targets = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    return estimate(step, base, lora, state, tokens, targets, target=options.chip, donate=(1, 2))


def _make_step(apply: Any, tx: optax.GradientTransformation) -> Any:
    """Loss of the next token, gradient of the adapter, AdamW."""

    def step(base: Any, lora: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        def compute_loss(lora: Any) -> jax.Array:
            logits = apply(combine(base, lora), tokens).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, gradient = jax.value_and_grad(compute_loss)(lora)
        updates, state = tx.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    return step
