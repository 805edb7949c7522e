"""`estimate`: the memory of adapters on a Llama, before any of it is loaded."""

from __future__ import annotations

import argparse
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P

from lowrank_jax._cli.plain_llama import MODELS, SPECS, Llama, make_shapes, read_sizes
from lowrank_jax._codecs.formats import FORMATS
from lowrank_jax._codecs.packing import PACKINGS
from lowrank_jax._errors import ConfigError
from lowrank_jax._estimate.chips import CHIPS
from lowrank_jax._estimate.estimate import Estimate, estimate
from lowrank_jax._jax.jaxprs import count_shards
from lowrank_jax._targeting.configs import LoraConfig, QuantConfig
from lowrank_jax._training.states import Coded, quantize_state
from lowrank_jax._transforms.lift import lift
from lowrank_jax._transforms.plan import plan
from lowrank_jax._trees.adapters import combine
from lowrank_jax._trees.init import init
from lowrank_jax._trees.quantize import quantize
from lowrank_jax._trees.specs import specs

DTYPES = ("bfloat16", "float32")
_VOCABULARY = ("embed_tokens", "lm_head")


def _parse_count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _parse_mesh(text: str) -> tuple[int, int]:
    """Parse "8x4": devices along data, devices along model."""
    sizes = [int(part) for part in text.split("x") if part.isdecimal()]
    if (
        len(sizes) != 1 + text.count("x")
        or len(sizes) != 2
        or not 0 < min(sizes) <= max(sizes) < 2**15
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive integers such as 8x1")
    return sizes[0], sizes[1]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = command.add_argument
    what = "a folder with a config.json, or " + ", ".join(MODELS)
    add("--like", required=True, metavar="MODEL", help=what)
    add("--chip", choices=sorted(CHIPS), help="compile for it; the default is this machine")
    split = "devices along data (FSDP, and the sequences) and model (tensor parallelism), as 8x1"
    add("--mesh", type=_parse_mesh, metavar="DATAxMODEL", help=split)
    add("--quantize", choices=(*FORMATS, "none"), default="none", help="of the linear layers")
    table = "of the embedding and the head"
    add("--quantize-vocabulary", choices=(*FORMATS, "none"), default="none", help=table)
    add("--packing", choices=PACKINGS, default="uint4", help="of codes of 4 bits; on a CPU, uint8")
    add("--rank", type=_parse_count, default=16)
    add("--dora", action="store_true")
    add("--batch", type=_parse_count, default=1, help="sequences in a step")
    add("--tokens", type=_parse_count, default=1024, help="tokens of a sequence")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the base and of activations")
    add("--factor-dtype", choices=DTYPES, default="float32", help="of the adapter's factors")
    add("--optimizer-bits", type=int, choices=(8, 32), default=32, help="of AdamW's states")
    chunk = "tokens whose logits exist at a time; a divisor of --tokens"
    add("--loss-chunk", type=_parse_count, metavar="TOKENS", help=chunk)
    add("--no-remat", action="store_true", help="keep each layer's activations for backward")


def estimate_llama(options: argparse.Namespace) -> Estimate:
    """Estimate a step of AdamW over adapters on all linear layers of a Llama of these sizes."""
    step, args = make_step(options)
    return estimate(step, *args, target=options.chip, donate=(1, 2))


def make_step(options: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """Return the step, and the shapes of base, adapter, state, tokens and targets."""
    sizes = read_sizes(options.like)
    mesh = _make_mesh(options)
    _check_batch(options)
    model = Llama(sizes, not options.no_remat, mesh is not None, options.loss_chunk)
    params = make_shapes(sizes, jnp.dtype(options.dtype))
    tokens = jax.ShapeDtypeStruct((options.batch, options.tokens), jnp.int32)
    found = plan(Llama(sizes).apply, params, tokens)
    params = _quantize(params, options, found)
    config = LoraConfig(rank=options.rank, dora=options.dora, factor_dtype=options.factor_dtype)
    start = lambda params: init(jax.random.key(0), params, config, plan=found)
    base, lora = jax.eval_shape(start, params)
    tx = optax.adamw(1e-4)
    tx = quantize_state(tx) if options.optimizer_bits == 8 else tx
    state = jax.eval_shape(tx.init, lora)
    args = (base, lora, state, tokens, tokens)
    at = None
    if mesh is not None:
        at = jax.tree.map(_split_largest_axis, lora)
        split = _split_args(args, at, tx)
        args = tuple(jax.tree.map(functools.partial(_place, mesh), args, split))
    return _make_step(lift(model.compute_loss, fallback="raise"), tx, at), args


def _quantize(params: Any, options: argparse.Namespace, found: Any) -> Any:
    """Quantize the shapes of the linear layers, and of the table and the head."""
    quantized = dict(params)
    for format, names, targets in (
        (options.quantize, ["layers"], "all-linear"),
        (options.quantize_vocabulary, [name for name in _VOCABULARY if name in params], None),
    ):
        if format != "none":
            quant = QuantConfig(format=format, packing=options.packing, targets=targets or names)
            encode = functools.partial(quantize, quant=quant, plan=found)
            shapes = jax.eval_shape(encode, params)
            quantized |= {name: shapes[name] for name in names}
    return quantized


def _make_mesh(options: argparse.Namespace) -> Any:
    """Make the mesh, of this machine's devices where no chip is named; None without one."""
    if options.mesh is None:
        return None
    names, types = ("data", "model"), (jax.sharding.AxisType.Auto,) * 2
    if options.chip is not None:
        return jax.sharding.AbstractMesh(options.mesh, names, axis_types=types)
    count = math.prod(options.mesh)
    if count > jax.device_count():
        raise ConfigError(
            f"--mesh {options.mesh[0]}x{options.mesh[1]} is {count} devices, and this machine has "
            f"{jax.device_count()}: name a --chip, or set JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.make_mesh(options.mesh, names, axis_types=types, devices=jax.devices()[:count])


def _check_batch(options: argparse.Namespace) -> None:
    """Raise if sequences do not divide among devices, or tokens into chunks."""
    if options.mesh is not None and options.batch % options.mesh[0]:
        raise ConfigError(
            f"--batch {options.batch} does not divide among {options.mesh[0]} devices along data: "
            f"use a multiple of {options.mesh[0]}"
        )
    if options.mesh is not None and options.tokens % options.mesh[1]:
        raise ConfigError(
            f"--tokens {options.tokens} does not divide among {options.mesh[1]} devices along "
            f"model: use a multiple of {options.mesh[1]}"
        )
    if options.loss_chunk is not None and options.tokens % options.loss_chunk:
        raise ConfigError(
            f"--loss-chunk {options.loss_chunk} does not divide --tokens {options.tokens}"
        )


def _split_largest_axis(leaf: jax.ShapeDtypeStruct) -> P:
    """Return the spec of an adapter's array [layers, ...]: its largest axis over all devices."""
    axis = 1 + int(np.argmax(leaf.shape[1:]))
    return P(*[None] * axis, ("data", "model"))


def _split_args(args: tuple[Any, ...], at: Any, tx: optax.GradientTransformation) -> Any:
    """Return the PartitionSpec of each array of the step's arguments; `at` are the adapter's."""
    base, _, state, _, _ = args
    dense = {name: SPECS[name] for name in base}
    split = lambda leaf, spec: jax.tree.map(lambda _: spec, leaf)  # a Coded has two arrays
    is_leaf = lambda leaf: isinstance(leaf, Coded)
    state_at = optax.tree.map_params(
        tx, split, state, at, transform_non_params=lambda _: P(), is_leaf=is_leaf
    )
    return specs(base, dense), at, state_at, P("data"), P("data")


def _place(mesh: Any, leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf on a mesh; an axis that does not divide is whole."""
    fits = lambda size, entry: size % count_shards(mesh, entry) == 0
    pairs = zip(leaf.shape, spec, strict=False)  # a spec may be shorter
    split = P(*(entry if fits(size, entry) else None for size, entry in pairs))
    sharding = jax.sharding.NamedSharding(mesh, split)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _make_step(compute_loss: Any, tx: optax.GradientTransformation, at: Any) -> Any:
    """Loss of the next token, gradient of the adapter, AdamW; the adapter stays where it was."""

    def step(base: Any, lora: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        loss_of = lambda lora: compute_loss(combine(base, lora), tokens, targets)
        loss, gradient = jax.value_and_grad(loss_of)(lora)
        if at is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, at)
        updates, state = tx.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    return step
