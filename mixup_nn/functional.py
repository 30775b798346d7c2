"""Apply a :class:`~mixup_nn.Mix`: pure functions of inputs, targets, losses and a draw."""

import torch
from einops import rearrange
from torch import Tensor

from ._losses import mix_cross_entropy, mix_loss
from ._mix import Mix, align, input_mix, target_mix
from .sampling import sample_mixup

__all__ = ["mix_cross_entropy", "mix_inputs", "mix_loss", "mix_targets", "mixup_batch"]


def mix_inputs(input: Tensor, mix: Mix) -> Tensor:
    r"""Mix a batch with a permutation of itself.

    .. math::
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}

    Every mixed value lies between its two sources, rounding included. In eager mode ``lam`` is rounded to the dtype of
    ``input`` and the sum once more, so a value is off by at most ``torch.finfo(dtype).eps`` times the larger source;
    compiled code rounds once. Infinity and NaN spread to the sample mixed with theirs, also where ``lam`` is 0 or 1,
    and so do sources farther apart than the largest number of their dtype (3.4e38 for bfloat16 and float32; float16 is
    computed in float32).

    Args:
        input: float16, bfloat16, float32 or float64, shape ``(B, *)``; never modified. ``(B, C, *spatial)`` for a
            ``lam`` per position, of the same spatial sizes.
        mix: the draw to apply, from :meth:`Mixer.sample <mixup_nn.Mixer.sample>`, ``Mixer.last_mix`` or
            :mod:`~mixup_nn.sampling`.

    Returns:
        The mixed batch; shape, dtype, device and memory format of ``input``, and differentiable in it and in ``lam``.

    Raises:
        TypeError: ``input`` is not a floating-point tensor, or ``mix`` is not a :class:`~mixup_nn.Mix`.
        ValueError: ``input`` has sizes other than those of the mix.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_inputs
        >>> mix_inputs(torch.tensor([[0.0, 1.0], [8.0, 9.0]]), Mix(torch.tensor(0.75), torch.tensor([1, 0])))
        tensor([[2., 3.],
                [6., 7.]])

    Reference:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018,
        https://arxiv.org/abs/1710.09412
    """
    return _mixed(input, *input_mix(input, mix))


def mix_targets(target: Tensor, mix: Mix, num_classes: int | None = None) -> Tensor:
    r"""Mix targets as :func:`mix_inputs` mixes inputs.

    .. math::
        \tilde y_i = \lambda_i y_i + (1 - \lambda_i)\, y_{\text{index}_i}

    :class:`~mixup_nn.Mix` says which targets take a ``lam`` per position, and which its share.

    Args:
        target: dense floating targets of shape ``(B, *)``, or class indices of shape ``(B, *)`` and an integer dtype,
            which become one-hot probabilities of shape ``(B, C, *)`` first.
        mix: the draw that mixed the inputs.
        num_classes: ``C``, two or more; needed for class indices, without effect on dense targets.

    Returns:
        Dense targets. Floating ones keep their shape and dtype; class indices give ``(B, C, *)`` in the dtype of
        ``mix.lam`` (float32), where each distribution sums to 1. A negative index, such as an ``ignore_index`` of
        -100, becomes a row of zeros: it adds nothing to a cross entropy without label smoothing, but still counts in
        its denominator.

    Raises:
        TypeError: ``target`` is not a tensor (parts are mixed one by one), is bool or complex, or holds class indices
            without ``num_classes``; ``mix`` is not a :class:`~mixup_nn.Mix`.
        ValueError: a shape that does not fit the mix; fewer than two classes.
        RuntimeError: a class index that is not below ``num_classes``, raised by torch.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_targets
        >>> mix_targets(torch.tensor([0, 2]), Mix(torch.tensor(0.75), torch.tensor([1, 0])), num_classes=3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.2500, 0.0000, 0.7500]])
    """
    lam, index = target_mix(target, mix)
    if not target.is_floating_point():
        target = one_hot(target, num_classes, lam.dtype)
    return _mixed(target, lam, index)


def one_hot(target: Tensor, num_classes: int | None, dtype: torch.dtype) -> Tensor:
    """Class indices ``(B, *)`` as probabilities ``(B, C, *)``; a negative index is a row of zeros."""
    if num_classes is None or num_classes < 2 or target.dtype == torch.bool or target.is_complex():
        expected = "floating targets, or integer class indices with num_classes of two or more"
        error = TypeError if num_classes is None or num_classes > 1 else ValueError
        raise error(f"expected {expected}, got {target.dtype} with {num_classes}; see docs: Criterion, Targets")
    index = rearrange(target.long(), "b ... -> b 1 ...")
    zeros = torch.zeros((*target.shape[:1], num_classes, *target.shape[1:]), dtype=dtype, device=target.device)
    return zeros.scatter(1, index.clamp(min=0), (index >= 0).to(dtype))


def mixup_batch(input: Tensor, target: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw, mix a batch and permute its targets: MixUp in one line of a plain training loop.

    .. math::
        \tilde x_i = (1 - \text{mixing})\, x_i + \text{mixing} \cdot x_{\text{index}_i}

    The third result weights the *permuted* sample, as in MosaicML Composer's function of the same name;
    everywhere else in this library ``lam = 1 - mixing`` weights the original one.

    Args:
        input: as for :func:`mix_inputs`, shape ``(B, *)``; never modified.
        target: any dtype, shape ``(B, *)``; never modified.
        alpha: parameter of the Beta distribution, a finite number >= 0.

    Returns:
        ``(input_mixed, target_permuted, mixing)``; ``mixing`` is a float32 tensor of shape ``()``.

    Raises:
        TypeError: ``input`` is not a floating-point tensor, or ``target`` not a tensor.
        ValueError: ``alpha`` is negative or not finite, or the two have different batch sizes.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from mixup_nn.functional import mixup_batch
        >>> model, X, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> X_mixed, y_perm, mixing = mixup_batch(X, y, alpha=0.2)
        >>> y_hat = model(X_mixed)
        >>> loss = (1 - mixing) * cross_entropy(y_hat, y) + mixing * cross_entropy(y_hat, y_perm)

        Dense targets are interpolated themselves, for a loss that takes them:

        >>> y = torch.nn.functional.one_hot(y, 3)
        >>> X_mixed, y_perm, mixing = mixup_batch(X, y, alpha=0.2)
        >>> loss = cross_entropy(model(X_mixed), (1 - mixing) * y + mixing * y_perm)
    """
    mix = sample_mixup(input.shape[0], alpha, device=input.device)
    return mix_inputs(input, mix), target.index_select(0, target_mix(target, mix).index), 1 - mix.lam


def _mixed(value: Tensor, lam: Tensor, index: Tensor) -> Tensor:
    """The formula, in place on the gathered partners: a pass and an allocation less than ``torch.lerp``."""
    lam = align(lam, value)
    # index_select copies whole samples, many times faster than value[index], but keeps no memory format: samples in
    # channels_last are mixed as the contiguous tensor that they are. The view comes last, or backward copies it twice.
    if value.ndim > 2 and value.stride(1) == 1 and value.stride(-1) == value.shape[1]:
        moved = value.movedim(1, -1)
        if moved.is_contiguous():
            return _lerp_channels_last(moved, lam, index).movedim(-1, 1)
    partners = value.index_select(0, index) if value.is_contiguous() else value[index]
    return partners.lerp_(value, lam)


def _lerp_channels_last(moved: Tensor, lam: Tensor, index: Tensor) -> Tensor:
    if lam.ndim < 2:
        return moved.index_select(0, index).lerp_(moved, lam)
    as_rows = torch.compiler.is_compiling() and moved.element_size() == 2
    if lam.shape[0] == 1 or as_rows:  # the CPU is slow to broadcast along channels that lie side by side
        lam = lam.expand(lam.shape[0], moved.shape[-1], *moved.shape[1:-1])
    lam = lam.movedim(1, -1).contiguous()
    # Of halves: the loop of Inductor on a CPU would be the channels, three for images.
    rows, lam = (moved.flatten(1), lam.flatten(1)) if as_rows else (moved, lam)
    return rows.index_select(0, index).lerp_(rows, lam).view_as(moved)
