"""Draw a :class:`Mix`: the only file that touches random numbers."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mix", "sample_beta", "sample_mix"]


class Mix(NamedTuple):
    r"""One draw of MixUp: who each sample is mixed with, and how much of it stays.

    Sample :math:`i` of a mixed batch is :math:`\lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}`.
    A ``Mix`` is plain data: build one by hand, keep it, or apply it to as many tensors as you like.

    Attributes:
        lam: weight of the *original* sample, a floating tensor in [0, 1] (the library draws float32); shape
            ``()`` for one weight per batch or ``(B,)`` for one per sample.
        index: partner of each sample, an int64 permutation of ``range(B)``, shape ``(B,)``.

    The values are the caller's duty: reading them to check would stall the device and break a compiled graph.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mixup
        >>> mix = Mix(lam=torch.tensor(0.75), index=torch.tensor([1, 2, 0]))
        >>> mixup(torch.tensor([0.0, 4.0, 8.0]), mix)
        tensor([1., 5., 6.])
    """

    lam: Tensor
    index: Tensor  # type: ignore[assignment]  # takes the name of tuple.index, which no draw needs


def sample_beta(
    alpha: float,
    shape: tuple[int, ...] = (),
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw from the symmetric Beta distribution, :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`.

    Exact for every finite ``alpha > 0``, elementwise, without a rejection loop or a host synchronisation, so it
    fuses under ``torch.compile``. With uniform :math:`u \in (0, 1]` and :math:`v \in [0, 1)`,

    .. math::
        t = \sqrt{u^{-1/\alpha} - 1}\, \cos 2 \pi v, \qquad
        \lambda = \frac12 + \frac{t}{2 \sqrt{1 + t^2}} = \mathrm{sigmoid}(2\, \mathrm{asinh}\, t)

    Here :math:`\sqrt{2 \alpha}\, t` follows Student's t distribution with :math:`2 \alpha` degrees of freedom,
    which this map takes to the symmetric Beta.

    Args:
        alpha: the parameter of the distribution, a finite number > 0.
        shape: shape of the result.
        device: device of the result; torch's default device if not given.
        generator: source of randomness; eager mode only, as a ``torch.Generator`` cannot enter a compiled graph.

    Returns:
        float32 tensor of the given shape, values in [0, 1].

    Raises:
        TypeError: ``alpha`` is not a number.
        ValueError: ``alpha`` is not finite or not above 0.

    Example:
        >>> import torch
        >>> from mixup_nn.sampling import sample_beta
        >>> _ = torch.manual_seed(0)
        >>> lam = sample_beta(0.2, (1000,))
        >>> lam.shape, bool((lam >= 0).all() and (lam <= 1).all())
        (torch.Size([1000]), True)

    Reference:
        R. W. Bailey, *Polar generation of random variates with the t-distribution*, Mathematics of Computation
        62 (1994).
    """
    check_number("sample_beta", "alpha", alpha, sys.float_info.min, sys.float_info.max, "a finite number > 0")
    return _beta(alpha, shape, device, generator)


def sample_mix(
    batch_size: int,
    alpha: float = 0.2,
    *,
    per_sample: bool = False,
    p: float = 1.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Mix:
    r"""Draw a :class:`Mix` for a batch: :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` and partners.

    ``index`` is a uniformly random *cyclic* permutation, so in a batch of two or more no sample is its own partner.

    Args:
        batch_size: number of samples, ``B``.
        alpha: parameter of the Beta distribution, a finite number >= 0; 0 gives ``lam = 1`` (plain training).
            0.2 suits ImageNet, 1.0 CIFAR-10.
        per_sample: draw one ``lam`` per sample, shape ``(B,)``, instead of one per batch, shape ``()``.
        p: probability of mixing; otherwise ``lam`` is 1. One decision per batch, or per sample with ``per_sample``.
        device: device of the result; torch's default device if not given.
        generator: source of randomness; eager mode only, as a ``torch.Generator`` cannot enter a compiled graph.

    Raises:
        TypeError: ``batch_size`` is no integer; ``alpha`` or ``p`` is not a number.
        ValueError: ``alpha`` is negative or not finite, or ``p`` is outside [0, 1].

    Example:
        >>> import torch
        >>> from mixup_nn.sampling import sample_mix
        >>> mix = sample_mix(4, alpha=1.0, per_sample=True)
        >>> mix.lam.shape, sorted(mix.index.tolist())
        (torch.Size([4]), [0, 1, 2, 3])
    """
    if not isinstance(batch_size, (Integral, torch.SymInt)):
        raise TypeError(f"sample_mix: expected batch_size to be an integer, got {type(batch_size).__name__}; as len(x)")
    check_alpha("sample_mix", alpha)
    check_p("sample_mix", p)
    shape = (batch_size,) if per_sample else ()
    lam = _beta(alpha, shape, device, generator)
    # A compiled graph always has the gate, and compares tensors only: a branch on a number asks for one more graph.
    if torch.compiler.is_compiling() or alpha == 0 or p < 1:
        mixes = (_rand(shape, device, generator) < p) & (torch.zeros_like(lam) < alpha)
        lam = torch.where(mixes, lam, 1)
    # argsort(rand) rather than randperm, whose use as an index crashes Inductor in torch 2.13 (pytorch#183988).
    order = _rand((batch_size,), device, generator).argsort()
    # Walk the samples in random order; the partner of each is the next on the walk, and the last meets the first.
    index = order.scatter(0, order, order.roll(-1))
    return Mix(lam, index)


def check_number(owner: str, name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Raise, in the name of ``owner``, unless ``value`` is a real number in ``[low, high]``."""
    if not isinstance(value, Real):
        raise TypeError(f"{owner}: expected {name} to be a number, got {type(value).__name__}")
    if not low <= float(value) <= high:
        raise ValueError(f"{owner}: expected {name} to be {meaning}, got {value}")


def check_alpha(owner: str, alpha: float) -> None:
    """Raise, in the name of ``owner``, unless ``alpha`` is a parameter of the Beta distribution, or 0."""
    check_number(owner, "alpha", alpha, 0, sys.float_info.max, "a finite number >= 0")


def check_p(owner: str, p: float) -> None:
    """Raise, in the name of ``owner``, unless ``p`` is a probability."""
    check_number(owner, "p", p, 0, 1, "a probability in [0, 1]")


def _beta(
    alpha: float, shape: tuple[int, ...], device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:
    u, v = _rand((2, *shape), device, generator)
    t = torch.expm1(torch.log1p(-u) / -alpha).sqrt() * torch.cos(2 * math.pi * v)
    return torch.sigmoid(2 * torch.asinh(t))  # 1/2 + t / (2 sqrt(1 + t^2)), without its cancellation near 0


def _rand(shape: tuple[int, ...], device: torch.device | str | None, generator: torch.Generator | None) -> Tensor:
    # generator=None handed to torch.rand breaks a compiled graph with dynamic shapes (torch 2.13): leave it out.
    if generator is None:
        return torch.rand(shape, device=device, dtype=torch.float32)
    return torch.rand(shape, device=device, dtype=torch.float32, generator=generator)
