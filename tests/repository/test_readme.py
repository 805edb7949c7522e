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
    lines = [line.rstrip() for line in printed[0].stdout.splitlines()]
    assert lines == OUTPUT[0].splitlines()


def test_the_first_block_learns():
    names = {}
    exec(compile(BLOCKS[0], "README block 0", "exec"), names)
    apply, x, y = names["model"].apply, names["x"], names["y"]
    correct = lambda params: (apply(params, x).argmax(-1) == y.argmax(-1)).mean()
    assert correct(lowrank.merge(names["base"], names["lora"])) == 1
    assert correct(names["params"]) < 0.5


def test_order():
    titles = ["Install", "Example", "Two commands", "What you can do", "How it compares", "Limits"]
    assert re.findall("^## (.*)$", TEXT, flags=re.M) == [*titles, "More"]
    intro = TEXT.split("\n## ")[0]
    assert len(intro.split()) <= 110
    assert re.search(r"^!\[[^\]]{20,}\]\(docs/images/", intro, flags=re.M)
    assert len(TEXT.split("pip install")[0].split()) <= 137  # as early as the best of its kind


def test_length():
    assert 700 <= len(TEXT.split()) <= 900
    assert all(len([*filter(str.strip, block.splitlines())]) <= 16 for block in BLOCKS)


def test_sentences_are_plain():
    prose = re.sub(r"```.*?```|^[|#!].*?$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    sentences = [s.split() for s in re.split(r"(?<=[.!?:])\s+|\n\n+", prose) if s.strip()]
    lengths = [len(sentence) for sentence in sentences]
    assert len(lengths) > 25
    assert max(lengths) <= 35, max(sentences, key=len)
    assert 9 <= sum(lengths) / len(lengths) <= 14


def anchors(path):
    """The fragments of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link), link
            continue
        name, _, fragment = link.partition("#")
        assert (ROOT / name).is_file(), link
        assert not fragment or fragment in anchors(ROOT / name), link


def test_the_two_commands():
    assert [command.split()[-1] for command in COMMANDS] == ["examples/finetune.py", "pytest"]


def test_every_file_it_names_is_there():
    names = re.findall(r"(?:notebooks|examples|tests|benchmarks|docs)/[\w./-]*\w", TEXT)
    assert len(names) > 12
    for name in names:
        assert (ROOT / name).exists(), name
