"""The contract of DESIGN in loops over samples and positions, in float64: nothing of the library but `Mix`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixup_nn import Mix

Position = tuple[int, ...]
Loss = Callable[[Tensor, Tensor], Tensor]


def positions(sizes: Position | torch.Size) -> Iterator[Position]:
    """Every index into dimensions of these sizes."""
    return itertools.product(*map(range, sizes))


# Weights


def weight_at(mix: Mix, i: int, position: Position) -> Tensor:
    """The weight of sample ``i`` at a position, whose last numbers are those of the map."""
    if mix.lam.ndim == 0:
        return mix.lam.double()
    own = mix.lam[i if len(mix.lam) > 1 else 0].double()
    if mix.lam.ndim == 1:
        return own
    place = zip(position[len(position) - (own.ndim - 1) :], own.shape[1:], strict=True)
    return own[0][tuple(where if size > 1 else 0 for where, size in place)]


def share(mix: Mix, i: int) -> Tensor:
    """The weight of the whole of sample ``i``: the mean over its positions."""
    everywhere = [weight_at(mix, i, position) for position in positions(mix.lam.shape[2:])]
    return torch.stack(everywhere).sum() / len(everywhere)


def pairs(mix: Mix) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (sample, partner, weight of the whole sample)."""
    for i, partner in enumerate(mix.index.tolist()):
        yield i, partner, share(mix, i)


def takes_lam(target: Tensor, mix: Mix) -> bool:
    """The whole rule of targets: by ``lam`` at each position, or by its share; anything else is a ValueError."""
    floating, map_sizes = target.is_floating_point(), mix.lam.shape[2:]
    if mix.lam.ndim < 2:
        return False
    for sizes in (target.shape[2:], target.shape[1:]):
        fits = len(sizes) == len(map_sizes) and all(m in (1, size) for m, size in zip(map_sizes, sizes, strict=True))
        of_sample = floating and target.ndim == 2
        if fits and not of_sample:
            return True
    if target.ndim == 1 or (target.ndim == 2 and floating):
        return False
    raise ValueError("a target neither per position nor per sample")


# Inputs and targets


def mixed(input: Tensor, mix: Mix, *, of_positions: bool = True) -> Tensor:
    """The mixed batch, in float64; targets of samples are not ``of_positions``."""
    values = []
    for i, j, whole in pairs(mix):
        for position in positions(input.shape[1:]):
            lam = weight_at(mix, i, position) if of_positions else whole
            values.append(lam * input[i][position].double() + (1 - lam) * input[j][position].double())
    return torch.stack(values).reshape(input.shape) if values else input.double()


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B, *)`` as float64 probabilities ``(B, C, *)``; a negative index is a row of zeros."""
    dense = torch.zeros(target.shape[0], num_classes, *target.shape[1:], dtype=torch.float64)
    for i, *position in positions(target.shape):
        label = int(target[(i, *position)])
        if label >= 0:
            dense[(i, label, *position)] = 1
    return dense


def mix_targets(target: Tensor, mix: Mix, num_classes: int | None = None) -> Tensor:
    """Dense targets by the rule; class indices become dense first."""
    of_positions = takes_lam(target, mix) or mix.lam.ndim < 2
    dense = target if target.is_floating_point() else one_hot(target, num_classes or 0)
    return mixed(dense, mix, of_positions=of_positions)


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

    def class_weight(self, label: int) -> float:
        """What a label adds to the denominator of the mean."""
        if label == self.ignore_index:
            return 0.0
        return 1.0 if self.weight is None else float(self.weight[label])

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        losses, denominator, num_classes = [], 0.0, input.shape[1]
        dense = target.is_floating_point()
        for i, *place in positions(input.shape[:1] + input.shape[2:]):
            logits = input[i].movedim(0, -1)[tuple(place)].double()
            log_probs = logits if self.normalised else logits - logits.logsumexp(0)
            label = 0 if dense else int(target[(i, *place)])
            if not dense and label == self.ignore_index:
                losses.append(logits[:0].sum())
                continue
            shares = [target[i].movedim(0, -1)[(*place, c)] if dense else float(c == label) for c in range(num_classes)]
            loss = logits[:0].sum()
            for c in range(num_classes):
                smoothed = (1 - self.label_smoothing) * shares[c] + self.label_smoothing / num_classes
                loss = loss - smoothed * (1.0 if self.weight is None else self.weight[c].double()) * log_probs[c]
            losses.append(loss)
            denominator += 1.0 if dense else self.class_weight(label)
        stacked = torch.stack(losses).reshape(input.shape[:1] + input.shape[2:])
        if self.reduction == "mean":
            return stacked.sum() / denominator if denominator else stacked.sum() * torch.nan
        return reduce(stacked, self.reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return {
        "none": losses,
        "mean": losses.sum() / losses.numel() if losses.numel() else losses.sum() * torch.nan,
        "sum": losses.sum(),
        "batchmean": losses.sum() / len(losses) if len(losses) else losses.sum(),
    }[reduction]


def unreduced(loss: Any) -> Loss:
    """The loss that returns every element, in float64."""
    copied = copy.deepcopy(loss)
    copied.reduction = "none"
    unreduced: Loss = copied.double() if isinstance(copied, nn.Module) else copied
    return unreduced


def mix_loss(loss: Any, input: Tensor, target: Tensor, mix: Mix) -> Tensor:
    """Both losses of each sample alone, weighed and reduced as the loss says; in class weights if it has them."""
    of_positions = takes_lam(target, mix)
    if mix.lam.ndim == 0:
        lam = mix.lam.double()
        value: Tensor = lam * loss(input, target) + (1 - lam) * loss(input, target[mix.index])
        return value
    each, losses, weights = unreduced(loss), [], []
    class_weight = getattr(loss, "class_weight", None) if not target.is_floating_point() else None
    for i, j, whole in pairs(mix):
        own, partner = (each(input[i : i + 1], target[k : k + 1])[0] for k in (i, j))
        for place in positions(own.shape):
            lam = weight_at(mix, i, place) if of_positions else whole
            losses.append(lam * own[place] + (1 - lam) * partner[place])
            if class_weight is not None:
                of_own, of_partner = (class_weight(int(target[k][place])) for k in (i, j))
                weights.append(lam * of_own + (1 - lam) * of_partner)
    if loss.reduction == "mean" and weights:
        return torch.stack(losses).sum() / torch.stack(weights).sum()
    return reduce(torch.stack(losses).reshape(len(input), *own.shape), loss.reduction)


def criterion(
    loss: Any, input: Tensor, target: Tensor, mix: Mix | None, interpolate_loss: bool | None,
    *, hard: bool = False, cross_entropy: bool = False,
) -> Tensor:  # fmt: skip
    """The criterion as a whole; ``hard`` losses keep targets apart, ``cross_entropy`` is linear in class indices."""
    floating, plain = target.is_floating_point(), cast(Loss, loss)
    if interpolate_loss is False and not floating and not cross_entropy:
        num_classes = input.shape[1]
        return plain(input, one_hot(target, num_classes) if mix is None else mix_targets(target, mix, num_classes))
    if mix is None:
        return plain(input, target)
    if interpolate_loss is None:
        interpolate_loss = hard or not floating
    if interpolate_loss or not floating:
        return mix_loss(loss, input, target, mix)
    return plain(input, mix_targets(target, mix))


def cross_entropy(input: Tensor, target: Tensor, mix: Mix, **options: Any) -> Tensor:
    """The weighted mean of the design: sum of both weighted terms over the sum of both weights."""
    return mix_loss(CrossEntropy(**options), input.double(), target, mix)


# Boxes


def cutmix_mask(sizes: Position, share: float, center: tuple[float, ...]) -> Tensor:
    """The mask of the paper, pixel by pixel: 0 where the middle of the pixel is in the clipped box, else 1."""
    mask = torch.ones(sizes)
    for pixel in positions(sizes):
        inside = True
        for size, place, middle in zip(sizes, pixel, center, strict=True):
            side = size * (1 - share) ** (1 / len(sizes))
            low, high = max(middle * size - side / 2, 0), min(middle * size + side / 2, size)
            inside = inside and low < place + 0.5 < high
        if inside:
            mask[pixel] = 0
    return mask


def torchvision_share(height: int, width: int, lam: float, center: tuple[int, int]) -> float:
    """The share of the original after clipping, as torchvision's v2.CutMix computes it."""
    ratio = 0.5 * (1 - lam) ** 0.5
    half_width, half_height = int(ratio * width), int(ratio * height)
    x, y = center
    x1, y1 = max(x - half_width, 0), max(y - half_height, 0)
    x2, y2 = min(x + half_width, width), min(y + half_height, height)
    return 1 - (x2 - x1) * (y2 - y1) / (width * height)


def timm_share(height: int, width: int, lam: float, center: tuple[int, int]) -> float:
    """The share of the original after clipping, as timm's rand_bbox with correct_lam computes it."""
    ratio = (1 - lam) ** 0.5
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    x, y = center
    y1, y2 = max(y - cut_height // 2, 0), min(y + cut_height // 2, height)
    x1, x2 = max(x - cut_width // 2, 0), min(x + cut_width // 2, width)
    return 1 - (y2 - y1) * (x2 - x1) / (height * width)
