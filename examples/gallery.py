"""Pictures of what the mixers draw, of what they make of a batch, and of a decision surface with and without MixUp.

    python examples/gallery.py           # about a quarter of a minute on two CPU cores
    python examples/gallery.py --quick   # a few seconds: shorter training, coarser pictures

Writes three pictures: mixers.png, a batch under MixUp, CutMix and the random choice of both, with the weights of the
two labels; density.png, the density of Beta(alpha, alpha) over draws of ``sample_beta``; and moons.png, the decision
surface of a small network on two noisy moons without and with MixUp.

Prints the test scores of the two moons for one training set. Over five of them MixUp changed the accuracy by -1 to 5
points, 1.8 on average.
"""

from __future__ import annotations

import argparse
from math import exp, lgamma
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from common import (
    BLUE,
    Runs,
    Samples,
    colored_digits,
    draw_batches,
    evaluate,
    fit,
    load_digits,
    report,
    save,
    set_plot_style,
)
from einops import rearrange
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import nn

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.sampling import sample_beta

INK = "#22262c"
POINTS = "#1b4aa8", "#b93218"  # darker than the surface below them
ALPHAS = 0.2, 0.5, 1.0, 2.0, 8.0
SURFACE = LinearSegmentedColormap.from_list(
    "surface", ("#74a0ee", "#b9cff7", "#fbfaf8", "#f8c6ba", "#f0907d"), N=120
)  # few enough colors for a small file


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


def draw_mixers(samples: Samples) -> Figure:
    """One batch under three mixers, each sample with the same partner throughout."""
    images, _ = colored_digits(samples)
    mixup, cutmix = MixUp(1.0, per_sample=True), CutMix(1.0, per_sample=True)
    mixers: dict[str, Mixer] = {
        "MixUp": mixup,
        "CutMix": cutmix,
        "random\nchoice": RandomChoice([mixup, cutmix], per_sample=True),
    }
    partners = mixup.sample(images).index
    batches = {"original": images, "partner": images[partners]}
    shares = {}
    for name, mixer in mixers.items():
        mix = Mix(mixer.sample(images).lam, partners)
        batches[name] = mixer(images, mix)
        shares[name] = mix.lam.view(len(images), -1).mean(1)  # of CutMix, of the area
    return draw_batches(batches, partners, shares)


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--quick", action="store_true", help="shorter training and coarser pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    set_plot_style()
    mpl.rcParams.update({"axes.grid": False, "image.interpolation_stage": "data"})

    torch.manual_seed(6)
    save(draw_mixers(load_digits()[0]), args.out / "mixers.png")

    torch.manual_seed(0)
    save(draw_density(2_000 if args.quick else 20_000), args.out / "density.png")

    train, test = moons(150, 2), moons(2000, 1)
    epochs = 5 if args.quick else 500
    models = {f"{name} MixUp": train_moons(alpha, train, epochs) for name, alpha in (("without", 0.0), ("with", 1.0))}
    save(draw_surfaces(models, train, test, 50 if args.quick else 300), args.out / "moons.png")

    runs: Runs = {"two moons": {name: [[evaluate(model, test)]] for name, model in models.items()}}
    print(report(runs))


if __name__ == "__main__":
    main()
