"""Every example runs, on its smallest setting, and says clearly what is wrong with a bad option."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SMALLEST = {
    "benchmark": ["--quick"],
    "gallery": ["--quick"],
    "train_digits": ["--epochs=1", "--seeds=1"],
    "train_manifold": ["--epochs=1", "--seeds=1"],
    "train_segmentation": ["--epochs=1", "--seeds=1"],
    "train_tabular": ["--epochs=1", "--seeds=1"],
    "train_text": ["--epochs=1", "--seeds=1"],
}
NOT_RUN_HERE = {"common", "train_distributed"}  # no script; run by torchrun in test_distributed.py


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, path = torch.get_num_threads(), sys.path.copy()
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_no_example_is_left_out() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == SMALLEST.keys() | NOT_RUN_HERE
    index = re.findall(r"^\| `examples/(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(index) == sorted(scripts - {"common"})


@pytest.mark.filterwarnings("default")  # those of plotting and data libraries
@pytest.mark.parametrize("name", SMALLEST)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, [*SMALLEST[name], f"--out={tmp_path}"], monkeypatch)
    assert len(capsys.readouterr().out.splitlines()) > 3
    if name in ("benchmark", "gallery", "train_digits"):
        assert list(tmp_path.glob("*.png"))


@pytest.mark.filterwarnings("default")
def test_train_digits_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train_digits", ["--epochs=1", "--seeds=1", "--compile", f"--out={tmp_path}"], monkeypatch)


@pytest.mark.parametrize("option", ("--alpha=-1", "--noise=1.5", "--epochs=0", "--seeds=x", "--device=nowhere"))
def test_a_bad_option_is_named(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("train_digits", [option], monkeypatch)
    assert f"error: argument {option.split('=')[0]}" in capsys.readouterr().err
