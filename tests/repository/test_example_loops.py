"""The training loops of the examples, in short form: what they learn, and what they leave alone."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("rich")

EXAMPLES = Path(__file__).parents[2] / "examples"

import characters  # noqa: E402

import lowrank_jax as lowrank  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


class Expected(NamedTuple):
    """Traces of the step, trees like the adapter in the optimizer's state, is the base donated?"""

    traces: int = 1
    moments: int = 2
    donated: bool = False


LOOPS = {
    "loop_two_trees": Expected(),
    "loop_pmap": Expected(),
    "loop_train_state": Expected(donated=True),
    "loop_nnx_optimizer": Expected(donated=True),
    "loop_accumulation": Expected(traces=2, moments=3),  # it trains twice; there is the accumulator
}
STEPS = 40


@dataclasses.dataclass
class Run:
    """What one loop made: its results, its traces, its output; what it began with, and a copy."""

    before: dict[str, float]
    after: dict[str, float]
    base: Any
    lora: Any
    opt_state: Any
    traces: int
    printed: str
    given: Any
    original: Any


def counting(jit: Callable, traces: list[str]) -> Callable:
    """The same jit, which notes every trace of the step of a main."""

    def counted(fn: Callable, **options: Any) -> Callable:
        # nnx.jit hands an object on to jax.jit, which must not count again
        if not inspect.isfunction(fn) or fn.__qualname__ != "main.<locals>.step":
            return jit(fn, **options)

        @functools.wraps(fn)
        def traced(*args: Any, **kwargs: Any) -> Any:
            traces.append(fn.__name__)
            return fn(*args, **kwargs)

        return jit(traced, **options)

    return counted


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer steps and windows, smaller nets, and XLA without its most expensive passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "EVALUATED_WINDOWS", 64)
        patch.setattr(characters, "PRETRAINING_STEPS", 120)
        net = importlib.import_module("loop_nnx_optimizer").ConvNet
        patch.setattr(net.__init__, "__defaults__", (32, 2))  # dim, layers
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def llama():
    """A model of one layer, trained a little on the source domain, and its variables."""
    return characters.pretrained(dim=32, layers=1)


@pytest.fixture(scope="module")
def runs(llama):
    """Name of a loop -> its run, each done once."""
    pretrain = characters.pretrain

    @functools.cache
    def run(name: str) -> Run:
        began, traces, printed = [], [], io.StringIO()

        def start(params: Any) -> Any:
            """A copy for the loop, which may donate it."""
            began[:] = jax.tree.map(jnp.copy, params), params
            return began[0]

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(characters, "pretrained", lambda: (llama[0], start(llama[1])))
            patch.setattr(characters, "pretrain", lambda *args: start(pretrain(*args)))
            for module, jit in ((jax, "jit"), (jax, "pmap"), (nnx, "jit")):
                patch.setattr(module, jit, counting(getattr(module, jit), traces))
            results = importlib.import_module(name).main(["--steps", str(STEPS)])
        return Run(*results, len(traces), printed.getvalue(), *began)

    return run


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_learns_what_it_has_not_seen(runs, name):
    run = runs(name)
    assert run.after["target"] < run.before["target"] - 0.1
    for figure in (*run.before.values(), *run.after.values()):
        assert f"{figure:.3f}" in run.printed
    for words in ("trained", "factored", "The Devil's Dictionary", "pydoc_data"):
        assert words in run.printed


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_leaves_the_base_alone(runs, name):
    run = runs(name)
    chex.assert_trees_all_equal(jax.tree.leaves(run.base), jax.tree.leaves(run.original))
    assert all(leaf.any() for leaf in jax.tree.leaves(run.lora))
    # A loop over one tree gives its base away, lest there be two of it.
    gone = {leaf.is_deleted() for leaf in jax.tree.leaves(run.given)}
    assert gone == {LOOPS[name].donated}


@pytest.mark.parametrize("name", LOOPS)
def test_the_optimizer_holds_state_for_the_adapter_alone(runs, name):
    run, moments = runs(name), LOOPS[name].moments
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(run.opt_state) if leaf.ndim)
    assert sizes == sorted(moments * [leaf.size for leaf in jax.tree.leaves(run.lora)])


@pytest.mark.parametrize("name", LOOPS)
def test_the_step_is_traced_once(runs, name):
    assert runs(name).traces == LOOPS[name].traces


@pytest.mark.parametrize("name", ["loop_train_state", "loop_pmap"])
def test_one_tree_and_many_devices_train_the_adapter_of_two_trees(runs, name):
    one, two = runs(name), runs("loop_two_trees")
    # devices sum the gradient in another order, and where it is near 0 Adam divides by its rounding
    atol = 5e-4 if name == "loop_pmap" else 1e-5
    chex.assert_trees_all_close(one.lora, two.lora, rtol=1e-3, atol=atol)
    assert one.after == pytest.approx(two.after, abs=1e-4)


def test_micro_batches_are_one_batch_and_only_the_adapter_is_clipped(runs):
    printed = runs("loop_accumulation").printed
    assert float(re.search(r"differs by (\S+) of what was learned", printed)[1]) < 1e-3
    norms = re.search(r"one tree (\S+), only_adapters (\S+), two trees (\S+)", printed)
    unwrapped, seen, alone = map(float, norms.groups())
    assert alone == pytest.approx(seen, rel=1e-3)
    assert unwrapped > 1.1 * alone


def test_accumulation_in_one_tree(llama):
    """only_adapters outermost: the accumulator and the clip know nothing of the frozen leaves."""
    model, params = llama
    plan = lowrank.plan(model.apply, params, characters.EXAMPLE)
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=2), plan=plan)
    loss_of = functools.partial(characters.loss_of.__wrapped__, lowrank.lift(model.apply))
    (batch,) = characters.batches(characters.target()[0], 1, "one batch")
    tree = lowrank.combine(base, lora)

    @jax.jit
    def gradients(tree):
        grads = jax.grad(loss_of)(tree, batch)
        own = lowrank.partition(grads)[1]
        return own, optax.tree.norm(grads), optax.tree.norm(own)

    own, unwrapped, alone = gradients(tree)
    # The adapter's gradient just passes; that of the whole tree would not, nor would a sum of four.
    assert unwrapped > 1.5 * alone
    whole = optax.chain(optax.clip_by_global_norm(1.1 * float(alone)), optax.sgd(1.0))
    expected = jax.tree.map(lambda value, grad: np.asarray(value) - np.asarray(grad), lora, own)

    tx = lowrank.only_adapters(optax.MultiSteps(whole, every_k_schedule=4))
    state = tx.init(tree)

    @jax.jit
    def step(tree, state, tokens):
        updates, state = tx.update(jax.grad(loss_of)(tree, tokens), state, tree)
        return optax.apply_updates(tree, updates), state

    for tokens in np.split(batch, 4):
        tree, state = step(tree, state, tokens)
    after, adapter = lowrank.partition(tree)
    chex.assert_trees_all_equal(after, base)
    chex.assert_trees_all_close(adapter, expected, atol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == sum(
        leaf.size for leaf in jax.tree.leaves(lora)
    )


def test_every_loop_is_listed_and_says_how_to_run_it():
    assert sorted(LOOPS) == sorted(path.stem for path in EXAMPLES.glob("loop_*.py"))
    for name in LOOPS:
        assert f"\n    python examples/{name}.py\n" in importlib.import_module(name).__doc__


def test_a_loop_runs_as_a_script():
    quick = (  # what Python does with a script, but for the length of the pretraining
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, 'examples')\n"
        "import characters; characters.PRETRAINING_STEPS = characters.EVALUATED_WINDOWS = 2\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", quick, "examples/loop_two_trees.py", "--steps=2"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = subprocess.run(command, cwd=EXAMPLES.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "The Devil's Dictionary" in result.stdout


def test_the_steps_are_a_positive_number(capsys):
    with pytest.raises(SystemExit):
        characters.steps_asked(["--steps=0"], default=1)
    assert "--steps: expected a whole number above 0, got 0" in capsys.readouterr().err
