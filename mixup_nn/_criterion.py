"""The :class:`MixUpCriterion` module: apply the mix to the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._losses import is_cross_entropy, mix_loss, needs_hard_targets
from ._mix import Mix, is_class_indices, kind_of
from ._modules import Mixer
from .functional import mix_targets, one_hot


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
    none, and the result is exactly the plain loss. So one criterion serves training and validation. The linked mix is
    that of the latest forward pass of the mixer; for the loss of an older one, pass its mix.

    Reductions, class weights and ``ignore_index`` are those of the loss; :func:`functional.mix_loss` says how weights
    per sample or position meet them.

    Args:
        loss: any callable of ``(input, target)``, such as ``nn.CrossEntropyLoss()``; never modified.
        mixer: the :class:`Mixer` to follow. The link is not a submodule: it adds nothing to ``state_dict``, and
            ``criterion.eval()`` does not switch the mixer.
        interpolate_loss: True interpolates the losses. False interpolates the targets, and makes integer targets
            dense, with ``input.shape[1]`` classes in the dtype of ``input``, for a loss that takes dense targets. It
            does so without a mix too: such a loss is validated on the type of target that it trains on. None (default)
            interpolates the loss for integer targets and the target for floating ones; always the loss for a target in
            parts, for torch's losses of hard labels (hinge embedding, multi-margin, NLL) and for those of logarithms
            (``log_target=True``). Floating targets with one channel against an output with several are labels more
            often than not: there it asks.

    All three may be replaced at any time, by assignment, and are checked again.

    Shape:
        - input: output of the model, whatever ``loss`` takes; ``(B, C, *)``, of two classes or more, for class indices
          made dense.
        - target: ``(B, *)``, or parts: a dict or a named tuple, nested, of tensors that each have the batch first.
        - output: what ``loss`` returns.

    Raises:
        TypeError: ``loss`` is a class or holds a criterion (mix dense targets twice instead, by
            :func:`functional.mix_targets`); ``mixer`` is not a :class:`Mixer`, or ``interpolate_loss`` not a bool; on
            call with a mix, ``target`` or a part of it is not a tensor, or it has parts and ``interpolate_loss`` is
            False; ``mix`` is not a :class:`Mix`.
        ValueError: ``interpolate_loss=False`` with a loss of hard labels or logarithms; on call, as
            :func:`functional.mix_loss` and :func:`functional.mix_targets`, or a floating target with one channel while
            ``interpolate_loss`` is None.
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

        A target in parts, here with a weight for each sample:

        >>> def weighted(output, target):
        ...     losses = nn.functional.cross_entropy(output, target["label"], reduction="none")
        ...     return (target["weight"] * losses).mean()
        >>> criterion = MixUpCriterion(weighted, mixup)
        >>> loss = criterion(head(mixup(x)), {"label": y, "weight": torch.rand(8)})

    Reference:
        https://arxiv.org/abs/1710.09412
    """

    mixer: Mixer | None
    interpolate_loss: bool | None = None

    def __init__(
        self, loss: Callable[[Any, Any], Tensor], mixer: Mixer | None = None, *, interpolate_loss: bool | None = None
    ) -> None:
        super().__init__()
        self.loss = loss
        self.mixer = mixer
        self.interpolate_loss = interpolate_loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mixer":
            if value is not None and not isinstance(value, Mixer):
                raise TypeError(f"expected MixUpCriterion(loss, mixer) of a Mixer, got {kind_of(value)}")
            self.__dict__[name] = value  # nn.Module would make it a submodule
            return
        if name == "loss":
            _check_loss(value, self.interpolate_loss)
        elif name == "interpolate_loss":
            _check_loss(self.loss, value)
        super().__setattr__(name, value)

    def forward(self, input: Any, target: Any, mix: Mix | None = None) -> Tensor:
        mix = self._linked_mix() if mix is None else mix
        if self.interpolate_loss is False and is_class_indices(target) and not is_cross_entropy(self.loss):
            return self.loss(input, _dense(input, target, mix))
        if mix is None:
            return self.loss(input, target)
        if self._interpolates_loss(input, target):
            return mix_loss(self.loss, input, target, mix)
        return self.loss(input, mix_targets(target, mix))

    def _linked_mix(self) -> Mix | None:
        """The mix that the linked mixer last applied; none outside training, never one that cannot be meant."""
        mixer = self.mixer
        if mixer is None or not (self.training and mixer.training):
            return None
        mix, page = mixer.last_mix, "see docs: Criterion, Which mix is used"
        if mix is None:
            raise RuntimeError(f"expected the linked {kind_of(mixer)} to have mixed a batch, got none; {page}")
        if not torch.is_grad_enabled():
            raise RuntimeError(f"expected gradients while the linked {kind_of(mixer)} trains, got them off; {page}")
        return mix

    def _interpolates_loss(self, input: Any, target: Any) -> bool:
        """Whether the losses of both targets are interpolated, and not the targets."""
        if is_class_indices(target):
            return True
        if self.interpolate_loss is not None:
            return self.interpolate_loss  # False with a target in parts: the door refuses it
        if not isinstance(target, Tensor) or needs_hard_targets(self.loss):
            return True
        one_channel = target.ndim > 2 and target.shape[1] == 1
        if one_channel and isinstance(input, Tensor) and input.ndim == target.ndim and input.shape[1] > 1:
            got = f"None with {target.dtype} {tuple(target.shape)} for {tuple(input.shape)}"
            raise ValueError(f"expected interpolate_loss as a bool, got {got}; see docs: Criterion, Loss or targets")
        return False

    def extra_repr(self) -> str:
        linked = None if self.mixer is None else f"{type(self.mixer).__name__}({self.mixer.extra_repr()})"
        return f"mixer={linked}, interpolate_loss={self.interpolate_loss}"


def _dense(input: Any, target: Tensor, mix: Mix | None) -> Tensor:
    """Class indices as (mixed) probabilities, as many as the output has, in its dtype."""
    if not isinstance(input, Tensor) or input.ndim < 2 or target.shape != input.shape[:1] + input.shape[2:]:
        got = f"{tuple(input.shape) if isinstance(input, Tensor) else kind_of(input)} and {tuple(target.shape)}"
        expected = "an output (B, C, *) and class indices (B, *) to be made dense"
        raise ValueError(f"expected {expected}, got {got}; see docs: Criterion, Targets")
    if mix is None:
        return one_hot(target, input.shape[1], input.dtype)
    return mix_targets(target, mix, input.shape[1]).to(input.dtype)


def _check_loss(loss: object, interpolate_loss: object) -> None:
    """Raise unless ``loss`` is one, and ``interpolate_loss`` possible with it."""
    if isinstance(loss, type):
        raise TypeError(f"expected a loss, got {kind_of(loss)}; use {loss.__name__}()")
    if isinstance(loss, nn.Module) and any(isinstance(module, MixUpCriterion) for module in loss.modules()):
        raise TypeError("expected a loss without a criterion in it, got one; see docs: Recipes, Two mixes in a row")
    if interpolate_loss is not None and not isinstance(interpolate_loss, bool):
        raise TypeError(f"expected interpolate_loss to be True, False or None, got {interpolate_loss!r}")
    if interpolate_loss is False and needs_hard_targets(loss):
        raise ValueError(f"expected interpolate_loss=True for labels or logarithms of {kind_of(loss)}, got False")
