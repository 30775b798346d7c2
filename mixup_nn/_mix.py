"""A :class:`Mix`, and the two doors where one meets a tensor: one for inputs, one for targets."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    r"""One draw: which sample each one is mixed with, and how much of it stays.

    .. math::
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}

    A ``Mix`` is plain data: make one by hand, keep it, save it (``torch.load`` takes it as it is), apply it to as many
    tensors as you like. Its values are not validated, because reading them would stall a GPU and break a compiled
    graph.

    Attributes:
        lam: weight of the *original* sample, a floating tensor in [0, 1]. Shape ``()`` is one weight per batch,
            ``(B,)`` one per sample, and ``(1, 1, *spatial)`` or ``(B, 1, *spatial)`` one per position, where 1 keeps
            the original and 0 takes the partner. A spatial size of 1 broadcasts, as of one box for all frames.
        index: partner of each sample, int64 of shape ``(B,)``, values in ``range(B)``. The library draws permutations;
            in a ``Mix`` of your own partners may repeat.

    A ``lam`` per position mixes inputs ``(B, C, *spatial)``. Per-position targets, ``(B, *spatial)`` or
    ``(B, C, *spatial)``, take it as it is; per-sample targets, ``(B,)`` or ``(B, K)``, take its :attr:`share`. With one
    spatial dimension class indices ``(B, T)`` are per position, and floating ``(B, K)`` are per sample. A target of any
    other shape raises a ValueError. To say that a target is per sample, give it ``mix._replace(lam=mix.share)``.

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

    @property
    def share(self) -> Tensor:
        """The weight of the original in each sample, ``()`` or ``(B,)``: ``lam``, or its mean over the positions."""
        return share_of(self.lam)


torch.serialization.add_safe_globals([Mix])  # or torch.load refuses a saved draw

BATCH_FIRST = "keep the batch as first dimension, as in (B, C, T), neither flattened with another nor second"
NO_MIX = "draw one by sampling.sample_mixup; last_mix is None before the first training batch and in eval mode"
TENSOR_AS_MIX = "targets go to MixUpCriterion or mixup_batch; a loss of three tensors is wrapped in a function of two"
OTHER_POSITIONS = "mix._replace(lam=mix.share), or a resized lam: mix._replace(lam=interpolate(mix.lam, size))"


def share_of(lam: Tensor) -> Tensor:
    """``lam`` per batch or per sample; the mean of one per position."""
    if lam.ndim < 2:
        return lam
    return lam.mean() if lam.shape[0] == 1 else lam.flatten(1).mean(1)


def input_mix(input: Tensor, mix: Mix) -> Mix:
    """The door of inputs: ``mix`` on their device, with a ``lam`` that broadcasts along them."""
    lam, index = _checked("input", input, mix)
    if not input.is_floating_point():
        fix = "mix token ids after their embedding, convert other numbers by input.float()"
        fix = "use torch.view_as_real(input)" if input.is_complex() else fix
        fix = "scale images first: input.float() / 255" if input.dtype == torch.uint8 else fix
        raise TypeError(f"expected a floating-point input, got {input.dtype}; {fix}")
    if lam.ndim > 1 and not spans(lam.shape[2:], input.shape[2:]):
        raise ValueError(
            f"expected input of shape (B, C, *spatial) with the positions of mix.lam, {tuple(lam.shape[2:])}, got "
            f"{tuple(input.shape)}; mix a tensor of other positions, or of none, by its share: {OTHER_POSITIONS}"
        )
    return Mix(align(lam, input), index)


def target_mix(target: Tensor, mix: Mix) -> Mix:
    """The door of targets: ``mix`` on their device, with its ``lam`` or, for per-sample targets, its share."""
    lam, index = _checked("target", target, mix)
    if lam.ndim > 1 and not _is_per_position(target, lam.shape[2:]):
        lam = share_of(lam)  # not mix.share, which Dynamo of torch 2.8 does not trace
    return Mix(lam, index)


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a dense tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        several = name == "target" and type(value) in (dict, list, tuple)
        fix = "; use a criterion per head, or sample numbers as the target: docs/recipes.md" if several else ""
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}{fix}")
    sharded = type(value) is not Tensor and hasattr(value, "device_mesh")  # a DTensor, whose import would be slow
    if sharded or value.is_nested or value.layout is not torch.strided:
        got = "DTensor" if sharded else "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
        fix = "use its to_dense(), to_padded_tensor(0) or to_local()"
        raise TypeError(f"expected {name} to be a dense strided tensor, got a {got}; {fix}")
    if value.ndim == 0:
        raise ValueError(f"expected {name} to have a batch dimension, got shape (); for one sample {name}.unsqueeze(0)")


def align(lam: Tensor, value: Tensor) -> Tensor:
    """``lam``, which spans ``value``, with the dimensions of size 1 that broadcast it."""
    if lam.ndim < 2:
        return append_dims(lam, value.ndim)
    if value.ndim < lam.ndim:
        return lam.squeeze(1)
    return lam if value.ndim == lam.ndim else lam.view(lam.shape[:2] + (1,) * (value.ndim - lam.ndim) + lam.shape[2:])


def append_dims(value: Tensor, ndim: int) -> Tensor:
    """A scalar as it is, a vector of shape ``(n, 1, 1, ...)`` with ``ndim`` dimensions."""
    return value if value.ndim == 0 else value.view(value.shape + (1,) * (ndim - 1))


def spans(spatial: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a map of ``spatial`` sizes broadcasts along ``sizes`` without enlarging them."""
    return len(spatial) == len(sizes) and all(a == 1 or a == b for a, b in zip(spatial, sizes, strict=True))


def _is_per_position(target: Tensor, spatial: Sequence[int]) -> bool:
    """Whether a target takes the map of ``lam`` and not its share; raise where both could be meant."""
    sizes, floating = target.shape[1:], target.is_floating_point()
    if spans(spatial, sizes[1:]) or (spans(spatial, sizes) and not (len(sizes) == 1 and floating)):
        return True
    fix = "pass the share"
    if len(sizes) < 2:
        of_frames = len(spatial) == 3 and sizes == spatial[:1] != (1,)
        if floating or len(sizes) == 0 or (not of_frames and sum(size > 1 for size in spatial) != 1):
            return False
        one_label = "mix.lam.mean((3, 4))" if of_frames else "mix.lam.flatten(2)"
        fix = (
            f"labels along a dimension take mix._replace(lam={one_label}), multi-hot ones are floats, others the share"
        )
    raise ValueError(
        f"expected a target per sample, (B,) or floating (B, K), or per position of mix.lam, {tuple(spatial)}, got "
        f"{target.dtype} of shape {tuple(target.shape)}; {fix}: {OTHER_POSITIONS}"
    )


def _checked(name: str, value: Tensor, mix: Mix) -> Mix:
    """``mix``, consistent in itself, of the batch size of ``value`` and on its device."""
    check_tensor(name, value)
    if not isinstance(mix, Mix):
        fix = TENSOR_AS_MIX if isinstance(mix, Tensor) else NO_MIX
        raise TypeError(f"expected mix to be a Mix, got {type(mix).__name__}; {fix}")
    _check_mix(mix)
    lam, index = mix
    if value.shape[0] != index.shape[0]:
        got = f"expected {name} to have the batch size of the mix, {index.shape[0]}, got {value.shape[0]}"
        raise ValueError(f"{got}; a mix fits the batch that it was drawn for; {BATCH_FIRST}")
    same_device = lam.device == value.device == index.device
    return mix if same_device else Mix(lam.to(value.device), index.to(value.device))


def _check_mix(mix: Mix) -> None:
    lam, index = mix
    tensors = isinstance(lam, Tensor) and isinstance(index, Tensor)
    if not tensors or not lam.is_floating_point() or index.dtype != torch.int64:
        got = " and ".join(str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in mix)
        fix = "as in Mix(torch.tensor(0.7), torch.tensor([1, 0]))"
        raise TypeError(f"expected mix.lam to be a floating tensor and mix.index an int64 one, got {got}; {fix}")
    is_map = lam.ndim > 2 and lam.shape[1] == 1 and lam.shape[0] in (1, *index.shape)
    if index.ndim != 1 or not (lam.ndim == 0 or lam.shape == index.shape or is_map):
        got = f"{tuple(index.shape)} and {tuple(lam.shape)}"
        raise ValueError(f"expected mix.index of shape (B,), mix.lam of (), (B,) or (1 or B, 1, *spatial), got {got}")
