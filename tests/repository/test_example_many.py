"""The examples of many adapters on one base, in short form on a tiny Llama."""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_llama import write_gguf

pytest.importorskip("rich")
pytest.importorskip("tokenizers")

import dpo
import serve
import small_jobs
import sweep
from rich.console import Console

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path)
    return path


def run(example, tiny, *words):
    """What the example's job returns, and what it prints."""
    console = Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    flags = example.make_arguments().parse_args([f"--model={tiny}", *words])
    return example.job(flags, console), console.export_text()


def read_tiny(tiny, quantize="none"):
    return small_jobs.read_model(
        argparse.Namespace(model=tiny, quantize=quantize, seed=0), Console(quiet=True)
    )


SHORT = ("--steps=4", "--length=24", "--batch=2")


def test_a_sweep_trains_each_adapter_as_if_alone_and_writes_the_best(tiny, tmp_path):
    flags = (*SHORT, "--windows=2")
    found, said = run(sweep, tiny, *flags, "--ranks=1,3", "--rates=1e-3,3e-2", f"--out={tmp_path}")
    assert found["curves"].shape == (4, 4)
    assert len({*found["losses"].round(4)}) == 4  # ranks and rates matter
    single, _ = run(sweep, tiny, *flags, "--ranks=1", "--rates=3e-2", f"--out={tmp_path / 'one'}")
    np.testing.assert_allclose(found["curves"][:, 1], single["curves"][:, 0], rtol=1e-4)
    np.testing.assert_allclose(found["losses"][1], single["losses"][0], rtol=1e-4)

    best = found["best"]
    assert found["losses"][best] == found["losses"].min()
    rank, rate = [(1, 1e-3), (1, 3e-2), (3, 1e-3), (3, 3e-2)][best]
    assert f"the best: rank {rank}, rate {rate:g}" in said
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    model = read_tiny(tiny)
    _, lora, config = lowrank.peft.load(
        tmp_path, model.params, plan=model.plan, names=lowrank.names.LLAMA
    )
    assert config.rank == rank
    expected = lowrank.merge(found["base"], lowrank.select(found["many"], best))
    got = lowrank.merge(found["base"], lora)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_serving_a_mixture_says_what_each_adapter_says_alone(tiny, base):
    words = ["--length=17", "--batch=5", "--rank=2", f"--quantize={base}"]
    found, said = run(serve, tiny, *words, f"--temperature={0.7 * (base == 'nf4')}")
    assert found["worst"] < 1e-4
    assert found["chosen"] == ["adapter 0", "adapter 1", "adapter 2", None, "adapter 0"]
    assert all(name in said for name in ("no adapter", "one adapter", "mixture of 3 and none"))


def test_serving_notices_a_wrong_adapter(tiny, monkeypatch, capsys):
    real = lowrank.select
    wrong = lambda many, index: real(many, jnp.where(index == 1, 0, index))
    monkeypatch.setattr(lowrank, "select", wrong)
    words = ["--length=17", "--batch=3", "--rank=2", "--temperature=1"]
    assert serve.main([f"--model={tiny}", *words]) == 1
    assert "adapter 1: the mixture says something else" in capsys.readouterr().err


def test_dpo_learns_to_prefer_on_one_base(tiny, tmp_path):
    flags = (*SHORT[:1], "--length=40", "--pairs=2", "--rank=2", "--learning-rate=1e-2")
    found, said = run(dpo, tiny, *flags, f"--out={tmp_path}")
    assert found["before"][0] == pytest.approx(np.log(2), rel=1e-4)  # policy and reference agree
    assert found["losses"][0] == pytest.approx(np.log(2), rel=1e-4)
    assert found["losses"][-1] != found["losses"][0]
    assert (tmp_path / "adapter_config.json").is_file()
    assert "put in order" in said


@pytest.mark.usefixtures("full_compile")
def test_dpo_holds_one_base(tiny):
    """No copy of the base is among the arguments or the temporaries of the compiled step."""
    model = read_tiny(tiny)
    base, lora = lowrank.init(0, model.params, lowrank.LoraConfig(rank=2), plan=model.plan)
    optimizer = dpo.optax.adamw(1e-3)
    batch = np.zeros((1, 2, 10), np.int32), np.ones((1, 2, 10), bool)
    arguments = base, lora, optimizer.init(lora), batch
    compiled = dpo.make_step(model.apply, optimizer, 0.1).lower(*arguments).compile()
    size = lambda tree: sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given == size(arguments)
    kernels = {leaf.shape for leaf in jax.tree.leaves(base) if leaf.ndim == 3}
    assert len(kernels) == 4
    for shape in kernels:
        array = rf"f32\[{','.join(map(str, shape))}\]"
        makers = re.findall(rf"= {array}\S* ([\w-]+)\(", compiled.as_text())
        assert {*makers} <= {"parameter", "get-tuple-element", "bitcast"}, (shape, {*makers})
        assert "parameter" in makers
