"""Draw a :class:`~mixup_nn.Mix`: the only file that touches random numbers."""

import math
import sys
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._mix import Mix, append_dims

__all__ = ["sample_beta", "sample_cutmix", "sample_mixup"]

Device = torch.device | str | None
Generator = torch.Generator | None


def sample_beta(
    alpha: float, shape: Sequence[int] = (), *, device: Device = None, generator: Generator = None
) -> Tensor:
    r"""Draw from the symmetric Beta distribution, :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`.

    Exact for every finite ``alpha > 0``, elementwise, without a rejection loop or a host synchronisation, so it
    fuses under ``torch.compile``. With :math:`u` and :math:`v` uniform on [0, 1), in steps of :math:`2^{-24}`,

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
    alpha = check_number("alpha", alpha, sys.float_info.min, sys.float_info.max, "a finite number > 0")
    return mixup_lam(shape, alpha, device, generator)


def sample_mixup(
    batch_size: int,
    alpha: float = 0.2,
    *,
    per_sample: bool = False,
    p: float = 1.0,
    device: Device = None,
    generator: Generator = None,
) -> Mix:
    r"""Draw the :class:`~mixup_nn.Mix` of MixUp: :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` and partners.

    ``index`` is a uniformly random *cyclic* permutation, so in a batch of two or more no sample is its own partner.

    Args:
        batch_size: number of samples, ``B``.
        alpha: parameter of the Beta distribution, a finite number >= 0; 0 gives ``lam = 1``, plain training.
        per_sample: draw one ``lam`` per sample, shape ``(B,)``, instead of one per batch, shape ``()``.
        p: probability of mixing; otherwise ``lam`` is 1. One decision per batch, or per sample with ``per_sample``.
        device: device of the result; torch's default device if not given.
        generator: source of randomness; eager mode only, as a ``torch.Generator`` cannot enter a compiled graph.

    Raises:
        ValueError: ``alpha`` is negative or not finite, or ``p`` is outside [0, 1].

    Example:
        >>> import torch
        >>> from mixup_nn.sampling import sample_mixup
        >>> mix = sample_mixup(4, alpha=1.0, per_sample=True)
        >>> mix.lam.shape, sorted(mix.index.tolist())
        (torch.Size([4]), [0, 1, 2, 3])

    Reference:
        https://arxiv.org/abs/1710.09412
    """
    lam = mixup_lam((batch_size,) if per_sample else (), check_alpha(alpha), device, generator)
    return Mix(gate(lam, check_p(p), generator=generator), cycle(batch_size, device, generator))


def sample_cutmix(
    shape: Sequence[int],
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    p: float = 1.0,
    spatial_dims: int | None = None,
    device: Device = None,
    generator: Generator = None,
) -> Mix:
    r"""Draw the :class:`~mixup_nn.Mix` of CutMix: a box that is taken from the partner, and partners.

    The box has the share :math:`1 - \lambda` of a sample, :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, its
    sides :math:`(1 - \lambda)^{1/k}` of the ``k`` sides of the sample. Its centre is uniform, and it is clipped at the
    border. ``lam`` is 0 inside the box and 1 outside, so its mean is the share of the original after clipping.
    Partners are drawn as in :func:`sample_mixup`.

    Args:
        shape: shape of the inputs, ``(B, C, *spatial)`` with one to three spatial dimensions.
        alpha: parameter of the Beta distribution, a finite number >= 0; 0 gives ``lam = 1``, plain training.
        per_sample: draw one box per sample, ``lam`` of shape ``(B, 1, *spatial)``, instead of one per batch,
            ``(1, 1, *spatial)``.
        p: probability of mixing; otherwise ``lam`` is 1. One decision per batch, or per sample with ``per_sample``.
        spatial_dims: how many of the last dimensions the box cuts; see :class:`~mixup_nn.CutMix`.
        device: device of the result; torch's default device if not given.
        generator: source of randomness; eager mode only, as a ``torch.Generator`` cannot enter a compiled graph.

    Raises:
        ValueError: ``shape`` does not have one to three spatial dimensions, or has fewer than ``spatial_dims``, or
            three and no ``spatial_dims`` is given; ``alpha`` is negative or not finite, or ``p`` is outside [0, 1].

    Example:
        >>> import torch
        >>> from mixup_nn.sampling import sample_cutmix
        >>> mix = sample_cutmix((4, 3, 32, 32))
        >>> mix.lam.shape, mix.index.shape
        (torch.Size([1, 1, 32, 32]), torch.Size([4]))

    Reference:
        S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo, *CutMix: Regularization Strategy to Train Strong
        Classifiers with Localizable Features*, ICCV 2019, https://arxiv.org/abs/1905.04899
    """
    lam = cutmix_lam(shape, check_alpha(alpha), per_sample, check_spatial_dims(spatial_dims), device, generator)
    return Mix(gate(lam, check_p(p), generator=generator), cycle(shape[0], device, generator))


# What a mix is drawn from: the mixers join these too. Their arguments are checked where the user sets them.


def mixup_lam(shape: Sequence[int], alpha: float, device: Device = None, generator: Generator = None) -> Tensor:
    """One ``lam`` for each entry of ``shape``; 1 where ``alpha`` is 0."""
    u, v = _uniform((2, *shape), device, generator).unbind()
    return _beta(u, v, alpha)


def cutmix_lam(
    shape: Sequence[int], alpha: float, per_sample: bool, spatial_dims: int | None, device: Device = None,
    generator: Generator = None,
) -> Tensor:  # fmt: skip
    """One ``lam`` of shape ``(1, 1, *spatial)``, or ``(B, 1, *spatial)``; an uncut dimension has the size 1."""
    spatial = _cut_sizes(shape, spatial_dims)
    samples = (shape[0] if per_sample else 1,) + (1,) * (len(shape) - 1)
    u, v, *centers = _uniform((2 + len(spatial), *samples), device, generator).unbind()
    side = _beta(u, v, alpha, plain=0.0).pow(1 / len(spatial))  # 1 - lam has the distribution of lam
    distances = []  # from the centre to the middle of each pixel, on a scale of 2 for each side of the sample
    for axis, (size, center) in enumerate(zip(spatial, centers, strict=True)):
        middles = torch.arange(1, 2 * size, 2, dtype=torch.float32, device=u.device) / size
        distances.append(append_dims(middles, len(spatial) - axis).sub(center, alpha=2).abs())
    # One comparison of the largest distance: a comparison per axis is a kernel more for each when compiled for CUDA.
    return (reduce(torch.maximum, distances) >= side).float()


def gate(lam: Tensor, p: float, decisions: Sequence[int] | None = None, generator: Generator = None) -> Tensor:
    """``lam`` with probability ``p``, else 1; a decision for each entry of its first dimension, or of ``decisions``."""
    if not torch.compiler.is_compiling() and p == 1:  # as in _beta
        return lam
    shape = lam.shape[:1] if decisions is None else decisions
    uniform = append_dims(_uniform(shape, lam.device, generator), max(lam.ndim, 1))
    return torch.where(uniform < p, lam, 1)


def choose(lams: Sequence[Tensor], weights: Sequence[float], batch_size: int | None) -> Tensor:
    """One of ``lams`` with relative ``weights``; for each sample of a batch where ``batch_size`` is given."""
    ndim = max(lam.ndim for lam in lams)
    uniform = append_dims(_uniform(() if batch_size is None else (batch_size,), lams[0].device, None), ndim)
    chosen, *others = (append_dims(lam, ndim) if lam.ndim == 1 else lam for lam in lams)
    for weight, lam in zip(accumulate(weights[:-1]), others, strict=True):
        chosen = torch.where(uniform < weight / sum(weights), chosen, lam)
    return chosen


def cycle(batch_size: int, device: Device = None, generator: Generator = None) -> Tensor:
    """A uniformly random cyclic permutation: the samples in random order, the partner of each is the next."""
    if torch.compiler.is_compiling():
        # An index by randperm crashes Inductor of torch 2.13 (pytorch#183988), roll cannot take the unbacked batch size
        # of a selection such as x[mask], and slices ask whether it is 2: a graph more, or no export for it.
        order = _uniform((batch_size,), device, generator).argsort()
        following = order.index_select(0, torch.arange(1, batch_size + 1, device=order.device) % batch_size)
    else:
        order = torch.randperm(batch_size, device=device, generator=generator)
        following = order.roll(-1)
    # index_copy_ rather than scatter, which Inductor leaves to ATen on CUDA where it fuses this one.
    return torch.empty_like(order).index_copy_(0, order, following)


def check_number(name: str, value: float, low: float, high: float, meaning: str) -> float:
    """Return ``value`` as a float, as an int would cost a graph; raise unless it is in ``[low, high]``."""
    number = float(value)
    if not low <= number <= high:
        raise ValueError(f"expected {name} to be {meaning}, got {value}")
    return number


def check_alpha(alpha: float) -> float:
    """Return ``alpha`` as a float; raise unless it is a parameter of the Beta distribution, or 0."""
    return check_number("alpha", alpha, 0, sys.float_info.max, "a finite number >= 0")


def check_p(p: float) -> float:
    """Return ``p`` as a float; raise unless it is a probability."""
    return check_number("p", p, 0, 1, "a probability in [0, 1]")


def check_spatial_dims(spatial_dims: int | None) -> int | None:
    """Return ``spatial_dims``; raise unless it is a number of dimensions, or not given."""
    if spatial_dims not in (None, 1, 2, 3) or isinstance(spatial_dims, float):
        raise ValueError(f"expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")
    return spatial_dims


def _cut_sizes(shape: Sequence[int], spatial_dims: int | None) -> Sequence[int]:
    """The sizes along which a box is cut: the last ``spatial_dims`` of ``shape``, or all of one or two."""
    ndim = len(shape) - 2
    cut = ndim if spatial_dims is None else spatial_dims
    if not 1 <= cut <= ndim <= 3:
        expected = "inputs (B, C, *spatial), 1 to 3 spatial dimensions and at most as many spatial_dims"
        raise ValueError(f"expected {expected}, got {tuple(shape)} and {spatial_dims}; see docs: Guide, Where")
    if spatial_dims is None and ndim == 3:
        fix = "3 cuts a box out of a volume, 2 one box through all frames of a clip"
        raise ValueError(f"expected spatial_dims for inputs of five dimensions, {tuple(shape)}, got None; {fix}")
    return shape[-cut:]


def _beta(u: Tensor, v: Tensor, alpha: float, plain: float = 1.0) -> Tensor:
    """Beta(alpha, alpha) from two uniform numbers; ``plain`` where ``alpha`` is 0."""
    t = torch.expm1(torch.log(u) / -alpha).sqrt() * torch.cos(2 * math.pi * v)
    half = torch.asinh(t)  # in eager mode a number in an operation, as in 2 * half, takes as long as two of them
    lam = torch.sigmoid(half + half)  # 1/2 + t / (2 sqrt(1 + t^2)), without its cancellation near 0
    if torch.compiler.is_compiling() or alpha == 0:
        # A compiled graph always compares, and compares tensors: a branch on a number asks for one more graph.
        lam = torch.where(torch.zeros_like(lam) < alpha, lam, plain)
    return lam


def _uniform(shape: Sequence[int], device: Device, generator: Generator) -> Tensor:
    # generator=None handed to torch.rand breaks a compiled graph with dynamic shapes (torch 2.13): leave it out.
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.rand(shape, device=device, dtype=torch.float32, **options)
