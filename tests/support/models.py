"""The models of the invariants: unmodified, and none is written for adapters.

One case of CASES is one way in which Flax or JAX uses a weight. `axes` names every leaf that must
be adapted, and no other, with the (fan_in, fan_out, stack) axes it must be given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Built = tuple[Callable, Any, tuple[Any, ...]]

# What a case is run as; each is the end of a name.
VARIANTS = PLAIN, CODES, DORA, DORA_CODES = "", " on codes", " with DoRA", " with DoRA on codes"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model.

    A field of variants lists those that the default suite runs; `pytest -m slow` runs the rest.

    Args:
      build: -> (fn, params, args).
      axes: path -> (fan_in, fan_out, stack) of every adapted leaf.
      targets, stack: of the LoraConfig.
      dtype: the coarsest dtype on the way: it sets the tolerance.
      materialized: paths that no rule keeps factored; with any, fallback="raise" must name one.
      reverse: whether the model has a reverse-mode derivative (a while_loop has none).
      forward: whether it has a forward-mode derivative (a custom_vjp has none).
      vmap: whether jax.vmap over the dense weights works at all.
      dora: whether there are variants with DoRA. In bfloat16 a factor's gradient under DoRA may be
        a sum that cancels, in the merged model too.
      normed: whether the model normalizes what DoRA scales: the magnitude's gradient is a sum that
        cancels.
      fused: variants whose weight is computed, where XLA fuses that into the product in one of the
        two programs alone: exact at step 0 only without fusion.
      miscompiled: whether XLA of jaxlib 0.10, without its pass named fusion, compiles even the
        plain model wrongly.
      spans: whether the gradient is also compared with the span of the inputs' covariance.
      values: variants whose value and gradient are compared, one for each rule; on codes, without
        models that differ from another in dtype or in who wrote the layer.
      transforms: variants that are transformed, one for each rule and each kind of loop.
      eager: variants called outside of jit. An eager call is a jitted one of the same trace: one
        for each kind of function.
      checkpoint: variants under jax.checkpoint and vmap, one for each kind of loop and of weight.
      optimized: variants compared with all of XLA's optimizations too.
    """

    name: str
    build: Callable[[], Built]
    axes: Mapping[str, Axes]
    targets: Any = "all-linear"
    stack: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32
    materialized: tuple[str, ...] = ()
    reverse: bool = True
    forward: bool = True
    vmap: bool = True
    dora: bool = True
    normed: bool = False
    fused: tuple[str, ...] = ()
    miscompiled: bool = False
    spans: bool = False
    values: tuple[str, ...] = (PLAIN, CODES)
    transforms: tuple[str, ...] = ()
    eager: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    optimized: tuple[str, ...] = ()


CASES: list[Case] = []
DENSE: Axes = ((0,), (1,), ())
STACKED: Axes = ((1,), (2,), (0,))


def case(axes: Mapping[str, Axes], **kwargs: Any) -> Callable:
    """Enter a builder as a case under its own name."""

    def enter(build: Callable[[], Built]) -> Callable[[], Built]:
        CASES.append(Case(build.__name__, build, axes, **kwargs))
        return build

    return enter


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    """A fixed normal array; device_put, unlike jnp.asarray, compiles nothing."""
    rng = np.random.default_rng([seed, *shape])
    return jax.device_put((scale * rng.standard_normal(shape)).astype(dtype))


def noisy(tree: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Every floating leaf plus noise, in NumPy: nothing is compiled."""

    def move(i: int, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        noise = np.random.default_rng([seed + i, *x.shape]).standard_normal(x.shape)
        return jax.device_put((np.asarray(x, np.float64) + scale * noise).astype(x.dtype))

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [move(i, x) for i, x in enumerate(leaves)])


def variables_of(module: nn.Module, *args: Any) -> Any:
    """Variables of the right shapes and a sensible size, without compiling module.init."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return noisy(jax.tree.map(lambda x: np.full(x.shape, 0.2, x.dtype), shapes), scale=0.4)


def linen(module: nn.Module, *args: Any) -> Built:
    """A Linen module applied to whole variables, none of which is zero or one."""
    return module.apply, variables_of(module, *args), args


def of_nnx(model: Any, *args: Any, pure: bool = True, call: Callable | None = None) -> Built:
    """An NNX module by split and merge; params a pure dict, or the State itself."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, *args: Any) -> Any:
        if pure:
            mine = jax.tree.map(lambda x: x, state)
            nnx.replace_by_pure_dict(mine, params)
        else:
            mine = params
        whole = nnx.merge(graphdef, mine, rest)
        return whole(*args) if call is None else call(whole, *args)

    return fn, noisy(nnx.to_pure_dict(state) if pure else state), args


def made(build: Callable[[], nnx.Module]) -> nnx.Module:
    """What build makes, its weights random as those of variables_of: nothing is compiled."""

    def fill(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.full(x.shape, 0.2 if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, noisy(jax.tree.map(fill, state), scale=0.4))


def one_device_mesh() -> jax.sharding.Mesh:
    """A mesh of one device, sharded by the compiler."""
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


# Dense layers.


@case({"params/kernel": DENSE}, targets="**/kernel")
def dense_float32():
    return linen(nn.Dense(5), normal(3, 7))


@case({"params/kernel": DENSE}, targets="**/kernel", dtype=jnp.bfloat16, values=(PLAIN,))
def dense_bfloat16():
    module = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return linen(module, normal(3, 7, dtype=jnp.bfloat16))


@case(
    {"params/kernel": DENSE},
    targets="**/kernel",
    dtype=jnp.bfloat16,
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, DORA),
    eager=(PLAIN,),
    checkpoint=(PLAIN,),
    optimized=(PLAIN,),
)
def dense_mixed():
    return linen(nn.Dense(5, dtype=jnp.bfloat16), normal(3, 7))


@case({"params/kernel": DENSE}, targets="**/kernel", dtype=jnp.float16, values=(PLAIN,))
def dense_float16_over_float32():
    return linen(nn.Dense(5, param_dtype=jnp.float16, dtype=jnp.float32), normal(3, 7))


@case({f"params/layers_{i}/kernel": DENSE for i in (0, 2)}, values=(PLAIN,))
def mlp_all_linear_leaves_the_head():
    module = nn.Sequential([nn.Dense(6), nn.gelu, nn.Dense(8), nn.gelu, nn.Dense(5)])
    return linen(module, normal(2, 3, 7))


@case({"params/kernel": ((0, 1), (2, 3), ())}, targets="**/kernel", spans=True)
def dense_general_many_axes():
    return linen(nn.DenseGeneral((3, 4), axis=(-2, -1)), normal(2, 5, 6))


@case({"params/kernel": ((1,), (2,), (0,))}, targets="**/kernel", transforms=(PLAIN,))
def dense_general_batch_dims():
    return linen(nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), normal(2, 3, 5))


@case({"kernel": ((0, 1), (2,), ())}, targets="kernel", values=(PLAIN,), spans=True)
def nnx_linear_general():
    return of_nnx(
        made(lambda: nnx.LinearGeneral((5, 6), 4, axis=(-2, -1), rngs=nnx.Rngs(0))), normal(3, 5, 6)
    )


@case({"params/kernel": DENSE}, targets="**/kernel", values=(PLAIN,))
def linen_partitioned_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
    return linen(nn.Dense(5, kernel_init=init), normal(3, 7))


@case({"kernel": DENSE}, targets="kernel", values=(PLAIN,))
def nnx_state():
    return of_nnx(made(lambda: nnx.Linear(7, 5, rngs=nnx.Rngs(0))), normal(3, 7), pure=False)


# Attention and einsum.

_PROJECTIONS: dict[str, Axes] = dict.fromkeys(("query", "key", "value"), ((0,), (1, 2), ()))


@case(
    {f"params/{name}/kernel": axes for name, axes in _PROJECTIONS.items()},
    values=(PLAIN, CODES, DORA, DORA_CODES),
    transforms=(PLAIN, CODES),
    checkpoint=(PLAIN,),
)
def linen_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    return linen(module, normal(2, 5, 6))


@case(
    {f"params/{name}/kernel": axes for name, axes in _PROJECTIONS.items()}
    | {"params/out/kernel": ((0, 1), (2,), ())},
    targets="**/kernel",
    dtype=jnp.bfloat16,
    values=(PLAIN,),
    dora=False,
)
def linen_attention_bfloat16_masked():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, dtype=jnp.bfloat16)
    x, mask = normal(2, 5, 6), np.tril(np.ones((2, 1, 5, 5), bool))
    params = variables_of(module, x)
    return (lambda params, x: module.apply(params, x, mask=mask)), params, (x,)


@case(
    {f"{name}/kernel": axes for name, axes in _PROJECTIONS.items()}
    | {"out/kernel": ((0, 1), (2,), ())},
    targets="**/kernel",
    values=(PLAIN,),
)
def nnx_attention():
    build = lambda: nnx.MultiHeadAttention(
        num_heads=2, in_features=6, qkv_features=8, decode=False, rngs=nnx.Rngs(0)
    )
    return of_nnx(made(build), normal(2, 5, 6))


@case({"params/kernel": ((1,), (0, 2), ())}, targets="**/kernel")
def linen_einsum():
    return linen(nn.Einsum((3, 6, 4), "bti,hio->bhto"), normal(2, 5, 6))


@case({"kernel": ((0, 1), (2,), ())}, targets="kernel", values=(PLAIN,))
def nnx_einsum():
    build = lambda: nnx.Einsum("bthk,hkd->btd", (2, 3, 4), (4,), rngs=nnx.Rngs(0))
    return of_nnx(made(build), normal(2, 5, 2, 3))


@case(
    {"w": ((2,), (1,), (0,))}, targets="w", values=(PLAIN, CODES, DORA), transforms=(PLAIN, CODES)
)
def einsum_stack_in_the_middle():
    fn = lambda p, x: jnp.einsum("tgi,goi->tog", x, p["w"])
    return fn, {"w": normal(3, 4, 5)}, (normal(6, 3, 5),)


# Convolutions.

_CONV2: Axes = ((0, 1, 2), (3,), ())


@case({"params/kernel": _CONV2}, targets="**/kernel", transforms=(PLAIN,), optimized=(PLAIN,))
def conv_strided():
    return linen(nn.Conv(6, (3, 2), strides=(2, 1)), normal(2, 7, 6, 4))


@case({"params/kernel": ((0, 1), (2,), ())}, targets="**/kernel")
def conv_1d_dilated_causal():
    module = nn.Conv(6, (3,), kernel_dilation=(2,), padding="CAUSAL")
    return linen(module, normal(2, 9, 4))


@case({"params/kernel": _CONV2}, targets="**/kernel")
def conv_input_dilated():
    module = nn.Conv(5, (2, 2), input_dilation=(2, 1), padding=((1, 0), (0, 1)))
    return linen(module, normal(2, 4, 5, 3))


@case({"params/kernel": _CONV2}, targets="**/kernel")
def conv_padded_circular():
    return linen(nn.Conv(5, (3, 3), padding="CIRCULAR"), normal(2, 4, 5, 3))


@case(
    {"params/kernel": _CONV2},
    targets="**/kernel",
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES, DORA),
    eager=(DORA,),
    checkpoint=(PLAIN, DORA),
)
def conv_grouped():
    return linen(nn.Conv(12, (3, 3), feature_group_count=2), normal(2, 4, 5, 12))


@case(
    {"params/kernel": _CONV2}, targets="**/kernel", values=(PLAIN, CODES, DORA), transforms=(PLAIN,)
)
def conv_depthwise():
    return linen(nn.Conv(6, (3, 3), feature_group_count=3), normal(2, 4, 5, 3))


@case({"params/kernel": _CONV2}, targets="**/kernel", dtype=jnp.bfloat16, values=(PLAIN,))
def conv_bfloat16():
    return linen(nn.Conv(5, (3, 2), dtype=jnp.bfloat16), normal(2, 5, 4, 3))


@case({"kernel": _CONV2}, targets="kernel", values=(PLAIN,))
def nnx_conv_pointwise():
    return of_nnx(made(lambda: nnx.Conv(4, 5, (1, 1), rngs=nnx.Rngs(0))), normal(2, 3, 3, 4))


@case({"params/kernel": ((0, 1), (2,), ())}, targets="**/kernel")
def conv_transpose_1d():
    return linen(nn.ConvTranspose(6, (3,), strides=(2,)), normal(2, 5, 4))


@case({"params/kernel": ((0, 1, 3), (2,), ())}, targets="**/kernel")
def conv_transpose_kernel_transposed():
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 1), transpose_kernel=True)
    return linen(module, normal(2, 4, 5, 3))


@case({"params/kernel": ((1,), (2,), (0,))}, targets="**/kernel", spans=True)
def conv_local_1d():
    return linen(nn.ConvLocal(5, (2,), padding="VALID"), normal(2, 5, 3))


@case(
    {"params/Conv_0/kernel": _CONV2, "params/Conv_1/kernel": _CONV2},
    values=(PLAIN,),
    optimized=(DORA,),
    fused=(DORA,),
    normed=True,
)
def conv_batch_norm_mutable():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 6):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.BatchNorm(use_running_average=False)(x)
                x = nn.gelu(x)
            return nn.Dense(3)(x.mean((1, 2)))

    module, x = Net(), normal(3, 4, 4, 3)
    variables = variables_of(module, x)
    fn = lambda variables, x: module.apply(variables, x, mutable=["batch_stats"])
    return fn, variables, (x,)


# Look-ups.

_TOKENS = np.array([[0, 3, 3], [8, 1, 5]], np.int32)


@case({"params/embedding": DENSE}, targets="**/embedding")
def embed():
    return linen(nn.Embed(9, 4), _TOKENS)


@case({"params/embedding": DENSE}, targets="**/embedding", dtype=jnp.bfloat16, values=(PLAIN,))
def embed_bfloat16():
    return linen(nn.Embed(9, 4, dtype=jnp.bfloat16), _TOKENS)


class Tied(nn.Module):
    """A table read by rows and multiplied by, transposed."""

    def setup(self):
        self.embed = nn.Embed(9, 4)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


@case(
    {"params/embed/embedding": ((1,), (0,), ())},
    targets="**/embedding",
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES, DORA),
    eager=(CODES,),
    checkpoint=(PLAIN, CODES),
)
def embed_tied_attend():
    return linen(Tied(), _TOKENS)


@case({"embed/embedding": ((1,), (0,), ())}, targets="**/embedding", values=(PLAIN,))
def nnx_embed_tied_attend():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(9, 4, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.embed(tokens)))

    return of_nnx(made(lambda: Tied(nnx.Rngs(0))), _TOKENS)


@case({"table": DENSE}, targets="table")
def table_by_take_and_one_hot():
    def fn(p, tokens):
        rows = jnp.take(p["table"], tokens, axis=0) + p["table"][tokens]
        return jnp.sin(rows) + jax.nn.one_hot(tokens, 9) @ p["table"]

    return fn, {"table": normal(9, 4)}, (_TOKENS,)


# Layers in loops.


class Block(nn.Module):
    """A residual block of two products, one fused into two halves."""

    @nn.compact
    def __call__(self, x, _=None):
        up, gate = jnp.split(nn.Dense(12, name="up")(nn.LayerNorm()(x)), 2, axis=-1)
        return x + nn.Dense(x.shape[-1], name="down")(nn.silu(gate) * up), None


class Stacked(nn.Module):
    """nn.scan over nn.remat of a Block."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(3)(jnp.sin(scan(name="layers")(x, None)[0]))


@case(
    {"params/layers/up/kernel": STACKED, "params/layers/down/kernel": STACKED},
    values=(PLAIN, CODES, DORA, DORA_CODES),
    transforms=(PLAIN, CODES, DORA, DORA_CODES),
    eager=(PLAIN,),
    checkpoint=(PLAIN, CODES, DORA),
    optimized=(PLAIN, DORA),
)
def linen_scan_remat():
    return linen(Stacked(), normal(2, 5, 4))


@case({"params/up/kernel": STACKED, "params/down/kernel": STACKED}, spans=True)
def linen_scan_at_top_level():
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return linen(scan(), normal(2, 4), None)


@case({f"params/blocks_{i}/{name}/kernel": DENSE for i in range(2) for name in ("up", "down")})
def linen_remat_unrolled():
    class Net(nn.Module):
        def setup(self):
            self.blocks = [nn.remat(Block)() for _ in range(2)]
            self.head = nn.Dense(3)

        def __call__(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return self.head(jnp.sin(x))

    return linen(Net(), normal(2, 5, 4))


class NnxBlock(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class NnxStack(nnx.Module):
    """nnx.scan with nnx.remat over layers made by nnx.vmap."""

    def __init__(self, rngs):
        make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(3))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return self.head(jnp.sin(forward(self.layers, x)))


@case(
    {"layers/up/kernel": STACKED, "layers/down/kernel": STACKED},
    values=(PLAIN,),
    transforms=(PLAIN,),
    checkpoint=(PLAIN,),
)
def nnx_scan_remat():
    return of_nnx(made(lambda: NnxStack(nnx.Rngs(0))), normal(2, 5, 4))


@case(
    {"block/up/kernel": DENSE, "block/down/kernel": DENSE},
    values=(PLAIN,),
    transforms=(PLAIN,),
    eager=(PLAIN,),
)
def nnx_jit_and_remat_inside():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = NnxBlock(rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.jit(lambda block, x: block(x))(self.block, x)
            x = nnx.remat(lambda block, x: block(x))(self.block, x)
            return self.head(jnp.sin(x))

    return of_nnx(made(lambda: Net(nnx.Rngs(0))), normal(2, 5, 4))


_GATES = [f"{kind}{gate}" for kind in "ih" for gate in "ifgo"]


@case(
    {f"params/cell/{gate}/kernel": DENSE for gate in _GATES},
    targets="**/kernel",
    transforms=(PLAIN,),
    checkpoint=(PLAIN,),
)
def linen_rnn_lstm():
    return linen(nn.RNN(nn.LSTMCell(4)), normal(2, 3, 5))


@case(
    {f"params/cell/{gate}/kernel": DENSE for gate in _GATES},
    targets="**/kernel",
    values=(PLAIN,),
)
def linen_rnn_lstm_that_concatenates_its_kernels():
    return linen(nn.RNN(nn.OptimizedLSTMCell(4)), normal(2, 3, 5))


def _nnx_rnn(cell: Callable) -> Built:
    """An RNN whose cell counts the random streams it draws its first carry from."""
    model = made(lambda: nnx.RNN(cell(5, 4, rngs=nnx.Rngs(0))))
    return of_nnx(model, normal(2, 3, 5), call=lambda model, x: model(x, rngs=nnx.Rngs(0)))


@case(
    {f"cell/{'if_' if gate == 'if' else gate}/kernel": DENSE for gate in _GATES},
    targets="**/kernel",
    values=(PLAIN,),
)
def nnx_rnn_lstm():
    return _nnx_rnn(nnx.LSTMCell)


@case(
    {"cell/dense_i/kernel": DENSE, "cell/dense_h/kernel": DENSE},
    targets="**/kernel",
    values=(PLAIN,),
)
def nnx_rnn_lstm_optimized():
    return _nnx_rnn(nnx.OptimizedLSTMCell)


def _stacked_weight() -> dict[str, jax.Array]:
    return {"w": normal(3, 4, 4, scale=0.5), "b": normal(3, 4)}


@case(
    {"w": STACKED},
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES),
    checkpoint=(PLAIN, CODES),
)
def fori_over_a_stack():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i] + p["b"][i]), x)

    return fn, _stacked_weight(), (normal(2, 4),)


@case({"w": STACKED}, optimized=(DORA,), fused=(DORA,), spans=True)
def scan_over_indices():
    def fn(p, x):
        step = lambda x, i: (jnp.tanh(x @ jnp.take(p["w"], i, axis=0)), None)
        return lax.scan(step, x, jnp.arange(3))[0]

    return fn, {"w": normal(3, 4, 4, scale=0.5)}, (normal(2, 4),)


@case({"w": STACKED})
def python_loop_over_a_stack():
    def fn(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i] + p["b"][i])
        return x

    return fn, _stacked_weight(), (normal(2, 4),)


@case({"w": ((2,), (3,), (0, 1))}, spans=True)
def scan_in_scan():
    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda x, w: (lax.scan(inner, x, w)[0], None)
        return jnp.sin(lax.scan(outer, x, p["w"], reverse=True)[0])

    return fn, {"w": normal(2, 3, 4, 4, scale=0.5)}, (normal(2, 4),)


@case({"w": DENSE}, transforms=(PLAIN,))
def carried_unchanged():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, c: (c[0], jnp.tanh(c[1] @ c[0])), (p["w"], x))[1]

    return fn, {"w": normal(4, 4, scale=0.5)}, (normal(2, 4),)


@case(
    {"w": DENSE, "v": DENSE},
    reverse=False,
    transforms=(PLAIN,),
    eager=(PLAIN,),
    checkpoint=(PLAIN,),
    optimized=(DORA,),
    fused=(DORA,),
)
def while_loop():
    def fn(p, x):
        more = lambda c: (c[0] < 5) & (jnp.abs(c[1] @ p["w"]).sum() < 1e6)
        step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) @ p["v"], c[2])
        return lax.while_loop(more, step, (x.shape[0], x, p["w"]))[1]

    return fn, {"w": normal(4, 6, scale=0.5), "v": normal(6, 4, scale=0.5)}, (normal(2, 4),)


@case({"w": DENSE, "v": DENSE}, transforms=(PLAIN,), checkpoint=(PLAIN,), spans=True)
def cond_and_switch():
    def fn(p, x):
        x = lax.cond(
            x.sum() > -1e9, lambda w, x: jnp.sin(x @ w), lambda w, x: x * w.shape[0], p["w"], x
        )
        branches = [lambda x: x, lambda x: jnp.sin(x @ p["v"]), lambda x: jnp.cos(x @ p["w"])]
        return lax.switch(jnp.int32(x.size > 2), branches, x)

    return fn, {"w": normal(4, 4), "v": normal(4, 4)}, (normal(2, 4),)


@case({"w": ((0,), (1,), ())}, targets="w", materialized=("w",))
def carried_and_changed():
    def fn(p, x):
        step = lambda i, c: (jnp.tanh(c[0]), jnp.tanh(c[1] @ c[0]))
        return lax.fori_loop(0, 3, step, (p["w"], x))[1]

    return fn, {"w": normal(4, 4)}, (normal(2, 4),)


# Experts.


class Experts(nn.Module):
    """nn.vmap over one expert."""

    in_axes: Any

    @nn.compact
    def __call__(self, x):
        vmapped = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=self.in_axes,
            axis_size=3,
        )
        return jnp.sin(vmapped(5, name="experts")(x))


@case({"params/experts/kernel": STACKED}, values=(PLAIN, CODES, DORA), transforms=(CODES,))
def vmap_experts_each_its_input():
    return linen(Experts(0), normal(3, 2, 4))


@case({"params/experts/kernel": ((1,), (0, 2), ())})
def vmap_experts_look_like_heads():
    return linen(Experts(None), normal(2, 4))


@case({"params/experts/kernel": STACKED}, stack={"**/experts/kernel": 0})
def vmap_experts_stack_override():
    return linen(Experts(None), normal(2, 4))


@case(
    {"up": STACKED, "down": STACKED, "router": DENSE},
    targets=("up", "down", "router"),
    vmap=False,
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES),
    eager=(PLAIN,),
    checkpoint=(PLAIN,),
    miscompiled=True,
)
def moe_ragged_dot():
    def fn(p, x, experts):
        order = jnp.argsort(experts)
        sizes = jnp.bincount(experts, length=3).astype(jnp.int32)
        gate = jax.nn.softmax(x @ p["router"])
        rows = jax.nn.silu(lax.ragged_dot(x[order], p["up"], sizes))
        rows = lax.ragged_dot(rows, p["down"], sizes)
        y = jnp.zeros_like(x).at[order].set(rows)
        return y * jnp.take_along_axis(gate, experts[:, None], axis=1)

    params = {"router": normal(4, 3), "up": normal(3, 4, 6), "down": normal(3, 6, 4)}
    return fn, params, (normal(7, 4), np.array([2, 0, 1, 2, 2, 0, 2], np.int32))


@case({"up": STACKED}, values=(PLAIN, CODES, DORA), transforms=(PLAIN,))
def moe_by_gathered_weights():
    def fn(p, x, experts):
        return jnp.sin(jnp.einsum("ti,tio->to", x, p["up"][experts]))

    return fn, {"up": normal(3, 4, 6)}, (normal(5, 4), np.array([2, 0, 1, 2, 2], np.int32))


# Plain weights: sides, transposes, ties, shapes.


@case({"w": ((1,), (0,), ())}, targets="w")
def weight_on_the_left():
    return (lambda p, x: p["w"] @ x), {"w": normal(5, 4)}, (normal(4, 3),)


@case({"w": ((1,), (0,), ())}, targets="w")
def weight_transposed():
    return (lambda p, x: x @ p["w"].T), {"w": normal(5, 4)}, (normal(3, 4),)


@case(
    {"w": DENSE},
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES),
    optimized=(DORA,),
    fused=(DORA,),
)
def weight_tied_transposed():
    return (
        (lambda p, x: jnp.sin(jnp.tanh(x @ p["w"]) @ p["w"].T)),
        {"w": normal(4, 6)},
        (normal(3, 4),),
    )


@case({"w": DENSE}, targets="w")
def weight_reshaped_to_heads():
    fn = lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(4, 2, 3))
    return fn, {"w": normal(4, 6)}, (normal(2, 3, 4),)


@case({"w": ((0,), (1, 2), ())}, targets="w")
def weight_heads_flattened():
    fn = lambda p, x: x @ p["w"].reshape(4, 6)
    return fn, {"w": normal(4, 2, 3)}, (normal(3, 4),)


@case({"w": DENSE}, values=(PLAIN, CODES, DORA), transforms=(CODES,))
def fused_qkv_kernel_split():
    def fn(p, x):
        q, k, v = (x @ part for part in jnp.split(p["w"], 3, axis=1))
        return jax.nn.softmax(q @ k.T) @ v

    return fn, {"w": normal(4, 15)}, (normal(6, 4),)


@case({"w": DENSE})
def fused_qkv_output_split():
    def fn(p, x):
        q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        return jax.nn.softmax(q @ k.T) @ v

    return fn, {"w": normal(4, 15), "b": normal(15)}, (normal(6, 4),)


@case({"w": ((1,), (0, 2), ())}, transforms=(PLAIN,))
def fused_qkv_stacked():
    def fn(p, x):
        q, k, v = jnp.einsum("td,ndk->ntk", x, p["w"][:, ::-1])[:, :, 1:]
        for i in range(3):
            v = jnp.sin(v @ p["w"][i, :, :4])
        return jax.nn.softmax(q @ k.T) @ v

    return fn, {"w": normal(3, 4, 5)}, (normal(6, 4),)


@case({"w": DENSE}, targets="w")
def weight_scaled():
    fn = lambda p, x: x @ (-p["w"] * jnp.float32(0.5) / 3.0)
    return fn, {"w": normal(4, 6)}, (normal(3, 4),)


@case({"weights/0": DENSE, "weights/1": DENSE}, values=(PLAIN,), spans=True)
def list_tuple_dataclass_pytree():
    return _pytree_model()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
    """A user's own pytree."""

    weights: tuple[Any, ...]
    biases: list[Any]


def _pytree_model() -> Built:
    def fn(p, x):
        for w, b in zip(p.weights, p.biases, strict=True):
            x = jnp.sin(x @ w + b)
        return x

    params = Params((normal(4, 6), normal(6, 5)), [normal(6), normal(5)])
    return fn, params, (normal(3, 4),)


@case({"w": DENSE})
def stop_gradient_on_one_use():
    fn = lambda p, x: jnp.sin(x @ lax.stop_gradient(p["w"])) + jnp.cos(x @ p["w"])
    return fn, {"w": normal(4, 6)}, (normal(3, 4),)


@case({"w": DENSE}, transforms=(PLAIN,))
def inner_jit_twice():
    block = jax.jit(lambda w, x: jnp.sin(x @ w))
    return (lambda p, x: block(p["w"], block(p["w"], x))), {"w": normal(4, 4)}, (normal(3, 4),)


@case({"w": DENSE, "v": DENSE})
def inner_vmap_and_checkpoint():
    def fn(p, x):
        h = jax.vmap(jax.checkpoint(lambda row: jnp.sin(row @ p["w"])))(x)
        return jnp.sin(jax.vmap(lambda col: p["v"].T @ col, in_axes=1, out_axes=1)(h.T))

    return fn, {"w": normal(4, 6), "v": normal(6, 5)}, (normal(3, 4),)


@case({"w": DENSE})
def grad_inside():
    def fn(p, x):
        energy = lambda x: jnp.sin(x @ p["w"]).sum()
        return jnp.sin(x - 0.5 * jax.grad(energy)(x))

    return fn, {"w": normal(4, 6)}, (normal(3, 4),)


@case(
    {"w": DENSE},
    targets="w",
    values=(PLAIN, CODES, DORA),
    transforms=(PLAIN, CODES),
    eager=(PLAIN,),
    checkpoint=(PLAIN,),
)
def shard_map_one_device():
    mesh = one_device_mesh()

    def fn(p, x):
        local = lambda w, x: lax.psum(x @ w, "d")
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P("d", None), P(None, "d")), out_specs=P()
        )
        return mapped(p["w"], x)

    return fn, {"w": normal(4, 6)}, (normal(3, 4),)


@case({"a": DENSE, "b": DENSE}, targets=("a", "b"))
def product_of_two_weights():
    fn = lambda p, x: jnp.sin(x @ (p["a"] @ p["b"])) + x @ p["a"] @ p["b"]
    return fn, {"a": normal(4, 6), "b": normal(6, 5)}, (normal(3, 4),)


# Where no rule serves: built, said, and right.


@functools.partial(jax.custom_vjp)
def tenfold(x, w):
    """x @ w whose author says that dw is ten times the truth."""
    return x @ w


def _tenfold_forward(x, w):
    return x @ w, (x, w)


def _tenfold_backward(saved, g):
    x, w = saved
    return g @ w.T, 10.0 * (x.T @ g)


tenfold.defvjp(_tenfold_forward, _tenfold_backward)


@jax.custom_jvp
def doubled(x, w):
    """x @ w whose author says that its tangent is twice the truth."""
    return x @ w


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2.0 * (dx @ w + x @ dw)


@case(
    {"w": DENSE},
    targets="w",
    materialized=("w",),
    forward=False,
    transforms=(PLAIN,),
    eager=(PLAIN,),
    checkpoint=(PLAIN,),
)
def custom_vjp():
    return (lambda p, x: jnp.sin(tenfold(x, p["w"]))), {"w": normal(4, 6)}, (normal(3, 4),)


@case({"w": DENSE}, targets="w", materialized=("w",), values=(PLAIN,), transforms=(PLAIN,))
def custom_jvp():
    return (lambda p, x: jnp.sin(doubled(x, p["w"]))), {"w": normal(4, 6)}, (normal(3, 4),)


@case({"wq": DENSE, "wk": DENSE}, targets=("wq", "wk"), values=(PLAIN,))
def weights_concatenated():
    def fn(p, x):
        q, k = jnp.split(x @ jnp.concatenate([p["wq"], p["wk"]], axis=1), [6], axis=1)
        return jnp.sin(q) * k.sum()

    return fn, {"wq": normal(4, 6), "wk": normal(4, 5)}, (normal(3, 4),)


@case(
    {"params/layer_instance/kernel": DENSE},
    targets="**/kernel",
    materialized=("params/layer_instance/kernel",),
    values=(PLAIN,),
    normed=True,
)
def weight_norm():
    return linen(nn.WeightNorm(nn.Dense(5)), normal(3, 4))


@case(
    {"w": DENSE},
    targets="w",
    materialized=("w",),
    values=(PLAIN,),
    optimized=(PLAIN,),
    fused=(PLAIN,),
)
def weight_elementwise():
    return (lambda p, x: x @ jnp.tanh(p["w"])), {"w": normal(4, 6)}, (normal(3, 4),)


@case({"w": DENSE}, targets="w", materialized=("w",))
def weight_returned():
    return (lambda p, x: (x @ p["w"], p["w"])), {"w": normal(4, 6)}, (normal(3, 4),)
