"""The :class:`MixUp` module: draw a mix, apply it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import functional
from .sampling import Mix, check_alpha, check_p, sample_mix


class MixUp(nn.Module):
    r"""Trains on convex combinations of the samples of a batch, as in *mixup: Beyond Empirical Risk Minimization*.

    .. math::
        \lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad
        \tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\text{index}_i}

    with ``index`` a random permutation in which no sample is its own partner. In training each call draws afresh, and
    leaves its draw in :attr:`last_mix` for :class:`MixUpCriterion`, which mixes the targets. In eval the module
    returns its input itself. It may stand anywhere: first, between layers (manifold mixup), after an embedding, after
    other transforms.

    The module has no parameters, no buffers and an empty ``state_dict``, and no result depends on an earlier call. It
    compiles with ``torch.compile(fullgraph=True)``; changing ``alpha`` or ``p`` between calls costs one more
    compilation, once. ``torch.export`` in eval exports the identity; in training it exports a program that draws at
    each call, and leaves ``last_mix`` as it was.

    Args:
        alpha: parameter of the Beta distribution, a finite number >= 0. 0.2 suits ImageNet, 1.0 CIFAR-10; the larger,
            the closer to equal parts; 0 is plain training.
        p: probability of mixing. One decision per batch, or per sample with ``per_sample``.
        per_sample: draw one ``lam`` per sample instead of one per batch.

    Attributes:
        last_mix: the :class:`Mix` of the latest training call that drew one, or None. An outlet: never read by the
            module itself, never copied or pickled with it. A model that mixes with a draw of its own may set it, for
            the criterion to follow. Under activation checkpointing the recomputation in backward sets it again: take
            the loss of every forward before any backward, or pass the mix.

    Shape:
        - input: ``(B, *)``, float16, bfloat16, float32 or float64.
        - output: like the input, in shape, dtype, device and memory format.

    Raises:
        TypeError: ``alpha`` or ``p`` is not a number; on call, an input that is no floating-point tensor, or a ``mix``
            that is no :class:`Mix`.
        ValueError: ``alpha`` is negative or not finite, ``p`` is outside [0, 1]; on call, an input without a batch
            dimension, or of another batch size than the ``mix``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixup_nn import MixUp, MixUpCriterion
        >>> mixup = MixUp(alpha=0.2)
        >>> model = nn.Sequential(mixup, nn.Linear(4, 3))
        >>> criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> criterion(model(x), y).backward()
        >>> x is mixup.eval()(x)
        True

    Reference:
        https://arxiv.org/abs/1710.09412
    """

    last_mix: Mix | None

    def __init__(self, alpha: float = 0.2, *, p: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.p = p
        self.per_sample = per_sample
        self.last_mix = None

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        check_alpha("MixUp", alpha)
        self._alpha = float(alpha)

    @property
    def p(self) -> float:
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        check_p("MixUp", p)
        self._p = float(p)

    def sample(self, input: Tensor) -> Mix:
        """Draw a mix for ``input``: its batch size and device, this module's hyperparameters."""
        functional.check_tensor("MixUp", "input", input)
        return sample_mix(input.shape[0], self.alpha, per_sample=self.per_sample, p=self.p, device=input.device)

    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        """Return the mixed batch; a given ``mix`` is applied in training and eval alike, and not kept."""
        if mix is not None:
            return functional.mixup(input, mix)
        if not self.training:
            return input
        mix = self.sample(input)
        mixed = functional.mixup(input, mix)
        self.last_mix = mix
        return mixed

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, p={self.p}, per_sample={self.per_sample}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_mix": None}
