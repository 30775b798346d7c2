"""Every example runs on its smallest setting, and prints and writes what it says."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TRAINED_ONCE = ["--epochs=1", "--seeds=1"]
SMALLEST = {
    "benchmark": ["--quick"],
    "gallery": ["--quick"],
    "quickstart": [],
    "train_digits": [*TRAINED_ONCE, "--jobs=1"],  # other processes return to the real __main__, which is pytest here
    "train_manifold": [*TRAINED_ONCE, "--compile"],
    "train_segmentation": TRAINED_ONCE,
    "train_tabular": TRAINED_ONCE,
    "train_text": [*TRAINED_ONCE, "--batch-size=100"],
}
RECIPE = ["--epochs=3", "--unmixed-epochs=1", "--seeds=1", "--batch-size=250"]
PICTURES = {"gallery": {"density.png", "mixup.png", "moons.png"}, "train_digits": {"accuracy.png"}}
# common is no script, train_distributed runs in test_distributed.py, train_recipe in the test of its resumption
NOT_IN_THE_TABLE = {"common", "train_distributed", "train_recipe"}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, path = torch.get_num_threads(), sys.path.copy()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    sys.path[:] = path


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # one graph or an error; no kernels
    if name == "quickstart":  # the one file that is read alone
        monkeypatch.setitem(sys.modules, "common", None)
    else:
        monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_no_example_is_left_out() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == SMALLEST.keys() | NOT_IN_THE_TABLE
    index = re.findall(r"^\| `examples/(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(index) == sorted(scripts - {"common"})


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # tensors that matplotlib turns into arrays
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


def test_a_stopped_recipe_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, save, saves = [*RECIPE, f"--out={tmp_path}"], torch.save, list[Any]()

    def save_and_count(*args: Any) -> None:
        saves.append(args)
        if len(saves) == 23:  # of 24: what is found after a stop in the second epoch of the last run, before two more
            shutil.copy(tmp_path / "recipe.pt", tmp_path / "stopped.pt")
        save(*args)

    monkeypatch.setattr(torch, "save", save_and_count)
    run("train_recipe", options, monkeypatch)
    whole = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.pt"]
    (tmp_path / "stopped.pt").rename(tmp_path / "recipe.pt")
    run("train_recipe", options, monkeypatch)
    assert len(saves) == 26
    assert capsys.readouterr().out == f"resuming from {tmp_path / 'recipe.pt'}\n{whole}"


def test_a_bad_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train_digits", ["--epochs=x"], monkeypatch)
    assert "error: argument --epochs" in capsys.readouterr().err


# index_select reads and writes a batch, lerp_ reads two and writes one: 5 over 2
@pytest.mark.parametrize(
    "row, times", [("MixUp", "2.50"), pytest.param("kornia", "7.00", marks=pytest.mark.needs("kornia"))]
)
def test_the_counted_table_is_the_same_every_time(row: str, times: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    table = (counts := runpy.run_path(str(EXAMPLES / "benchmark.py"))["counts"])()
    assert table == counts()
    assert re.search(rf"^\| {row} +\| \d+\u00a0\({times}\) ", table, re.MULTILINE)
