"""Interpolated losses, and all that is known of torch's losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ._mix import Mix, align, append_dims, check_tensor, checked, lam_of_target

# These need hard labels.
LABEL_LOSSES = (nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss, nn.MultiMarginLoss, nn.NLLLoss)

# Their mean is divided by the class weights of the targets that are not ignored. The third is new in torch 2.13.
INDEX_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, getattr(nn, "LinearCrossEntropyLoss", nn.NLLLoss))

# From here on (in eager) a second dense gradient costs more than the small operations that avoid it.
LARGE = 2**22


def mix_loss(loss: Callable[[Any, Tensor], Tensor], input: Any, target: Tensor, mix: Mix) -> Tensor:
    r"""Interpolate the losses against both targets, instead of the targets.

    .. math::
        \lambda\, \ell(x, y) + (1 - \lambda)\, \ell(x, y_{\text{index}})

    For a loss linear in its target (cross entropy, BCE) this is the loss against the mixed target. For another it is
    not: for MSE the two differ by :math:`\lambda (1 - \lambda)\, \mathrm{mean}((y - y_{\text{index}})^2)`.

    One weight per batch interpolates whatever the loss returns. Weights per sample or position need unreduced losses:
    an ``nn.Module`` with a ``reduction`` is evaluated with ``"none"``, weighed, and reduced as it was told to; any
    other callable must return losses of shape ``(B, *)`` and gets them back weighed, not reduced.

    :class:`torch.nn.CrossEntropyLoss` on class indices goes to :func:`mix_cross_entropy`, unless it has hooks or is
    subclassed. Its subclasses, :class:`torch.nn.NLLLoss` and :class:`torch.nn.LinearCrossEntropyLoss` divide their mean
    by the mixed class weights, as that function does. The compilation of a loss is ignored: compile the criterion. With
    weights per sample or position a shallow copy of the loss is called, so what it sets on itself meanwhile is lost.

    Args:
        loss: any callable of ``(input, target)``; never modified.
        input: first argument of the loss, the output of the model.
        target: second argument of the loss, shape ``(B, *)``.
        mix: the draw that mixed the inputs.

    Returns:
        The loss, of the shape and floating dtype that ``loss`` itself returns; float32 for integers, as of a metric.

    Raises:
        TypeError: ``target`` or the loss is not a tensor, or ``mix`` is not a :class:`~mixup_nn.Mix`.
        ValueError: weights per sample or position and a loss that reduces itself; a target that does not fit the mix.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_loss
        >>> mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
        >>> mix_loss(F.l1_loss, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]), mix)
        tensor(1.5000)
    """
    loss = uncompiled(loss)
    if _is_plain_cross_entropy(loss) and not (isinstance(target, Tensor) and target.is_floating_point()):
        options = {name: getattr(loss, name) for name in ("weight", "ignore_index", "reduction", "label_smoothing")}
        return mix_cross_entropy(input, target, mix, **options)
    mix = checked("target", target, mix)
    if isinstance(loss, nn.NLLLoss):
        check_class_indices(target)
    lam = lam_of_target(mix.lam, target)
    reduction = getattr(loss, "reduction", None) if lam.ndim and isinstance(loss, nn.Module) else None
    if reduction is not None:
        loss = _unreduced(loss)
    original, partner = loss(input, target), loss(input, target[mix.index])
    if not isinstance(original, Tensor):
        raise TypeError(
            f"expected loss to return a tensor, got {type(original).__name__}; wrap it to return that alone"
        )
    if lam.ndim and original.shape[:1] != target.shape[:1]:
        raise ValueError(
            f"expected a loss per sample, of shape ({target.shape[0]}, ...), for one lam per sample or position, got "
            f"{tuple(original.shape)}; use reduction='none', a loss with a reduction such as nn.MSELoss(), dense "
            "targets with interpolate_loss=False, or one lam per batch"
        )
    losses = _interpolate(lam, original, partner)
    if reduction == "mean" and isinstance(loss, INDEX_LOSSES) and not target.is_floating_point():
        ignore_index = -100 if loss.ignore_index is None else loss.ignore_index
        weights = _mixed_class_weights(lam, mix.index, target.long(), loss.weight, ignore_index, losses.dtype)
        losses = losses.sum() / weights.sum()
    elif reduction == "mean":
        losses = losses.mean()
    elif reduction in ("sum", "batchmean"):
        losses = losses.sum() / (target.shape[0] if reduction == "batchmean" else 1)
    elif reduction not in (None, "none"):
        raise ValueError(f"expected reduction to be 'none', 'mean', 'sum' or 'batchmean', got {reduction!r}")
    return losses.to(original.dtype) if original.is_floating_point() else losses


def mix_cross_entropy(
    input: Tensor,
    target: Tensor,
    mix: Mix,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross entropy against both class indices, with one log-softmax and without a dense target.

    .. math::
        \frac{\sum_i \lambda_i w_{y_i} \ell(x_i, y_i) + (1 - \lambda_i) w_{y'_i} \ell(x_i, y'_i)}
             {\sum_i \lambda_i w_{y_i} + (1 - \lambda_i) w_{y'_i}}, \qquad
        \ell(x, y) = -\log \mathrm{softmax}(x)_y, \qquad y'_i = y_{\text{index}_i}

    with the class weight :math:`w_y`, 1 if not given and 0 at ``ignore_index``. With one weight per batch this is the
    interpolation of torch's two means, since ``y'`` is a permutation of ``y``. Options mean what they mean in
    :func:`torch.nn.functional.cross_entropy`, and ``lam = 1`` gives its value where both losses are finite.

    Args:
        input: logits, shape ``(B, C)`` or ``(B, C, *)``.
        target: class indices, shape ``(B,)`` or ``(B, *)``; values in ``range(C)`` or ``ignore_index``.
        mix: the draw that mixed the inputs.
        weight: weight of each class, shape ``(C,)``.
        ignore_index: target value that adds nothing to the loss or its denominator.
        reduction: ``"mean"`` (the formula above), ``"sum"`` (its numerator) or ``"none"`` (the terms of that sum).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].

    Returns:
        Shape ``()``, or that of ``target`` for ``"none"``; dtype of ``input``, or float32 under autocast.

    Raises:
        TypeError: ``target`` is not int64 or uint8, ``input`` is not a tensor, or ``mix`` is not a
            :class:`~mixup_nn.Mix`.
        ValueError: shapes that do not fit each other; an unknown ``reduction``, a ``label_smoothing`` outside [0, 1].

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_cross_entropy
        >>> mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
        >>> mix_cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), mix)
        tensor(0.6269)
    """
    mix = checked("target", target, mix)
    check_tensor("input", input)
    check_class_indices(target)
    if input.ndim == 1 or target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            f"expected input of shape (B, C, *) and class indices of shape (B, *), got {tuple(input.shape)} and "
            f"{tuple(target.shape)}{'; one-hot targets must be floats' if target.shape == input.shape else ''}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.promote_types(input.dtype, torch.float32))  # as torch's own; log_softmax does not on CPU

    lam, index = lam_of_target(mix.lam, target), mix.index
    target, log_probs = target.long(), input.log_softmax(1)
    partner = target[index]
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
    small = torch.compiler.is_compiling() or input.numel() < LARGE  # compiled, the gradient of nll_loss fuses
    full_precision = log_probs.dtype in (torch.float32, torch.float64)  # in half precision torch sums in it
    if lam.ndim == 0 and label_smoothing == 0 and full_precision and small:
        original = F.nll_loss(log_probs, target, reduction=reduction, **options)
        permuted = F.nll_loss(log_probs, partner, reduction=reduction, **options)
        return torch.lerp(permuted, original, lam.to(log_probs.dtype))

    if small:
        original = F.nll_loss(log_probs, target, reduction="none", **options)
        permuted = F.nll_loss(log_probs, partner, reduction="none", **options)
    else:
        original, permuted = _gathered_nll(log_probs, torch.stack((target, partner), 1), **options)
    losses = _interpolate(lam, original, permuted)
    weights = _mixed_class_weights(lam, index, target, weight, ignore_index, losses.dtype)
    if label_smoothing:
        kept = weights
        if weight is not None:
            kept = _mixed_class_weights(lam, index, target, None, ignore_index, losses.dtype)
            log_probs = log_probs * append_dims(weight, log_probs.ndim - 1)
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(1) * kept
    if reduction == "mean":
        losses = losses.sum() / weights.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(log_probs.dtype)


def check_class_indices(target: Tensor) -> None:
    """Raise unless ``target`` has a dtype that torch's losses of class indices take."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"expected class indices of dtype int64 or uint8, as torch's own losses, got {target.dtype}; convert "
            "integers by target.long(), and give dense targets to a loss that takes them"
        )


def uncompiled(loss: Any) -> Any:
    """What :func:`torch.compile` wraps, for a loss that it returned."""
    return loss if type(loss) is nn.CrossEntropyLoss else getattr(loss, "_orig_mod", loss)


def is_cross_entropy(loss: object) -> bool:
    """Whether ``loss`` computes torch's cross entropy, which is linear in its target."""
    loss = uncompiled(loss)
    if not isinstance(loss, nn.CrossEntropyLoss) or "forward" in loss.__dict__:
        return False
    return type(loss).forward is nn.CrossEntropyLoss.forward


def needs_hard_targets(loss: object) -> bool:
    """Whether the targets of ``loss`` are labels or logarithms, which cannot be averaged."""
    loss = uncompiled(loss)
    return isinstance(loss, LABEL_LOSSES) or getattr(loss, "log_target", False) is True


def _is_plain_cross_entropy(loss: object) -> bool:
    """Whether calling ``loss`` would do nothing else than torch's cross entropy: no subclass, no hooks."""
    if type(loss) is not nn.CrossEntropyLoss or "forward" in loss.__dict__ or _has_any_global_hook():
        return False
    hooks = loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks
    return not any(hooks)


def _unreduced(loss: Any) -> Any:
    """A shallow copy of ``loss`` with ``reduction="none"``, made by hand because Dynamo cannot trace copy.copy."""
    unreduced = object.__new__(type(loss))
    # Without the compiled call, which has the old reduction baked in.
    unreduced.__dict__.update(loss.__dict__, reduction="none", _compiled_call_impl=None)
    return unreduced


def _interpolate(lam: Tensor, original: Tensor, partner: Tensor) -> Tensor:
    """The formula in float32 at least, as torch's own reductions sum."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    return torch.lerp(partner.to(dtype), original.to(dtype), align(lam, original).to(dtype))


def _gathered_nll(log_probs: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, ...]:
    """Unreduced negative log-likelihoods of both targets by one gather: one dense gradient, not two."""
    kept = labels != ignore_index
    labels = labels.where(kept, 0)
    losses = -log_probs.gather(1, labels)
    return (losses if weight is None else losses * weight[labels]).where(kept, 0).unbind(1)


def _mixed_class_weights(
    lam: Tensor, index: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The interpolated class weights of both targets: each is 1 where none are given, and 0 where ignored."""
    kept = target != ignore_index
    weights = kept.to(dtype) if weight is None else weight[target.where(kept, 0)].where(kept, 0).to(dtype)
    return _interpolate(lam, weights, weights[index])
