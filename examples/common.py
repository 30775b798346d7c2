"""What the examples share: options, digits, a training loop, scores, tables and the look of the pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from math import floor
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import sklearn.datasets
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from mixup_nn import MixUp, MixUpCriterion

GREY, BLUE = "#7b818b", "#2f6fde"  # the two runs of every comparison: without and with MixUp


class Samples(NamedTuple):
    """A data set small enough to stay on the device as two tensors."""

    input: Tensor
    target: Tensor


class Scores(NamedTuple):
    """How well a classifier does on a set of samples; see :func:`evaluate`."""

    accuracy: float
    loss: float
    calibration_error: float


Runs = dict[str, dict[str, list[list[Scores]]]]  # setting, training (the first without MixUp), seed, epoch


def example_parser(doc: str | None, *, alpha: float, epochs: int, batch_size: int) -> argparse.ArgumentParser:
    """The options that all examples have, with the docstring of the script as help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"

    def add(name: str, kind: Callable[[str], object], default: object, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (default: {default})")

    add("--alpha", number(float, 0), alpha, "parameter of the Beta distribution")
    add("--epochs", number(int, 1), epochs, "passes over the training samples, per run")
    add("--seeds", number(int, 1), 3, "runs per setting, for means and spreads")
    add("--batch-size", number(int, 1), batch_size, "training samples per step")
    add("--device", usable_device, default_device, "where to train")
    add("--out", Path, Path("out"), "folder for the pictures")
    parser.add_argument("--compile", action="store_true", help="compile the training step, forward and loss, as one")
    return parser


def number(kind: type[int] | type[float], low: float, high: float = sys.float_info.max) -> Callable[[str], float]:
    """An argparse type: a number in ``[low, high]``, with an error that says so."""

    def parse(text: str) -> float:
        bounds = f">= {low}" if high == sys.float_info.max else f"in [{low}, {high}]"
        expected = f"expected a {'whole' if kind is int else 'finite'} number {bounds}, got {text!r}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(expected)
        return value

    return parse


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # torch raises either, with the reason in the first line
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None


def load_digits(device: torch.device | str = "cpu") -> tuple[Samples, Samples]:
    """scikit-learn's handwritten digits, ``(N, 1, 8, 8)`` in [0, 1]: always the same 1,000 to train, 797 to test."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    input = rearrange(torch.tensor(images, dtype=torch.float32, device=device) / 16, "n (h w) -> n 1 h w", h=8)
    target = torch.tensor(labels, device=device)
    parts = train_test_split(range(len(labels)), train_size=1000, stratify=labels, random_state=0)
    train, test = (Samples(input[part], target[part]) for part in parts)
    return train, test


def fit(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    train: Samples,
    epochs: int,
    batch_size: int,
    *,
    lr: float,
    seed: int,
    compile: bool = False,
) -> Iterator[int]:
    """Train with Adam and a cosine schedule; yields the number of each epoch when it is done.

    ``seed`` fixes the order of the batches, whatever else draws random numbers.
    """

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    compute_loss = torch.compile(forward, fullgraph=True) if compile else forward
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(train.input), generator=order).to(train.input.device).split(batch_size):
            loss = compute_loss(train.input[batch], train.target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        yield epoch


def fitted(
    network: nn.Module, loss: nn.Module, train: Samples, alpha: float, *, lr: float, seed: int, args: argparse.Namespace
) -> nn.Module:
    """The whole of one run, by the options of the example: ``network`` trained with MixUp of the input."""
    mixup = MixUp(alpha)
    model = nn.Sequential(mixup, network).to(args.device)
    criterion = MixUpCriterion(loss, mixup)
    for _ in fit(model, criterion, train, args.epochs, args.batch_size, lr=lr, seed=seed, compile=args.compile):
        pass
    return model


@torch.no_grad()
def evaluate(model: nn.Module, test: Samples, bins: int = 15, ignore_index: int = -100) -> Scores:
    """Accuracy, mean negative log-likelihood and expected calibration error, of samples or of their pixels.

    A target of ``ignore_index`` counts for nothing, as in cross entropy.

    The calibration error is the mean distance of confidence to accuracy, over bins of equal width in confidence.
    """
    logits = rearrange(model.eval()(test.input), "b classes ... -> (b ...) classes")
    target = test.target.flatten()
    logits, target = logits[target != ignore_index], target[target != ignore_index]
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == target).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, device=logits.device).index_add_(0, which, confidence - correct)
    return Scores(
        accuracy=correct.mean().item(),
        loss=nn.functional.cross_entropy(logits, target).item(),
        calibration_error=gaps.abs().sum().item() / len(target),
    )


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds, 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values: Sequence[float]) -> str:
    """A cell of a table: ``0.912 ± 0.008``."""
    return f"{fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def verdict(without: Sequence[float], with_mixup: Sequence[float], *, higher_is_better: bool) -> str:
    """What a comparison shows, in words: a difference counts where it exceeds both spreads together."""
    gain = (fmean(with_mixup) - fmean(without)) * (1 if higher_is_better else -1)
    if abs(gain) <= spread(without) + spread(with_mixup):
        return "no clear difference"
    return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.3f}" + (" (one seed)" if len(without) == 1 else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text that is a Markdown table too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def report(runs: Runs) -> str:
    """The scores after the last epoch as a table, and what they show in words."""
    metrics = [field.replace("_", " ") for field in Scores._fields]
    rows, findings = [], []
    for setting, trainings in runs.items():
        last = {name: list(zip(*(run[-1] for run in seeds), strict=True)) for name, seeds in trainings.items()}
        rows += [[setting, name, *map(mean_and_spread, scores)] for name, scores in last.items()]
        without, *others = last  # each is compared to the first
        for name in others:
            words = [
                f"{metric} {verdict(*pair, higher_is_better=metric == 'accuracy')}"
                for metric, *pair in zip(metrics, last[without], last[name], strict=True)
            ]
            findings.append(f"{setting}, {name}: {', '.join(words)}.")
    scores = "Test scores after the last epoch, mean ± standard deviation over the seeds:"
    rule = "In words, where a difference counts if it exceeds both deviations together:"
    return "\n".join(["", scores, "", table(["", "", *metrics], rows), "", rule, *findings])


def set_plot_style() -> None:
    """Large type and few lines: the look of all pictures."""
    mpl.rcParams.update(
        {
            "axes.edgecolor": "#c4c8cf",
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.labelcolor": "#4a4f57",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlepad": 14,
            "axes.titlesize": 15,
            "axes.titleweight": "bold",
            "font.size": 13,
            "grid.color": "#eceef1",
            "lines.linewidth": 2.5,
            "lines.solid_capstyle": "round",
            "savefig.dpi": 160,
            "text.color": "#22262c",
            "xtick.color": "#6a6f78",
            "xtick.major.size": 0,
            "ytick.color": "#6a6f78",
            "ytick.major.size": 0,
        }
    )


def draw_accuracy(runs: Runs) -> Figure:
    """Test accuracy over the epochs, a panel for each setting, with means over the seeds and bands of one spread."""
    figure = Figure(figsize=(10, 4.4))
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.865, top=0.88, bottom=0.13, wspace=0.42)
    lowest = min(run[-1].accuracy for trainings in runs.values() for seeds in trainings.values() for run in seeds)
    axes[0].set(ylim=(max(floor(10 * lowest - 1) / 10, 0), 1.01), ylabel="test accuracy")
    for axis, (setting, trainings) in zip(axes, runs.items(), strict=True):
        axis.set(title=f"trained on {setting}", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        ends = []
        for (name, seeds), color in zip(trainings.items(), (GREY, BLUE), strict=True):
            accuracies = [[scores.accuracy for scores in epoch] for epoch in zip(*seeds, strict=True)]
            mean, band = (np.array([of(values) for values in accuracies]) for of in (fmean, spread))
            epochs = range(1, len(mean) + 1)
            axis.plot(epochs, mean, color=color)
            axis.plot(len(mean), mean[-1], "o", color=color)
            axis.fill_between(epochs, mean - band, mean + band, color=color, alpha=0.16, linewidth=0)
            ends.append((len(mean), mean[-1], name, color))
        label_ends(axis, *sorted(ends, key=lambda end: end[1]))
    return figure


def label_ends(axis: Axes, lower: tuple[int, float, str, str], upper: tuple[int, float, str, str]) -> None:
    """Write name and last value beside the ends of two curves, so far apart that neither label covers the other."""
    bottom, top = axis.get_ylim()
    apart = max(upper[1] - lower[1], 0.17 * (top - bottom))
    for (x, y, name, color), side in ((lower, -0.5), (upper, 0.5)):
        place = (x, (lower[1] + upper[1]) / 2 + side * apart)
        label = axis.annotate(f"{name}\n{y:.3f}", place, (10, 0), textcoords="offset points", annotation_clip=False)
        label.set(color=color, verticalalignment="center")


def save(figure: Figure, path: Path) -> None:
    """Write a picture and say where. A ``Figure`` made without pyplot needs no display."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")
