"""The :class:`MixUpCriterion` module: apply the mix to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._losses import is_cross_entropy, mix_loss, needs_hard_targets
from ._mix import Mix, check_tensor
from ._modules import Mixer
from .functional import mix_targets

WAYS_OUT = (
    "to validate, call criterion.loss(output, target), mixer.eval() or criterion.eval(); for a metric, or the loss of "
    "another forward pass, pass its mix: criterion(output, target, mix)"
)


class MixUpCriterion(nn.Module):
    r"""Wraps a loss so that it takes the targets of a mixed batch.

    With the output :math:`\hat y` of the model, ``interpolate_loss=True`` interpolates the losses, False the targets:

    .. math::
        \lambda\, \ell(\hat y, y) + (1 - \lambda)\, \ell(\hat y, y_{\text{index}})
        \qquad \text{or} \qquad
        \ell(\hat y, \lambda y + (1 - \lambda)\, y_{\text{index}})

    Both give the same value for a loss that is linear in its target (:func:`functional.mix_loss` has the difference for
    MSE). :class:`torch.nn.CrossEntropyLoss` on class indices is linear, and takes one path for all settings,
    :func:`functional.mix_cross_entropy`.

    Which mix is used: the one passed; else the ``last_mix`` of the linked mixer while both are in training mode; else
    none, and the result is exactly ``loss(input, target)``. So one criterion serves training and validation. The
    linked mix is that of the latest forward pass of the mixer; for the loss of an older one, pass its mix.

    Reductions, class weights and ``ignore_index`` are those of the loss; :func:`functional.mix_loss` says how weights
    per sample or position meet them.

    Args:
        loss: any callable of ``(input, target)``, such as ``nn.CrossEntropyLoss()``; never modified.
        mixer: the :class:`Mixer` to follow. The link is not a submodule: it adds nothing to ``state_dict``, and
            ``criterion.eval()`` does not switch the mixer.
        interpolate_loss: True interpolates the losses. False interpolates the targets, and makes integer targets
            dense, with ``input.shape[1]`` classes in the dtype of ``input``, for a loss that takes dense targets.
            None (default) interpolates the loss for integer targets and the target for floating ones; always the
            loss for torch's losses of hard labels (hinge embedding, multi-margin, NLL) and of logarithms
            (``nn.KLDivLoss(log_target=True)``).

    Shape:
        - input: output of the model, whatever ``loss`` takes; ``(B, C, *)`` for class indices made dense.
        - target: ``(B, *)``.
        - output: what ``loss`` returns.

    Raises:
        TypeError: ``loss`` is not callable, or a class; ``mixer`` is not a :class:`Mixer`, or ``interpolate_loss`` not
            a bool; on call with a mix, ``target`` is not a tensor or ``mix`` not a :class:`Mix`.
        ValueError: ``interpolate_loss=False`` with a loss of hard labels or logarithms; on call, as
            :func:`functional.mix_loss` and :func:`functional.mix_targets`.
        RuntimeError: mixer and criterion are in training mode, but the mixer has not mixed a batch yet, or gradients
            are off.

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

    mixer: Mixer | None

    def __init__(
        self, loss: Callable[[Any, Tensor], Tensor], mixer: Mixer | None = None, *, interpolate_loss: bool | None = None
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"expected loss to be callable, got {type(loss).__name__}")
        if isinstance(loss, type):
            raise TypeError(f"expected a loss, got the class {loss.__name__}; use {loss.__name__}()")
        if interpolate_loss is not None and not isinstance(interpolate_loss, bool):
            raise TypeError(f"expected interpolate_loss to be True, False or None, got {interpolate_loss!r}")
        if interpolate_loss is False and needs_hard_targets(loss):
            got = f"{type(loss).__name__} of hard labels or logarithms"
            raise ValueError(f"expected a loss of dense targets, got {got}; use interpolate_loss=True")
        self.loss = loss
        self.mixer = mixer
        self.interpolate_loss = interpolate_loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "mixer":
            super().__setattr__(name, value)
        elif value is None or isinstance(value, Mixer):
            self.__dict__[name] = value  # nn.Module would make it a submodule
        else:
            got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
            raise TypeError(f"expected mixer to be a Mixer, got {got}; link the mixer, not what holds or wraps it")

    def forward(self, input: Any, target: Tensor, mix: Mix | None = None) -> Tensor:
        mix = self._linked_mix(target) if mix is None else mix
        if mix is None:
            return self.loss(input, target)
        check_tensor("target", target)
        floating = target.is_floating_point()
        interpolate_loss = self.interpolate_loss
        if interpolate_loss is None:
            interpolate_loss = not floating or needs_hard_targets(self.loss)
        if interpolate_loss or (not floating and is_cross_entropy(self.loss)):
            return mix_loss(self.loss, input, target, mix)
        if floating:
            return self.loss(input, mix_targets(target, mix))
        dense = mix_targets(target, mix, input.shape[1] if input.ndim > 1 else None)
        return self.loss(input, dense.to(input.dtype))

    def _linked_mix(self, target: Tensor) -> Mix | None:
        """The mix that the linked mixer last applied; none outside training, never one that cannot be meant."""
        if self.mixer is None or not (self.training and self.mixer.training):
            return None
        mix = self.mixer.last_mix
        if mix is None:
            raise RuntimeError(f"expected the linked mixer to have mixed a batch, got none; call the model. {WAYS_OUT}")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "expected gradients while the linked mixer is in training mode, got them off. It looks like validation "
                "of an EMA copy, or with a mixer that model.eval() does not reach, and would use the mix of an earlier "
                f"batch; {WAYS_OUT}"
            )
        if isinstance(target, Tensor) and target.ndim and target.shape[0] != mix.index.shape[0]:
            got = f"expected target to have the batch size of the last mix, {mix.index.shape[0]}, got {target.shape[0]}"
            raise ValueError(f"{got}; {WAYS_OUT}")
        return mix

    def extra_repr(self) -> str:
        linked = None if self.mixer is None else f"{type(self.mixer).__name__}({self.mixer.extra_repr()})"
        return f"mixer={linked}, interpolate_loss={self.interpolate_loss}"
