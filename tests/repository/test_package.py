"""What tests/support/check_package.py, which builds the package, reports as wrong."""

import warnings

import pytest
from check_package import first_example, sources, wrong_names

TEST = "tests/transforms/test_lift.py"
FILES = {"lowrank_jax/__init__.py", "lowrank_jax/py.typed", "lowrank_jax/peft/__init__.py"}
WHEEL = {*FILES, "lowrank_jax-0.1.dist-info/METADATA", "lowrank_jax-0.1.dist-info/licenses/LICENSE"}
ARCHIVE = {
    *FILES,
    *("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", TEST),
}


def test_a_whole_package_passes():
    assert wrong_names(WHEEL, ARCHIVE, FILES) == []
    assert sources() > FILES
    assert not [name for name in sources() if "__pycache__" in name]
    compile(first_example(), "README.md", "exec")


@pytest.mark.parametrize(
    ("wheel", "archive", "said"),
    [
        (WHEEL - {"lowrank_jax/py.typed"}, ARCHIVE, "the wheel has no py.typed"),
        (WHEEL - {"lowrank_jax/peft/__init__.py"}, ARCHIVE, "misses lowrank_jax/peft/__init__.py"),
        (FILES, ARCHIVE, "the wheel has no LICENSE"),
        (
            WHEEL | {TEST},
            ARCHIVE,
            f"the wheel holds {TEST}",
        ),
        (WHEEL, ARCHIVE - {"LICENSE"}, "the source archive misses LICENSE"),
        (WHEEL, ARCHIVE - {TEST}, "the source archive has no tests"),
    ],
)
def test_what_is_wrong_with_a_package_is_said(wheel, archive, said):
    assert any(said in problem for problem in wrong_names(wheel, archive, FILES))


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_deprecations_are_errors(kind):
    with pytest.raises(kind):
        warnings.warn("this will go", kind, stacklevel=1)
