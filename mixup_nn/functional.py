"""Apply a :class:`~mixup_nn.Mix`: pure functions of inputs, targets, losses and a draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .sampling import Mix, sample_mix

__all__ = ["mix_targets", "mixup", "mixup_batch", "mixup_cross_entropy", "mixup_loss"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Their mean is divided by the class weights of the targets that are not ignored. The third is new in torch 2.13.
INDEX_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, getattr(nn, "LinearCrossEntropyLoss", nn.NLLLoss))


def mixup(input: Tensor, mix: Mix) -> Tensor:
    r"""Mix a batch with a permutation of itself.

    .. math::
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}

    Every mixed value lies between its two sources, rounding included. ``lam`` is rounded to the dtype of ``input``
    and the sum once more, so a value is off by at most ``torch.finfo(dtype).eps`` times the larger source. Infinity
    and NaN spread to the sample mixed with theirs, also where ``lam`` is 0 or 1, and so do sources farther apart
    than the largest number of their dtype (3.4e38 for bfloat16 and float32; float16 is computed in float32).

    Args:
        input: float16, bfloat16, float32 or float64, shape ``(B, *)``; never modified.
        mix: the draw to apply, from :meth:`MixUp.sample <mixup_nn.MixUp.sample>`, ``MixUp.last_mix`` or
            :func:`~mixup_nn.sampling.sample_mix`.

    Returns:
        The mixed batch: shape, dtype, device and memory format of ``input``, and differentiable in it.

    Raises:
        TypeError: ``input`` is no floating-point tensor, or ``mix`` is no :class:`~mixup_nn.Mix`.
        ValueError: ``input`` has no batch dimension, or one of another size than the mix.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mixup
        >>> mixup(torch.tensor([[0.0, 1.0], [8.0, 9.0]]), Mix(torch.tensor(0.75), torch.tensor([1, 0])))
        tensor([[2., 3.],
                [6., 7.]])

    Reference:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018,
        https://arxiv.org/abs/1710.09412
    """
    _check("mixup", "input", input, mix)
    if not input.is_floating_point():
        raise TypeError(
            f"mixup: expected a floating-point input, got {input.dtype}; convert it first, as in input.float()"
        )
    # In place on the gathered copy: one pass and one allocation less than torch.lerp(partner, input, lam).
    return _gather(input, mix.index).lerp_(input, _align(mix.lam, input.ndim).to(input.dtype))


def mix_targets(target: Tensor, mix: Mix, num_classes: int | None = None) -> Tensor:
    r"""Mix targets as :func:`mixup` mixes inputs.

    .. math::
        \tilde y_i = \lambda_i y_i + (1 - \lambda_i)\, y_{\text{index}_i}

    Args:
        target: dense floating targets of shape ``(B, *)``, or class indices of shape ``(B, *)`` and an integer dtype,
            which become one-hot probabilities of shape ``(B, C, *)`` first.
        mix: the draw that mixed the inputs.
        num_classes: ``C``; needed for class indices, without effect on dense targets.

    Returns:
        Dense targets. Floating ones keep their shape and dtype; class indices give ``(B, C, *)`` in the dtype of
        ``mix.lam`` (float32), where each distribution sums to 1. An index outside ``range(C)``, such as an
        ``ignore_index``, is a row of zeros: it adds nothing to a cross entropy without label smoothing, and counts
        in its mean.

    Raises:
        TypeError: ``target`` is bool, complex or no tensor, or ``mix`` is no :class:`~mixup_nn.Mix`.
        ValueError: class indices without ``num_classes``; no batch dimension, or one of another size than the mix.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_targets
        >>> mix_targets(torch.tensor([0, 2]), Mix(torch.tensor(0.75), torch.tensor([1, 0])), num_classes=3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.2500, 0.0000, 0.7500]])
    """
    _check("mix_targets", "target", target, mix)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"mix_targets: expected floating targets or integer class indices, got {target.dtype}; "
            "convert multi-label targets first, as in target.float()"
        )
    if not target.is_floating_point():
        if num_classes is None:
            raise ValueError(
                f"mix_targets: expected num_classes with class indices ({target.dtype}), got None; "
                "pass num_classes, or floating targets"
            )
        classes = _align(torch.arange(num_classes, device=target.device), target.ndim)
        target = (rearrange(target, "b ... -> b 1 ...") == classes).to(mix.lam.dtype)
    return mixup(target, mix)


def mixup_loss(loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor, mix: Mix) -> Tensor:
    r"""Interpolate the losses against both targets, instead of the targets.

    .. math::
        \lambda\, \ell(x, y) + (1 - \lambda)\, \ell(x, y_{\text{index}})

    For a loss linear in its target (cross entropy, BCE) this is the loss against the mixed target, whose target
    may then be a class index. For another it is not: for MSE the two differ by
    :math:`\lambda (1 - \lambda)\, \mathrm{mean}((y - y_{\text{index}})^2)`.

    A ``lam`` of shape ``()`` interpolates whatever the loss returns. One of shape ``(B,)`` needs per-sample losses:
    a loss with a ``reduction`` attribute is evaluated with ``"none"``, weighed, and reduced as it was told to; a
    callable without one must return losses of shape ``(B, *)`` and gets them back weighed, not reduced.
    :class:`torch.nn.CrossEntropyLoss` on class indices is passed on to :func:`mixup_cross_entropy`, unless it has hooks
    or a ``forward`` of its own; the mean of it, its subclasses, :class:`torch.nn.NLLLoss` and
    :class:`torch.nn.LinearCrossEntropyLoss` is that function's. A loss under :func:`torch.compile` is taken out of it:
    compile the criterion.

    Args:
        loss: any callable of ``(input, target)``; never modified.
        input: first argument of the loss, the output of the model, shape ``(B, *)``.
        target: second argument of the loss, shape ``(B, *)``.
        mix: the draw that mixed the inputs.

    Returns:
        The loss, of the shape and floating dtype that ``loss`` itself returns; float32 for integers, as of a metric.

    Raises:
        TypeError: ``target`` or the loss is no tensor, or ``mix`` is no :class:`~mixup_nn.Mix`.
        ValueError: a per-sample ``lam`` and a loss that returns no per-sample losses; no batch dimension, or one of
            another size than the mix.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mixup_loss
        >>> mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
        >>> mixup_loss(F.l1_loss, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]), mix)
        tensor(1.5000)
    """
    _check("mixup_loss", "target", target, mix)
    loss = getattr(loss, "_orig_mod", loss)
    if _is_torch(loss, nn.CrossEntropyLoss) and not target.is_floating_point():
        return mixup_cross_entropy(
            input,
            target,
            mix,
            weight=loss.weight,
            ignore_index=loss.ignore_index,
            reduction=loss.reduction,
            label_smoothing=loss.label_smoothing,
        )
    if _is_torch(loss, nn.NLLLoss):
        return _mixup_nll(input, target, mix, loss.weight, loss.ignore_index, loss.reduction)

    reduction = getattr(loss, "reduction", None) if mix.lam.ndim else None
    if reduction is not None:
        loss = _unreduced(loss)
    original, partner = loss(input, target), loss(input, target[mix.index])
    if not isinstance(original, Tensor):
        raise TypeError(
            f"mixup_loss: expected loss to return a tensor, got {type(original).__name__}; "
            "wrap it in a function that returns the loss alone"
        )
    if mix.lam.ndim and original.shape[:1] != mix.lam.shape:
        raise ValueError(
            f"mixup_loss: expected per-sample losses of shape ({mix.lam.shape[0]}, ...) for a per-sample lam, got "
            f"{tuple(original.shape)}; use a loss with a reduction attribute such as torch.nn.MSELoss(), one that "
            "returns per-sample losses, as with reduction='none', or per_sample=False"
        )
    losses = _interpolate(mix.lam, original, partner)
    if reduction == "mean" and isinstance(loss, INDEX_LOSSES) and not target.is_floating_point():
        losses = _weighted_mean(losses, target.long(), mix, loss.weight, loss.ignore_index)
    else:
        losses = _reduce(losses, reduction)
    return losses.to(original.dtype) if original.is_floating_point() else losses


def mixup_cross_entropy(
    input: Tensor,
    target: Tensor,
    mix: Mix,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross entropy against both class indices, for one log-softmax and without a dense target.

    .. math::
        \frac{\sum_i \lambda_i w_{y_i} \ell(x_i, y_i) + (1 - \lambda_i) w_{y'_i} \ell(x_i, y'_i)}
             {\sum_i \lambda_i w_{y_i} + (1 - \lambda_i) w_{y'_i}}, \qquad
        \ell(x, y) = -\log \mathrm{softmax}(x)_y, \qquad y'_i = y_{\text{index}_i}

    with the class weight :math:`w_y`, 1 if not given and 0 at ``ignore_index``. Options mean what they mean in
    :func:`torch.nn.functional.cross_entropy`, and ``lam = 1`` gives its value where both losses are finite.

    Args:
        input: logits, shape ``(B, C)`` or ``(B, C, *)``.
        target: class indices, shape ``(B,)`` or ``(B, *)``; values in ``range(C)`` or ``ignore_index``.
        mix: the draw that mixed the inputs.
        weight: weight of each class, shape ``(C,)``.
        ignore_index: target value that adds nothing to the loss or its mean.
        reduction: ``"mean"`` (the formula above), ``"sum"`` (its numerator) or ``"none"`` (the terms of that sum).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].

    Returns:
        Shape ``()``, or that of ``target`` for ``"none"``; dtype of ``input``, or float32 under autocast.

    Raises:
        TypeError: ``target`` does not hold integers, ``input`` is no tensor, or ``mix`` is no
            :class:`~mixup_nn.Mix`.
        ValueError: shapes that do not fit each other; an unknown ``reduction``, a ``label_smoothing`` outside [0, 1];
            no batch dimension, or one of another size than the mix.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mixup_cross_entropy
        >>> mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
        >>> mixup_cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), mix)
        tensor(0.6269)
    """
    _check("mixup_cross_entropy", "target", target, mix)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"mixup_cross_entropy: expected integer class indices, got {target.dtype}; for dense targets use "
            "torch.nn.functional.cross_entropy(input, mix_targets(target.float(), mix))"
        )
    check_tensor("mixup_cross_entropy", "input", input)
    if input.ndim == 1 or target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            "mixup_cross_entropy: expected input of shape (B, C, *) and class indices of shape (B, *), got "
            f"{tuple(input.shape)} and {tuple(target.shape)}; give one-hot targets as floats, as in target.float()"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"mixup_cross_entropy: expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"mixup_cross_entropy: expected label_smoothing in [0, 1], got {label_smoothing}")
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.promote_types(input.dtype, torch.float32))  # as torch's own; log_softmax does not on CPU
    log_probs = F.log_softmax(input, 1)
    return _mixup_nll(log_probs, target, mix, weight, ignore_index, reduction, label_smoothing)


def mixup_batch(input: Tensor, target: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw, mix a batch and permute its targets: MixUp in one line of a plain training loop.

    .. math::
        \tilde x_i = (1 - \text{mixing})\, x_i + \text{mixing} \cdot x_{\text{index}_i}

    The third result weights the *permuted* sample, as in MosaicML Composer's function of the same name;
    everywhere else in this library ``lam = 1 - mixing`` weights the original one.

    Args:
        input: as for :func:`mixup`, shape ``(B, *)``; never modified.
        target: any dtype, shape ``(B, *)``; never modified.
        alpha: parameter of the Beta distribution, a finite number >= 0; 0.2 suits ImageNet, 1.0 CIFAR-10.

    Returns:
        ``(input_mixed, target_permuted, mixing)``; ``mixing`` is a float32 tensor of shape ``()``.

    Raises:
        TypeError: ``input`` is no floating-point tensor, ``target`` no tensor, or ``alpha`` no number.
        ValueError: ``alpha`` is negative or not finite; no batch dimension, or two of different size.

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
    check_tensor("mixup_batch", "input", input)
    mix = sample_mix(input.shape[0], alpha, device=input.device)
    _check("mixup_batch", "target", target, mix)
    return mixup(input, mix), target[mix.index], 1 - mix.lam


def check_tensor(owner: str, name: str, value: object) -> None:
    """Raise, in the name of ``owner``, unless ``value`` is a tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.ndim == 0:
        raise ValueError(
            f"{owner}: expected {name} to have a batch dimension, got a tensor of shape (); "
            f"for a batch of one use {name}.unsqueeze(0)"
        )


def _check(owner: str, name: str, value: Tensor, mix: Mix) -> None:
    check_tensor(owner, name, value)
    if isinstance(mix, Tensor):
        raise TypeError(
            f"{owner}: expected mix to be a Mix, got a tensor; targets do not go here: hand them to MixUpCriterion, "
            "or use functional.mixup_batch(input, target)"
        )
    if not isinstance(mix, Mix):
        raise TypeError(f"{owner}: expected mix to be a Mix, got {type(mix).__name__}; draw one with sample_mix")
    dtypes = [part.dtype if isinstance(part, Tensor) else type(part).__name__ for part in mix]
    if dtypes[1] != torch.int64 or not isinstance(dtypes[0], torch.dtype) or not dtypes[0].is_floating_point:
        raise TypeError(
            f"{owner}: expected mix.lam to be a floating tensor and mix.index an int64 one, got {dtypes[0]} and "
            f"{dtypes[1]}; as in Mix(torch.tensor(0.7), torch.tensor([1, 0]))"
        )
    if mix.index.ndim != 1 or mix.lam.ndim > 1 or (mix.lam.ndim == 1 and mix.lam.shape != mix.index.shape):
        raise ValueError(
            f"{owner}: expected mix.index of shape (B,) and mix.lam of shape () or (B,), "
            f"got {tuple(mix.index.shape)} and {tuple(mix.lam.shape)}"
        )
    if value.shape[0] != mix.index.shape[0]:
        raise ValueError(
            f"{owner}: expected {name} to have the batch size of the mix, {mix.index.shape[0]}, got {value.shape[0]}; "
            "a mix fits the batch that it was drawn for, with the batch as first dimension"
        )


def _gather(input: Tensor, index: Tensor) -> Tensor:
    """``input[index]``, where the layout allows it by ``index_select``, which copies samples, not single elements."""
    if input.ndim > 2 and input.stride(1) == 1 and input.stride(-1) == input.shape[1]:
        channels_last = input.movedim(1, -1)  # a memory format that index_select does not keep
        if channels_last.is_contiguous():
            return channels_last.index_select(0, index).movedim(-1, 1)
    return input.index_select(0, index) if input.is_contiguous() else input[index]


def _align(vector: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size 1 until a vector broadcasts along the first (or class) dimension."""
    return vector if vector.ndim == 0 else rearrange(vector, f"n -> n {'1 ' * (ndim - 1)}")


def _is_torch(loss: object, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether ``loss`` does just what torch's own ``kind`` does: no other forward, no hooks."""
    if not isinstance(loss, kind) or loss._forward_hooks or loss._forward_pre_hooks:
        return False
    return type(loss).forward is kind.forward and "forward" not in loss.__dict__


def _unreduced(loss: Any) -> Any:
    """A shallow copy of ``loss`` with ``reduction="none"``, made by hand because Dynamo cannot trace copy.copy."""
    twin = object.__new__(type(loss))
    twin.__dict__.update(loss.__dict__, reduction="none", _compiled_call_impl=None)  # compiled with the reduction
    return twin


def _reduce(losses: Tensor, reduction: str | None) -> Tensor:
    if reduction is None or reduction == "none":
        return losses
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return losses.sum() / losses.shape[0]
    raise ValueError(f"mixup_loss: expected reduction to be 'none', 'mean', 'sum' or 'batchmean', got {reduction!r}")


def _interpolate(lam: Tensor, original: Tensor, partner: Tensor) -> Tensor:
    """The formula in float32 at least, as torch's own reductions sum."""
    dtype = torch.promote_types(torch.promote_types(lam.dtype, original.dtype), torch.float32)
    lam = _align(lam.to(dtype), original.ndim)
    return lam * original.to(dtype) + (1 - lam) * partner.to(dtype)


def _weighted_mean(losses: Tensor, target: Tensor, mix: Mix, weight: Tensor | None, ignore_index: int | None) -> Tensor:
    """The sum of the losses over that of the mixed class weights, 0 where ignored."""

    def mass(target: Tensor) -> Tensor:
        kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        return (kept if weight is None else weight[target.where(kept, 0)].where(kept, 0)).to(losses.dtype)

    return losses.sum() / _interpolate(mix.lam, mass(target), mass(target[mix.index])).sum()


def _mixup_nll(
    log_probs: Tensor,
    target: Tensor,
    mix: Mix,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    target = target.long()
    if label_smoothing:
        weighted = log_probs if weight is None else log_probs * _align(weight, log_probs.ndim - 1)
        smooth_loss = -weighted.mean(1)

    def loss(target: Tensor) -> Tensor:
        nll = F.nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction="none")
        if label_smoothing:
            nll = (1 - label_smoothing) * nll + label_smoothing * smooth_loss.where(target != ignore_index, 0)
        return nll

    original = loss(target)
    losses = _interpolate(mix.lam, original, loss(target[mix.index]))
    if reduction == "mean":
        return _weighted_mean(losses, target, mix, weight, ignore_index).to(original.dtype)
    return _reduce(losses, reduction).to(original.dtype)
