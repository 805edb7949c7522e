"""DoRA's outputs, gradients and merges equal PEFT's (tests/golden/make_peft_dora.py)."""

import dataclasses
import json
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import adapter, flax_params, model
from peft_llama import load as load_llama

import lowrank_jax as lowrank

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_dora"
is_lowrank = lambda x: isinstance(x, lowrank.LowRank)


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file), json.loads((GOLDEN / f"{name}.json").read_text())


# A Llama


def llama_adapter(lora, tensors, scan, prefix="adapter/"):
    """lora with PEFT's factors and magnitudes, stacked over layers where scanned."""

    def magnitude(keys, node):
        names = [key.key for key in keys][1:-1]
        layers = range(2) if scan else [int(names[0].split("_")[1])]
        at = [f"{prefix}base_model.model.model.layers.{i}.{'.'.join(names[1:])}" for i in layers]
        values = [tensors[name + ".lora_magnitude_vector"] for name in at]
        value = np.stack(values) if scan else values[0]
        chex.assert_equal_shape([value, node.magnitude])
        return dataclasses.replace(node, magnitude=value)

    lora = adapter(lora, tensors, scan, prefix)
    return jax.tree_util.tree_map_with_path(magnitude, lora, is_leaf=is_lowrank)


RANKS = {"**/q_proj/kernel": 3, "**/mlp/down_proj/kernel": 6}


@pytest.mark.parametrize(
    ("case", "scan"),
    [
        ("dora", True),
        ("rslora", False),
        pytest.param("dora", False, marks=pytest.mark.slow),
        pytest.param("rslora", True, marks=pytest.mark.slow),
    ],
)
def test_a_llama(case, scan, fast_compile):
    tensors, golden = load(f"llama-{case}")
    base_tensors = load_llama("base")
    params = flax_params(base_tensors, scan)
    tokens = base_tensors["tokens"]
    apply = model(scan).apply
    config = lowrank.LoraConfig(
        rank=golden["r"],
        alpha=golden["lora_alpha"],
        rslora=golden["use_rslora"],
        rank_pattern=RANKS if case == "rslora" else {},
        targets=[f"**/{name}/kernel" for name in golden["target_modules"]],
        dora=True,
    )
    plan = lowrank.plan(apply, params, tokens)
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)
    lora = llama_adapter(jax.eval_shape(init, params)[1], tensors, scan)
    for keys, node in jax.tree_util.tree_leaves_with_path(lora, is_leaf=is_lowrank):
        names = [key.key for key in keys][2:-1]
        theirs = golden["modules"][f"model.layers.0.{'.'.join(names)}"]
        assert node.rank == theirs["r"]
        assert node.scale == pytest.approx(theirs["scaling"], rel=1e-12)

    lifted = lowrank.lift(apply, fallback="raise")

    def loss(lora, base):
        logits = lifted(lowrank.combine(base, lora), tokens)
        rows = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(rows, tokens[:, 1:, None], axis=-1).mean(), logits

    @jax.jit
    def found(lora, params):
        base, _ = init(params)
        merged = [lowrank.merge(frozen, lora) for frozen in (base, params)]  # norms at hand, or not
        return jax.value_and_grad(loss, has_aux=True)(lora, base), merged, apply(merged[1], tokens)

    ((value, logits), gradients), merged, dense = found(lora, params)
    np.testing.assert_allclose(logits, tensors["logits"], atol=1e-5)
    np.testing.assert_allclose(value, tensors["loss"], rtol=1e-6)
    theirs = llama_adapter(gradients, tensors, scan, prefix="grad/")
    chex.assert_trees_all_close(gradients, theirs, rtol=1e-4, atol=1e-6)

    expected = dict(base_tensors)
    expected |= {k.removeprefix("merged/"): v for k, v in tensors.items() if "merged/" in k}
    expected = flax_params(expected, scan)
    for tree in merged:
        chex.assert_trees_all_close(tree, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(dense, tensors["logits"], atol=1e-5)


# Layers on their own


LAYERS, ABOUT = load("layers")
ABOUT = ABOUT["layers"]


def tensors_of(name):
    return {k.removeprefix(name + "/"): v for k, v in LAYERS.items() if k.startswith(name + "/")}


def kernel(weight):
    """torch's [out, in, ...] -> Flax's [..., in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def factors(tensors, prefix=""):
    """PEFT's A, B and magnitude in our orientation."""
    a, b, magnitude = (tensors[prefix + name] for name in ("A", "B", "magnitude"))
    return {"a": kernel(a), "b": b.reshape(b.shape[0], -1).T, "magnitude": magnitude.reshape(-1)}


def layer(about):
    """The Flax module of a torch layer."""
    options = about["options"]
    if "out_channels" not in options:
        return nn.Dense(options.get("out_features") or options["output_features"])
    rank = 1 if about["layer"] == "Conv1d" else 2
    each = lambda name, default: np.broadcast_to(options.get(name, default), rank).tolist()
    return nn.Conv(
        options["out_channels"],
        each("kernel_size", None),
        strides=each("stride", 1),
        padding=[(side, side) for side in each("padding", 0)],
        kernel_dilation=each("dilation", 1),
    )


def dora(about, **targets):
    """The config of a golden case."""
    return lowrank.LoraConfig(rank=about["r"], alpha=about["lora_alpha"], dora=True, **targets)


SINGLE = [name for name in ABOUT if name not in ("embed", "grouped")]


@pytest.mark.parametrize("name", SINGLE)
def test_a_layer(name, monkeypatch, fast_compile):
    tensors, about = tensors_of(name), ABOUT[name]
    spatial = about["layer"].startswith("Conv")
    last = (lambda x: np.moveaxis(x, 1, -1)) if spatial else np.asarray
    states = {k.removeprefix("state."): v for k, v in tensors.items() if "state." in k}
    weight = (
        lowrank.bitsandbytes.from_state_dict(states, "weight")
        if states
        else kernel(tensors["weight"])
    )
    params = {"params": {"kernel": weight, "bias": tensors["bias"]}}
    apply, x = layer(about).apply, last(tensors["x"])
    plan = lowrank.plan(apply, jax.eval_shape(lowrank.dequantize, params), x)
    config = dora(about, targets="**/kernel")
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)
    _, lora = jax.eval_shape(init, params)
    node = lora["params"]["kernel"]
    assert node.scale == about["scaling"]
    mine = factors(tensors)
    chex.assert_trees_all_equal_shapes(mine, {k: getattr(node, k) for k in mine})
    lora["params"]["kernel"] = dataclasses.replace(node, **mine)

    options = {}
    if "p" in about:
        options = {"dropout": about["p"], "key": jax.random.key(1)}
        mask = last(tensors["mask"]).astype(bool)
        monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: mask.reshape(shape))
    lifted = lowrank.lift(apply, fallback="raise")

    def loss(lora, x, base):
        y = lifted(lowrank.combine(base, lora, **options), x)
        return (y * last(tensors["probe"])).sum(), y

    @jax.jit
    def found(lora, x, params):
        base, _ = init(params)
        pairs = [] if options else [(params, lora), (base, lowrank.fold_norms(base, lora))]
        ys = [lifted(lowrank.combine(*pair), x) for pair in pairs]
        value = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lora, x, base)
        return value, ys, None if options else lowrank.merge(base, lora)["params"]["kernel"]

    ((_, y), (gradients, dx)), ys, merged = found(lora, x, params)
    for each in (y, *ys):
        np.testing.assert_allclose(each, last(tensors["y"]), atol=1e-5)
    got = gradients["params"]["kernel"]
    got = {name: getattr(got, name) for name in mine}
    chex.assert_trees_all_close(got, factors(tensors, "grad."), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dx, last(tensors["grad.x"]), rtol=1e-4, atol=1e-6)
    if not options:
        assert len(ys) == 2
        np.testing.assert_allclose(merged, kernel(tensors["merged"]), atol=1e-6, rtol=0)


class Table(nn.Module):
    """A table and a head."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(9, name="head")(nn.Embed(30, 12, name="embed")(tokens))


def test_a_table_and_a_head(fast_compile):
    tensors, about = tensors_of("embed"), ABOUT["embed"]
    params = {
        "embed": {"embedding": tensors["weight"]},
        "head": {"kernel": tensors["head.weight"].T, "bias": tensors["head.bias"]},
    }
    apply = lambda params, tokens: Table().apply({"params": params}, tokens)
    tokens = tensors["x"]
    plan = lowrank.plan(apply, params, tokens)
    config = dora(about, targets=["embed/embedding", "head/kernel"])
    init = lambda params: lowrank.init(jax.random.key(0), params, config, plan=plan)
    _, lora = jax.eval_shape(init, params)

    def filled(lora, grad):
        """lora with PEFT's values, or their gradients; A of a table is [r, rows]."""
        table, head = factors(tensors, grad), factors(tensors, "head." + grad)
        table = dataclasses.replace(lora["embed"]["embedding"], **table)
        head = dataclasses.replace(lora["head"]["kernel"], **head)
        return {"embed": {"embedding": table}, "head": {"kernel": head, "bias": None}}

    before, lora = lora, filled(lora, "")
    chex.assert_trees_all_equal_shapes(before, lora)
    lifted = lowrank.lift(apply, fallback="raise")

    def loss(lora, base):
        y = lifted(lowrank.combine(base, lora), tokens)
        return (y * tensors["probe"]).sum(), y

    @jax.jit
    def found(lora, params):
        base, _ = init(params)
        value = jax.value_and_grad(loss, has_aux=True)(lora, base)
        return value, lowrank.merge(base, lora)

    ((_, y), gradients), merged = found(lora, params)
    np.testing.assert_allclose(y, tensors["y"], atol=1e-5)
    chex.assert_trees_all_close(gradients, filled(gradients, "grad."), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(merged["embed"]["embedding"], tensors["merged"], atol=1e-6)
    np.testing.assert_allclose(merged["head"]["kernel"], tensors["head.merged"].T, atol=1e-6)


# Why a grouped convolution is not exchanged


def test_peft_grouped_convolution_is_no_change_of_its_kernel():
    tensors, about = tensors_of("grouped"), ABOUT["grouped"]
    groups, scale = about["options"]["groups"], about["scaling"]
    weight, a, b = (tensors[name] for name in ("weight", "A", "B"))
    (outputs, narrow), rank = weight.shape[:2], len(a)
    # A reads every in channel: PEFT's change is of a kernel without groups
    pairs = zip(b.reshape(groups, -1, rank // groups), np.split(a, groups), strict=True)
    change = scale * np.concatenate([np.tensordot(b, a, 1) for b, a in pairs])
    wide = np.zeros_like(change)
    own = np.zeros(change.shape, bool)
    for rows, columns in zip(
        np.split(np.arange(outputs), groups),
        np.split(np.arange(narrow * groups), groups),
        strict=True,
    ):
        wide[np.ix_(rows, columns)] = weight[rows]
        own[np.ix_(rows, columns)] = True
    # and its norm is of the kernel plus numbers of another shape, poured into the kernel's
    poured = b.reshape(-1, rank) @ a.reshape(rank, -1)
    norm = lambda w: np.linalg.norm(w.reshape(outputs, -1), axis=1)
    used = norm(weight + scale * poured.reshape(weight.shape))
    gain = (tensors["magnitude"].reshape(-1) / used)[:, None, None, None]
    y = jax.lax.conv(jnp.asarray(tensors["x"]), gain * (wide + change), (1, 1), "SAME")
    np.testing.assert_allclose(y + tensors["bias"][:, None, None], tensors["y"], atol=1e-5)

    said = about["grouped"]
    between = np.square(change[~own]).sum() / np.square(change).sum()
    assert between == pytest.approx(said["share_between_groups"])
    ratio = used / norm(wide + change)
    low_high = said["norm_used_over_acting"]
    assert [ratio.min(), ratio.max()] == pytest.approx(low_high, rel=1e-5)
    assert "not supported" in said["merge"]
