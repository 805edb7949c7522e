"""The guide to many adapters runs as it is pasted."""

import re
from pathlib import Path

import jax.numpy as jnp

GUIDE = Path(__file__).parents[2] / "docs" / "many-adapters.md"


def test_the_guide_runs_and_prints_what_it_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    space = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), space)
    said = re.findall(r"print\(.*#\s*(\([\d, ]+\))", "\n".join(blocks))
    assert capsys.readouterr().out.split("\n")[:-1] == said
    assert len(said) == 5
    # the sweep learns, and its winner is the best of its runs
    assert float(space["losses"].min()) < 0.9 * float(jnp.mean(space["y"] ** 2))
