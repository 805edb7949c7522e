"""Leaves too narrow for the rank: "all-linear" gives them the largest rank they can have."""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


class Net(nn.Module):
    """A depthwise convolution, a router of 8 experts, a wide layer, and a head of one number."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (2, 2), feature_group_count=32, name="depthwise")(x).mean((1, 2))
        weights = nn.softmax(nn.Dense(8, name="router")(x))
        x = nn.Dense(64, name="wide")(x) * weights.sum(-1, keepdims=True)
        return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(1, name="value")(x)))


@pytest.fixture(scope="module")
def net():
    model, x = Net(), jnp.ones((2, 4, 4, 32))
    params = model.init(jax.random.key(0), x)
    return model, params, x, lowrank.plan(model.apply, params, x)


# of 16: fan-in 4 in each group; 8 experts; one number; nothing to narrow
RANKS = {"depthwise": 4, "router": 8, "value": 1, "wide": 16}


@pytest.mark.parametrize("options", [{}, {"alpha": 24}, {"rslora": True}, {"method": "loha"}])
def test_a_narrow_leaf_has_its_largest_rank_and_the_scale_of_the_rank_asked_for(net, options):
    model, params, x, plan = net
    config = lowrank.LoraConfig(**options)
    base, lora = lowrank.init(jax.random.key(1), params, config, plan=plan)
    nodes = {name: lora["params"][name]["kernel"] for name in RANKS}
    assert {name: node.rank for name, node in nodes.items()} == RANKS
    assert {node.scale for node in nodes.values()} == {config.scale_of(16, config.alpha)}
    if options.get("rslora") or "alpha" in options:
        return  # other scales of the same programs
    moved = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    got = lowrank.lift(model.apply, fallback="raise")(lowrank.combine(base, moved), x)
    want = model.apply(lowrank.merge(base, moved), x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_plan_report_and_repr_say_so(net):
    model, params, x, plan = net
    base, lora = lowrank.init(jax.random.key(1), params, lowrank.LoraConfig(), plan=plan)
    rows = {line.split()[0]: line for line in str(plan).splitlines() if "kernel" in line}
    assert "rank 8 at most" in rows["params/router/kernel"]
    assert "at most" not in rows["params/wide/kernel"]
    report = lowrank.report(model.apply, lowrank.combine(base, lora), x)
    leaves = {name: report[f"params/{name}/kernel"] for name in RANKS}
    assert [leaf.full for leaf in leaves.values()] == [True, True, True, False]
    assert "LoRA r=8 (full) s=2" in str(report)
    assert "rank=8, is_full=True, " in repr(lora["params"]["router"]["kernel"])
    assert "is_full" not in repr(lora["params"]["wide"]["kernel"])


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["all-linear", "**/router/kernel"]},
        {"targets": "**/kernel", "exclude": ["**/depthwise/*", "**/value/*", "**/head/*"]},
        {"rank_pattern": {"**/router/kernel": 16}},
    ],
)
def test_a_leaf_or_a_rank_that_is_named_is_refused(net, options):
    _, params, _, plan = net
    with pytest.raises(lowrank.ConfigError, match=r"rank 16 is larger than 'params/router/kernel'"):
        lowrank.init(jax.random.key(1), params, lowrank.LoraConfig(**options), plan=plan)


def test_pefts_patterns_are_those_of_the_nodes(net, tmp_path):
    _, params, _, plan = net
    config = lowrank.LoraConfig(exclude="**/depthwise/kernel")
    base, lora = lowrank.init(jax.random.key(1), params, config, plan=plan)
    lowrank.peft.save(tmp_path, lora, config, base=base, plan=plan)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (16, 32)
    ranks, alphas = (
        {name.removesuffix("$").split(".")[-1]: value for name, value in written[field].items()}
        for field in ("rank_pattern", "alpha_pattern")
    )
    assert ranks == {"router": 8, "value": 1}
    assert alphas == {"router": 16, "value": 2}  # alpha / r stays 2
    _, back, _ = lowrank.peft.load(tmp_path, params, plan=plan)
    chex.assert_trees_all_equal(back, lora)
