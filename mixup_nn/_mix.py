"""A :class:`Mix`, and the two doors where one meets a tensor: one for inputs, one for targets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import is_namedtuple_instance, tree_map  # torch.utils has no public one


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

    A ``lam`` per position mixes inputs ``(B, C, *spatial)``. Targets per position, ``(B, C, *spatial)`` or
    ``(B, *spatial)`` (with one spatial dimension only integers), take it as it is. Targets per sample, ``(B,)`` or
    floating ``(B, K)``, take its :attr:`share`; so values per frame are ``(B, 1, T)``, not ``(B, T)``. A target of any
    other shape raises a ValueError; to say that it is per sample, give it ``mix._replace(lam=mix.share)``.

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
        """The weight of the original in each sample, ``()`` or ``(B,)``. ``lam``, or its mean over positions."""
        return share_of(self.lam)


torch.serialization.add_safe_globals([Mix])  # or torch.load refuses a saved draw


def share_of(lam: Tensor) -> Tensor:
    """``lam`` per batch or per sample; the mean of one per position."""
    if lam.ndim < 2:
        return lam
    return lam.mean() if lam.shape[0] == 1 else lam.flatten(1).mean(1)


def input_mix(input: Tensor, mix: Mix) -> Mix:
    """The door of inputs: ``mix``, which fits them, on their device."""
    lam, index = _checked("input", input, mix, "Guide, Where")
    if not input.is_floating_point():
        raise TypeError(f"expected a floating-point input, got {input.dtype}; see docs: Guide, Where")
    if lam.ndim > 1 and not spans(lam.shape[2:], input.shape[2:]):
        expected = f"input of shape (B, C, *spatial) with the positions of mix.lam, {tuple(lam.shape[2:])}"
        raise ValueError(f"expected {expected}, got {tuple(input.shape)}; see docs: Criterion, Targets")
    return Mix(lam, index)


def target_mix(target: Tensor, mix: Mix) -> Mix:
    """The door of targets: ``mix`` on their device, with its ``lam`` or, for targets per sample, its share."""
    lam, index = _checked("target", target, mix, "Criterion, Targets in parts")
    if lam.ndim > 1 and not _is_per_position(target, lam.shape[2:]):
        lam = share_of(lam)  # not mix.share, which Dynamo of torch 2.8 does not trace
    return Mix(lam, index)


def with_partners(target: Any, mix: Mix) -> tuple[Mix, tuple[Any, Any]]:
    """``mix`` for a target, whole or in parts, and the target of the samples and of their partners."""
    if not is_in_parts(target):
        mix = target_mix(target, mix)
        return mix, (target, target.index_select(0, mix.index))
    partners = tree_map(lambda part: _partners_of_part(part, mix), target, is_leaf=lambda node: not is_in_parts(node))
    return Mix(share_of(mix.lam), mix.index), (target, partners)


def is_in_parts(target: object) -> bool:
    """Whether a target names its parts. Lists and plain tuples do not: they may hold an entry for each sample."""
    return isinstance(target, dict) or is_namedtuple_instance(target)


def align(lam: Tensor, value: Tensor) -> Tensor:
    """``lam``, which spans ``value``, in its dtype and with the dimensions of size 1 that broadcast it."""
    lam = as_dtype(lam, value.dtype)
    if lam.ndim < 2:
        return append_dims(lam, value.ndim)
    if value.ndim < lam.ndim:
        return lam.squeeze(1)
    return lam if value.ndim == lam.ndim else lam.view(lam.shape[:2] + (1,) * (value.ndim - lam.ndim) + lam.shape[2:])


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``. A conversion that changes nothing would take as long as an operation."""
    return value if value.dtype == dtype else value.to(dtype)


def append_dims(value: Tensor, ndim: int) -> Tensor:
    """A scalar as it is, a vector of shape ``(n, 1, 1, ...)`` with ``ndim`` dimensions."""
    return value if value.ndim == 0 else value.view(value.shape + (1,) * (ndim - 1))


def spans(spatial: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a map of ``spatial`` sizes broadcasts along ``sizes`` without enlarging them."""
    return len(spatial) == len(sizes) and all(a == 1 or a == b for a, b in zip(spatial, sizes, strict=True))


def is_class_indices(target: object) -> bool:
    """Whether a target is a tensor of class indices and not of values."""
    return isinstance(target, Tensor) and not target.is_floating_point()


def kind_of(value: object) -> str:
    """What an error calls ``value``: its class, or that it is one."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _is_per_position(target: Tensor, spatial: Sequence[int]) -> bool:
    """Whether a target takes the map of ``lam`` and not its share."""
    sizes, floating = target.shape[1:], target.is_floating_point()
    if spans(spatial, sizes[1:]) or (spans(spatial, sizes) and not (floating and len(sizes) == 1)):
        return True
    if len(sizes) > 1 or (len(sizes) == 1 and not floating):
        expected = f"a target (B,) or floating (B, K), or of the positions of mix.lam, {tuple(spatial)}"
        raise ValueError(f"expected {expected}, got {target.dtype} {tuple(target.shape)}; see docs: Criterion, Targets")
    return False


def _partners_of_part(part: Tensor, mix: Mix) -> Tensor:
    lam, index = target_mix(part, mix)
    if lam.ndim > 1:
        got = f"{part.dtype} {tuple(part.shape)} under a lam per position"
        raise ValueError(f"expected each part of a target per sample, got {got}; see docs: Criterion, Targets in parts")
    return part.index_select(0, index)


def _checked(name: str, value: Tensor, mix: Mix, page: str) -> Mix:
    """``mix``, consistent in itself, of the batch size of ``value`` and on its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {kind_of(value)}; see docs: {page}")
    if not isinstance(mix, Mix):
        page = "Criterion, Which mix is used" if mix is None else "Programs, Losses of more than two arguments"
        raise TypeError(f"expected mix to be a Mix, got {kind_of(mix)}; see docs: {page}")
    lam, index = mix
    _check_parts(lam, index)
    if value.ndim == 0 or value.shape[0] != index.shape[0]:
        expected = f"{name} to have the batch size of the mix first, {index.shape[0]}"
        raise ValueError(f"expected {expected}, got shape {tuple(value.shape)}; see docs: Programs, Another batch size")
    return mix if lam.device == value.device == index.device else Mix(lam.to(value.device), index.to(value.device))


def _check_parts(lam: Any, index: Any) -> None:
    """Raise unless both are tensors of the dtypes and shapes of a :class:`Mix`."""
    tensors = isinstance(lam, Tensor) and isinstance(index, Tensor)
    kinds = tensors and lam.is_floating_point() and index.dtype == torch.int64
    if kinds and index.ndim == 1 and is_lam(lam, index.shape[0]):
        return
    got = [f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else kind_of(part) for part in (lam, index)]
    expected = "mix.lam floating, (), (B,) or (1 or B, 1, *spatial), and mix.index int64, (B,)"
    raise (ValueError if kinds else TypeError)(f"expected {expected}, got {got[0]} and {got[1]}")


def is_lam(lam: object, batch_size: int) -> bool:
    """Whether ``lam`` is a weight per batch, per sample or per position."""
    if not isinstance(lam, Tensor) or not lam.is_floating_point():
        return False
    if lam.ndim < 2:
        return lam.ndim == 0 or lam.shape[0] == batch_size
    return lam.ndim > 2 and lam.shape[1] == 1 and lam.shape[0] in (1, batch_size)
