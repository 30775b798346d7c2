"""A :class:`Mix`: the pair, its checks, and how its ``lam`` meets a tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    r"""One draw: who each sample is mixed with, and how much of it stays.

    .. math::
        \tilde x = \lambda x + (1 - \lambda)\, x_{\text{index}}

    A ``Mix`` is plain data: build one by hand, keep it, apply it to as many tensors as you like. Its values are not
    validated, because reading them would stall a GPU and break a compiled graph.

    Attributes:
        lam: weight of the *original* sample, a floating tensor in [0, 1]. Shape ``()`` is one weight per batch,
            ``(B,)`` one per sample, and ``(1, 1, *spatial)`` or ``(B, 1, *spatial)`` one per position, where 1 keeps
            the original and 0 takes the partner.
        index: partner of each sample, an int64 permutation of ``range(B)``, shape ``(B,)``.

    A ``lam`` per position mixes inputs ``(B, C, *spatial)``. Targets of a position, ``(B, *spatial)`` or
    ``(B, C, *spatial)``, take it as it is; targets of a sample, ``(B,)`` or ``(B, K)``, take its mean over the
    positions, the share of the original. With one spatial dimension class indices ``(B, T)`` are of positions, and
    floating ``(B, K)`` are of samples. A target of any other shape raises a ValueError.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_inputs
        >>> mix = Mix(lam=torch.tensor(0.75), index=torch.tensor([1, 2, 0]))
        >>> mix_inputs(torch.tensor([0.0, 4.0, 8.0]), mix)
        tensor([1., 5., 6.])
    """

    lam: Tensor
    index: Tensor  # type: ignore[assignment]  # takes the name of tuple.index, which no draw needs


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a dense tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    sharded = type(value) is not Tensor and hasattr(value, "device_mesh")
    if sharded or value.is_nested or value.layout is not torch.strided:
        got = "DTensor" if sharded else "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
        raise TypeError(
            f"expected {name} to be a dense strided tensor, got a {got}; use its to_dense(), to_padded_tensor(0) or "
            "to_local()"
        )
    if value.ndim == 0:
        raise ValueError(f"expected {name} to have a batch dimension, got shape (); for one sample {name}.unsqueeze(0)")


def checked(name: str, value: Tensor, mix: Mix) -> Mix:
    """Return ``mix``, on the device of ``value``; raise unless the two fit each other."""
    check_tensor(name, value)
    if not isinstance(mix, Mix):
        fix = "targets go to MixUpCriterion or functional.mixup_batch"
        if not isinstance(mix, Tensor):
            fix = "draw one with sampling.sample_mixup; last_mix is None before the mixer has mixed in training mode"
        raise TypeError(f"expected mix to be a Mix, got {type(mix).__name__}; {fix}")
    lam, index = mix
    tensors = isinstance(lam, Tensor) and isinstance(index, Tensor)
    if not tensors or not lam.is_floating_point() or index.dtype != torch.int64:
        got = " and ".join(str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in mix)
        raise TypeError(
            f"expected mix.lam to be a floating tensor and mix.index an int64 one, got {got}; as in "
            "Mix(torch.tensor(0.7), torch.tensor([1, 0]))"
        )
    per_position = lam.ndim > 2 and lam.shape[1] == 1 and (lam.shape[0] == 1 or lam.shape[0] == index.shape[0])
    if index.ndim != 1 or not (lam.ndim == 0 or lam.shape == index.shape or per_position):
        raise ValueError(
            "expected mix.index of shape (B,) and mix.lam of shape (), (B,) or (1 or B, 1, *spatial), got "
            f"{tuple(index.shape)} and {tuple(lam.shape)}"
        )
    if value.shape[0] != index.shape[0]:
        raise ValueError(
            f"expected {name} to have the batch size of the mix, {index.shape[0]}, got {value.shape[0]}; a mix fits "
            "the batch that it was drawn for, with the batch as first dimension"
        )
    same_device = lam.device == value.device == index.device
    return mix if same_device else Mix(lam.to(value.device), index.to(value.device))


def lam_of_target(lam: Tensor, target: Tensor) -> Tensor:
    """``lam`` itself for targets of positions; its mean, of shape () or (B,), for targets of samples."""
    if lam.ndim < 2:
        return lam
    spatial, sizes = lam.shape[2:], target.shape[1:]
    floating_vector = len(sizes) == 1 and target.is_floating_point()
    if sizes[1:] == spatial or (sizes == spatial and not floating_vector):
        return lam
    if len(sizes) == 0 or floating_vector or (len(sizes) == 1 and len(spatial) > 1):
        return lam.mean() if lam.shape[0] == 1 else lam.flatten(1).mean(1)
    raise ValueError(
        f"expected a target of samples, (B,) or (B, K), or of the positions of mix.lam, {tuple(spatial)}, got one of "
        f"shape {tuple(target.shape)}; resize the target or the lam to the same positions"
    )


def append_dims(value: Tensor, ndim: int) -> Tensor:
    """A scalar as it is, a vector of shape ``(n, 1, 1, ...)`` with ``ndim`` dimensions."""
    return value if value.ndim == 0 else value.view(value.shape + (1,) * (ndim - 1))


def align(lam: Tensor, value: Tensor) -> Tensor:
    """``lam`` with the dimensions of size 1 that broadcast it along ``value``."""
    if lam.ndim < 2:
        return append_dims(lam, value.ndim)
    if value.shape[2:] == lam.shape[2:]:
        return lam
    if value.shape[1:] == lam.shape[2:]:
        return lam.squeeze(1)
    raise ValueError(
        f"expected a tensor of the positions of mix.lam, {tuple(lam.shape[2:])}, got one of shape {tuple(value.shape)}"
    )
