"""The README's Python blocks run as pasted, each in a fresh interpreter, and its claims hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_jax as lowrank

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
OUTPUT = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each block prints, run in an empty directory with nothing of this process."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # see fast_compile in conftest.py
    run = lambda block: subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path_factory.mktemp("empty"),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return [run(block) for block in BLOCKS]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs_as_pasted(printed, number):
    assert printed[number].returncode == 0, printed[number].stderr


def test_the_first_block_prints_what_the_readme_shows(printed):
    assert printed[0].stdout == OUTPUT[0]


def test_the_first_block_learns():
    names = {}
    exec(compile(BLOCKS[0], "README block 0", "exec"), names)
    predicted = names["model"](lowrank.merge(names["base"], names["lora"]), names["x"])
    assert abs(predicted - 1).max() < 0.1  # the target is 1 everywhere; the base is far from it
    assert abs(names["model"](names["params"], names["x"]) - 1).max() > 0.5


def test_the_linen_block_prints_its_plan(printed):
    assert re.search(r"params/Dense_1/kernel +32×64 +dot .* yes$", printed[1].stdout, re.M)


def test_length():
    intro = TEXT.split("\n", 1)[1].split("```")[0]
    assert len(intro.split()) <= 120
    assert len(BLOCKS) == 5
    assert all(len(block.strip().splitlines()) <= 20 for block in BLOCKS)


def test_the_two_commands():
    assert [command.split()[-1] for command in COMMANDS] == ["examples/finetune.py", "pytest"]


def test_every_file_it_names_is_there():
    names = re.findall(r"(?:notebooks|examples|tests|benchmarks|docs)/[\w./-]*\w", TEXT)
    assert len(names) > 12
    for name in names:
        assert (ROOT / name).exists(), name
