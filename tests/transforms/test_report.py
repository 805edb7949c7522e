"""report and the tables: counts, bytes, and the truth about every use."""

import dataclasses
import io
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import NamedSharding, P

import lowrank_jax as lowrank
from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.low_rank import LowRankWeight

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)
IDS = np.zeros((2, 5), np.int32)


def ones(*shape):
    return np.ones(shape, np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x + h)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(20, 8, name="embed")
        x = embed(ids)
        for i in range(4):
            x = Block(name=f"block_{i}")(x)
        return embed.attend(x)


VARIABLES = jax.eval_shape(Net().init, KEY, IDS)
PLAN = lowrank.plan(Net().apply, VARIABLES, IDS)


def combined(variables=VARIABLES, plan=PLAN, **options):
    config = lowrank.LoraConfig(**{"rank": 2, "alpha": 3, **options})
    make = lambda key, params: lowrank.combine(*lowrank.init(key, params, config, plan=plan))
    return jax.eval_shape(make, KEY, variables)


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_counts_and_bytes():
    tree = combined(train="**/bias", factor_dtype="bfloat16")
    report = lowrank.report(Net().apply, tree, IDS)
    base, lora = lowrank.partition(tree)
    assert (report.frozen, report.trainable) == (sizes(VARIABLES), sizes(lora))
    assert report.total == report.frozen + report.trainable
    assert report.memory.base == 4 * sizes(VARIABLES)
    biases = sum(leaf.trainable for leaf in report.values() if leaf.kind == "whole")
    assert report.memory.adapters == 2 * (sizes(lora) - biases) + 4 * biases
    assert report.memory.total == report.memory.base + report.memory.adapters
    assert report.device_memory == report.memory
    chex.assert_trees_all_equal_structs(base, VARIABLES)


def test_each_leaf_says_what_it_has_and_where_it_was_used():
    report = lowrank.report(Net().apply, combined(), IDS)
    assert set(report) == {path for path, use in PLAN.items() if use.linear}
    leaf = report["params/block_2/attention/query/kernel"]
    assert (leaf.kind, leaf.shape, leaf.rank, leaf.scale) == ("LoRA", (8, 2, 4), 2, 1.5)
    assert leaf.trainable == 2 * 8 + 2 * 8
    (use,) = leaf.uses
    assert (use.how, use.primitive) == ("factored", "dot_general")
    assert use.source.startswith("test_report.py:")
    assert use.source.endswith("__call__)")
    assert "block_2/attention/query" in use.layer
    assert not report.notes


def test_a_tied_leaf_lists_both_its_uses():
    report = lowrank.report(Net().apply, combined(targets="**/embedding"), IDS)
    leaf = report["params/embed/embedding"]
    assert [use.primitive for use in leaf.uses] == ["gather", "dot_general"]
    assert leaf.how == "factored 2×"


def squared(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"].T * jnp.sum(p["w"] ** 2) + x @ (p["v"] @ p["w"])


def test_what_was_built_is_said_with_its_reason():
    params = {name: ones(4, 4) for name in "wvu"}
    base, lora = lowrank.init(KEY, params, lowrank.LoraConfig(rank=1, targets="*"))
    report = lowrank.report(squared, lowrank.combine(base, lora), ones(2, 4))
    assert report["w"].how == "factored 2×, materialized 1×"
    assert report["v"].how == "factored 1×, built 1×"
    assert report["u"].how == "unused"
    notes = "\n".join(report.notes)
    assert re.search(r"w is materialized at \w+, test_report.py:\d+ \(squared\): no rule", notes)
    assert re.search(r"v is materialized at dot_general, .*a product of two weights", notes)
    assert "u is adapted but unused: its gradient is zero" in notes
    lifted = lowrank.lift(squared, fallback="silent")
    loss = lambda l: lifted(lowrank.combine(base, l), ones(2, 4)).sum()
    grads = jax.jit(jax.grad(loss))(lora)
    assert not np.any(jax.tree.leaves(grads["u"])[1])


@pytest.mark.parametrize("wrap", ["jit", "scan", "remat", "lift"])
def test_uses_are_seen_through_control_flow(wrap):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def fn(p, x):
        if wrap == "scan":
            return jax.lax.scan(layer, x, p["w"])[0]
        one = {"jit": jax.jit, "remat": jax.checkpoint, "lift": lambda f: f}[wrap]
        for i in range(3):
            x = one(layer)(x, p["w"][i])[0]
        return x

    params = {"w": ones(3, 4, 4)}
    plan = lowrank.plan(fn, params, ones(2, 4))
    base, lora = lowrank.init(KEY, params, lowrank.LoraConfig(rank=1), plan=plan)
    run = lowrank.lift(fn) if wrap == "lift" else fn
    report = lowrank.report(run, lowrank.combine(base, lora), ones(2, 4))
    assert report["w"].how == ("factored 1×" if wrap == "scan" else "factored 3×")


def test_dense_parameters_have_a_report_too():
    report = lowrank.report(Net().apply, VARIABLES, IDS)
    assert (len(report), report.trainable, report.frozen) == (0, 0, sizes(VARIABLES))
    assert "trained" in str(report)
    assert "equations" in report._repr_html_()


def test_an_adapter_without_its_base_is_refused():
    _, lora = lowrank.partition(combined())
    with pytest.raises(lowrank.TreeError, match=r"LowRank adapter without its base"):
        lowrank.report(Net().apply, lora, IDS)


def test_memory_of_one_device_of_many():
    mesh = jax.make_mesh((8,), ("data",))
    params = {"w": jax.device_put(ones(16, 4), NamedSharding(mesh, P("data")))}
    base, lora = lowrank.init(KEY, params, lowrank.LoraConfig(rank=2, targets="w"))
    lora = jax.device_put(lora, NamedSharding(mesh, P()))
    tree = lowrank.combine(base, lora)
    report = lowrank.report(lambda p, x: x @ p["w"], tree, ones(1, 16))
    assert (report.memory.base, report.device_memory.base) == (256, 32)
    assert report.memory.adapters == report.device_memory.adapters == 4 * (32 + 8)
    assert "on one device" in str(report)


def test_text():
    text = str(lowrank.report(Net().apply, combined(train="**/block_0/*/bias"), IDS))
    assert re.search(r"^frozen +[\d,]+ +\d+\.\d\d% +[\d.]+ KiB$", text, re.M)
    assert re.search(r"^trained +[\d,]+ +\d+\.\d\d% +[\d.]+ KiB$", text, re.M)
    row = r"^params/block_{0\.\.3}/up/kernel +8×12 +LoRA r=2 s=1\.5 +160 +factored 1×$"
    assert re.search(row, text, re.M)
    assert re.search(r"^params/block_0/up/bias +12 +trained whole +12 +dense 1×$", text, re.M)
    assert text.count("\n") < 25


def test_plan_as_text():
    text = str(PLAN)
    row = r"^params/block_{0\.\.3}/attention/query/kernel +8×2×4 +dot +8 +2·4 +- +1 +yes +rank 8 "
    assert re.search(row + "at most$", text, re.M)
    assert re.search(r"^params/embed/embedding +20×8 +dot .* 2 +tied, final, lookup$", text, re.M)


@pytest.mark.parametrize("shown", [PLAN, lowrank.report(Net().apply, combined(), IDS)])
def test_html_and_rich(shown):
    from html.parser import HTMLParser

    opened, text = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

        def handle_data(self, data):
            text.append(data)

    Reader().feed(shown._repr_html_())
    assert not opened
    assert "params/block_{0..3}/up/kernel" in text
    rich = pytest.importorskip("rich.console")
    for width in (200, 80, 60):
        console = rich.Console(width=width, record=True, file=io.StringIO())
        console.print(shown)
        exported = console.export_text()
        assert max(map(len, exported.splitlines())) <= width
        assert "8×12" in exported
        # broken after a slash where the terminal is narrow, never inside a word or cut off
        assert all(word in exported for word in ("params/", "block_{0..3}/", "up/", "kernel"))
        assert "params/block_{0..3}/up/kernel" in exported or width < 200
        assert "…" not in exported


def test_html_is_escaped():
    params = {"<b>w<b>": ones(4, 4)}
    base, lora = lowrank.init(KEY, params, lowrank.LoraConfig(rank=1, targets="*"))
    tree = lowrank.combine(base, lora)
    report = lowrank.report(lambda p, x: x @ p["<b>w<b>"], tree, ones(1, 4))
    assert "<b>w" not in report._repr_html_()
    assert "&lt;b&gt;w&lt;b&gt;" in report._repr_html_()


def test_notes_of_like_layers_are_one_and_unused_whole_leaves_are_said():
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, ct: (ct @ res[1].T, res[0].T @ ct))

    def fn(p, x):
        for i in range(6):
            x = own(x, p[f"layer_{i}"])
        return x

    params = {f"layer_{i}": np.eye(4, dtype=np.float32) for i in range(6)} | {"b": ones(4)}
    config = lowrank.LoraConfig(rank=1, targets="layer_*", train="b")
    base, lora = lowrank.init(KEY, params, config)
    report = lowrank.report(fn, lowrank.combine(base, lora), ones(2, 4))
    built, unused = report.notes
    assert built.startswith("layer_{0..5} is materialized at custom_vjp_call")
    assert unused == "b is adapted but unused: its gradient is zero"
    assert report["b"].how == "unused"


def test_features_that_dora_cannot_train_are_said():
    """An output feature of zeros has no direction: no factor and no magnitude has a gradient."""
    w = np.ones((2, 6, 4), np.float32)
    w[0, :, 1] = w[1, :, :2] = 0
    params = {"layers": w, "fine": ones(4, 4)}

    def fn(p, x):
        for i in range(2):
            x = jnp.tanh(x @ p["layers"][i]) @ ones(4, 6)
        return x[:, :4] @ p["fine"]

    x = ones(3, 6) + np.arange(6, dtype=np.float32)
    plan = lowrank.plan(fn, params, x)
    config = lowrank.LoraConfig(rank=2, targets=["layers", "fine"], dora=True)
    base, lora = lowrank.init(KEY, params, config, plan=plan)
    tree = lowrank.combine(base, lora)
    report = lowrank.report(fn, tree, x)
    assert (report["layers"].still, report["fine"].still) == (3, 0)
    (note,) = report.notes
    assert note.startswith(
        "layers has 3 all-zero output features: under DoRA they have no direction"
    )
    assert note in str(report)
    live = lowrank.lift(fn)
    grads = jax.grad(lambda lora: jnp.sum(live(lowrank.combine(base, lora), x)))(lora)["layers"]
    zero = np.asarray(base["layers"].squares) == 0
    assert not np.any(np.asarray(grads.magnitude)[zero])
    assert not np.any(np.moveaxis(np.asarray(grads.b), 1, 0)[:, zero])
    # what has been moved there has a direction; shapes say nothing
    moved = {**lora, "layers": dataclasses.replace(lora["layers"], b=lora["layers"].b + 1)}
    assert not lowrank.report(fn, lowrank.combine(base, moved), x).notes
    assert not lowrank.report(fn, jax.eval_shape(lambda: tree), x).notes
    traced = []
    jax.jit(lambda tree: traced.append(lowrank.report(fn, tree, x).notes))(tree)
    assert traced == [()]
    plain = lowrank.init(KEY, params, dataclasses.replace(config, dora=False), plan=plan)
    assert not lowrank.report(fn, lowrank.combine(*plain), x).notes


def test_values_of_quantized_factors_are_counted_and_not_their_codes():
    base, lora = lowrank.init(
        0, {"w": jnp.ones((256, 64))}, lowrank.LoraConfig(rank=4, targets="w")
    )
    stored = lowrank.quantize_adapter(lora, lowrank.QuantConfig(packing="uint8"))
    fn = lambda params, x: x @ params["w"]
    of = lambda lora: lowrank.report(fn, lowrank.combine(base, lora), jnp.ones((1, 256)))
    assert of(stored).trainable == of(lora).trainable == 4 * (256 + 64)
    assert of(stored)["w"].trainable == 4 * (256 + 64)
    assert of(stored).memory.adapters < of(lora).memory.adapters / 4


def test_a_report_evaluates_one_of_equal_products_and_no_other_equation(monkeypatch):
    products = []
    dot = LowRankWeight.dot
    counted = lambda self, *args: products.append(self.shape) or dot(self, *args)
    monkeypatch.setattr(LowRankWeight, "dot", counted)
    monkeypatch.setattr(jaxprs, "bind", None)

    def model(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = [{"up": shape(26, 38), "down": shape(38, 26)} for _ in range(5)]
    config = lowrank.LoraConfig(rank=2, targets="**")
    make = lambda params: lowrank.combine(*lowrank.init(KEY, params, config))
    report = lowrank.report(model, jax.eval_shape(make, params), shape(3, 26))
    assert sorted(products) == [(26, 38), (38, 26)]
    assert {leaf.how for leaf in report.values()} == {"factored 1×"}
