"""What the examples share: options, data, a network, a training loop, scores and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import sklearn.datasets
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

PLOT_STYLE = Path(__file__).with_name("pictures.mplstyle")
GREY, BLUE, ORANGE, GREEN = "#7b818b", "#2f6fde", "#e8743a", "#17a673"  # no mixing, MixUp, CutMix, others


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring of a script as it is, and the defaults."""


def example_parser(
    doc: str | None, *, epochs: int, batch_size: int, alpha: float | None = None
) -> argparse.ArgumentParser:
    """The options that the examples have in common, with the docstring of the script as help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if alpha is not None:
        parser.add_argument("--alpha", type=float, default=alpha, help="parameter of the Beta distribution of MixUp")
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over the training samples, per run")
    parser.add_argument("--seeds", type=int, default=3, help="runs per setting, for means and standard deviations")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="training samples per step")
    parser.add_argument("--device", type=torch.device, default=device, help="where to train")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    parser.add_argument("--compile", action="store_true", help="compile forward pass and loss as one graph")
    return parser


def load_digits(device: torch.device | str = "cpu") -> tuple[Samples, Samples]:
    """scikit-learn's handwritten digits, ``(N, 1, 8, 8)`` in [0, 1]: always the same 1,000 to train, 797 to test."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    input = rearrange(torch.tensor(images, dtype=torch.float32, device=device) / 16, "n (h w) -> n 1 h w", h=8)
    target = torch.tensor(labels, device=device)
    parts = train_test_split(range(len(labels)), train_size=1000, stratify=labels, random_state=0)
    train, test = (Samples(input[part], target[part]) for part in parts)
    return train, test


def redraw(labels: Tensor, share: float, seed: int) -> Tensor:
    """Replace each label with probability ``share`` by one of the classes, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(labels.shape, generator=generator) < share
    drawn = torch.randint(int(labels.max()) + 1, labels.shape, generator=generator)
    return torch.where(chosen, drawn, labels.cpu()).to(labels.device)


def small_cnn() -> nn.Module:
    """87,000 weights: enough to memorise 1,000 random labels of digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def fit(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    train: Samples,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    compile: bool = False,
    after_epoch: Callable[[], object] = lambda: None,
) -> None:
    """A plain training loop: Adam and a cosine schedule. ``seed`` fixes the order of the batches."""

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    torch.compiler.reset()  # forgets the graphs of the run before
    compute_loss = torch.compile(forward, fullgraph=True) if compile else forward
    order = torch.Generator().manual_seed(seed)  # of its own: mixing draws from the global one
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train.input), generator=order).to(train.input.device).split(batch_size):
            loss = compute_loss(train.input[batch], train.target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        after_epoch()


@torch.no_grad()
def evaluate(model: nn.Module, test: Samples, bins: int = 15, ignore_index: int = -100) -> Scores:
    """Accuracy, cross entropy and expected calibration error, over samples or over pixels, without those ignored.

    The calibration error is the gap between confidence and accuracy, averaged over bins of equal width in confidence.
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
    return f"{fmean(values):.3f}" + (f"\u00a0±\u00a0{spread(values):.3f}" if len(values) > 1 else "")


def verdict(without: Sequence[float], with_mixing: Sequence[float], *, higher_is_better: bool) -> str:
    """A comparison in words: a difference counts if it exceeds the sum of the two standard deviations."""
    if len(without) == 1:
        return "no verdict from one seed"
    gain = (fmean(with_mixing) - fmean(without)) * (1 if higher_is_better else -1)
    if abs(gain) <= spread(without) + spread(with_mixing):
        return "no clear difference"
    return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text that is a Markdown table too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def report(runs: Runs) -> str:
    """The scores after the last epoch as a table, and each training compared in words to the first."""
    metrics = [field.replace("_", " ") for field in Scores._fields]
    rows, findings = [], []
    for setting, trainings in runs.items():
        last = {name: list(zip(*(run[-1] for run in seeds), strict=True)) for name, seeds in trainings.items()}
        rows += [[setting, name, *map(mean_and_spread, scores)] for name, scores in last.items()]
        without, *others = last
        for name in others:
            words = [
                f"{metric} {verdict(*pair, higher_is_better=metric == 'accuracy')}"
                for metric, *pair in zip(metrics, last[without], last[name], strict=True)
            ]
            findings.append(f"{setting}, {name}: {', '.join(words)}.")
    scores = "Test scores after the last epoch, mean ± standard deviation over the seeds:"
    rule = "In words, where a difference counts if it exceeds the sum of the two standard deviations:"
    words = [rule, *findings] if len(next(iter(trainings.values()))) > 1 else ["One seed: no verdict."]
    return "\n".join(["", scores, "", table(["", "", *metrics], rows), "", *words])


def save(figure: Figure, path: Path, colors: int | None = None) -> None:
    """Write a picture, of few ``colors`` if photographs make it large, and say where. No pyplot, so no display."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    if colors is not None:
        Image.open(path).convert("RGB").quantize(colors).save(path, optimize=True)
    print(f"wrote {path}")
