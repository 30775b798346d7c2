"""Interpolated losses, and all that is known of torch's losses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # the only way to know of hooks for all modules

from ._mix import Mix, align, append_dims, as_dtype, is_class_indices, kind_of, spans, target_mix, with_partners

# These need hard labels.
LABEL_LOSSES = (nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss, nn.MultiMarginLoss, nn.NLLLoss)

# Their mean is divided by the class weights of the targets that are not ignored. The third is new in torch 2.13.
INDEX_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, getattr(nn, "LinearCrossEntropyLoss", nn.NLLLoss))

# From here on (in eager) a second dense gradient costs more than the small operations that avoid it.
LARGE = 2**22


def mix_loss(loss: Callable[[Any, Any], Tensor], input: Any, target: Any, mix: Mix) -> Tensor:
    r"""Interpolate the losses against both targets, instead of the targets.

    .. math::
        \lambda\, \ell(x, y) + (1 - \lambda)\, \ell(x, y_{\text{index}})

    For a loss linear in its target (cross entropy, BCE) this is the loss against the mixed target. For another it is
    not: for MSE the two differ by :math:`\lambda (1 - \lambda)\, \mathrm{mean}((y - y_{\text{index}})^2)`.

    One weight per batch interpolates whatever the loss returns. Weights per sample or position need unreduced losses:
    an ``nn.Module`` with a ``reduction`` is evaluated with ``"none"``, weighted, and reduced as it was told to; any
    other callable must return losses of shape ``(B, *)`` and gets them back weighted, not reduced.

    A target may come in parts: a dict or a named tuple, nested, of tensors that each have the batch first, such as
    labels for several heads, or a value and the weight of its sample. Each part is that of the partner, whatever its
    dtype. Under a ``lam`` per position all parts must be per sample.

    :class:`torch.nn.CrossEntropyLoss` on class indices goes to :func:`mix_cross_entropy`, unless it has hooks or a
    ``forward`` or ``__call__`` of its own. Its subclasses, :class:`torch.nn.NLLLoss` and
    :class:`torch.nn.LinearCrossEntropyLoss` divide their mean by the mixed class weights, as that function does. The
    compilation of a loss is ignored: compile the criterion. With weights per sample or position a shallow copy of the
    loss is called, so an attribute that it sets on itself meanwhile is lost.

    The loss is called twice, with the same input. It may change its target in place, but not its input.

    Args:
        loss: any callable of ``(input, target)``, without state of its own; never modified.
        input: first argument of the loss, the output of the model.
        target: second argument of the loss, shape ``(B, *)``, or parts of such shapes.
        mix: the draw that mixed the inputs.

    Returns:
        The loss, of the shape and floating dtype that ``loss`` itself returns; float32 for integers, as of a metric.

    Raises:
        TypeError: ``target`` or a part of it is not a tensor (lists and plain tuples may hold an entry for each sample:
            name the parts), ``mix`` is not a :class:`~mixup_nn.Mix`, or ``loss`` is a metric with state (``update`` and
            ``compute``), which two calls would count twice.
        ValueError: weights per sample or position and a loss that reduces itself, or one that takes the mean over a
            target in parts; a target or part that does not fit the mix.

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
    of_logits = isinstance(input, Tensor) and not hasattr(input, "full_tensor")  # a DTensor: wrong gradients, smoothed
    if _is_plain_cross_entropy(loss) and of_logits and is_class_indices(target):
        options: dict[str, Any] = {"reduction": loss.reduction, "label_smoothing": loss.label_smoothing}
        return mix_cross_entropy(input, target, mix, weight=loss.weight, ignore_index=loss.ignore_index, **options)
    if hasattr(loss, "update") and hasattr(loss, "compute"):  # a metric: two calls would count each sample twice
        raise TypeError(f"expected a loss without state, got {kind_of(loss)}; see docs: Guide, Accuracy while mixing")
    mix, targets = with_partners(target, mix)  # before the loss is called, which may change its target
    return _mix_losses(loss, input, targets, mix)


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
        weight: weight of each class, shape ``(C,)``, in the dtype of ``input`` (or any but float64 under autocast).
        ignore_index: target value that adds nothing to the loss or its denominator.
        reduction: ``"mean"`` (the formula above), ``"sum"`` (its numerator) or ``"none"`` (the terms of that sum).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].

    Returns:
        Shape ``()``, or that of ``target`` for ``"none"``; dtype of ``input``, or float32 under autocast.

    Raises:
        TypeError: ``target`` is not a tensor, or ``mix`` is not a :class:`~mixup_nn.Mix`.
        ValueError: shapes that do not fit each other; an unknown ``reduction``, a ``label_smoothing`` outside [0, 1].
        RuntimeError: class weights of another dtype or number; what torch refuses, such as a target of int32.

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
    _check_options(input, target, label_smoothing, small)
    labels = target, target.index_select(0, index)
    log_probs, dtype = _log_softmax(input, small)
    weight = None if weight is None else _as_class_weights(weight, input, log_probs.dtype)
    whole = lam.ndim == 0 and small and (weight is None or not label_smoothing)  # torch reduces each of the two losses
    of_each, reduction = (reduction, "none") if whole else ("none", reduction)
    losses = _nll(log_probs, labels, weight, ignore_index, label_smoothing, small, of_each)
    weights = _weights_of(target, index, weight, ignore_index, losses[0].dtype) if reduction == "mean" else None
    return as_dtype(_reduce(losses, weights, lam, reduction), dtype)


def uncompiled(loss: Any) -> Any:
    """What :func:`torch.compile` wraps, for a loss that it returned."""
    # A module is slow to miss an attribute: microseconds that the usual loss need not wait for.
    return loss if type(loss) is nn.CrossEntropyLoss else getattr(loss, "_orig_mod", loss)


def is_cross_entropy(loss: object) -> bool:
    """Whether ``loss`` computes torch's cross entropy, which is linear in its target."""
    loss = uncompiled(loss)
    known = isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward
    return known and "forward" not in loss.__dict__


def needs_hard_targets(loss: object) -> bool:
    """Whether the targets of ``loss`` are labels or logarithms, which cannot be averaged."""
    loss = uncompiled(loss)
    log_target = loss.keywords.get("log_target") if isinstance(loss, partial) else getattr(loss, "log_target", None)
    return isinstance(loss, LABEL_LOSSES) or log_target is True


def _is_plain_cross_entropy(loss: Any) -> TypeGuard[nn.CrossEntropyLoss]:
    """Whether calling ``loss`` does nothing else than torch's cross entropy: no hooks, no ``__call__`` of its own."""
    if not is_cross_entropy(loss) or type(loss).__call__ is not nn.Module.__call__:
        return False
    hooks = loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks
    return not (any(hooks) or _has_any_global_hook())


def _mix_losses(loss: Any, input: Any, targets: tuple[Any, Any], mix: Mix) -> Tensor:
    """Both losses, mixed. Weights per sample or position mix unreduced ones, and reduce as the loss was told to."""
    reduction = getattr(loss, "reduction", None) if mix.lam.ndim and isinstance(loss, nn.Module) else None
    unreduced = loss if reduction is None else _unreduced(loss)
    losses = [unreduced(input, y) for y in targets]
    if mix.lam.ndim:
        _check_unreduced(losses[0], mix, loss)
    weights = _weights_of_mean(loss, targets[0], mix.index, losses[0].dtype) if reduction == "mean" else None
    mixed = _reduce(losses, weights, mix.lam, reduction or "none")
    return as_dtype(mixed, losses[0].dtype) if losses[0].is_floating_point() else mixed


def _unreduced(loss: Any) -> Any:
    """A shallow copy of ``loss`` with ``reduction="none"``, made by hand because Dynamo cannot trace copy.copy."""
    unreduced = object.__new__(type(loss))
    # Without the compiled call, which has the old reduction baked in.
    unreduced.__dict__.update(loss.__dict__, reduction="none", _compiled_call_impl=None)
    return unreduced


def _check_unreduced(losses: Tensor, mix: Mix, loss: object) -> None:
    """Raise unless the loss returned one value per sample, or per position of ``lam``."""
    sizes, batch_size, spatial = tuple(losses.shape), mix.index.shape[0], tuple(mix.lam.shape[2:])
    if sizes[:1] != (batch_size,) or not (not spatial or spans(spatial, sizes[1:]) or spans(spatial, sizes[2:])):
        expected = f"one loss per sample or position of mix.lam, {(batch_size, *spatial)}"
        raise ValueError(f"expected {expected}, got {sizes} from {kind_of(loss)}; see docs: Criterion, Reductions")


def _interpolate(pair: Sequence[Tensor], lam: Tensor) -> Tensor:
    """The formula, on what belongs to the samples and to their partners; in float32 at least, as torch's own sums."""
    original, permuted = (_wide(value) for value in pair)
    lam = lam if lam.device == original.device else lam.to(original.device)  # of a target in parts
    return torch.lerp(permuted, original, align(lam, original))


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else as_dtype(value, torch.float32)


def _reduce(losses: Sequence[Tensor], weights: Sequence[Tensor] | None, lam: Tensor, reduction: str) -> Tensor:
    """The reduction of the mixed losses; their mean is divided by the mixed ``weights`` where there are any."""
    if weights is not None and lam.ndim == 0:  # each mean with its own denominator
        return _interpolate([each.sum() / own.sum() for each, own in zip(losses, weights, strict=True)], lam)
    mixed = _interpolate(losses, lam)
    if reduction == "mean":
        return mixed.mean() if weights is None else mixed.sum() / _interpolate(weights, lam).sum()
    if reduction in ("sum", "batchmean"):
        return mixed.sum() / (mixed.shape[0] if reduction == "batchmean" else 1)
    if reduction != "none":
        raise ValueError(f"expected reduction to be 'none', 'mean', 'sum' or 'batchmean', got {reduction!r}")
    return mixed


def _weights_of_mean(loss: Any, target: Any, index: Tensor, dtype: torch.dtype) -> Sequence[Tensor] | None:
    """What a loss divides its mean by, for both targets; None for the number of its elements."""
    if isinstance(loss, INDEX_LOSSES) and isinstance(target, Tensor):
        return _weights_of(target, index, loss.weight, loss.ignore_index, dtype) if is_class_indices(target) else None
    if not isinstance(target, Tensor) or getattr(loss, "ignore_index", None) is not None:
        expected = "reduction 'sum' or 'none' of a loss whose mean may not be over all samples"
        raise ValueError(f"expected {expected}, got 'mean' of {kind_of(loss)}; see docs: Criterion, Reductions")
    return None


def _weights_of(
    target: Tensor, index: Tensor, weight: Tensor | None, ignore_index: int | None, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The class weights of both targets: 1 where none are given, and 0 where ignored."""
    labels = target.long()  # of bytes, -100 would be 156
    kept = labels != (-100 if ignore_index is None else ignore_index)
    own = kept if weight is None else weight[labels.where(kept, 0)].where(kept, 0)
    own = own.to(dtype)
    return own, own.index_select(0, index)


def _check_options(input: Tensor, target: Tensor, label_smoothing: float, small: bool) -> None:
    """Raise for what torch would not refuse: of large logits, sizes that gather a part; a loss that is none."""
    if target.ndim + 1 != input.ndim or not (small or target.shape == input.shape[:1] + input.shape[2:]):
        expected = f"class indices of shape (B, *) for logits (B, C, *), here {tuple(input.shape)}"
        raise ValueError(f"expected {expected}, got {target.dtype} {tuple(target.shape)}; see docs: Criterion, Targets")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")


def _log_softmax(input: Tensor, small: bool) -> tuple[Tensor, torch.dtype]:
    """The log-probabilities, and the dtype of their loss: float32 under autocast, that of ``input`` elsewhere."""
    if input.dtype not in (torch.float16, torch.bfloat16):
        return input.log_softmax(1), input.dtype
    autocast = _is_autocast(input)
    # Large ones keep their dtype, or memory grows by two thirds; compiled ones are computed in float32 anyway.
    in_float32 = autocast or (small and not torch.compiler.is_compiling())
    return input.log_softmax(1, dtype=torch.float32 if in_float32 else None), torch.float32 if autocast else input.dtype


def _as_class_weights(weight: Tensor, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Class weights in the ``dtype`` of the log-probabilities; another than the logits' torch takes under autocast."""
    other = weight.dtype != input.dtype and (torch.float64 in (weight.dtype, input.dtype) or not _is_autocast(input))
    if other or weight.shape != input.shape[1:2]:
        raise RuntimeError(f"expected class weights (C,) of {input.dtype}, got {weight.dtype} {tuple(weight.shape)}")
    return as_dtype(weight, dtype)


def _is_autocast(value: Tensor) -> bool:
    return not value.is_meta and torch.is_autocast_enabled(value.device.type)  # asked of meta tensors, torch raises


def _nll(
    log_probs: Tensor, labels: tuple[Tensor, Tensor], weight: Tensor | None, ignore_index: int, label_smoothing: float,
    small: bool, reduction: str,
) -> Sequence[Tensor]:  # fmt: skip
    """Losses of both targets; of large logits unreduced and by one gather, with one dense gradient.

    Smoothing commutes with picking a class, so it is done once: the mean over all classes enters the term of each.
    """
    if small:
        if label_smoothing:
            terms, weight = _weighted(log_probs, weight), None
            log_probs = torch.lerp(terms, terms.mean(1, keepdim=True), label_smoothing)
        return [F.nll_loss(log_probs, y, weight, None, ignore_index, None, reduction) for y in labels]
    both = torch.stack(labels, 1).long()
    kept = both != ignore_index
    both = both.where(kept, 0)
    picked = _wide(log_probs.gather(1, both))
    picked = picked if weight is None else picked * weight[both]
    if label_smoothing:
        uniform = _weighted(log_probs, weight).mean(1, keepdim=True, dtype=picked.dtype)
        picked = torch.lerp(picked, uniform, label_smoothing)
    return (-picked).where(kept, 0).unbind(1)


def _weighted(log_probs: Tensor, weight: Tensor | None) -> Tensor:
    return log_probs if weight is None else log_probs * append_dims(weight, log_probs.ndim - 1)
