"""MixUp and CutMix as the papers write them, a sample or pixel at a time, in loops, with nothing of the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixup_nn import Mix

Position = tuple[int, ...]


def positions(sizes: Position | torch.Size) -> Iterator[Position]:
    """Every index into dimensions of these sizes."""
    return itertools.product(*map(range, sizes))


def weight_at(mix: Mix, i: int, position: Position) -> Tensor:
    """The weight of sample ``i`` at a position."""
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


def mixed(input: Tensor, mix: Mix, *, of_positions: bool = True) -> Tensor:
    """The mixed batch, in float64; targets of samples are not ``of_positions``."""
    output = torch.empty(input.shape, dtype=torch.float64)
    for i, j, whole in pairs(mix):
        for position in positions(input.shape[1:]):
            lam = weight_at(mix, i, position) if of_positions else whole
            output[(i, *position)] = lam * input[i][position].double() + (1 - lam) * input[j][position].double()
    return output


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B, *)`` as float64 probabilities ``(B, C, *)``, one position at a time."""
    dense = torch.zeros(target.shape[0], num_classes, *target.shape[1:], dtype=torch.float64)
    for i, *position in positions(target.shape):
        entry: Position = (i, int(target[(i, *position)]), *position)
        dense[entry] = 1
    return dense


def interpolated_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    mix: Mix,
    reduction: str,
    *,
    of_positions: bool = False,
) -> Tensor:
    """Weigh the unreduced losses of each sample alone, then reduce over all their elements."""
    losses = []
    for i, j, whole in pairs(mix):
        own, partner = (loss(input[i : i + 1], target[k : k + 1])[0] for k in (i, j))
        weights = [weight_at(mix, i, place) if of_positions else whole for place in positions(own.shape)]
        lam = torch.stack(weights).reshape(own.shape)
        losses.append(lam * own + (1 - lam) * partner)
    return reduce(torch.stack(losses), reduction)


def interpolated_targets_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    mix: Mix,
    reduction: str,
    *,
    of_positions: bool = False,
) -> Tensor:
    """Mix the targets of each sample, then reduce the losses of the samples over all their elements."""
    target = mixed(target, mix, of_positions=of_positions)
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

    def class_weight(label: int) -> float:
        return 0.0 if label == ignore_index else float(w[label])

    terms, weights = [], []
    for i, j, whole in pairs(mix):
        for position in positions(target.shape[1:]):
            lam = weight_at(mix, i, position) if position else whole
            logits = input[i].movedim(0, -1)[position].double()
            own, partner = int(target[i][position]), int(target[j][position])
            terms.append(lam * term(logits, own) + (1 - lam) * term(logits, partner))
            weights.append(lam * class_weight(own) + (1 - lam) * class_weight(partner))
    if reduction == "mean":
        return torch.stack(terms).sum() / torch.stack(weights).sum()
    return reduce(torch.stack(terms).reshape(target.shape), reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return {
        "none": losses,
        "mean": losses.sum() / losses.numel(),
        "sum": losses.sum(),
        "batchmean": losses.sum() / len(losses),
    }[reduction]


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
