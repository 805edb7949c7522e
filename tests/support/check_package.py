"""Build the package, and try its wheel where nothing else is.

    python tests/support/check_package.py

The source archive and, from it, the wheel are built (`python -m build`); both must hold what they
should. The wheel is installed into a new environment, where the first example of the README and
`python -m lowrank_jax --help` run in an empty folder.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lowrank_jax"


def sources() -> set[str]:
    """Files of the package, by their paths from the root."""
    files = [path for path in (ROOT / PACKAGE).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc",)}


def wrong_names(wheel: set[str], archive: set[str], files: set[str]) -> list[str]:
    """What the names within the wheel and the source archive miss, or should not hold."""
    info = {name for name in wheel if name.split("/")[0].endswith(".dist-info")}
    problems = [f"the wheel misses {name}" for name in sorted(files - wheel)]
    problems += [f"the wheel holds {name}" for name in sorted(wheel - info - files)]
    if f"{PACKAGE}/py.typed" not in wheel:
        problems.append("the wheel has no py.typed")
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        problems.append("the wheel has no LICENSE")
    wanted = {*files, "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    problems += [f"the source archive misses {name}" for name in sorted(wanted - archive)]
    if not any(re.match(r"tests/.*test_\w+\.py$", name) for name in archive):
        problems.append("the source archive has no tests")
    return problems


def first_example() -> str:
    """The README's first block of Python."""
    match = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert match is not None, "README.md has no block of Python"
    return match.group(1)


def run(*command: object, cwd: Path) -> str:
    """What a command prints; an error, with all that it said, if it fails."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def names_within(folder: Path) -> tuple[Path, set[str], set[str]]:
    """The wheel of a folder, its names, and those of the source archive there."""
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as whole:
        inside = {name for name in whole.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as whole:
        files = [member.name.partition("/")[2] for member in whole if member.isfile()]
    return wheel, inside, set(files)


def main() -> None:
    """Build, look, install, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        wheel, inside, archive = names_within(folder / "dist")
        if problems := wrong_names(inside, archive, sources()):
            sys.exit("\n".join(problems))
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        (folder / "empty").mkdir()
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder / "empty")
        where = run(
            python, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", cwd=folder / "empty"
        )
        assert Path(where.strip()).is_relative_to(folder / "env"), where
        printed = run(python, "-c", first_example(), cwd=folder / "empty")
        assert "factored" in printed, printed
        helped = run(python, "-m", PACKAGE, "--help", cwd=folder / "empty")
        assert "usage" in helped, helped
    print(f"{wheel.name}: {len(inside)} files; the README's first example and --help run")


if __name__ == "__main__":
    main()
