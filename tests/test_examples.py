"""Every example runs on its smallest setting, and prints and writes what it says."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TRAINED_ONCE = ["--epochs=1", "--seeds=1"]
RECIPE = ["--epochs=2", "--unmixed-epochs=1", "--seeds=1", "--batch-size=250"]
DIGITS = [*TRAINED_ONCE, "--jobs=1"]  # other processes return to the real __main__, which is pytest here
SMALLEST = {
    "benchmark": ["--quick"],
    "gallery": ["--quick"],
    "quickstart": [],
    "train_digits": DIGITS,
    "train_manifold": TRAINED_ONCE,
    "train_recipe": RECIPE,
    "train_segmentation": TRAINED_ONCE,
    "train_tabular": TRAINED_ONCE,
    "train_text": TRAINED_ONCE,
}
PICTURES = {
    "gallery": {"density.png", "mixup.png", "moons.png"},
    "train_digits": {"accuracy.png"},
}
NOT_RUN_HERE = {"common", "train_distributed"}  # not a script; run by torchrun in test_distributed.py


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, path = torch.get_num_threads(), sys.path.copy()
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    if name == "quickstart":  # the one file that is read alone
        monkeypatch.setitem(sys.modules, "common", None)
    else:
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
    folder = [] if name in ("benchmark", "quickstart") else [f"--out={tmp_path}"]
    run(name, [*SMALLEST[name], *folder], monkeypatch)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 3
    assert not re.search("(better|worse) by", printed)  # one seed says neither
    assert {path.name for path in tmp_path.iterdir()} == PICTURES.get(name, set())


@pytest.mark.filterwarnings("default")
def test_train_manifold_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train_manifold", [*TRAINED_ONCE, "--compile", f"--out={tmp_path}"], monkeypatch)


@pytest.mark.filterwarnings("default")
def test_a_stopped_recipe_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*RECIPE, f"--out={tmp_path}"]
    run("train_recipe", options, monkeypatch)
    whole = capsys.readouterr().out

    save, saves = torch.save, []

    def stop_at_the_fourth(*args: Any) -> None:
        saves.append(args)
        if len(saves) == 4:  # in the second epoch of the second run
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(torch, "save", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("train_recipe", options, monkeypatch)
    monkeypatch.setattr(torch, "save", save)
    capsys.readouterr()
    run("train_recipe", options, monkeypatch)
    assert capsys.readouterr().out == f"resuming from {tmp_path / 'recipe.pt'}\n{whole}"


def test_a_bad_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train_digits", ["--epochs=x"], monkeypatch)
    assert "error: argument --epochs" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_the_counted_table_of_the_benchmark_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    counts = runpy.run_path(str(EXAMPLES / "benchmark.py"))["counts"]
    table = counts()
    assert table == counts()
    mixup = next(line for line in table.splitlines() if "| MixUp " in line)
    assert "\u00a0(2.50) " in mixup  # index_select reads and writes a batch, lerp_ reads two and writes one: 5 over 2
