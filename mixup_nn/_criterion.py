"""The :class:`MixUpCriterion` module: apply the mix to the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._losses import is_cross_entropy, mix_loss, needs_hard_targets
from ._mix import BATCH_FIRST, Mix
from ._modules import Mixer
from .functional import mix_targets, one_hot

WAYS_OUT = (
    "for a metric, or the loss of another forward pass, pass its mix: criterion(output, target, mix); "
    "to validate, call criterion.loss(output, target), mixer.eval() or criterion.eval()"
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
            interpolates the loss for integer targets and the target for floating ones; always the loss for torch's
            losses of hard labels (hinge embedding, multi-margin, NLL) and of logarithms
            (``nn.KLDivLoss(log_target=True)``).

    All three may be replaced at any time, by assignment, and are checked again.

    Shape:
        - input: output of the model, whatever ``loss`` takes; ``(B, C, *)`` for class indices made dense.
        - target: ``(B, *)``.
        - output: what ``loss`` returns.

    Raises:
        TypeError: ``loss`` is not callable, a class or a mixer; ``mixer`` is not a :class:`Mixer`, or
            ``interpolate_loss`` not a bool; on call with a mix, ``target`` is not a tensor or ``mix`` not a
            :class:`Mix`.
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
        self.loss = loss
        self.mixer = mixer
        self.interpolate_loss = interpolate_loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mixer":
            _check_mixer(value)
            self.__dict__[name] = value  # nn.Module would make it a submodule
            return
        if name == "loss":
            _check_loss(value, getattr(self, "interpolate_loss", None))
            self._modules.pop(name, None)  # nn.Module refuses a function in the place of a module
        if name == "interpolate_loss":
            _check_loss(self.loss, value)
        super().__setattr__(name, value)

    def forward(self, input: Any, target: Tensor, mix: Mix | None = None) -> Tensor:
        mix = self._linked_mix(target) if mix is None else mix
        loss, interpolate_loss = self.loss, self.interpolate_loss
        tensor = isinstance(target, Tensor)
        floating = tensor and target.is_floating_point()
        if interpolate_loss is False and tensor and not floating and not is_cross_entropy(loss):
            return loss(input, _dense(input, target, mix))
        if mix is None:
            return loss(input, target)
        if interpolate_loss is None:
            interpolate_loss = not floating or needs_hard_targets(loss)
        if interpolate_loss or not floating:
            _check_nesting(loss, mix)
            return mix_loss(loss, input, target, mix)
        return loss(input, mix_targets(target, mix))

    def _linked_mix(self, target: Tensor) -> Mix | None:
        """The mix that the linked mixer last applied; none outside training, never one that cannot be meant."""
        if self.mixer is None or not (self.training and self.mixer.training):
            return None
        mix = self.mixer.last_mix
        if mix is None:
            fix = "call the model first; a criterion copied without its model follows a mixer that is not called"
            raise RuntimeError(f"expected the linked mixer to have mixed a batch, got none; {fix}; {WAYS_OUT}")
        if not torch.is_grad_enabled():
            got = "got them off: validation of an EMA copy, or with a mixer that model.eval() does not reach, would use"
            fix = "the mix of an earlier batch; a reentrant checkpoint must be passed its mix"
            raise RuntimeError(
                f"expected gradients while the linked mixer is in training mode, {got} {fix}; {WAYS_OUT}"
            )
        size = mix.index.shape[0]
        if isinstance(target, Tensor) and target.ndim and target.shape[0] != size:
            got = f"expected target to have the batch size of the last mix, {size}, got {target.shape[0]}"
            raise ValueError(f"{got}; {BATCH_FIRST}; {WAYS_OUT}")
        return mix

    def extra_repr(self) -> str:
        linked = None if self.mixer is None else f"{type(self.mixer).__name__}({self.mixer.extra_repr()})"
        return f"mixer={linked}, interpolate_loss={self.interpolate_loss}"


def _dense(input: Any, target: Tensor, mix: Mix | None) -> Tensor:
    """Class indices as (mixed) probabilities, as many as the output has, in its dtype."""
    if not isinstance(input, Tensor) or input.ndim < 2 or target.shape != input.shape[:1] + input.shape[2:]:
        got = f"{tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__} and {tuple(target.shape)}"
        fix = "give dense and multi-hot targets as floats, or use interpolate_loss=True"
        raise ValueError(f"expected an output (B, C, *) for class indices (B, *) made dense, got {got}; {fix}")
    if mix is None:
        return one_hot(target, input.shape[1], input.dtype)
    return mix_targets(target, mix, input.shape[1]).to(input.dtype)


def _check_nesting(loss: object, mix: Mix) -> None:
    """Raise where the criterion inside would need the weights of the partners too."""
    if isinstance(loss, MixUpCriterion) and isinstance(mix, Mix) and mix.lam.ndim and mix.lam.shape[0] > 1:
        fix = "mix dense targets by both, mix_targets(mix_targets(y, first), second), or draw the first per batch"
        raise ValueError(f"expected one lam per batch of the mix applied first, got one per sample; {fix}")


def _check_mixer(mixer: object) -> None:
    """Raise unless a criterion can follow ``mixer``."""
    if isinstance(mixer, type):
        raise TypeError(f"expected mixer to be a Mixer, got the class {mixer.__name__}; use {mixer.__name__}()")
    if mixer is not None and not isinstance(mixer, Mixer):
        fix = "link the mixer, not what holds or wraps it"
        raise TypeError(f"expected mixer to be a Mixer, got {type(mixer).__name__}; {fix}")


def _check_loss(loss: object, interpolate_loss: object) -> None:
    """Raise unless ``loss`` is one, and ``interpolate_loss`` possible with it."""
    if isinstance(loss, type):
        raise TypeError(f"expected a loss, got the class {loss.__name__}; use {loss.__name__}()")
    if isinstance(loss, Mixer) or not callable(loss):
        raise TypeError(f"expected loss to be callable, got {type(loss).__name__}; as in MixUpCriterion(loss, mixer)")
    if interpolate_loss is not None and not isinstance(interpolate_loss, bool):
        raise TypeError(f"expected interpolate_loss to be True, False or None, got {interpolate_loss!r}")
    if interpolate_loss is False and needs_hard_targets(loss):
        got = f"{type(loss).__name__} of hard labels or logarithms"
        raise ValueError(f"expected a loss of dense targets, got {got}; use interpolate_loss=True")
