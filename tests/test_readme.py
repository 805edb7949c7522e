"""The README's Python blocks run as pasted."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, capsys):
    names = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    printed = capsys.readouterr().out
    if number == 0:
        assert float(printed) < 0.1  # the loss; it starts near 1
        assert names["merged"]["up"].shape == (64, 256)
    else:
        assert "Dense_0/kernel" in printed
        assert names["logits"].shape == (2, 8, 100)


def test_there_are_two_blocks_and_two_commands():
    assert len(BLOCKS) == 2
    commands = re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)
    assert [command.split()[-1] for command in commands] == ["examples/finetune.py", "pytest"]
