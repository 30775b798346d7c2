"""Trains a small CNN on handwritten digits without and with MixUp, on clean labels and on partly random ones.

    python examples/train_digits.py
    python examples/train_digits.py --noise 0.8   # four of five training labels redrawn at random

The data are scikit-learn's 1,797 digits of 8x8 pixels. In the noisy runs a share of the training labels is redrawn
uniformly at random; the test labels stay as they are. The runs of a setting start from the same weights and see the
same batches and labels. The plain one memorises the random labels and loses test accuracy; MixUp makes memorising
hard. This is the corrupted-label experiment of https://arxiv.org/abs/1710.09412 at small scale.

RegMixup (https://arxiv.org/abs/2206.14502) trains on each batch twice in one step, as it is and mixed, at twice the
cost. On clean labels it halves the loss of both others, with a third of the calibration error of MixUp. Random labels
it still memorises, with the half that is not mixed.

Prints the test scores after the last epoch, and draws the test accuracy over the epochs, accuracy.png.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from itertools import accumulate, product
from math import floor
from statistics import fmean

import numpy as np
import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    PLOT_STYLE,
    Runs,
    Samples,
    Scores,
    evaluate,
    example_parser,
    fit,
    load_digits,
    redraw,
    report,
    save,
    small_cnn,
    spread,
)
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mixup_nn import Mix, MixUp, MixUpCriterion


class RegMixUp(MixUp):
    """Returns the batch as it is, followed by the mixed one."""

    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        """Twice as long in training mode."""
        mixed = super().forward(input, mix)
        return torch.cat((input, mixed)) if self.training else mixed


def regmixup_loss(criterion: MixUpCriterion, output: Tensor, y: Tensor) -> Tensor:
    """The mean of the plain loss on the clean half and the mixed loss on the other."""
    clean, mixed = output.chunk(2)
    return (criterion.loss(clean, y) + criterion(mixed, y)) / 2


def train_once(mixup: MixUp, train: Samples, test: Samples, seed: int, args: Namespace, bar: tqdm) -> list[Scores]:
    """The test scores after each epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(mixup, small_cnn()).to(args.device)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
    loss = partial(regmixup_loss, criterion) if isinstance(mixup, RegMixUp) else criterion
    history: list[Scores] = []

    def after_epoch() -> None:
        history.append(evaluate(model, test))
        bar.update()

    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}
    fit(model, loss, train, lr=5e-3, seed=seed, after_epoch=after_epoch, **options)
    return history


def draw_accuracy(runs: Runs) -> Figure:
    """Test accuracy over the epochs, a panel for each setting: means over the seeds, bands of a standard deviation."""
    figure = Figure(figsize=(10, 4.4))
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.865, top=0.88, bottom=0.13, wspace=0.42)
    lowest = min(run[-1].accuracy for trainings in runs.values() for seeds in trainings.values() for run in seeds)
    axes[0].set(ylim=(max(floor(10 * lowest - 1) / 10, 0), 1.01), ylabel="test accuracy")
    for axis, (setting, trainings) in zip(axes, runs.items(), strict=True):
        axis.set(title=f"trained on {setting}", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        ends = []
        for (name, seeds), color in zip(trainings.items(), (GREY, BLUE, GREEN), strict=True):
            accuracies = [[scores.accuracy for scores in epoch] for epoch in zip(*seeds, strict=True)]
            mean, band = (np.array([of(values) for values in accuracies]) for of in (fmean, spread))
            epochs = range(1, len(mean) + 1)
            axis.plot(epochs, mean, color=color)
            axis.plot(len(mean), mean[-1], "o", color=color)
            axis.fill_between(epochs, mean - band, mean + band, color=color, alpha=0.16, linewidth=0)
            ends.append((mean[-1], name, color))
        label_ends(axis, len(mean), sorted(ends))
    return figure


def label_ends(axis: Axes, epoch: int, ends: list[tuple[float, str, str]]) -> None:
    """Write name and last value beside the curves, the lowest first, so far apart that no label covers another."""
    bottom, top = axis.get_ylim()
    apart = 0.17 * (top - bottom)
    values = [value for value, _, _ in ends]
    places = list(accumulate(values, lambda below, value: max(value, below + apart)))
    too_high = max(fmean(places) - fmean(values), places[-1] - top + apart / 2)
    for place, (value, name, color) in zip(places, ends, strict=True):
        options = {"textcoords": "offset points", "annotation_clip": False, "color": color, "va": "center"}
        axis.annotate(f"{name}\n{value:.3f}", (epoch, place - too_high), (10, 0), **options)


def main() -> None:
    """Train every way on every seed, then draw and print the results."""
    parser = example_parser(__doc__, alpha=8.0, epochs=60, batch_size=100)
    parser.add_argument("--noise", type=float, default=0.5, help="share of training labels redrawn")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more, and loses much where other work takes a core
    style.use(PLOT_STYLE)
    train, test = load_digits(args.device)
    noises = {"clean labels": 0.0, f"{args.noise:.0%} random labels": args.noise}
    mixers = {"without MixUp": MixUp(0), "with MixUp": MixUp(args.alpha), "RegMixup": RegMixUp(args.alpha)}
    runs: Runs = {labels: {name: [] for name in mixers} for labels in noises}
    with tqdm(total=len(noises) * args.seeds * len(mixers) * args.epochs, unit="epoch") as bar:
        for (labels, noise), seed, (name, mixup) in product(noises.items(), range(args.seeds), mixers.items()):
            bar.set_description(f"{labels}, {name}")
            noisy = train._replace(target=redraw(train.target, noise, seed))
            runs[labels][name].append(train_once(mixup, noisy, test, seed, args, bar))
    save(draw_accuracy(runs), args.out / "accuracy.png")
    print(report(runs))


if __name__ == "__main__":
    main()
