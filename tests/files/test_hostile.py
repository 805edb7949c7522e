"""Files that mean harm: each is read, or refused in one sentence; soon, and in little memory.

The cases are in tests/hostile, a module for each format; `python tests/support/fuzz_files.py`
makes more.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("resource")
import fuzz_files
import hostile_cost

HOSTILE = Path(__file__).parents[1] / "hostile"
MEMORY = 50_000_000
# format -> cases that must be read, of those that look odd and are good
FORMATS = {
    "tensor_files": {"names of 300", "many tensors"},
    "model_files": {"a configuration: names that move the cursor"},
    "indices": set(),
    "adapter_configs": {"many names", "a name that moves the cursor", "optional letters"},
    "quant_states": {"a shape of 6 axes"},
    "gguf_files": {"a list of a million bytes"},
    "manifests": {"many ranks and alphas"},
    "state_dicts": set(),
    "dictionaries": {"LoraConfig.targets: many texts"},
}


@pytest.fixture(scope="module")
def ends():
    """Format -> (case, what was done with it, how it ended, extra bytes), all of one process."""
    env = {**os.environ, "PYTHONPATH": str(HOSTILE.parents[1]), "MALLOC_ARENA_MAX": "2"}
    names = [name for name in FORMATS if name != "gguf_files" or find_spec("gguf")]
    worker = [sys.executable, str(HOSTILE / "worker.py"), *names]
    done = subprocess.run(worker, capture_output=True, text=True, env=env, cwd=HOSTILE, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"it ended in {lines[-1:]}: {done.stderr[-2000:]}"
    found = {name: [] for name in names}
    for name, *rest in lines:
        found[name] += [rest[:4]] if len(rest) > 1 else []
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory by /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_each_file_is_read_or_refused_in_one_sentence(name, ends):
    """Within 5 seconds of processor time and a gigabyte over what the import takes."""
    if name not in ends:
        pytest.skip("gguf is not installed")
    wrong = [line for line in ends[name] if line[2] not in ("read", "refused")]
    assert not wrong, "\n".join(map(str, wrong[:10]))
    assert len(ends[name]) > 10
    assert {case for case, _, end, _ in ends[name] if end == "read"} >= FORMATS[name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory by /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_no_file_takes_more_than_50_MB_over_its_size(name, ends):
    if name not in ends:
        pytest.skip("gguf is not installed")
    heavy = [line for line in ends[name] if line[3] > MEMORY]
    assert not heavy, "\n".join(map(str, heavy[:10]))


# Orbax works in threads, which a trace does not see, and the steps of automata have a limit of
# their own.
FAMILIES = [
    make
    for make in hostile_cost.FILES
    if make not in (hostile_cost.make_three_regexes, hostile_cost.make_names_of_saved)
]
GROWING = [hostile_cost.name_row(make, verb) for make in FAMILIES for verb in ("load", "inspect")]
GROWING = [row for row in [*GROWING, "pairs: merge"] if row in hostile_cost.ROWS]


@pytest.mark.parametrize("row", GROWING)
def test_work_grows_as_the_file_does(row, tmp_path):
    """By lines of Python that run and functions that are called, for four sizes of a file."""
    if "gguf" in row:
        pytest.importorskip("gguf")
    make, _, do = hostile_cost.ROWS[row]
    steps = []
    for count in (2, 20, 40, 80):  # the first imports and compiles
        (tmp_path / str(count)).mkdir()
        call = do(tmp_path / str(count) / "folder", make(count))
        steps.append(count_steps(lambda call=call: hostile_cost.attempt(call)))
    _, one, two, four = steps
    assert four - two <= 2.5 * (two - one) + 500, steps


def count_steps(call):
    """Count the lines that run and the functions that are called."""
    count = 0

    def step(frame, event, arg):
        nonlocal count
        count += event in ("line", "c_call")
        return step

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(step), sys.setprofile(step)
    try:
        call()
    finally:
        sys.settrace(before[0]), sys.setprofile(before[1])
    return count


SHORT = 100  # files of each parser, some of which read tensors


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("parser", fuzz_files.PARSERS)
def test_changed_files_are_read_or_refused(parser, tmp_path):
    if parser == "gguf":
        pytest.importorskip("gguf")
    counts, wrong = fuzz_files.fuzz(parser, tmp_path, 0, lambda count: count >= SHORT)
    assert not wrong, "\n".join(map(str, wrong[:5]))
    assert min(counts.values()) > 0
