"""The site: these pages, those of the repository's root, and the docstrings. Build it as CONTRIBUTING.md says."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from sphinx.application import Sphinx

import mixup_nn

ROOT = Path(__file__).parent.parent
PAGE_OF = {  # each is included by a page of this folder
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/README.md": "tests.md",
}

project = "mixup_nn"
author = "The mixup_nn developers"
project_copyright = author
release = version = mixup_nn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True  # a role that leads nowhere is an error
nitpick_ignore_regex = [("py:class", r"collections\.abc\..*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_inherit_docstrings = False  # those of nn.Module say nothing of ours
napoleon_custom_sections = ["Reference", "Shape"]
# Written by hand, in the text form of version 1, so that a build needs no network.
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", "torch.inv")}

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False


def at_home(folder: Path, text: str) -> str:
    """``text``, written for a page in ``folder``, with the links between files as a page of docs/ needs them."""

    def rewritten(link: re.Match[str]) -> str:
        file = Path(os.path.normpath(folder / link[1]))
        if not file.is_file():  # an address, or no link at all
            return link[0]
        page = PAGE_OF.get(file.relative_to(ROOT).as_posix(), os.path.relpath(file, ROOT / "docs"))
        return f"]({page}{link[2]})"

    return re.sub(r"\]\(([^)#\s]+)((?:#[^)\s]*)?)\)", rewritten, text)


def on_source_read(_app: Sphinx, _page: str, content: list[str]) -> None:
    """Rewrite the links of a page of this folder."""
    content[0] = at_home(ROOT / "docs", content[0])


def on_include_read(_app: Sphinx, path: Path, _page: str, content: list[str]) -> None:
    """Rewrite the links of a page of the root."""
    content[0] = at_home((ROOT / "docs" / path).resolve().parent, content[0])


def setup(app: Sphinx) -> None:
    """Sphinx calls this by its name."""
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
