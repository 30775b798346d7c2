"""The package as a whole: its names, its layers, and that everything the README shows runs."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import mixup_nn

ROOT = Path(__file__).parent.parent
LAYERS = ("sampling", "functional", "_mixup", "_criterion", "__init__")


def test_public_names() -> None:
    assert mixup_nn.__all__ == ["Mix", "MixUp", "MixUpCriterion", "functional", "sampling"]
    assert mixup_nn.functional.__all__ == ["mix_targets", "mixup", "mixup_batch", "mixup_cross_entropy", "mixup_loss"]
    assert mixup_nn.sampling.__all__ == ["Mix", "sample_beta", "sample_mix"]
    for module in (mixup_nn, mixup_nn.functional, mixup_nn.sampling):
        assert all(hasattr(module, name) for name in module.__all__)


def test_version_is_that_of_the_distribution_and_the_changelog() -> None:
    assert mixup_nn.__version__ == metadata.version("mixup_nn")
    assert f"## {mixup_nn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


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


def run_blocks_in_order(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert len(blocks) > 5


def test_every_code_block_of_the_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks_in_order("README.md")
    printed = capsys.readouterr().out.splitlines()
    claimed = re.findall(r"^print\(.*\)  # (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert claimed
    assert printed[: len(claimed)] == claimed


def test_every_test_that_the_guide_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text()))
    defined = {
        name for path in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named <= defined


@pytest.mark.filterwarnings("default")  # the trainers' own
def test_every_trainer_of_the_trainers_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks_in_order("docs/trainers.md")


def test_torchvision_transforms_around_it() -> None:
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises the latter
        pytest.skip(f"torchvision does not import: {error}")
    mixup = mixup_nn.MixUp(1.0)
    input = torch.rand(4, 3, 8, 8)
    output = v2.Compose([v2.Normalize([0.5] * 3, [0.25] * 3), mixup])(input)
    assert mixup.last_mix is not None
    torch.testing.assert_close(output, mixup_nn.functional.mixup((input - 0.5) / 0.25, mixup.last_mix))
