"""Interpolated losses, and all that is known of torch's losses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # the only way to know of hooks for all modules

from ._mix import Mix, align, append_dims, as_dtype, is_floating, kind_of, spans, target_mix

# These need hard labels.
LABEL_LOSSES = (nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss, nn.MultiMarginLoss, nn.NLLLoss)

# Their mean is divided by the class weights of the targets that are not ignored. The third is new in torch 2.13.
INDEX_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, getattr(nn, "LinearCrossEntropyLoss", nn.NLLLoss))

# From here on (in eager) a second dense gradient costs more than the small operations that avoid it.
LARGE = 2**22

Labels = tuple[Tensor, Tensor]  # of the samples, and of their partners


def mix_loss(loss: Callable[[Any, Tensor], Tensor], input: Any, target: Tensor, mix: Mix) -> Tensor:
    r"""Interpolate the losses against both targets, instead of the targets.

    .. math::
        \lambda\, \ell(x, y) + (1 - \lambda)\, \ell(x, y_{\text{index}})

    For a loss linear in its target (cross entropy, BCE) this is the loss against the mixed target. For another it is
    not: for MSE the two differ by :math:`\lambda (1 - \lambda)\, \mathrm{mean}((y - y_{\text{index}})^2)`.

    One weight per batch interpolates whatever the loss returns. Weights per sample or position need unreduced losses:
    an ``nn.Module`` with a ``reduction`` is evaluated with ``"none"``, weighted, and reduced as it was told to; any
    other callable must return losses of shape ``(B, *)`` and gets them back weighted, not reduced.

    :class:`torch.nn.CrossEntropyLoss` on class indices goes to :func:`mix_cross_entropy`, unless it has hooks or is
    subclassed. Its subclasses, :class:`torch.nn.NLLLoss` and :class:`torch.nn.LinearCrossEntropyLoss` divide their mean
    by the mixed class weights, as that function does. The compilation of a loss is ignored: compile the criterion. With
    weights per sample or position a shallow copy of the loss is called, so what it sets on itself meanwhile is lost.

    The loss is called twice, with the same input. It may change its target in place, but not its input.

    Args:
        loss: any callable of ``(input, target)``, without state of its own; never modified.
        input: first argument of the loss, the output of the model.
        target: second argument of the loss, shape ``(B, *)``.
        mix: the draw that mixed the inputs.

    Returns:
        The loss, of the shape and floating dtype that ``loss`` itself returns; float32 for integers, as of a metric.

    Raises:
        TypeError: ``target`` is not a tensor, ``mix`` is not a :class:`~mixup_nn.Mix`, or ``loss`` is a metric with
            state (``update`` and ``compute``), which two calls would count twice.
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
    if _is_plain_cross_entropy(loss) and not is_floating(target):
        options: dict[str, Any] = {"reduction": loss.reduction, "label_smoothing": loss.label_smoothing}
        return mix_cross_entropy(input, target, mix, weight=loss.weight, ignore_index=loss.ignore_index, **options)
    if hasattr(loss, "update") and hasattr(loss, "compute"):  # a metric: two calls would count each sample twice
        raise TypeError(f"expected a loss without state, got {kind_of(loss)}; see docs: Guide, Accuracy while mixing")
    lam, index = target_mix(target, mix)
    labels = target, target.index_select(0, index)  # before the loss is called, which may change its target
    reduction = getattr(loss, "reduction", None) if lam.ndim and isinstance(loss, nn.Module) else None
    unreduced = loss if reduction is None else _unreduced(loss)
    losses = [unreduced(input, y) for y in labels]
    if lam.ndim:
        _check_unreduced(losses[0], lam, target, loss)
    mixed = _interpolate(losses, lam)
    if reduction is not None:
        mixed = _reduce(mixed, _weights_of_mean(loss, labels, lam, mixed.dtype), reduction)
    return mixed.to(losses[0].dtype) if losses[0].is_floating_point() else mixed


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

    with the class weight :math:`w_y`, 1 if not given and 0 at ``ignore_index``. Options mean what they mean in
    :func:`torch.nn.functional.cross_entropy`, and ``lam = 1`` gives its value where both losses are finite. One weight
    per batch interpolates torch's two means, each with its own denominator; that is the formula above where ``y'`` is a
    permutation of ``y``, not where partners repeat.

    Args:
        input: logits, shape ``(B, C)`` or ``(B, C, *)``.
        target: class indices, shape ``(B,)`` or ``(B, *)``; values in ``range(C)`` or ``ignore_index``.
        mix: the draw that mixed the inputs.
        weight: weight of each class, shape ``(C,)``, in the dtype of ``input``.
        ignore_index: target value that adds nothing to the loss or its denominator.
        reduction: ``"mean"`` (the formula above), ``"sum"`` (its numerator) or ``"none"`` (the terms of that sum).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].

    Returns:
        Shape ``()``, or that of ``target`` for ``"none"``; dtype of ``input``, or float32 under autocast.

    Raises:
        TypeError: ``target`` is not a tensor, or ``mix`` is not a :class:`~mixup_nn.Mix`.
        ValueError: shapes that do not fit each other; an unknown ``reduction``, a ``label_smoothing`` outside [0, 1].
        RuntimeError: what torch refuses, such as a target that is not int64 or class weights of another dtype.

    Example:
        >>> import torch
        >>> from mixup_nn import Mix
        >>> from mixup_nn.functional import mix_cross_entropy
        >>> mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
        >>> mix_cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), mix)
        tensor(0.6269)
    """
    lam, index = target_mix(target, mix)
    small = torch.compiler.is_compiling() or input.numel() < LARGE  # compiled, the gradient of nll_loss fuses
    if target.ndim + 1 != input.ndim or not (small or target.shape == input.shape[:1] + input.shape[2:]):
        expected = f"class indices of shape (B, *) for logits (B, C, *), here {tuple(input.shape)}"
        raise ValueError(f"expected {expected}, got {target.dtype} {tuple(target.shape)}; see docs: Criterion, Targets")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")
    labels = target, target.index_select(0, index)
    log_probs, dtype = _log_softmax(input, small)
    if weight is not None and weight.dtype == input.dtype:  # another dtype torch refuses
        weight = weight.to(log_probs.dtype)

    if lam.ndim == 0 and small and (weight is None or not label_smoothing):
        if label_smoothing:
            log_probs = torch.lerp(log_probs, log_probs.mean(1, keepdim=True), label_smoothing)
        own, partner = [F.nll_loss(log_probs, y, weight, None, ignore_index, None, reduction) for y in labels]
        return as_dtype(torch.lerp(partner, own, align(lam, own)), dtype)
    losses = _nll(log_probs, labels, weight, ignore_index, label_smoothing, small)
    if reduction != "mean":
        return _reduce(_interpolate(losses, lam), None, reduction).to(dtype)
    weights = _class_weights(labels, weight, ignore_index, losses[0].dtype)
    if lam.ndim:
        return _reduce(_interpolate(losses, lam), _interpolate(weights, lam), reduction).to(dtype)
    means = [_reduce(*terms, reduction) for terms in zip(losses, weights, strict=True)]  # each with its denominator
    return _interpolate(means, lam).to(dtype)


def uncompiled(loss: Any) -> Any:
    """What :func:`torch.compile` wraps, for a loss that it returned."""
    # A module is slow to miss an attribute: microseconds that the usual loss need not wait for.
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
    if isinstance(loss, partial):
        return loss.keywords.get("log_target", False) is True
    return isinstance(loss, LABEL_LOSSES) or getattr(loss, "log_target", False) is True


def _is_plain_cross_entropy(loss: object) -> TypeGuard[nn.CrossEntropyLoss]:
    """Whether calling ``loss`` would do nothing else than torch's cross entropy: no subclass, no hooks."""
    if type(loss) is not nn.CrossEntropyLoss or "forward" in loss.__dict__:
        return False
    hooks = loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks
    return not (any(hooks) or _has_any_global_hook())


def _unreduced(loss: Any) -> Any:
    """A shallow copy of ``loss`` with ``reduction="none"``, made by hand because Dynamo cannot trace copy.copy."""
    unreduced = object.__new__(type(loss))
    # Without the compiled call, which has the old reduction baked in.
    unreduced.__dict__.update(loss.__dict__, reduction="none", _compiled_call_impl=None)
    return unreduced


def _check_unreduced(losses: Tensor, lam: Tensor, target: Tensor, loss: object) -> None:
    """Raise unless the loss returned one value per sample, or per position of ``lam``."""
    sizes, spatial = tuple(losses.shape), tuple(lam.shape[2:])
    if sizes[:1] != target.shape[:1] or not (not spatial or spans(spatial, sizes[1:]) or spans(spatial, sizes[2:])):
        expected = f"one loss per weight of mix.lam, {(target.shape[0], *spatial)}"
        raise ValueError(f"expected {expected}, got {sizes} from {kind_of(loss)}; see docs: Criterion, Reductions")


def _interpolate(pair: Sequence[Tensor], lam: Tensor) -> Tensor:
    """The formula, on what belongs to the samples and to their partners; in float32 at least, as torch's own sums."""
    original, permuted = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in pair)
    return torch.lerp(permuted, original, align(lam, original))


def _reduce(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.mean() if weights is None else losses.sum() / weights.sum()
    if reduction in ("sum", "batchmean"):
        return losses.sum() / (losses.shape[0] if reduction == "batchmean" else 1)
    if reduction != "none":
        raise ValueError(f"expected reduction to be 'none', 'mean', 'sum' or 'batchmean', got {reduction!r}")
    return losses


def _weights_of_mean(loss: Any, labels: Labels, lam: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What a loss divides its mean by, weighted as its losses are; None for the number of its elements."""
    if loss.reduction != "mean" or (isinstance(loss, INDEX_LOSSES) and is_floating(labels[0])):
        return None
    if isinstance(loss, INDEX_LOSSES):
        return _interpolate(_class_weights(labels, loss.weight, loss.ignore_index, dtype), lam)
    if getattr(loss, "ignore_index", None) is not None:
        expected = "a loss whose mean over ignored targets is known"
        raise ValueError(f"expected {expected}, got {type(loss).__name__}; see docs: Criterion, Reductions")
    return None


def _class_weights(
    labels: Labels, weight: Tensor | None, ignore_index: int | None, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The class weights of both targets: 1 where none are given, and 0 where ignored."""
    indices = [y.long() for y in labels]  # of bytes, -100 would be 156
    kept = [y != (-100 if ignore_index is None else ignore_index) for y in indices]
    if weight is None:
        return [mask.to(dtype) for mask in kept]
    return [weight[y.where(mask, 0)].where(mask, 0).to(dtype) for y, mask in zip(indices, kept, strict=True)]


def _log_softmax(input: Tensor, small: bool) -> tuple[Tensor, torch.dtype]:
    """The log-probabilities, and the dtype of their loss: float32 under autocast, that of ``input`` elsewhere."""
    if input.dtype not in (torch.float16, torch.bfloat16):
        return input.log_softmax(1), input.dtype
    autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)  # asked of meta tensors, torch raises
    # Large ones keep their dtype, or memory grows by two thirds; compiled ones are computed in float32 anyway.
    in_float32 = autocast or (small and not torch.compiler.is_compiling())
    return input.log_softmax(1, dtype=torch.float32 if in_float32 else None), torch.float32 if autocast else input.dtype


def _nll(
    log_probs: Tensor, labels: Labels, weight: Tensor | None, ignore_index: int, label_smoothing: float, small: bool
) -> Sequence[Tensor]:
    """Unreduced losses of both targets, in float32 at least; of large logits by one gather, with one dense gradient.

    Smoothing commutes with picking a class, so it is done once: the mean over all classes enters the term of each.
    """
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    if small:
        if label_smoothing:
            terms, weight = _weighted(log_probs, weight), None
            log_probs = torch.lerp(terms, terms.mean(1, keepdim=True), label_smoothing)
        return [F.nll_loss(log_probs, y, weight, None, ignore_index, None, "none").to(dtype) for y in labels]
    both = torch.stack(labels, 1)
    kept = both != ignore_index
    both = both.where(kept, 0)
    picked = log_probs.gather(1, both).to(dtype)
    picked = picked if weight is None else picked * weight[both]
    if label_smoothing:
        picked = torch.lerp(picked, _weighted(log_probs, weight).mean(1, keepdim=True, dtype=dtype), label_smoothing)
    return (-picked).where(kept, 0).unbind(1)


def _weighted(log_probs: Tensor, weight: Tensor | None) -> Tensor:
    return log_probs if weight is None else log_probs * append_dims(weight, log_probs.ndim - 1)
