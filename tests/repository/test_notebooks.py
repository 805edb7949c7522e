"""The notebooks: run to their end, paired with their text, their outputs kept."""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# name -> what must hold in the kernel when the last cell has run
HOLDS = {
    "quickstart": """
assert np.allclose(curve[0][1]["Python"], before["Python"], rtol=1e-5)
assert curve[-1][1]["Python"] < before["Python"] - 0.15
assert all(np.allclose(sweep[0][name], before[name], rtol=1e-5) for name in before)
assert abs(difference).max() < 1e-4
assert jax.tree.all(jax.tree.map(np.array_equal, restored.lora, lora))
axis = figure.axes[0]
assert axis.get_title() and axis.get_xlabel()
assert axis.get_ylabel() == "held-out loss (nats per character)"
assert set(plan) >= {"mix/kernel", "head/kernel"}
""",
}


# name -> what is run in the place of what is read: shorter trainings, fewer held-out windows
SHORTER = {
    "quickstart": {
        'train["English"], 300)': 'train["English"], 100)',
        '    train["Python"],\n    200,\n': '    train["Python"],\n    60,\n',
        "* 9 // 10 :], 128, 0)": "* 9 // 10 :], 32, 0)",
    }
}


def read(path):
    return nbformat.read(path, 4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_every_notebook_is_known():
    assert {path.stem for path in NOTEBOOKS} == set(HOLDS)
    assert {path.stem for path in FOLDER.glob("*.py")} == set(HOLDS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_paired_with_its_text(path):
    """Made by `jupytext --to ipynb --execute notebooks/NAME.py`."""
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(read(path)) == cells(jupytext.read(path.with_suffix(".py")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_and_plots_are_kept(path):
    kept = outputs(read(path))
    assert not [o for o in kept if o.output_type == "error" or o.get("name") == "stderr"]
    data = [output.get("data", {}) for output in kept]
    assert sum("image/png" in d for d in data) >= 2
    assert sum("<table>" in d.get("text/html", "") for d in data) >= 3
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert all(cell.execution_count == i for i, cell in enumerate(cells, 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_images_have_texts_and_objects_leave_none(path):
    kept = outputs(read(path))
    images = [output for output in kept if "image/png" in output.get("data", {})]
    assert all(len(image.metadata["image/png"]["alt"]) > 40 for image in images)
    texts = [output.get("data", {}).get("text/plain", "") for output in kept]
    assert not [text for text in texts if text.startswith("<") and "Image" not in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_the_others_import(path):
    first, *others = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert '"pip", "install"' in first.source
    extra = re.search(r"\.\.\[(\w+)\]", first.source)[1]
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][extra]]
    brought = {re.match(r"[\w-]+", name)[0].lower() for name in wanted} | {"lowrank_jax"}
    brought |= {*sys.stdlib_module_names, "ipython"}  # which ipykernel brings
    trees = [ast.parse(cell.source) for cell in others]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0].lower() for name in names} <= brought


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_to_its_end(path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a reader has
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see fast_compile in conftest.py
    notebook = read(path)
    for read_text, run_text in SHORTER[path.stem].items():
        (cell,) = [cell for cell in notebook.cells if read_text in cell.source]
        cell.source = cell.source.replace(read_text, run_text)
    notebook.cells.append(nbformat.v4.new_code_cell(HOLDS[path.stem]))
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(FOLDER))
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
