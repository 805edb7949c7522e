"""Each function that is given a combined tree takes it, or says what to pass in its place.

Trees: combined once; again, over the same leaf or another one; and a part of the last, all of whose
adapters are frozen.
"""

import inspect

import arguments
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lowrank
from lowrank_jax import checkpoint, huggingface, peft

pytestmark = pytest.mark.usefixtures("fast_compile")

NAMES = {"w": "model.w", "v": lowrank.names.Parameter("model.v"), "bias": "model.b"}
CONFIGS = {name: lowrank.LoraConfig(rank=2, targets=name) for name in "wv"}
NORMED = lowrank.LoraConfig(rank=2, targets="w", dora=True)
QUANT = lowrank.QuantConfig(format="int8", double_quant=False, targets="w")


def fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["bias"]


@pytest.fixture(scope="module")
def trees():
    params = {"w": jnp.eye(64), "v": jnp.ones((64, 3)), "bias": jnp.ones(3)}
    first, one = lowrank.init(0, params, CONFIGS["w"])
    _, same = lowrank.init(1, params, CONFIGS["w"])
    _, other = lowrank.init(2, params, CONFIGS["v"])
    once = lowrank.combine(first, one)
    over = lowrank.combine(once, other)
    combined = {"once": once, "again": lowrank.combine(once, same), "other": over}
    return params, one, combined, {"w": over["w"]}


def restore(folder, lora, own, **given):
    """Restore, with given, what was saved with own as its base."""
    folder = folder.parent / "saved"
    checkpoint.save(folder, lora=lora, config=CONFIGS["w"], base=own)
    return checkpoint.restore(folder, **given)


def is_plain(tree):
    return not any(isinstance(leaf, lowrank.Adapted) for leaf in tree.values())


# name -> (params, an adapter of w, a combined tree, a folder) -> a call with the tree for weights
WEIGHTS = {
    "fingerprint": lambda p, lora, t, at: lowrank.fingerprint(t),
    "init": lambda p, lora, t, at: lowrank.init(0, t, CONFIGS["w"]),
    "quantize": lambda p, lora, t, at: lowrank.quantize(t, QUANT),
    "dequantize": lambda p, lora, t, at: lowrank.dequantize(t),
    "quantization_error": lambda p, lora, t, at: lowrank.quantization_error(
        t, lowrank.quantize(p, QUANT)
    ),
    "covariances": lambda p, lora, t, at: lowrank.covariances(fn, CONFIGS["w"])(
        t, jnp.ones((2, 64))
    ),
    "extract": lambda p, lora, t, at: lowrank.extract(t, jax.tree.map(lambda x: x + 1, p), 1),
    "extract to": lambda p, lora, t, at: lowrank.extract(jax.tree.map(lambda x: x + 1, p), t, 1),
    "checkpoint.save": lambda p, lora, t, at: checkpoint.save(
        at, lora=lora, config=CONFIGS["w"], base=t
    ),
    "checkpoint.restore": lambda p, lora, t, at: restore(at, lora, p, base=t, check_base=False),
    "checkpoint.restore, checked": lambda p, lora, t, at: restore(
        at, lora, t if is_plain(t) else p, base=t
    ),
    "peft.save": lambda p, lora, t, at: peft.save(at, lora, CONFIGS["w"], base=t, names=NAMES),
    "peft.save, original": lambda p, lora, t, at: peft.save(
        at, lora, CONFIGS["w"], base=t, original=t, names=NAMES
    ),
    "peft.tensors": lambda p, lora, t, at: peft.tensors(lora, CONFIGS["w"], base=t, names=NAMES),
    "peft.servable": lambda p, lora, t, at: peft.servable(t, lora),
    "huggingface.save": lambda p, lora, t, at: huggingface.save(at, t, names=NAMES),
}

# name -> the same with the tree for an adapter
ADAPTER = {
    "combine": lambda p, lora, t, at: lowrank.combine(p, t),
    "merge": lambda p, lora, t, at: lowrank.merge(p, t),
    "fold_norms": lambda p, lora, t, at: lowrank.fold_norms(p, t),
    "stack": lambda p, lora, t, at: lowrank.stack([t, t]),
    "select": lambda p, lora, t, at: lowrank.select(t, 0),
    "blend": lambda p, lora, t, at: lowrank.blend([t, t], [0.5, 0.5]),
    "compress": lambda p, lora, t, at: lowrank.compress(t, 1),
    "pool": lambda p, lora, t, at: lowrank.pool(t, 2),
    "quantize_adapter": lambda p, lora, t, at: lowrank.quantize_adapter(t, QUANT),
    "factor_labels": lambda p, lora, t, at: lowrank.factor_labels(t),
    "checkpoint.save": lambda p, lora, t, at: checkpoint.save(at, lora=t, config=CONFIGS["w"]),
    "checkpoint.restore": lambda p, lora, t, at: restore(at, lora, p, like={"lora": t}),
    "peft.save": lambda p, lora, t, at: peft.save(at, t, CONFIGS["w"], names=NAMES),
    "peft.tensors": lambda p, lora, t, at: peft.tensors(t, CONFIGS["w"], names=NAMES),
}

# take a combined tree, as other tests show of their values
TAKEN = {"combine", "fold_norms", "map_adapters", "merge", "partition", "peft.load", "plan"}
TAKEN |= {"report", "specs", "tabulate", "trainable_mask", "peft.servable"}
# of one argument like another, which one of the tables above has
LIKE = {"checkpoint.save_async", "huggingface.load"}


def test_the_tables_have_every_function_of_trees():
    functions = arguments.public_functions()
    has_tree = lambda f: "PyTree" in str([*inspect.signature(f).parameters.values()])
    known = {name.split(",")[0] for name in (*WEIGHTS, *ADAPTER)} | TAKEN | LIKE
    assert {name for name in functions if has_tree(functions[name])} <= known


def refusal(call, params, lora, tree, folder):
    with pytest.raises(lowrank.LowrankError) as info:
        call(params, lora, tree, folder)
    return str(info.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_where_weights_are_expected_the_remedies_work(trees, name, tmp_path):
    params, lora, combined, part = trees
    call = WEIGHTS[name]
    for tree in (*combined.values(), part):
        text = refusal(call, params, lora, tree, tmp_path / "refused")
        assert "adapter" in text or "adapted" in text
        assert "lowrank.merge(base, lora)" in text
        assert not (tmp_path / "refused").exists()
    tree = combined["again"]
    call(params, lora, lowrank.merge(*lowrank.partition(tree)), tmp_path / "merged")
    for left in (1, 0):
        tree, _ = lowrank.partition(tree)
        assert is_plain(tree) == (not left)
    call(params, lora, tree, tmp_path / "bare")


@pytest.mark.parametrize("name", ADAPTER)
def test_where_an_adapter_is_expected_the_remedy_works(trees, name, tmp_path):
    params, lora, combined, part = trees
    call = ADAPTER[name]
    for tree in (*combined.values(), part):
        text = refusal(call, params, lora, tree, tmp_path / "refused")
        assert "is a combined tree (see " in text
        assert "lowrank.partition(tree)[1]" in text
    tree = combined["again"]
    if name == "fold_norms":
        params, lora = lowrank.init(0, params, NORMED)
        tree = lowrank.combine(params, lora)
    adapter = lowrank.partition(tree)[1]
    call(params, lora, lowrank.stack([adapter]) if name == "select" else adapter, tmp_path / "it")


def test_an_adapter_of_peft_is_loaded_over_a_combined_tree(trees, tmp_path):
    """Also one with DoRA, whose norms are then those of the inner weights."""
    params, lora, _, _ = trees
    one = jax.tree.map(lambda x: x + 0.1, lora)
    inner = lowrank.combine(params, one)
    for config in (CONFIGS["w"], NORMED):
        _, two = lowrank.init(3, params, config)
        two = jax.tree.map(lambda x: x + 0.2, two)
        folder = tmp_path / str(config.dora)
        peft.save(folder, two, config, names=NAMES)
        base, again, _ = peft.load(folder, inner, names=NAMES)
        wanted = lowrank.merge(lowrank.merge(params, one), two)["w"]
        assert jnp.allclose(lowrank.merge(base, again)["w"], wanted, atol=1e-5, rtol=1e-5)
