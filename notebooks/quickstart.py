# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# A model that knows English learns Python, through low-rank adapters, and we watch what it forgets.
# Nothing is downloaded: the English is the documentation inside Python itself, the Python is its
# standard library. The models are ordinary Flax code and know nothing of adapters.

# %%
# What this notebook imports, where it is missing: run in the notebooks folder of the repository.
import importlib.util
import subprocess
import sys

if not all(map(importlib.util.find_spec, ("lowrank_jax", "flax", "optax", "matplotlib"))):
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "..[notebooks]"], check=True)

# %%
import functools
import inspect
import io
import pydoc_data.topics
import statistics
import tempfile

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Image

import lowrank_jax as lowrank

# %% [markdown]
# ## Two texts
#
# One token is one byte. The last tenth of each text is held out.

# %%
CONTEXT, BATCH, VOCAB = 64, 16, 128


def encode(text):
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


def windows(ids, count, seed):
    starts = np.random.default_rng(seed).integers(0, len(ids) - CONTEXT, (count, 1))
    return ids[starts + np.arange(CONTEXT + 1)]


english = encode("\n".join(pydoc_data.topics.topics.values()))
python = encode("\n".join(map(inspect.getsource, (inspect, statistics, functools, tempfile))))
split = {"English": english, "Python": python}
train = {name: ids[: len(ids) * 9 // 10] for name, ids in split.items()}
held_out = {name: windows(ids[len(ids) * 9 // 10 :], 128, 0) for name, ids in split.items()}
{name: f"{len(ids):,} characters" for name, ids in split.items()}

# %% [markdown]
# ## An unmodified Flax model
#
# A small transformer in Linen. (NNX comes at the end; it takes one line more.)


# %%
class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h)


class Transformer(nn.Module):
    layers: int = 3
    dim: int = 64

    @nn.compact
    def __call__(self, ids):
        places = self.param("places", nn.initializers.normal(0.02), (CONTEXT, self.dim))
        x = nn.Embed(VOCAB, self.dim, name="embed")(ids) + places[: ids.shape[1]]
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(VOCAB, name="head")(nn.LayerNorm()(x))


model = Transformer()
params = model.init(jax.random.key(0), held_out["English"][:, :-1])


# %% [markdown]
# It is trained on the English, all of it, as ever.


# %%
def loss(apply, params, tokens):
    """Nats per character."""
    logits = apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def fit(step, state, ids, steps, look=None):
    """Run step over random windows; look at the held-out losses now and then."""
    curve = []
    for i, batch in enumerate(windows(ids, steps * BATCH, 1).reshape(steps, BATCH, -1)):
        if look is not None and i % 10 == 0:
            curve.append((i, look(state)))
        state = step(state, batch)
    return state, [*curve, (steps, look(state))] if look else None


tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 30, 300))


@jax.jit
def pretrain(state, tokens):
    params, opt_state = state
    grads = jax.grad(functools.partial(loss, model.apply))(params, tokens)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


(params, _), _ = fit(pretrain, (params, tx.init(params)), train["English"], 300)
before = {n: float(loss(model.apply, params, w)) for n, w in held_out.items()}
before

# %% [markdown]
# ## Adapters
#
# `plan` traces the model on shapes, and learns from its equations what every parameter is for:
# which axes a product contracts (fan-in), which it keeps (fan-out). So attention's three-axis
# kernels need no special treatment, and "all-linear" means what it says.

# %%
plan = lowrank.plan(model.apply, params, held_out["English"][:, :-1])
plan

# %% [markdown]
# `init` returns two trees: the frozen base, and the adapter that mirrors it, with factors `a` and
# `b` at the targets, the value itself where a leaf is to be trained whole (the norms, here), and
# `None` elsewhere. `combine` puts the trees together without arithmetic, and `report` says what
# they cost and, equation by equation, how each adapter was used.

# %%
config = lowrank.LoraConfig(rank=8, targets="all-linear", train="**/LayerNorm_*/*")
base, lora = lowrank.init(jax.random.key(1), params, config, plan=plan)
lowrank.report(model.apply, lowrank.combine(base, lora), held_out["English"][:, :-1])

# %% [markdown]
# ## Training
#
# `lift` makes the model's own function take such trees. We differentiate `lora` alone, so no dense
# gradient is ever computed. The base is an argument of the jitted step, not a constant in it.

# %%
apply = lowrank.lift(model.apply)
tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 10, 200))


@jax.jit
def step(state, tokens, base):
    lora, opt_state = state
    grads = jax.grad(lambda l: loss(apply, lowrank.combine(base, l), tokens))(lora)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(lora, updates), opt_state


@jax.jit
def evaluate(lora, scale=1.0):
    tree = lowrank.combine(base, lora, scale=scale)
    return {name: loss(apply, tree, tokens) for name, tokens in held_out.items()}


(lora, _), curve = fit(
    functools.partial(step, base=base),
    (lora, tx.init(lora)),
    train["Python"],
    200,
    look=lambda state: evaluate(state[0]),
)

# %% mystnb={"image": {"alt": "held-out losses of both texts over training steps"}}
COLORS = {"Python": "tab:blue", "English": "tab:orange"}


def draw(x, losses, style, **labels):
    """Plot the held-out losses of both texts."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name, color in COLORS.items():
        axis.plot(x, [loss[name] for loss in losses], style, color=color, label=name)
        axis.axhline(before[name], color=color, linestyle=":", linewidth=1)
    axis.set(ylabel="held-out loss (nats per character)", **labels)
    axis.legend(title="dotted: the base")
    return figure


def show(figure, alt):
    """Return a figure as an image with a text for those who do not see it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return Image(png.getvalue(), alt=alt)


figure = draw(
    [i for i, _ in curve],
    [losses for _, losses in curve],
    "-",
    title="What is learned, what is forgotten",
    xlabel=f"training step ({BATCH} windows of {CONTEXT} characters each)",
)
first, last = curve[0][1], curve[-1][1]
show(
    figure,
    "Held-out losses over training steps, in nats per character: on Python it falls from "
    f"{first['Python']:.2f} to {last['Python']:.2f}, on English it rises from "
    f"{first['English']:.2f} to {last['English']:.2f}.",
)

# %% [markdown]
# ## Turning the adapter up and down
#
# `scale` multiplies the adapter's effect, 0 to turn it off. It is traced: the sweep below compiles
# nothing new. Below 1 there is a better bargain between the two texts.

# %% mystnb={"image": {"alt": "held-out losses of both texts over the adapter's scale"}}
scales = np.linspace(0.0, 1.5, 13)
sweep = [evaluate(lora, scale) for scale in scales]
figure = draw(
    scales,
    sweep,
    "o-",
    title="The adapter turned up and down",
    xlabel="scale (1 is the adapter as trained, 0 the base)",
)
best = {name: scales[np.argmin([losses[name] for losses in sweep])] for name in COLORS}
show(
    figure,
    "Held-out losses over the adapter's scale from 0 to 1.5, in nats per character: lowest on "
    f"Python at scale {best['Python']:.2f}, on English at scale {best['English']:.2f}.",
)

# %% [markdown]
# ## Merging, saving
#
# `merge` folds the adapter into dense weights of the shapes and dtypes that the model had: they go
# to `model.apply` itself. What is saved is small: the adapter and its configuration, bound to the
# base by a fingerprint.

# %%
merged = lowrank.merge(base, lora)
tokens = held_out["Python"][:, :-1]
difference = model.apply(merged, tokens) - apply(lowrank.combine(base, lora), tokens)
with tempfile.TemporaryDirectory() as directory:
    lowrank.checkpoint.save(directory, lora=lora, config=config, base=base)
    restored = lowrank.checkpoint.restore(directory, base=base)
print("largest difference in the logits:", float(abs(difference).max()))
print("restored, bit for bit:", jax.tree.all(jax.tree.map(np.array_equal, restored.lora, lora)))

# %% [markdown]
# ## The same with NNX
#
# `functional` turns an `nnx.Module` into a function and its parameters; from there on everything is
# as above. What a call would change in the model besides (batch statistics, dropout's counters) is
# threaded by `functional_with_state`, and refused here, by name.


# %%
class Mixer(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.embed = nnx.Embed(VOCAB, dim, rngs=rngs)
        self.mix = nnx.Conv(dim, dim, kernel_size=(8,), padding="CAUSAL", rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.head = nnx.Linear(4 * dim, VOCAB, rngs=rngs)

    def __call__(self, ids):
        return self.head(nnx.relu(self.up(nnx.relu(self.mix(self.embed(ids))))))


mixer = Mixer(32, rngs=nnx.Rngs(0))
fn, params = lowrank.functional(mixer)
plan = lowrank.plan(fn, params, tokens)
small = lowrank.LoraConfig(rank=4)
frozen, adapter = lowrank.init(jax.random.key(2), params, small, plan=plan)
lowrank.report(fn, lowrank.combine(frozen, adapter), tokens)

# %% [markdown]
# The convolution and the matrix are adapted, the table and the last projection are not; name them
# in `targets` to change that.

# %%
mixed = lambda adapter: loss(lowrank.lift(fn), lowrank.combine(frozen, adapter), held_out["Python"])
grads = jax.grad(mixed)(adapter)
print("norm of the adapter's gradient:", float(optax.global_norm(grads)))
nnx.update(mixer, lowrank.merge(frozen, adapter))  # back into the module
mixer(tokens).shape
