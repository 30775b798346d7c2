"""MixUp beyond images: regression and classification of tables, and classification of time series.

    python examples/train_tabular.py
    python examples/train_tabular.py --alpha 0.2   # weaker mixing hurts the waves less

Three small problems, each trained without and with MixUp from the same weights on the same batches:

- diabetes (scikit-learn): predict the progress of the disease from 10 measurements, with ``nn.MSELoss()``. The
  targets are floating, so the criterion interpolates the targets themselves.
- breast cancer (scikit-learn): one of two diagnoses from 30 measurements, with ``nn.CrossEntropyLoss()``.
- waves: tell sine, square and sawtooth of random pitch and phase apart, in noise: ``(B, channels, time)`` into a CNN.

Prints the test error or accuracy after the last epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from common import Samples, evaluate, example_parser, fit, mean_and_spread, table, verdict
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from mixup_nn import MixUp, MixUpCriterion


class Problem(NamedTuple):
    """The data, the network, its loss and its test score."""

    train: Samples
    test: Samples
    network: Callable[[], nn.Module]
    loss: nn.Module
    score: Callable[[nn.Module, Samples], float]


def rows(input: Tensor, target: Tensor, device: torch.device) -> tuple[Samples, Samples]:
    """Half of a table to train and half to test, standardised by mean and deviation of the training half."""
    train, test = train_test_split(range(len(target)), train_size=0.5, random_state=0)

    def standardized(values: Tensor) -> Tensor:
        return ((values - values[train].mean(0)) / values[train].std(0)).float()

    input, target = standardized(input), standardized(target)[:, None] if target.is_floating_point() else target
    train, test = (Samples(input[part].to(device), target[part].to(device)) for part in (train, test))
    return train, test


def waves(count: int, seed: int, device: torch.device, length: int = 64) -> Samples:
    """``(count, 1, length)`` noisy signals; the target is the shape of the wave."""
    generator = torch.Generator().manual_seed(seed)
    pitch, phase = torch.rand((2, count, 1), generator=generator)
    phase = phase + (2 + 4 * pitch) * torch.linspace(0, 1, length)
    shapes = torch.stack(
        [torch.sin(2 * math.pi * phase) * 2**0.5, phase.frac().sub(0.5).sign(), (phase.frac() - 0.5) * 12**0.5]
    )
    target = torch.randint(len(shapes), (count,), generator=generator)
    signal = shapes[target, torch.arange(count)] + 0.5 * torch.randn((count, length), generator=generator)
    return Samples(signal[:, None].to(device), target.to(device))


def mlp(columns: int, outputs: int) -> nn.Module:
    """Many more weights than rows."""
    return nn.Sequential(nn.Linear(columns, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs))


def convolution() -> nn.Module:
    """Two convolutions over time, and pooling."""
    layers = nn.Conv1d(1, 32, 9, stride=2), nn.ReLU(), nn.Conv1d(32, 64, 9, stride=2), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(256, 3))


def accuracy(model: nn.Module, test: Samples) -> float:
    """Share of the test samples classified correctly."""
    return evaluate(model, test).accuracy


@torch.no_grad()
def rmse(model: nn.Module, test: Samples) -> float:
    """Root of the mean squared error, in standard deviations of the target."""
    return nn.functional.mse_loss(model.eval()(test.input), test.target).sqrt().item()


def main() -> None:
    """Train every pair of runs, then print the results."""
    args = example_parser(__doc__, alpha=1.0, epochs=40, batch_size=50).parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    diabetes = rows(*map(torch.tensor, load_diabetes(return_X_y=True)), args.device)
    cancer = rows(*map(torch.tensor, load_breast_cancer(return_X_y=True)), args.device)
    sounds = waves(300, 0, args.device), waves(2000, 1, args.device)
    problems = {
        "diabetes": Problem(*diabetes, lambda: mlp(10, 1), nn.MSELoss(), rmse),
        "breast cancer": Problem(*cancer, lambda: mlp(30, 2), nn.CrossEntropyLoss(), accuracy),
        "waves": Problem(*sounds, convolution, nn.CrossEntropyLoss(), accuracy),
    }
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}
    results = {name: ([], []) for name in problems}
    for (name, problem), seed, mixed in tqdm(list(product(problems.items(), range(args.seeds), (0, 1))), unit="run"):
        train, test, network, loss, score = problem
        torch.manual_seed(seed)
        mixup = MixUp(args.alpha if mixed else 0)
        model = nn.Sequential(mixup, network()).to(args.device)
        criterion = MixUpCriterion(loss, mixup)
        fit(model, criterion, train, lr=2e-3, seed=seed, **options)
        results[name][mixed].append(score(model, test))

    lines = []
    for name, pair in results.items():
        score = problems[name].score
        words = verdict(*pair, higher_is_better=score is accuracy)
        lines.append([name, score.__name__, *map(mean_and_spread, pair), words])
    print("\nTest scores after the last epoch, mean ± standard deviation over the seeds; a difference counts if it")
    print("exceeds the sum of the two standard deviations:\n")
    print(table(["", "score", "without MixUp", "with MixUp", "in words"], lines))


if __name__ == "__main__":
    main()
