"""The package as a whole: its names, its layers, its files, and that everything the pages show runs."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tarfile
import types
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import mixup_nn
from mixup_nn import CutMix, MixUp

from .conftest import imports

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LAYERS = ("_mix", "sampling", "_losses", "functional", "_modules", "_criterion", "__init__")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"^```python\n# needs (\w+)$", re.MULTILINE)
NEEDED = [(page, package) for page in PAGES for package in sorted(set(NEEDS.findall((ROOT / page).read_text())))]
PAGES_AND_PACKAGES = [
    pytest.param("README.md", None, marks=pytest.mark.xdist_group("inductor")),
    *((page, None) for page in PAGES[1:]),
    *(pytest.param(page, package, marks=pytest.mark.needs(package)) for page, package in NEEDED),
]
builds = pytest.mark.needs("hatchling", "hatch_fancy_pypi_readme")


def test_public_names() -> None:
    names = {
        "": "CutMix Mix MixUp MixUpCriterion Mixer RandomChoice functional sampling",
        "functional": "mix_cross_entropy mix_inputs mix_loss mix_targets mixup_batch",
        "sampling": "sample_beta sample_cutmix sample_mixup",
    }
    for name, public in names.items():
        module = getattr(mixup_nn, name) if name else mixup_nn
        assert module.__all__ == public.split()
        assert all(hasattr(module, each) for each in module.__all__)


def test_version_is_that_of_the_distribution_the_changelog_and_the_citation() -> None:
    assert mixup_nn.__version__ == metadata.version("mixup_nn")
    assert f"## {mixup_nn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {mixup_nn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_needs_nothing_but_torch_and_einops_at_run_time() -> None:
    required = [line for line in metadata.requires("mixup_nn") or () if "extra ==" not in line]
    assert sorted(re.split(r"[ <>=~]", line)[0] for line in required) == ["einops", "torch"]


def test_imports_run_one_way() -> None:
    assert sorted(path.stem for path in (ROOT / "mixup_nn").glob("*.py")) == sorted(LAYERS)
    for rank, layer in enumerate(LAYERS):
        tree = ast.parse((ROOT / "mixup_nn" / f"{layer}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(name in LAYERS[:rank] for name in names)


@builds
def test_wheel_and_sdist_hold_the_package_and_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling import build

    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {f"mixup_nn/{layer}.py" for layer in LAYERS} | {"mixup_nn/py.typed"}

    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert files >= {"mixup_nn/py.typed", "LICENSE", "CHANGELOG.md", "docs/guide.md", "tests/test_package.py"}
    assert not [name for name in files if name.endswith(".png") or name.startswith((".ci", ".github", "out/"))]


@builds
def test_links_of_the_readme_lead_to_the_repository_on_a_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hatchling import build

    monkeypatch.chdir(tmp_path)
    for name in ("LICENSE", "README.md"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "mixup_nn", "mixup_nn")
    settings, places = re.subn(
        r"(# The one place for the address .*\n)replacement = .*",
        r"\1replacement = 'https://host/\\1/$HFPR_VERSION/'",
        (ROOT / "pyproject.toml").read_text(),
    )
    assert places == 1
    Path("pyproject.toml").write_text(settings)

    with zipfile.ZipFile(build.build_wheel(str(tmp_path))) as wheel:
        readme = wheel.read(f"mixup_nn-{mixup_nn.__version__}.dist-info/METADATA").decode().partition("\n\n")[2]
    plain = re.sub(rf"https://host/(blob|raw)/{re.escape(mixup_nn.__version__)}/", "", readme)
    assert plain == (ROOT / "README.md").read_text()
    for bang, link in re.findall(r"(!?)\[[^][]*\]\(([^)]+)\)", FENCE.sub("", readme)):
        assert "://" in link
        assert not link.startswith("https://host/") or link.startswith(f"https://host/{'raw' if bang else 'blob'}/")


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    if module := sys.modules.get("accelerate.state"):
        module.AcceleratorState._reset_state(reset_partial_state=True)


def blocks_of(page: str, *only: str) -> Iterator[str]:
    """The code blocks of a page at their lines, or those with one of the strings.

    One that begins with ``# needs package`` must be asked for, and is left out where the package does not import.
    """
    text = (ROOT / page).read_text()
    for block in FENCE.finditer(text):
        needed = NEEDS.match(block[0])
        chosen = any(string in block[1] for string in only) if only else not needed
        if chosen and (not needed or imports(needed[1])):
            yield "\n" * text[: block.start(1)].count("\n") + block[1]


def run_blocks(page: str, *only: str) -> dict[str, Any]:
    """Run blocks of a page in order, and return what they define."""
    name = re.sub(r"\W", "_", page)
    module = sys.modules[name] = types.ModuleType(name)  # a module, so that what is defined can be pickled
    for block in blocks_of(page, *only):
        exec(compile(block, page, "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.usefixtures("no_accelerator", "fresh_compiler")
@pytest.mark.parametrize("page, package", PAGES_AND_PACKAGES)
def test_every_code_block_of_the_pages_runs_and_prints_what_it_says(
    page: str, package: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if page != "README.md":  # tests of kernels compile more than these pages do
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    only = ("import torch\n", f"# needs {package}\n") if package else ()
    run_blocks(page, *only)
    claims = re.findall(r"^ *print\(.*\)  # (.*)$", "".join(blocks_of(page, *only)), re.MULTILINE)
    assert claims or page != "README.md"
    printed = iter(capsys.readouterr().out.splitlines())
    assert all(claim in printed for claim in claims)  # in this order


def anchors(page: Path) -> set[str]:
    """The names that a page's headings get, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md"])
def test_links_between_the_pages_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", (ROOT / page).read_text())):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("mode", ("batch", "elem"))
@pytest.mark.parametrize(
    "mixup, cutmix, alphas, weights",  # a MixUp(0) beside CutMix would leave half the batches unmixed
    ((0.8, 1.0, [0.8, 1.0], (0.75, 0.25)), (0, 1.0, [1.0], None), (0.8, 0, [0.8], None), (0, 0, [0.0], None)),
)
def test_flags_of_timm_become_a_choice_of_the_mixers_that_are_on(
    mixup: float, cutmix: float, alphas: list[float], weights: tuple[float, ...] | None, mode: str
) -> None:
    page = run_blocks("docs/coming-from.md", "import torch\n", "def mixer_of_flags")
    flags = timm_flags(mixup=mixup, cutmix=cutmix, mixup_prob=0.9, mixup_switch_prob=0.25, mixup_mode=mode)
    choice = page["mixer_of_flags"](flags)
    assert [type(each) for each in choice.mixers] == [MixUp] * (len(alphas) - bool(cutmix)) + [CutMix] * bool(cutmix)
    assert ([mixer.alpha for mixer in choice.mixers], choice.weights, choice.p) == (alphas, weights, 0.9)
    assert all(each.per_sample is (mode == "elem") for each in (choice, *(choice.mixers if any(alphas) else ())))
    for refused in {"mixup_mode": "pair"}, {"cutmix_minmax": [0.2, 0.8]}:
        with pytest.raises(ValueError, match="expected --mixup-mode batch or elem and no --cutmix-minmax"):
            page["mixer_of_flags"](types.SimpleNamespace(**{**vars(flags), **refused}))


def timm_flags(**given: Any) -> types.SimpleNamespace:
    """The flags that timm's train.py has for mixing, with its defaults."""
    flags = {"mixup": 0.0, "cutmix": 0.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch"}
    return types.SimpleNamespace(**{**flags, "cutmix_minmax": None, **given})
