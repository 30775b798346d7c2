"""The site builds without a warning, needs no network, and reads well at two widths; the last where a browser is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock  # torch needs it too

import mixup_nn

pytestmark = pytest.mark.needs("furo", "latex2mathml", "myst_parser", "sphinx", "sphinx_copybutton")
ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"  # where CI takes it from
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=20000 --dump-dom"""
PAGES, WIDTHS = ("index", "guide", "reference"), (1440, 390)
SEARCHED = ("segmentation", "Hugging Face", "variance", "spectrogram", "fp16", "dictionary", "sample weights")

# Each page measures itself in a frame and tells the page around it: frames of files may not look at each other.
MEASURE = r"""<script>addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)], box = each => each.getBoundingClientRect();
  const hidden = each => each.scrollWidth - each.clientWidth, height = each => box(each).height;
  parent.postMessage({
    page: location.pathname.split("/").pop(), width: innerWidth, overflow: hidden(document.documentElement),
    wide: all("body, body *").filter(each => hidden(each) > 0 && /auto|scroll/.test(getComputedStyle(each).overflowX)
      && !each.closest("pre, .table-wrapper")).map(each => each.tagName + "." + each.className),
    cut: all("article math").filter(each => box(each).right > innerWidth || !height(each)).length,
    fractions: all("mfrac").map(each => height(each) / height(each.firstElementChild)),
    tex: document.body.innerText.match(/\\[a-z]{3,}/g) || [],
    code: all("pre").filter(each => hidden(each) > 0).map(each => each.innerText.slice(0, 40)),
    torn: all("td p").filter(each => /±/.test(each.innerText) && height(each) > 30).length,
    tasks: all("#your-task .table-wrapper").map(hidden),
  }, "*")
})</script>"""
FRAMES = """<pre id="measures"></pre><script>addEventListener("message", message =>
  document.getElementById("measures").append(JSON.stringify(message.data) + "\\n"))</script>"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once by whichever process of pytest comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "site.lock"):
        if not (log := base / "site.log").exists():
            shutil.rmtree(SITE, ignore_errors=True)  # a page that is not read again does not warn again
            command = [sys.executable, "-m", "sphinx", "-q", "-W", "docs", str(SITE)]
            run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
            log.write_bytes((run.stderr or b"failed") if run.returncode else b"")
    assert not log.read_text(), log.read_text()
    return SITE


def attributes(page: Path, pattern: str) -> set[str]:
    return {unquote(unescape(value)) for value in re.findall(rf'\b(?:{pattern})="([^"]*)"', page.read_text())}


def test_every_link_leads_somewhere_and_what_a_page_is_made_of_lies_beside_it(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name not in ("genindex.html", "search.html")]
    anchors = {page: attributes(page, "id") for page in pages}
    assert len(pages) > len(PAGES)
    for page, link in [(each, link) for each in pages for link in attributes(each, "href|src")]:
        parts = urlsplit(link)
        target = (page.parent / parts.path).resolve() if parts.path else page
        if parts.scheme:
            assert link not in attributes(page, "src"), (page, link)
        else:
            assert target.is_file(), (page, link)
            assert target not in anchors or not parts.fragment or parts.fragment in anchors[target], (page, link)


def test_names_in_the_text_are_links(site: Path) -> None:
    pages = [page for page in site.glob("*.html") if page.name != "reference.html"]
    linked = set().union(*(attributes(page, "href") for page in pages))
    names = [f"functional.{name}" for name in mixup_nn.functional.__all__] + ["Mixer.sample_lam", "Mix.share"]
    names += [name for name in mixup_nn.__all__ if name[0].isupper()]
    assert linked >= {f"reference.html#mixup_nn.{name}" for name in names}
    assert linked >= {f"examples/{path.name}.html" for path in (ROOT / "examples").glob("train_*.py")}
    word = r'class="xref[^>]*><span class="pre">(alpha|mix|mixup|p)</span>'  # is no name
    assert not any(re.search(word, page.read_text()) for page in pages)


def test_the_search_finds_the_words_that_people_use(site: Path) -> None:
    stem = import_module("sphinx.search.en").SearchEnglish({}).stem
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    for phrase in SEARCHED:
        found = [index["terms"].get(stem(word.lower()), []) for word in phrase.split()]  # a page, or a list of them
        assert set.intersection(*({pages} if isinstance(pages, int) else {*pages} for pages in found)), phrase


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_formulas_are_drawn_and_nothing_but_code_and_tables_scrolls_sideways(site: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(site, tmp_path / "site")
    for path in (copy / f"{page}.html" for page in PAGES):
        path.write_text(path.read_text().replace("</body>", MEASURE + "</body>"))
    frames = (f'<iframe src="{page}.html" width="{width}" height="900"></iframe>' for page in PAGES for width in WIDTHS)
    (copy / "frames.html").write_text(FRAMES + "".join(frames))
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{copy}/frames.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    lines = unescape(re.findall(r'<pre id="measures">(.*?)</pre>', dom, re.DOTALL)[0]).splitlines()
    measures = {(each["page"], each["width"]): each for each in map(json.loads, lines)}
    assert set(measures) == {(f"{page}.html", width) for page in PAGES for width in WIDTHS}
    for where, measure in measures.items():
        assert [measure[what] for what in ("overflow", "wide", "cut", "tex")] == [0, [], 0, []], where
    for width in WIDTHS:
        assert [measures["index.html", width][what] for what in ("code", "torn", "tasks")] == [[], 0, [0]], width
        assert min(measures["reference.html", width]["fractions"]) > 1.5  # numerator above denominator
