"""Interpolated losses, and all that is known of torch's losses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # the only way to know of hooks for all modules

from ._mix import Mix, align, append_dims, check_tensor, spans, target_mix

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
        TypeError: ``target`` or the loss is not a tensor, ``mix`` is not a :class:`~mixup_nn.Mix`, or ``loss`` is a
            metric with state (``update`` and ``compute``), which two calls would count twice.
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
    _check_two_calls(loss, target)
    lam, index = target_mix(target, mix)
    partner = target[index]  # before the loss is called, which may change its target
    reduction = getattr(loss, "reduction", None) if lam.ndim and isinstance(loss, nn.Module) else None
    if reduction is not None:
        loss = _unreduced(loss)
    losses = loss(input, target), loss(input, partner)
    _check_returned(losses[0], lam, loss, input, target)
    mixed = _interpolate(losses, lam)
    if reduction is not None:
        weights = _weights_of_mean(loss, (target, partner), lam, mixed.dtype) if reduction == "mean" else None
        mixed = _reduce(mixed, weights, reduction)
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
        TypeError: ``target`` is not int64, ``input`` is not a tensor, ``weight`` has another dtype, or ``mix`` is not a
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
    lam, index = target_mix(target, mix)
    check_tensor("input", input)
    check_class_indices(target)
    _check_options(input, target, reduction, label_smoothing)
    input, weight = _in_dtype_of_loss(input, weight)
    log_probs, labels = input.log_softmax(1), (target, target[index])
    small = torch.compiler.is_compiling() or input.numel() < LARGE  # compiled, the gradient of nll_loss fuses
    full_precision = log_probs.dtype in (torch.float32, torch.float64)  # in half precision torch sums in it
    if lam.ndim == 0 and label_smoothing == 0 and full_precision and small:
        original, permuted = (F.nll_loss(log_probs, y, weight, None, ignore_index, None, reduction) for y in labels)
        return torch.lerp(permuted, original, lam.to(log_probs.dtype))

    losses = _nll(log_probs, labels, weight, ignore_index, small)
    if label_smoothing:
        uniform = _nll_of_uniform(log_probs, labels, weight, ignore_index)
        losses = [(1 - label_smoothing) * a + label_smoothing * b for a, b in zip(losses, uniform, strict=True)]
    weights = _class_weights(labels, weight, ignore_index, losses[0].dtype)
    if lam.ndim == 0:  # each mean has its own denominator, as above
        value = _interpolate([_reduce(*terms, reduction) for terms in zip(losses, weights, strict=True)], lam)
    else:
        value = _reduce(_interpolate(losses, lam), _interpolate(weights, lam), reduction)
    return value.to(log_probs.dtype)


def check_class_indices(target: Tensor) -> None:
    """Raise unless ``target`` has the dtype that all of torch's losses of class indices take."""
    if target.dtype != torch.int64:
        fix = "convert integers by target.long(), and give dense targets to a loss that takes them"
        raise TypeError(f"expected class indices of dtype int64, got {target.dtype}; {fix}")


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
    return isinstance(loss, LABEL_LOSSES) or getattr(loss, "log_target", False) is True


def _is_plain_cross_entropy(loss: object) -> bool:
    """Whether calling ``loss`` would do nothing else than torch's cross entropy: no subclass, no hooks."""
    if type(loss) is not nn.CrossEntropyLoss or "forward" in loss.__dict__:
        return False
    hooks = loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks
    return not (any(hooks) or _has_any_global_hook())


def _check_two_calls(loss: Any, target: object) -> None:
    """Raise where a second call would count twice, or torch would refuse the target."""
    if hasattr(loss, "update") and hasattr(loss, "compute"):
        got = f"{type(loss).__name__} with update and compute, which two calls would count twice"
        raise TypeError(f"expected a loss without state, got {got}; give its functional form, one value per sample")
    if isinstance(loss, nn.NLLLoss) and isinstance(target, Tensor):
        check_class_indices(target)


def _check_returned(losses: Any, lam: Tensor, loss: Any, input: Any, target: Tensor) -> None:
    """Raise unless ``lam`` can weight what the loss returned."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"expected loss to return a tensor, got {type(losses).__name__}; wrap it to return that alone")
    got, spatial = tuple(losses.shape), tuple(lam.shape[2:])
    if lam.ndim and losses.shape[:1] != target.shape[:1]:
        raise ValueError(
            f"expected a loss per sample, of shape ({target.shape[0]}, ...), for one lam per sample or position, got "
            f"{got}; {_unreduced_form(loss, input)}, or draw one lam per batch"
        )
    if spatial and not (spans(spatial, got[1:]) or spans(spatial, got[2:])):
        fix = "for a loss of whole samples, such as Dice, mix the targets: interpolate_loss=False, or docs/recipes.md"
        raise ValueError(f"expected a loss per position of mix.lam, {spatial}, got losses of shape {got}; {fix}")


def _unreduced_form(loss: Any, input: Any) -> str:
    """How to make this loss return one value per sample."""
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    inner = [
        type(part).__name__ for part in modules if part is not loss and getattr(part, "reduction", "none") != "none"
    ]
    if inner:
        return f"make the {inner[0]} inside {type(loss).__name__} with reduction='none'"
    if hasattr(loss, "reduction") and not isinstance(loss, nn.Module):
        return "set its reduction to 'none', and reduce what comes back"
    dense = isinstance(input, Tensor) and not needs_hard_targets(loss)
    fix = "let it return one value per sample, as with reduction='none'"
    return f"{fix}, or, if it takes dense targets, use interpolate_loss=False" if dense else fix


def _check_options(input: Tensor, target: Tensor, reduction: str, label_smoothing: float) -> None:
    """Raise unless logits and class indices fit each other, and the options are those of torch."""
    if input.ndim == 1 or target.shape != input.shape[:1] + input.shape[2:]:
        got = f"{tuple(input.shape)} and {tuple(target.shape)}"
        fix = "; one-hot targets must be floats" if target.shape == input.shape else ""
        raise ValueError(f"expected input of shape (B, C, *) and class indices of shape (B, *), got {got}{fix}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")


def _in_dtype_of_loss(input: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits and class weights of one dtype: float32 under autocast, where log_softmax on the CPU would not be."""
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # asked of meta tensors, torch raises
        input = input.to(torch.promote_types(input.dtype, torch.float32))
        weight = None if weight is None else weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight is not None and (weight.dtype != input.dtype or weight.requires_grad):
        got = f"{weight.dtype}{' with one' if weight.requires_grad else ''}"
        raise TypeError(
            f"expected class weights of the dtype of the logits, {input.dtype}, without gradient, got {got}"
        )
    return input, weight


def _unreduced(loss: Any) -> Any:
    """A shallow copy of ``loss`` with ``reduction="none"``, made by hand because Dynamo cannot trace copy.copy."""
    unreduced = object.__new__(type(loss))
    # Without the compiled call, which has the old reduction baked in.
    unreduced.__dict__.update(loss.__dict__, reduction="none", _compiled_call_impl=None)
    return unreduced


def _interpolate(pair: Sequence[Tensor], lam: Tensor) -> Tensor:
    """The formula, on what belongs to the samples and to their partners; in float32 at least, as torch's own sums."""
    original, permuted = pair
    dtype = torch.promote_types(original.dtype, torch.float32)
    return torch.lerp(permuted.to(dtype), original.to(dtype), align(lam, original).to(dtype))


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
    if isinstance(loss, INDEX_LOSSES):
        dense = labels[0].is_floating_point()
        return None if dense else _interpolate(_class_weights(labels, loss.weight, loss.ignore_index, dtype), lam)
    if getattr(loss, "ignore_index", None) is not None:
        fix = "make it with reduction='none' and reduce what comes back, or draw one lam per batch"
        raise ValueError(f"expected a loss whose mean over ignored targets is known, got {type(loss).__name__}; {fix}")
    return None


def _class_weights(
    labels: Labels, weight: Tensor | None, ignore_index: int | None, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The class weights of both targets: 1 where none are given, and 0 where ignored."""
    kept = [y != (-100 if ignore_index is None else ignore_index) for y in labels]
    if weight is None:
        return [mask.to(dtype) for mask in kept]
    return [weight[y.where(mask, 0)].where(mask, 0).to(dtype) for y, mask in zip(labels, kept, strict=True)]


def _nll(log_probs: Tensor, labels: Labels, weight: Tensor | None, ignore_index: int, small: bool) -> Sequence[Tensor]:
    """Unreduced losses of both targets, in float32 at least; of large logits by one gather, with one dense gradient."""
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    if small:
        return [F.nll_loss(log_probs, y, weight, None, ignore_index, None, "none").to(dtype) for y in labels]
    both = torch.stack(labels, 1)
    kept = both != ignore_index
    both = both.where(kept, 0)
    gathered = -log_probs.gather(1, both).to(dtype)
    return (gathered if weight is None else gathered * weight[both]).where(kept, 0).unbind(1)


def _nll_of_uniform(log_probs: Tensor, labels: Labels, weight: Tensor | None, ignore_index: int) -> Sequence[Tensor]:
    """Unreduced losses of the uniform target that smooths; 0 where ignored, whatever the logits hold there."""
    if weight is not None:
        log_probs = log_probs * append_dims(weight, log_probs.ndim - 1)
    losses = -log_probs.mean(1, dtype=torch.promote_types(log_probs.dtype, torch.float32))
    return [losses.where(y != ignore_index, 0) for y in labels]
