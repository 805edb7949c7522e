"""The guides run as they are pasted, and print what they show."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from guides import DOCS, read_blocks, run_guide

from lowrank_jax.peft._config import DEFAULTS
from lowrank_jax.peft._parsing import REFUSED

GOLDEN = Path(__file__).parents[1] / "golden"
ELSEWHERE = {"many-adapters.md"}  # tests/many/test_guide.py
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]
GUIDES = sorted(
    page.relative_to(DOCS).as_posix()
    for page in PAGES
    if page.name not in ELSEWHERE and any(read_blocks(page.read_text()))
)
TORCH = ("peft", "torch", "transformers")
NEEDS = {"guides/nnx.md": ("sklearn",)}  # guide -> packages that the library does not need


def skip_without(*packages):
    """Skip a test where a package is missing, and say which."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")


def copy_torch_side(folder):
    """Write what the torch block of huggingface.md does, as PEFT and transformers wrote it."""
    shutil.copytree(GOLDEN / "huggingface" / "llama", folder / "tiny-llama")
    shutil.copytree(GOLDEN / "peft_files" / "lora", folder / "tiny-adapter")
    with np.load(GOLDEN / "peft_llama" / "base.npz") as base:
        tokens = base["tokens"]
    with np.load(GOLDEN / "peft_files" / "lora.npz") as adapter:
        np.savez(folder / "torch.npz", tokens=tokens, logits=adapter["logits"])


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty working directory, with temporary folders below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs_and_prints_what_it_shows(name, empty_folder):
    skip_without(*NEEDS.get(name, ()))
    if name == "guides/huggingface.md":
        copy_torch_side(empty_folder)
    run_guide(name, skip=TORCH)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's
def test_the_llama_of_torch_and_back(empty_folder):
    """Every block, torch's too: what PEFT trains is read here, and what is saved here, by PEFT."""
    skip_without(*TORCH)
    run_guide("guides/huggingface.md")


def test_the_glossary_has_every_field_of_peft():
    text = (DOCS / "coming-from.md").read_text().split("## Fields of PEFT")[1].split("\n## ")[0]
    table, _, refused = text.partition("These fields change the function")
    named = lambda part: set(re.findall(r"`(\w+)`", part))
    rows = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    assert named(" ".join(rows)) == DEFAULTS.keys() - REFUSED.keys()
    assert named(refused) - {"peft"} == REFUSED.keys()
