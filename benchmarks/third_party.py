"""Models of other libraries under adapters on all linear layers, dense and on codes of four bits.

    python benchmarks/third_party.py [--dora] [words of a case's name]

None of these libraries is a dependency; a case whose library is missing says so. An environment of
their own, made in a checkout (bonsai is not on PyPI: clone github.com/jax-ml/bonsai beside it):

    python3 -m venv third && . third/bin/activate
    pip install -e . keras dm-haiku jaxtyping && pip install --no-deps -e ../bonsai

Every model is built as its library's documentation says, with random weights, and used through its
own call. Adapters are `LoraConfig(rank=16)`, "all-linear". Columns:
- adapted: how many leaves have an adapter, and of how many arrays the model consists;
- start: the largest difference of the lifted function from the plain one, jitted both, with the
  adapters that init returns, of the largest output. 0 is equal bit for bit;
- value, gradient: with random factors, the largest difference from the function of the merged
  weights, of the largest output; and of the factors' gradients, of the largest of the same leaf;
- quantized: how many leaves NF4 codes replace; nf4: value again, on these codes;
- below a case: the warning of each dense weight that was built, on codes or not.

A gradient of 1e-2 (Keras Xception) is rounding at ReLUs: in float64 it is 3e-15.
"""

import argparse
import os
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lowrank


def normal(*shape, seed=0):
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(*shape, vocabulary=100):
    """Token numbers."""
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, shape), jnp.int32)


def bonsai_efficientnet():
    from bonsai.models.efficientnet import modeling
    from flax import nnx

    model = modeling.EfficientNet(modeling.ModelConfig.b0(), rngs=nnx.Rngs(0))
    return *lowrank.functional(model), normal(1, 64, 64, 3)


def bonsai_mamba2():
    from bonsai.models.mamba2 import modeling
    from flax import nnx

    model = modeling.Mamba2ForCausalLM(modeling.ModelConfig.tiny(), rngs=nnx.Rngs(0))
    fn, params = lowrank.functional(model)
    return lambda p, ids: fn(p, ids)["logits"], params, tokens(2, 40)


def bonsai_mamba2_forecaster():
    from bonsai.models.mamba2 import modeling
    from flax import nnx

    options = {"d_model": 64, "n_layers": 2, "d_state": 16, "headdim": 16, "chunk_size": 16}
    model = modeling.Mamba2Forecaster(3, rngs=nnx.Rngs(0), **options)
    return *lowrank.functional(model), normal(2, 40, 3)


def keras_model(model, x):
    """A Keras model by its stateless call, its trainable variables by their paths."""
    names = [variable.path for variable in model.trainable_variables]
    params = {n: v.value for n, v in zip(names, model.trainable_variables, strict=True)}
    rest = [variable.value for variable in model.non_trainable_variables]
    fn = lambda p, x: model.stateless_call([p[name] for name in names], rest, x)[0]
    return fn, params, x


def keras_network(make, size):
    """A network of Keras for images of bytes, to its logits."""
    shape = (size, size, 3)
    model = make(weights=None, input_shape=shape, classifier_activation=None)
    return keras_model(model, 128 + 50 * normal(1, *shape))


def keras_efficientnet():
    import keras

    return keras_network(keras.applications.EfficientNetB0, 64)


def keras_mobilenet():
    import keras

    return keras_network(keras.applications.MobileNetV3Small, 64)


def keras_xception():
    import keras

    return keras_network(keras.applications.Xception, 71)


def keras_convnext():
    import keras

    return keras_network(keras.applications.ConvNeXtTiny, 64)


def keras_layers(*names):
    """Layers of Keras one after another, as a function of a list of variables."""

    def make():
        import keras
        from keras import layers

        x = normal(2, 8, 8, 16) if names[0] in IMAGES else normal(2, 7, 16)
        inputs = keras.Input(x.shape[1:])
        made = inputs
        for name in names:
            made = KERAS[name](layers)(made)
        model = keras.Model(inputs, layers.Dense(5, name="head")(made))
        rest = [variable.value for variable in model.non_trainable_variables]
        params = [variable.value for variable in model.trainable_variables]
        return lambda p, x: model.stateless_call(p, rest, x)[0], params, x

    return make


KERAS = {
    "DepthwiseConv2D": lambda layers: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
    "SeparableConv2D": lambda layers: layers.SeparableConv2D(24, 3, padding="same"),
    "Conv2D, groups": lambda layers: layers.Conv2D(32, 3, groups=4),
    "Conv2D, dilated": lambda layers: layers.Conv2D(32, 3, dilation_rate=2, padding="same"),
    "Conv2DTranspose": lambda layers: layers.Conv2DTranspose(24, 3, strides=2, padding="same"),
    "GRU": lambda layers: layers.GRU(24, return_sequences=True),
    "GRU, reset before": lambda layers: layers.GRU(24, reset_after=False, return_sequences=True),
    "LSTM": lambda layers: layers.LSTM(24, return_sequences=True),
    "LSTM, unrolled": lambda layers: layers.LSTM(24, unroll=True, return_sequences=True),
    "SimpleRNN": lambda layers: layers.SimpleRNN(24, return_sequences=True),
    "Bidirectional": lambda layers: layers.Bidirectional(layers.GRU(24, return_sequences=True)),
    "ConvLSTM1D": lambda layers: layers.ConvLSTM1D(24, 3, return_sequences=True),
    "Dense": lambda layers: layers.Dense(24, "relu"),
    "EinsumDense": lambda layers: layers.EinsumDense("btd,dhk->bthk", (None, 4, 8)),
    "MultiHeadAttention": lambda layers: Twice(layers.MultiHeadAttention(4, 8)),
    "GroupQueryAttention": lambda layers: Twice(layers.GroupQueryAttention(8, 4, 2)),
    "Conv1D": lambda layers: layers.Conv1D(24, 3, padding="causal"),
    "SeparableConv1D": lambda layers: layers.SeparableConv1D(24, 3),
    "Conv1DTranspose": lambda layers: layers.Conv1DTranspose(24, 3, strides=2),
    "SpectralNormalization": lambda layers: layers.SpectralNormalization(layers.Dense(24)),
}
IMAGES = {"DepthwiseConv2D", "SeparableConv2D", "Conv2D, groups", "Conv2D, dilated"}
IMAGES |= {"Conv2DTranspose", "ConvLSTM1D"}


class Twice:
    """An attention layer of a sequence to itself."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, x)


def haiku(body, x, state=False):
    """A Haiku function, transformed."""

    def make():
        import haiku as hk

        transformed = hk.without_apply_rng(hk.transform(lambda x: body(hk, x)))
        return transformed.apply, transformed.init(jax.random.key(0), x), x

    return make


def unroll(make, dynamic=True):
    """A recurrent core of Haiku over time."""

    def body(hk, x):
        core = make(hk)
        run = hk.dynamic_unroll if dynamic else hk.static_unroll
        return hk.Linear(5)(run(core, x, core.initial_state(x.shape[1]))[0])

    return body


def haiku_attention(hk, x):
    """Self-attention, then a projection."""
    start = hk.initializers.VarianceScaling(2.0)
    return hk.Linear(5)(hk.MultiHeadAttention(4, 8, w_init=start)(x, x, x))


def haiku_network(make):
    """A network of Haiku with batch norm, its averages constant."""
    import haiku as hk

    transformed = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: make(hk)(x, is_training=train))
    )
    x = normal(1, 64, 64, 3)
    params, state = transformed.init(jax.random.key(0), x, True)
    return lambda p, x: transformed.apply(p, state, x, False)[0], params, x


def haiku_mobilenet():
    return haiku_network(lambda hk: hk.nets.MobileNetV1())


def haiku_resnet():
    return haiku_network(lambda hk: hk.nets.ResNet18(10))


def head(layer):
    """A layer of Haiku, then a projection."""
    return lambda hk, x: hk.Linear(5)(jax.nn.relu(layer(hk)(x)))


SERIES, IMAGE = normal(7, 2, 16), normal(2, 8, 8, 16)
CASES = {
    "bonsai EfficientNet-B0 (NNX)": bonsai_efficientnet,
    "bonsai Mamba-2 (NNX)": bonsai_mamba2,
    "bonsai Mamba-2 forecaster (NNX)": bonsai_mamba2_forecaster,
    "Keras EfficientNetB0": keras_efficientnet,
    "Keras MobileNetV3Small": keras_mobilenet,
    "Keras Xception": keras_xception,
    "Keras ConvNeXtTiny": keras_convnext,
    **{f"Keras {name}": keras_layers(name) for name in KERAS},
    "Haiku GRU": haiku(unroll(lambda hk: hk.GRU(24)), SERIES),
    "Haiku GRU, unrolled": haiku(unroll(lambda hk: hk.GRU(24), dynamic=False), SERIES),
    "Haiku LSTM": haiku(unroll(lambda hk: hk.LSTM(24)), SERIES),
    "Haiku VanillaRNN": haiku(unroll(lambda hk: hk.VanillaRNN(24)), SERIES),
    "Haiku Conv2DLSTM": haiku(
        unroll(lambda hk: hk.Conv2DLSTM((8, 8), 24, 3)), normal(3, 2, 8, 8, 16)
    ),
    "Haiku Conv2DTranspose": haiku(head(lambda hk: hk.Conv2DTranspose(24, 3, 2)), IMAGE),
    "Haiku DepthwiseConv2D": haiku(head(lambda hk: hk.DepthwiseConv2D(2, 3)), IMAGE),
    "Haiku SeparableDepthwiseConv2D": haiku(
        head(lambda hk: hk.SeparableDepthwiseConv2D(2, 3)), IMAGE
    ),
    "Haiku Conv2D, groups": haiku(head(lambda hk: hk.Conv2D(32, 3, feature_group_count=4)), IMAGE),
    "Haiku MultiHeadAttention": haiku(haiku_attention, normal(2, 7, 32)),
    "Haiku MLP": haiku(lambda hk, x: hk.nets.MLP([24, 24, 5])(x), normal(3, 16)),
    "Haiku MobileNetV1": haiku_mobilenet,
    "Haiku ResNet18": haiku_resnet,
}


def difference(found, expected):
    """The largest difference, of the largest number expected."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(f - e).max() / jnp.maximum(jnp.abs(e).max(), 1e-30)) for f, e in pairs)


def noisy(tree, size):
    """A tree with noise on every array: nothing is zero, or has no effect."""
    leaves, tree = jax.tree.flatten(tree)
    rng = np.random.default_rng(2)
    noise = lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)
    return jax.tree.unflatten(tree, [leaf + noise(leaf) for leaf in leaves])


def built(caught):
    """Paths of which a dense weight was built, as warnings say."""
    return [str(w.message) for w in caught if issubclass(w.category, lowrank.MaterializeWarning)]


def check(make, dora=False):
    """The figures of a case, and what was materialized."""
    fn, params, x = make()
    params = noisy(params, 0.02)  # some libraries start the last layer, or a branch, at zero
    lifted = lowrank.lift(fn)
    plan = lowrank.plan(fn, params, x)
    config = lowrank.LoraConfig(rank=16, dora=dora)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base, lora = lowrank.init(0, params, config, plan=plan)
        adapted = len(jax.tree.leaves(lora, is_leaf=lambda n: isinstance(n, lowrank.LowRank)))
        found = {"adapted": f"{adapted}/{len(jax.tree.leaves(params))}"}
        plain = jax.jit(fn)(params, x)
        found["start"] = difference(lifted(lowrank.combine(base, lora), x), plain)
        lora = noisy(lora, 0.1)
        live = lambda lora: lifted(lowrank.combine(base, lora), x)
        dense = jax.jit(lambda lora: fn(lowrank.merge(base, lora), x))
        out = dense(lora)
        found["value"] = difference(live(lora), out)
        weigh = lambda out: sum(
            jnp.vdot(normal(*leaf.shape, seed=3), leaf) for leaf in jax.tree.leaves(out)
        )
        slopes = [jax.jit(jax.grad(lambda l, f=f: weigh(f(l))))(lora) for f in (live, dense)]
        found["gradient"] = difference(*slopes)
        quant = lowrank.QuantConfig(packing="uint8")
        frozen = lowrank.quantize(params, quant, plan=plan)
        is_code = lambda n: isinstance(n, lowrank.Quantized)
        codes = [n for n in jax.tree.leaves(frozen, is_leaf=is_code) if is_code(n)]
        found["quantized"] = len(codes)
        base, lora = lowrank.init(0, frozen, config, plan=plan)
        lora = noisy(lora, 0.1)
        merged = fn(lowrank.merge(base, lora), x)
        found["nf4"] = difference(lifted(lowrank.combine(base, lora), x), merged)
    return found, sorted(set(built(caught)))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dora", action="store_true")
    options = parser.parse_args()
    print(f"{'model':34} adapted   start    value    gradient quantized nf4")
    for name, make in CASES.items():
        if not all(word.lower() in name.lower() for word in options.words):
            continue
        try:
            found, dense = check(make, options.dora)
        except ImportError as error:
            print(f"{name:34} not installed: {error}")
            continue
        except Exception as error:
            print(f"{name:34} {type(error).__name__}: {error}")
            continue
        figures = (f"{found[key]:<8.1e}" for key in ("start", "value", "gradient"))
        print(
            f"{name:34} {found['adapted']:9}",
            *figures,
            f"{found['quantized']:<9} {found['nf4']:.1e}",
        )
        for line in dense:
            print("    ", line)


if __name__ == "__main__":
    main()
