"""MixUp as the paper writes it: one sample at a time, in Python loops, with nothing of the library's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixup_nn import Mix


def pairs(mix: Mix) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (sample, partner, weight of the sample)."""
    for i, partner in enumerate(mix.index.tolist()):
        yield i, partner, (mix.lam if mix.lam.ndim == 0 else mix.lam[i]).double()


def mixed(input: Tensor, mix: Mix) -> Tensor:
    """The mixed batch, in float64."""
    rows = [lam * input[i].double() + (1 - lam) * input[j].double() for i, j, lam in pairs(mix)]
    return torch.stack(rows) if rows else input.double()


def positions(target: Tensor) -> Iterator[tuple[int, ...]]:
    """Every index into the dimensions behind the batch."""
    return itertools.product(*map(range, target.shape[1:]))


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B, *)`` as float64 probabilities ``(B, C, *)``, one position at a time."""
    dense = torch.zeros(target.shape[0], num_classes, *target.shape[1:], dtype=torch.float64)
    for i in range(len(target)):
        for position in positions(target):
            entry: tuple[int, ...] = (i, int(target[i][position]), *position)
            dense[entry] = 1
    return dense


def interpolated_loss(
    loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor, mix: Mix, reduction: str
) -> Tensor:
    """Weigh the unreduced losses of each sample alone, then reduce over all their elements."""
    losses = [
        lam * loss(input[i : i + 1], target[i : i + 1]) + (1 - lam) * loss(input[i : i + 1], target[j : j + 1])
        for i, j, lam in pairs(mix)
    ]
    return reduce(torch.cat(losses), reduction)


def interpolated_targets_loss(
    loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor, mix: Mix, reduction: str
) -> Tensor:
    """Mix the targets of each sample, then reduce the losses of the samples over all their elements."""
    target = mixed(target, mix)
    return reduce(torch.cat([loss(input[i : i + 1], target[i : i + 1]) for i in range(len(input))]), reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    mix: Mix,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The weighted mean of the design: sum of both weighted terms over the sum of both weights."""
    num_classes = input.shape[1]
    w = torch.ones(num_classes, dtype=torch.float64) if weight is None else weight.double()

    def term(logits: Tensor, label: int) -> Tensor:
        if label == ignore_index:
            return logits.sum() * 0
        nll = [w[c] * (logits.exp().sum().log() - logits[c]) for c in range(num_classes)]
        smooth = torch.stack(nll).sum() / num_classes
        return (1 - label_smoothing) * nll[label] + label_smoothing * smooth

    def mass(label: int) -> float:
        return 0.0 if label == ignore_index else float(w[label])

    terms, masses = [], []
    for i, j, lam in pairs(mix):
        for position in positions(target):
            logits = input[i].movedim(0, -1)[position].double()
            own, partner = int(target[i][position]), int(target[j][position])
            terms.append(lam * term(logits, own) + (1 - lam) * term(logits, partner))
            masses.append(lam * mass(own) + (1 - lam) * mass(partner))
    if reduction == "mean":
        return torch.stack(terms).sum() / torch.stack(masses).sum()
    return reduce(torch.stack(terms).reshape(target.shape), reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return {
        "none": losses,
        "mean": losses.sum() / losses.numel(),
        "sum": losses.sum(),
        "batchmean": losses.sum() / len(losses),
    }[reduction]
