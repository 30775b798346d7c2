"""Trains a small CNN on handwritten digits without and with MixUp, on clean labels and on partly random ones.

    python examples/train_digits.py               # about a minute on two CPU cores
    python examples/train_digits.py --noise 0.8   # four of five training labels redrawn at random

The data are scikit-learn's 1,797 digits of 8x8 pixels. In the noisy runs a share of the training labels is redrawn
uniformly at random; the test labels stay as they are. The two runs of a pair start from the same weights and see the
same batches and labels. The plain one learns the random labels by heart, at the cost of what it knew; MixUp makes that
hard. This is the corrupted-label experiment of https://arxiv.org/abs/1710.09412 in small.

Prints the test scores after the last epoch, and writes two pictures: mixtures.png, what MixUp makes of a batch, and
accuracy.png, test accuracy over the epochs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import product

import torch
from common import (
    Runs,
    Samples,
    Scores,
    draw_accuracy,
    evaluate,
    example_parser,
    fit,
    load_digits,
    number,
    report,
    save,
    set_plot_style,
)
from einops import rearrange
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mixup_nn import MixUp, MixUpCriterion

COLORS = ("#2f6fde", "#e8543a", "#17a673", "#9a4fd0", "#f08a00", "#0d9fc0", "#e0408f", "#6f8f1a")  # of 0 to 7
PAPER = 0.96  # the grey of the empty pixels


def redraw(labels: Tensor, share: float, seed: int) -> Tensor:
    """Replace each label with probability ``share`` by one of the ten digits, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(labels.shape, generator=generator) < share
    return torch.where(chosen, torch.randint(10, labels.shape, generator=generator), labels.cpu()).to(labels.device)


def small_cnn() -> nn.Module:
    """87,000 weights: enough to learn 1,000 random labels by heart."""
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


def train_once(alpha: float, train: Samples, test: Samples, seed: int, args: Namespace) -> Iterator[Scores]:
    """One run: yields the test scores after each epoch. With ``alpha=0`` they are those of the plain model and loss."""
    torch.manual_seed(seed)
    mixup = MixUp(alpha)
    model = nn.Sequential(mixup, small_cnn()).to(args.device)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
    for _ in fit(model, criterion, train, args.epochs, args.batch_size, lr=5e-3, seed=seed, compile=args.compile):
        yield evaluate(model, test)


def draw_mixtures(samples: Samples, alpha: float) -> Figure:
    """A batch, the partners and what MixUp makes of both, each digit in a colour of its own."""
    chosen = torch.stack([(samples.target == digit).nonzero()[0, 0] for digit in range(len(COLORS))])
    ink, digits = samples.input[chosen].cpu(), samples.target[chosen].cpu()
    color = rearrange(torch.tensor([to_rgb(COLORS[digit]) for digit in digits]), "n rgb -> n rgb 1 1")
    images = PAPER - ink * (PAPER - color)

    mixup = MixUp(alpha, per_sample=True)
    mix = mixup.sample(images)
    batches = {"original": images, "partner": images[mix.index], "mixture": mixup(images, mix)}

    figure = Figure(figsize=(10, 4.1))
    axes = figure.subplots(3, len(COLORS))
    figure.subplots_adjust(left=0.095, right=0.992, top=0.98, bottom=0.17, wspace=0.08, hspace=0.08)
    for row, (name, batch) in enumerate(batches.items()):
        axes[row, 0].text(-0.12, 0.5, name, transform=axes[row, 0].transAxes, ha="right", va="center")
        for axis, image in zip(axes[row], rearrange(batch, "n rgb h w -> n h w rgb"), strict=True):
            axis.imshow(image)
            axis.set_axis_off()
    for axis, weight, digit, partner in zip(axes[2], mix.lam.tolist(), digits, digits[mix.index], strict=True):
        shown = round(weight, 2)  # so that the two numbers add up to 1
        for y, share, label in ((-0.17, f"{shown:.2f}", digit), (-0.38, f"+ {1 - shown:.2f}", partner)):
            text = f'{share} · "{label}"'
            axis.text(0.94, y, text, transform=axis.transAxes, ha="right", va="center", color=COLORS[label])
    return figure


def main() -> None:
    """Train every pair of runs, then draw and print what came of them."""
    parser = example_parser(__doc__, alpha=8.0, epochs=60, batch_size=100)
    parser.add_argument(
        "--noise", type=number(float, 0, 1), default=0.5, help="share of training labels redrawn (default: 0.5)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more, and loses much where other work takes a core
    set_plot_style()
    train, test = load_digits(args.device)
    torch.manual_seed(5)
    save(draw_mixtures(train, args.alpha), args.out / "mixtures.png")

    noises = {"clean labels": 0.0, f"{args.noise:.0%} random labels": args.noise}
    alphas = {"without MixUp": 0.0, "with MixUp": args.alpha}
    runs: Runs = {labels: {name: [] for name in alphas} for labels in noises}
    with tqdm(total=len(noises) * args.seeds * len(alphas) * args.epochs, unit="epoch") as bar:
        for (labels, noise), seed, (name, alpha) in product(noises.items(), range(args.seeds), alphas.items()):
            bar.set_description(f"{labels}, {name}")
            noisy = train._replace(target=redraw(train.target, noise, seed))
            runs[labels][name].append(history := [])
            for scores in train_once(alpha, noisy, test, seed, args):
                history.append(scores)
                bar.update()
    save(draw_accuracy(runs), args.out / "accuracy.png")
    print(report(runs))


if __name__ == "__main__":
    main()
