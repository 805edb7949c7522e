"""The built pages: no warning, nothing as typed, and right in a browser without a network."""

import importlib
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from browser import find_chromium, start_browser

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
TOOLS = ("sphinx", "myst_nb", "furo", "latex2mathml")
AUDIT = (SUPPORT / "page_audit.js").read_text()
CONTRAST = (SUPPORT / "page_contrast.js").read_text()
WIDTHS = (1400, 390)  # CSS pixels: a desktop's window, a phone

if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{', '.join(missing)} missing: pip install -e '.[docs]'", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html", "-d", folder / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, ROOT / "docs", folder / "html"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A browser's tab."""
    if (chromium := find_chromium()) is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with start_browser(chromium, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_pages_build_without_a_warning(site):
    for page in site.glob("api/*.html"):
        text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
        assert "$" not in text, f"{page.stem}: mathematics as typed"
        assert "Args:" not in text, f"{page.stem}: a section as typed"
        assert "Source:" not in text, f"{page.stem}: a section as typed"


def test_names_in_the_text_lead_to_the_api(site):
    text = (site / "guides" / "serving.html").read_text()
    assert 'href="../api/peft.html#lowrank_jax.peft.servable"' in text  # `peft.servable`


def test_long_outputs_are_folded(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    nodes = pytest.importorskip("docutils.nodes")
    outputs = importlib.import_module("outputs")
    page = nodes.section()
    for language, lines in (("text", 60), ("text", 5), ("python", 60)):
        text = "\n".join(map(str, range(lines)))
        page += nodes.literal_block(text, text, language=language)
    outputs.finish(types.SimpleNamespace(builder=types.SimpleNamespace(format="html")), page, "")
    folds = [node.astext() for node in page.findall(nodes.raw)]
    assert folds == ['<details class="output"><summary>Output, 60 lines</summary>', "</details>"]
    assert len(list(page.findall(nodes.literal_block))) == 3


def test_every_page_is_right_on_a_desktop_and_on_a_phone(site, tab):
    """No error in the console, no request, nothing cut, images described, formulas drawn."""
    wrong, formulas = {}, 0
    for page in sorted(site.rglob("*.html")):
        tab.resize(WIDTHS[0])
        tab.problems.clear()
        tab.open(page.as_uri())
        found = tab.evaluate(AUDIT)
        formulas += tab.evaluate("document.querySelectorAll('math').length")
        for width in WIDTHS[1:]:
            tab.resize(width)
            found += tab.evaluate(AUDIT)
        if found := found + tab.problems:
            wrong[str(page.relative_to(site))] = found
    assert not wrong, "\n".join(f"{page}: {p}" for page, found in wrong.items() for p in found)
    assert formulas > 50


def test_the_audit_sees_what_is_wrong(tab, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<article><table><tr><td style='min-width: 3000px'>wide</table> <img src='none.png'>"
        r"$W + s$ \frac <script src='https://example.org/x.js'></script></article>"
    )
    tab.resize(WIDTHS[0])
    tab.problems.clear()
    tab.open(page.as_uri())
    found = "\n".join(tab.evaluate(AUDIT) + tab.problems)
    for problem in (
        "cut at 1400 px",
        "px wide",
        "without alt text",
        "not there",
        "as typed",
        "a request for https://example.org/x.js",
    ):
        assert problem in found, found


def test_search_finds_a_function(site, tab):
    tab.problems.clear()
    tab.open((site / "search.html").as_uri() + "?q=lift")
    tab.wait_for("document.querySelector('ul.search li a') !== null")
    first = tab.evaluate("document.querySelector('ul.search li a').getAttribute('href')")
    assert first == "api/transform.html#lowrank_jax.lift"
    assert not tab.problems


@pytest.mark.parametrize(
    ("scheme", "is_right"), [("light", lambda x: x > 200), ("dark", lambda x: x < 50)]
)
def test_both_color_schemes_are_readable(site, tab, scheme, is_right):
    tab.resize(WIDTHS[0])
    tab.set_scheme(scheme)
    for name in ("index", "quickstart", "how-it-works", "api/plan"):
        tab.open((site / f"{name}.html").as_uri())
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert all(is_right(int(part)) for part in re.findall(r"\d+", background)[:3]), background
        contrasts = tab.evaluate(CONTRAST)
        assert contrasts[0][0] >= 4.5, (name, contrasts[:5])
