"""Documentation: each public name has one place in the pages, a docstring and a doctest."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import lowrank_jax

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def public():
    """Dotted name -> value: what the package re-exports and what its public modules define."""
    found = {f"lowrank_jax.{name}": value for name, value in vars(lowrank_jax).items()}
    for info in pkgutil.iter_modules(lowrank_jax.__path__, "lowrank_jax."):
        if "._" in info.name:
            continue
        found[info.name] = module = importlib.import_module(info.name)
        exported = getattr(module, "__all__", ())
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            own = home == info.name or home.startswith(f"{info.name}._") or name in exported
            if own and (inspect.isfunction(value) or inspect.isclass(value)):
                found[f"{info.name}.{name}"] = value
    return {name: value for name, value in sorted(found.items()) if "._" not in name}


PUBLIC = public()
# what these packages do is taken from papers, file formats and other libraries: they cite them
CITING = ("bitsandbytes", "huggingface", "initializers", "peft")


def of_kind(is_kind):
    return [pytest.param(v, id=name) for name, v in PUBLIC.items() if is_kind(v)]


def places():
    """The dotted name of each object that the pages document, as often as they do."""
    for page in PAGES:
        module = None
        directives = re.findall(r"^\.\. (\w+):: ([\w.]+)$", page.read_text(), flags=re.M)
        for directive, name in directives:
            if directive == "currentmodule":
                module = name
            elif directive == "automodule":
                yield name
            elif directive.startswith("auto"):
                yield f"{module}.{name}"


def test_each_public_name_has_one_place_in_the_pages():
    count = Counter(places())
    assert not PUBLIC.keys() - count.keys(), "in no page of docs/api"
    assert not count.keys() - PUBLIC.keys(), "in the pages, but not public"
    assert not [name for name, times in count.items() if times > 1], "in the pages twice"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_what_exists(page):
    for dotted in re.findall(r"\blowrank(?:_jax)?((?:\.[A-Za-z_]\w*)+)", page.read_text()):
        functools.reduce(getattr, dotted[1:].split("."), lowrank_jax)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_files_that_are_there(page):
    text = page.read_text()
    names = re.findall(r"(?:notebooks|examples|tests|benchmarks|docs)/[\w./-]*\w", text)
    names += [f"lowrank_jax/{name}" for name in re.findall(r"`(_?[a-z]+/\w+\.py)`", text)]
    for name in names:
        inside = name.removeprefix("lowrank_jax/")
        assert (ROOT / name).exists() or (ROOT / inside).exists(), name


def parameters(function):
    """Names of what a caller passes."""
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls")]


def unnamed(names, text):
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("function", of_kind(inspect.isfunction))
def test_functions_are_documented(function):
    text = inspect.getdoc(function) or ""
    assert re.search(r"[.:]", text.split("\n")[0]), "the first sentence"
    signature = inspect.signature(function)
    parts = [">>> "]
    parts += ["Args:"] if signature.parameters else []
    parts += ["Returns:"] if signature.return_annotation not in (None, "None") else []
    assert not [part for part in parts if part not in text]
    assert not unnamed(parameters(function), text.partition("Args:")[2])


@pytest.mark.parametrize(
    "name", [n for n, v in PUBLIC.items() if inspect.isfunction(v) and n.split(".")[1] in CITING]
)
def test_functions_of_papers_and_formats_cite_them(name):
    source = re.search(r"^Source: *(\S.*)", inspect.getdoc(PUBLIC[name]), flags=re.M)
    assert source
    assert "this library" not in source[1]


def members(owner):
    """Public methods and properties that a class defines itself: name -> function."""
    for name, value in vars(owner).items():
        if isinstance(value, property):
            yield name, value.fget
        elif isinstance(value, classmethod | staticmethod):
            yield name, value.__func__
        elif inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize("owner", of_kind(inspect.isclass))
def test_classes_are_documented(owner):
    text = vars(owner)["__doc__"] or ""
    assert text, owner
    assert not text.startswith(f"{owner.__name__}("), "dataclass wrote it"
    if dataclasses.is_dataclass(owner):
        assert not unnamed([field.name for field in dataclasses.fields(owner)], text)
    for name, function in members(owner):
        if not name.startswith("_"):
            assert function.__doc__, name
            assert not unnamed(parameters(function), function.__doc__), name


@pytest.mark.parametrize(
    "owner", of_kind(lambda v: inspect.isclass(v) and not issubclass(v, Exception))
)
def test_classes_have_an_example(owner):
    """Nodes, configurations and results; errors have theirs in docs/mistakes.md."""
    assert ">>> " in vars(owner)["__doc__"]


@pytest.mark.parametrize("module", of_kind(inspect.ismodule))
def test_modules_are_documented(module):
    assert module.__doc__


def test_doctests_are_run():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"].split()
    assert "lowrank_jax" in options["testpaths"]
    for path in (ROOT / "lowrank_jax").rglob("*.py"):
        assert "doctest: +SKIP" not in path.read_text(), path
