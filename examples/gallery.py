"""Pictures of what the mixers draw, of what they make of a batch, and of a decision surface with and without MixUp.

    python examples/gallery.py
    python examples/gallery.py --quick   # shorter training, coarser pictures

Writes four pictures: mixup.png, a batch, the partners and what MixUp makes of both; mixers.png, a batch under MixUp,
CutMix and the random choice of both, with the weights of the two labels; density.png, the density of Beta(alpha, alpha)
over draws of ``sample_beta``; and moons.png, the decision surface of a small network on two noisy moons without and
with MixUp.

Prints the test scores of the two moons for one training set. Over five of them MixUp changed the accuracy by -1 to 3
points, 1.1 on average.
"""

from __future__ import annotations

import argparse
from math import exp, lgamma
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from common import BLUE, GREY, PLOT_STYLE, Runs, Samples, evaluate, fit, load_digits, report, save
from einops import rearrange
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.sampling import sample_beta

DIGIT_COLORS = ("#2f6fde", "#e8543a", "#17a673", "#9a4fd0", "#f08a00", "#0d9fc0", "#e0408f", "#6f8f1a")  # of 0 to 7
PAPER = 0.96  # the grey of the empty pixels
INK = "#22262c"
POINTS = "#1b4aa8", "#b93218"  # darker than the surface below them
ALPHAS = 0.2, 0.5, 1.0, 2.0, 8.0
SURFACE = LinearSegmentedColormap.from_list(
    "surface", ("#74a0ee", "#b9cff7", "#fbfaf8", "#f8c6ba", "#f0907d"), N=120
)  # few enough colors for a small file


def colored_digits(samples: Samples) -> tuple[Tensor, Tensor]:
    """One picture ``(3, 8, 8)`` of each digit from 0 to 7, in a colour of its own; and the digits."""
    digits = torch.arange(len(DIGIT_COLORS))
    ink = torch.stack([samples.input[samples.target == digit][0] for digit in digits]).cpu()
    colors = rearrange(torch.tensor([to_rgb(color) for color in DIGIT_COLORS]), "n rgb -> n rgb 1 1")
    return PAPER - ink * (PAPER - colors), digits


def draw_batches(batches: dict[str, Tensor], partners: Tensor, shares: dict[str, Tensor]) -> Figure:
    """A row for each batch of coloured digits; under those with ``shares``, one per sample, both labels and weights."""
    left, size, gap, caption = 0.95, 1.048, 0.084, 0.62  # inches
    height = 2 * gap + len(batches) * (size + gap) + len(shares) * (caption - gap)
    figure = Figure(figsize=(10, height))
    bottom = height - gap
    for name, batch in batches.items():
        bottom -= size
        figure.text((left - 0.12) / 10, (bottom + size / 2) / height, name, ha="right", va="center")
        weights = shares[name].tolist() if name in shares else []
        if weights:
            note = {"ha": "right", "va": "center", "size": "x-small", "color": GREY}
            figure.text((left - 0.12) / 10, (bottom + size / 2 - 0.2) / height, "per sample", **note)
        for column, image in enumerate(rearrange(batch, "n rgb h w -> n h w rgb")):
            x = left + column * (size + gap)
            axis = figure.add_axes((x / 10, bottom / height, size / 10, size / height))
            axis.imshow(image)
            axis.set_axis_off()
            if weights:
                caption_below(axis, weights[column], column, int(partners[column]))
        bottom -= caption if weights else gap
    return figure


def caption_below(axis: Axes, weight: float, digit: int, partner: int) -> None:
    """The label of a mixture: ``0.72 · "0"`` and, below it, ``+ 0.28 · "6"``, in the colours of the digits."""
    shown = round(weight, 2)  # so that the two numbers add up to 1
    for y, share, label in ((-0.17, f"{shown:.2f}", digit), (-0.38, f"+ {1 - shown:.2f}", partner)):
        text = f'{share} · "{label}"'
        axis.text(0.94, y, text, transform=axis.transAxes, ha="right", va="center", color=DIGIT_COLORS[label])


def draw_mixtures(samples: Samples, alpha: float) -> Figure:
    """A batch, the partners, and what MixUp makes of both."""
    images, _ = colored_digits(samples)
    mixup = MixUp(alpha, per_sample=True)
    mix = mixup.sample(images)
    batches = {"original": images, "partner": images[mix.index], "mixture": mixup(images, mix)}
    return draw_batches(batches, mix.index, {"mixture": mix.lam})


def draw_mixers(samples: Samples) -> Figure:
    """One batch under three mixers, each sample with the same partner throughout."""
    images, _ = colored_digits(samples)
    mixup, cutmix = MixUp(1.0, per_sample=True), CutMix(1.0, per_sample=True)
    mixers: dict[str, Mixer] = {
        "MixUp": mixup,
        "CutMix": cutmix,
        "choice": RandomChoice([mixup, cutmix], per_sample=True),
    }
    partners = mixup.sample(images).index
    batches = {"original": images, "partner": images[partners]}
    shares = {}
    for name, mixer in mixers.items():
        mix = Mix(mixer.sample(images).lam, partners)
        batches[name] = mixer(images, mix)
        shares[name] = mix.lam.view(len(images), -1).mean(1)  # of CutMix, of the area
    return draw_batches(batches, partners, shares)


def beta_density(lam: np.ndarray, alpha: float) -> np.ndarray:
    """The exact density of Beta(alpha, alpha)."""
    return exp(lgamma(2 * alpha) - 2 * lgamma(alpha)) * (lam * (1 - lam)) ** (alpha - 1)


def draw_density(draws: int) -> Figure:
    """A panel for each alpha: the exact density over a histogram of draws."""
    figure = Figure(figsize=(10, 2.9))
    axes = figure.subplots(1, len(ALPHAS), sharey=True)
    figure.subplots_adjust(left=0.025, right=0.975, top=0.83, bottom=0.2, wspace=0.16)
    lam = np.linspace(0.001, 0.999, 999)
    for axis, alpha in zip(axes, ALPHAS, strict=True):
        axis.hist(
            sample_beta(alpha, (draws,)).numpy(), bins=40, range=(0, 1), density=True, color="#b9cff7", rwidth=0.8
        )
        axis.plot(lam, beta_density(lam, alpha), color=BLUE)
        axis.set(title=f"alpha = {alpha:g}", xlabel="lam", xlim=(-0.02, 1.02), ylim=(0, 4.3))
        axis.set_xticks((0, 0.5, 1), ("0", "½", "1"))
        axis.set_yticks(())
        axis.spines["left"].set_visible(False)
    return figure


def moons(count: int, seed: int, noise: float = 0.3) -> Samples:
    """Two half circles in the plane, each into the other."""
    points, labels = make_moons(count, noise=noise, random_state=seed)
    return Samples(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))


def train_moons(alpha: float, train: Samples, epochs: int) -> nn.Module:
    """A network large enough to memorise every point."""
    torch.manual_seed(0)
    mixup = MixUp(alpha, per_sample=True)
    hidden = [nn.Sequential(nn.Linear(width, 128), nn.SiLU()) for width in (2, 128, 128)]
    model = nn.Sequential(mixup, *hidden, nn.Linear(128, 2))
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
    fit(model, criterion, train, epochs=epochs, batch_size=50, lr=3e-3, seed=0)
    return model.eval()


@torch.no_grad()
def draw_surfaces(models: dict[str, nn.Module], train: Samples, test: Samples, resolution: int) -> Figure:
    """The probability of one class over the plane, the decision boundary, and the training points."""
    figure = Figure(figsize=(10, 4.1))
    axes = figure.subplots(1, len(models))
    figure.subplots_adjust(left=0.012, right=0.988, top=0.88, bottom=0.025, wspace=0.03)
    x, y = torch.linspace(-1.85, 2.75, resolution), torch.linspace(-1.6, 1.9, resolution)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        probability = model(rearrange(plane, "h w xy -> (h w) xy")).softmax(1)[:, 1]
        surface = rearrange(probability, "(h w) -> h w", h=resolution)
        extent = (x[0], x[-1], y[0], y[-1])
        axis.imshow(surface, SURFACE, vmin=0, vmax=1, extent=extent, origin="lower", interpolation="bicubic")
        axis.contour(x, y, surface, (0.5,), colors=INK, linewidths=2)
        for label, color in enumerate(POINTS):
            chosen = train.input[train.target == label]
            axis.scatter(*chosen.T, s=36, color=color, edgecolor="white", linewidth=1, zorder=3)
        axis.set_title(f"{name}: {evaluate(model, test).accuracy:.1%} test accuracy")
        axis.set_aspect("auto")
        axis.set_axis_off()
    return figure


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--quick", action="store_true", help="shorter training and coarser pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    style.use(PLOT_STYLE)
    mpl.rcParams.update({"axes.grid": False, "image.interpolation_stage": "data"})

    digits, _ = load_digits()
    torch.manual_seed(5)
    save(draw_mixtures(digits, 8.0), args.out / "mixup.png")

    torch.manual_seed(6)
    save(draw_mixers(digits), args.out / "mixers.png")

    torch.manual_seed(0)
    save(draw_density(2_000 if args.quick else 200_000), args.out / "density.png")

    train, test = moons(150, 2), moons(2000, 1)
    epochs = 5 if args.quick else 500
    models = {f"{name} MixUp": train_moons(alpha, train, epochs) for name, alpha in (("without", 0.0), ("with", 1.0))}
    save(draw_surfaces(models, train, test, 50 if args.quick else 300), args.out / "moons.png")

    runs: Runs = {"two moons": {name: [[evaluate(model, test)]] for name, model in models.items()}}
    print(report(runs))


if __name__ == "__main__":
    main()
