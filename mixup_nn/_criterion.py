"""The :class:`MixUpCriterion` module: apply the mix to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import functional
from ._mixup import MixUp
from .sampling import Mix

# Their targets are labels, and nothing between two labels is one.
LABEL_LOSSES = (nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss, nn.MultiMarginLoss, nn.NLLLoss)


class MixUpCriterion(nn.Module):
    r"""Wraps a loss so that it takes the targets of a mixed batch.

    With ``interpolate_loss=True`` the two losses are interpolated, otherwise the two targets:

    .. math::
        \lambda\, \ell(x, y) + (1 - \lambda)\, \ell(x, y_{\text{index}})
        \qquad \text{or} \qquad
        \ell(x, \lambda y + (1 - \lambda)\, y_{\text{index}})

    For a loss linear in its target (cross entropy, BCE) both are the same number; for MSE they differ by
    :math:`\lambda (1 - \lambda)\, \mathrm{mean}((y - y_{\text{index}})^2)`.

    Which mix is used: the one passed; else the ``last_mix`` of the linked module while that module is in training
    mode; else none, and the result is exactly ``loss(input, target)``. So one criterion serves training and
    validation. A model called twice before the loss leaves the latest draw; for an older one, keep and pass its mix.

    Reductions, class weights and ``ignore_index`` are those of the loss; :func:`functional.mixup_loss` says how a
    per-sample ``lam`` meets them, :func:`functional.mixup_cross_entropy` gives the weighted mean.

    Args:
        loss: any callable of ``(input, target)``, such as ``nn.CrossEntropyLoss()``; never modified.
        mixup: the :class:`MixUp` to follow. The link is no submodule: it adds nothing to ``state_dict``, and
            ``criterion.eval()`` does not switch the linked module.
        interpolate_loss: True interpolates the losses. False interpolates the targets, and makes integer targets
            dense, with ``input.shape[1]`` classes in the dtype of ``input``, for a loss that takes dense targets.
            None (default) interpolates the loss for integer targets and the target for floating ones; always the
            loss for torch's losses of labels (hinge embedding, multi-margin, NLL) and of logarithms
            (``nn.KLDivLoss(log_target=True)``).

    Shape:
        - input: output of the model, whatever ``loss`` takes; ``(B, C, *)`` for class indices made dense.
        - target: ``(B, *)``.
        - output: what ``loss`` returns.

    Raises:
        TypeError: ``loss`` is not callable, or a class; ``mixup`` is no :class:`MixUp`, or ``interpolate_loss`` no
            bool; on call with a mix, ``target`` is no tensor or ``mix`` no :class:`Mix`.
        ValueError: ``interpolate_loss=False`` with a loss of labels or logarithms; on call, as
            :func:`functional.mixup_loss` and :func:`functional.mix_targets`.
        RuntimeError: the linked module is in training mode but has drawn nothing yet.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixup_nn import MixUp, MixUpCriterion
        >>> mixup, head = MixUp(alpha=1.0), nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> criterion = MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=0.1), mixup)
        >>> loss = criterion(head(mixup(x)), y)

        Any loss works, also on dense targets and without a link:

        >>> criterion = MixUpCriterion(nn.MSELoss())
        >>> mix = mixup.sample(x)
        >>> loss = criterion(head(mixup(x, mix)), torch.randn(8, 3), mix)

    Reference:
        https://arxiv.org/abs/1710.09412
    """

    mixup: MixUp | None

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        mixup: MixUp | None = None,
        *,
        interpolate_loss: bool | None = None,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"MixUpCriterion: expected loss to be callable, got {type(loss).__name__}")
        if isinstance(loss, type):
            raise TypeError(f"MixUpCriterion: expected a loss, got the class {loss.__name__}; use {loss.__name__}()")
        if interpolate_loss not in (None, True, False):
            raise TypeError(
                f"MixUpCriterion: expected interpolate_loss to be True, False or None, got {interpolate_loss!r}"
            )
        if interpolate_loss is False and _has_unmixable_targets(loss):
            raise ValueError(
                "MixUpCriterion: expected a loss that takes dense targets with interpolate_loss=False, got "
                f"{type(loss).__name__} of labels or logarithms; use interpolate_loss=True"
            )
        self.loss = loss
        self.mixup = mixup
        self.interpolate_loss = interpolate_loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "mixup":
            super().__setattr__(name, value)
        elif value is None or isinstance(value, MixUp):
            object.__setattr__(self, name, value)  # past nn.Module, which would make the link a submodule
        else:
            raise TypeError(
                f"MixUpCriterion: expected mixup to be a MixUp, got {type(value).__name__}; "
                "link the MixUp module itself, not the model that holds it"
            )

    def forward(self, input: Tensor, target: Tensor, mix: Mix | None = None) -> Tensor:
        if mix is None:
            mix = self._linked_mix()
        if mix is None:
            return self.loss(input, target)
        functional.check_tensor("MixUpCriterion", "target", target)
        interpolate_loss = self.interpolate_loss
        if interpolate_loss is None:
            interpolate_loss = not target.is_floating_point() or _has_unmixable_targets(self.loss)
        if interpolate_loss:
            return functional.mixup_loss(self.loss, input, target, mix)
        if target.is_floating_point():
            return self.loss(input, functional.mix_targets(target, mix))
        dense = functional.mix_targets(target, mix, input.shape[1] if input.ndim > 1 else None)
        return self.loss(input, dense.to(input.dtype))

    def _linked_mix(self) -> Mix | None:
        if self.mixup is None or not self.mixup.training:
            return None
        if self.mixup.last_mix is None:
            raise RuntimeError(
                "MixUpCriterion: expected the linked MixUp to have drawn a mix, got None; "
                "call the model in training mode before the loss, or pass the mix"
            )
        return self.mixup.last_mix

    def extra_repr(self) -> str:
        linked = "None" if self.mixup is None else f"MixUp({self.mixup.extra_repr()})"
        return f"mixup={linked}, interpolate_loss={self.interpolate_loss}"


def _has_unmixable_targets(loss: Any) -> bool:
    """Whether the targets of ``loss`` are labels or logarithms, of which no mixture is one."""
    loss = getattr(loss, "_orig_mod", loss)  # what torch.compile wraps
    return isinstance(loss, LABEL_LOSSES) or getattr(loss, "log_target", False) is True
