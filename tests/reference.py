"""The contract of DESIGN, sample by sample in float64: nothing of the library but `Mix`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixup_nn import Mix

Position = tuple[int, ...]


def positions(sizes: Position | torch.Size) -> Iterator[Position]:
    """Every index into dimensions of these sizes."""
    return itertools.product(*map(range, sizes))


# Weights


def weight(mix: Mix, i: int) -> Tensor:
    """The weight of sample ``i``: a number, or one for each position, which align with the last dimensions."""
    if mix.lam.ndim == 0:
        return mix.lam.double()
    own = mix.lam[i if len(mix.lam) > 1 else 0].double()
    return own if own.ndim == 0 else own[0]


def share(mix: Mix, i: int) -> Tensor:
    """The weight of the whole of sample ``i``: the mean over its positions."""
    everywhere = [weight(mix, i)[position] for position in positions(mix.lam.shape[2:])]
    return torch.stack(everywhere).sum() / len(everywhere)


def pairs(mix: Mix) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (sample, partner, weight of the whole sample)."""
    for i, partner in enumerate(mix.index.tolist()):
        yield i, partner, share(mix, i)


def of_samples(mix: Mix) -> Mix:
    """The mix of whole samples: one weight for all if there is one map for all."""
    if mix.lam.ndim < 2:
        return mix
    shares = [share(mix, i) for i in range(len(mix.lam))]
    return Mix(shares[0] if len(shares) == 1 else torch.stack(shares), mix.index)


def of_target(target: Any, mix: Mix) -> Mix:
    """The whole rule of targets: by ``lam`` at each position, or by its share; anything else is a ValueError."""
    if not isinstance(target, Tensor):
        mixes = [of_target(part, mix) for part in parts_of(target)]
        if any(each.lam.ndim > 1 for each in mixes):
            raise ValueError("a part with positions, which has weights of its own")
        return mixes[0]
    if mix.lam.ndim < 2:
        return mix
    map_sizes, vector = mix.lam.shape[2:], target.is_floating_point() and target.ndim == 2
    for sizes in (target.shape[2:], target.shape[1:]):
        fits = len(sizes) == len(map_sizes) and all(m in (1, size) for m, size in zip(map_sizes, sizes, strict=True))
        if fits and not vector:
            return mix
    if target.ndim == 1 or vector:
        return of_samples(mix)
    raise ValueError("a target neither per position nor per sample")


# Parts


def each_part(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same parts, each of them changed."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: each_part(function, part) for name, part in value.items()}
    return type(value)(*(each_part(function, part) for part in value))  # a named tuple


def parts_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for each in (value.values() if isinstance(value, dict) else value) for part in parts_of(each)]


# Inputs and targets


def mixed(input: Tensor, mix: Mix, *, of_positions: bool = True) -> Tensor:
    """The mixed batch, in float64; targets of samples are not ``of_positions``."""
    mix, input, samples = mix if of_positions else of_samples(mix), input.double(), []
    for i, j in enumerate(mix.index.tolist()):
        lam = weight(mix, i)
        samples.append(lam * input[i] + (1 - lam) * input[j])
    return torch.stack(samples) if samples else input


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B, *)`` as float64 probabilities ``(B, C, *)``; a negative index is a row of zeros."""
    return torch.stack([target == c for c in range(num_classes)], 1).double()


def mix_targets(target: Tensor, mix: Mix, num_classes: int | None = None) -> Tensor:
    """Dense targets by the rule; class indices become dense first."""
    dense = target if target.is_floating_point() else one_hot(target, num_classes or 0)
    return mixed(dense, of_target(target, mix))


# Losses


class CrossEntropy:
    """Cross entropy of class indices and of dense targets by its formula, or NLL if its input is ``normalised``."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0, normalised: bool = False,
    ) -> None:  # fmt: skip
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.normalised = normalised

    def class_weights(self, labels: Tensor) -> Tensor:
        """What labels add to the denominator of the mean."""
        each = [0.0 if label == self.ignore_index else self.of_class(label) for label in labels.flatten().tolist()]
        return torch.tensor(each, dtype=torch.float64).reshape(labels.shape)

    def of_class(self, label: int) -> float:
        return 1.0 if self.weight is None else float(self.weight[label])

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        input, num_classes, dense = input.double(), input.shape[1], target.is_floating_point()
        kept = torch.ones_like(input[:, 0], dtype=torch.bool) if dense else target != self.ignore_index
        log_probs = input if self.normalised else input - input.logsumexp(1, keepdim=True)
        shares = target.double() if dense else one_hot(target, num_classes)
        shares = (1 - self.label_smoothing) * shares + self.label_smoothing / num_classes
        terms = [self.of_class(c) * shares[:, c] * log_probs[:, c] for c in range(num_classes)]
        losses = -torch.stack(terms).sum(0).where(kept, 0)
        if self.reduction != "mean":
            return reduce(losses, self.reduction)
        weights = kept.double() if dense else self.class_weights(target)
        return losses.sum() / weights.sum() if weights.sum() else losses.detach().sum() * torch.nan + 0 * losses.sum()


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return {
        "none": losses,
        "mean": losses.sum() / losses.numel() if losses.numel() else losses.sum() * torch.nan,
        "sum": losses.sum(),
        "batchmean": losses.sum() / len(losses) if len(losses) else losses.sum(),
    }[reduction]


def of_torch(loss: nn.Module) -> Any:
    """The oracle's own of a loss of torch that divides by class weights; else the same, in float64."""
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        options = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
        return CrossEntropy(**options, normalised=isinstance(loss, nn.NLLLoss))
    return copy.deepcopy(loss).double()


def one(value: Any, i: int) -> Any:
    """A batch of sample ``i`` alone."""
    return each_part(lambda part: part[i : i + 1], value)


def mix_loss(loss: Any, input: Any, target: Any, mix: Mix) -> Tensor:
    """Both losses of each sample alone, weighed and reduced as the loss says; in class weights if it has them."""
    mix = of_target(target, mix)
    if mix.lam.ndim == 0:
        lam, partners = mix.lam.double(), each_part(lambda part: part[mix.index], target)
        value: Tensor = lam * loss(input, target) + (1 - lam) * loss(input, partners)
        return value
    each, losses, weights, reduction = copy.deepcopy(loss), [], [], getattr(loss, "reduction", "none")
    each.reduction = "none"
    counts = isinstance(loss, CrossEntropy) and not target.is_floating_point()
    for i, j in enumerate(mix.index.tolist()):
        lam, at, own, partner = weight(mix, i), one(input, i), one(target, i), one(target, j)
        losses.append(lam * each(at, own)[0] + (1 - lam) * each(at, partner)[0])
        if counts:
            weights.append(lam * each.class_weights(own)[0] + (1 - lam) * each.class_weights(partner)[0])
    if reduction == "mean" and counts:
        return torch.stack(losses).sum() / torch.stack(weights).sum()
    return reduce(torch.stack(losses), reduction)


def criterion(
    loss: Any, input: Any, target: Any, mix: Mix | None, interpolate_loss: bool | None,
    *, hard: bool = False, cross_entropy: bool = False,
) -> Tensor:  # fmt: skip
    """The criterion as a whole; ``hard`` losses keep targets apart, ``cross_entropy`` is linear in class indices."""
    of_values = isinstance(target, Tensor) and target.is_floating_point()
    of_labels = isinstance(target, Tensor) and not of_values
    value: Tensor
    if interpolate_loss is False and of_labels and not cross_entropy:
        classes = input.shape[1]
        value = loss(input, one_hot(target, classes) if mix is None else mix_targets(target, mix, classes))
    elif mix is None:
        value = loss(input, target)
    elif not of_values or (hard if interpolate_loss is None else interpolate_loss):
        value = mix_loss(loss, input, target, mix)
    else:
        value = loss(input, mix_targets(target, mix))
    return value


def cross_entropy(input: Tensor, target: Tensor, mix: Mix, **options: Any) -> Tensor:
    """The weighted mean of the design: sum of both weighted terms over the sum of both weights."""
    return mix_loss(CrossEntropy(**options), input, target, mix)
