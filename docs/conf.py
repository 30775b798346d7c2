"""The site: these pages, those of the repository's root, and the docstrings. Build it as CONTRIBUTING.md says."""

from __future__ import annotations

import os.path
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

import mixup_nn

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
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
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
nitpicky = True  # a role that leads nowhere is an error
nitpick_ignore_regex = [("py:class", r"collections\.abc\..*")]

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
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


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


def draw(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers draw by themselves; the parts of a long one may stand below each other."""
    kind = "block" if isinstance(node, nodes.math_block) else "inline"
    parts = [convert(part, display=kind) for part in node.astext().split(r"\qquad")]
    translator.body.append(f'<span class="math {kind}">{"".join(parts)}</span>')
    raise nodes.SkipNode


class NamesBecomeLinks(SphinxPostTransform):
    """Code in a text that names the API or an example, as in `mix.share`, `CutMix(1.0)`, `train_text.py`, is a link."""

    default_priority = 5

    def run(self, **_options: Any) -> None:
        """Sphinx calls this for each page."""
        places = self.places()
        kept = {*self.document.findall(lambda node: isinstance(node, (nodes.reference, nodes.title, pending_xref)))}
        if self.env.docname == "coming-from":
            kept |= {row[0] for row in self.document.findall(nodes.row)}  # the names of other libraries
        for code in list(self.document.findall(nodes.literal)):
            script = re.search(r"(?:^|[ /])(\w+\.py)$", code.astext())
            name = script[1] if script else re.sub(r"\(.*\)$| = .*$", "", code.astext())
            ancestor = code.parent
            while ancestor and ancestor not in kept:
                ancestor = ancestor.parent
            if len(places[name]) == 1 and not ancestor:
                page, anchor = min(places[name])
                inner = nodes.literal("", code.astext(), classes=["xref"])
                code.replace_self(make_refnode(self.app.builder, self.env.docname, page, anchor, inner))

    def places(self) -> dict[str, set[tuple[str, str]]]:
        """Pages and anchors by name."""
        places = defaultdict(set, {name: {(f"examples/{name}", "")} for name in EXAMPLES})
        for full_name, _, kind, page, anchor, _ in self.env.get_domain("py").get_objects():
            *owners, name = full_name.split(".")
            if "_" in name or kind in ("class", "function", "module"):  # no words such as `p`
                places[name].add((page, anchor))
            for owner in reversed(owners):
                name = f"{owner}.{name}"
                for spelling in {name, name.lower()}:  # a mixer called mixer
                    places[spelling].add((page, anchor))
        return places


def pages_of_examples(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each example as a page."""
    for name in EXAMPLES:
        code = app.builder.highlighter.highlight_block((ROOT / "examples" / name).read_text(), "python")  # type: ignore[attr-defined]
        yield f"examples/{name}", {"title": name, "body": f"<h1>{name}</h1>{code}"}, "page.html"


def setup(app: Sphinx) -> None:
    """Sphinx calls this by its name."""
    app.add_html_math_renderer("mathml", (draw, None), (draw, None))
    app.add_post_transform(NamesBecomeLinks)
    app.connect("html-collect-pages", pages_of_examples)
    app.connect("include-read", on_include_read)
    app.connect("source-read", on_source_read)
