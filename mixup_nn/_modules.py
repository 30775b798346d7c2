"""The mixers: modules that draw a mix and apply it."""

from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any

from torch import Tensor, nn

from . import sampling
from ._mix import Mix, is_lam, kind_of
from .functional import mix_inputs


class Mixer(nn.Module):
    r"""Base class of the modules that mix a batch with a permutation of itself.

    .. math::
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}

    A subclass says how ``lam`` is drawn, by :meth:`sample_lam`, and may say who the partners are, by
    :meth:`sample_index`. In training mode each call draws afresh and leaves what it applied in :attr:`last_mix`, for
    :class:`MixUpCriterion`, which mixes the targets. In eval mode the module returns its input itself, and there is no
    :attr:`last_mix`.

    It may stand anywhere: first in the model, between layers, after an embedding, after other transforms. It has no
    parameters, no buffers and an empty ``state_dict``, and no result depends on an earlier call. It compiles with
    ``torch.compile(fullgraph=True)``.

    Args:
        p: probability of mixing; otherwise ``lam`` is 1. One decision for each ``lam`` drawn: per batch or per sample.

    Raises:
        TypeError: on call, an input that is not a floating-point tensor, or a ``mix`` that is not a :class:`Mix`.
        ValueError: ``p`` is outside [0, 1]; on call, an input whose sizes do not fit the ``mix``.
        RuntimeError: on call in training mode, on a replica made by ``nn.DataParallel``.

    Example:
        The right part of each image, of random width, from the partner:

        >>> import torch
        >>> from mixup_nn import Mixer
        >>> class RightPart(Mixer):
        ...     def sample_lam(self, input):
        ...         columns = torch.arange(input.shape[-1], device=input.device) / input.shape[-1]
        ...         return (columns < torch.rand((), device=input.device)).float().expand(1, 1, *input.shape[2:])
        >>> mixer = RightPart(p=0.5)
        >>> mixer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, *, p: float = 1.0) -> None:
        super().__init__()
        self.p = p
        self._last_mix: Mix | None = None

    @property
    def p(self) -> float:
        """The probability of mixing. May be set at any time; 0 turns mixing off."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        self._p = sampling.check_p(p)

    @property
    def last_mix(self) -> Mix | None:
        """The :class:`Mix` last applied in training mode; None in eval mode, where no draw is meant.

        Never read by the module itself, never copied or pickled with it. A model that mixes in a way of its own may
        set it, for the criterion to follow. Under activation checkpointing the recomputation in backward sets it
        again: take the loss of every forward before any backward, or pass the mix.
        """
        return self._last_mix if self.training else None

    @last_mix.setter
    def last_mix(self, mix: Mix | None) -> None:
        self._last_mix = mix

    def sample_lam(self, input: Tensor) -> Tensor:
        """Draw ``lam`` for ``input``, on its device, in one of the shapes of :class:`Mix`. Subclasses override this."""
        raise NotImplementedError(f"{type(self).__name__} has no sample_lam(input), which draws lam")

    def sample_index(self, input: Tensor) -> Tensor:
        """Draw the partners, int64 of shape ``(B,)``: a random cycle, in which no sample is its own partner.

        Override it for partners of your own. A :class:`RandomChoice` draws those of all its entries.
        """
        return sampling.cycle(input.shape[0], input.device)

    def sample(self, input: Tensor) -> Mix:
        """Draw a mix for ``input``, in eval mode too. An override must apply ``p`` itself."""
        return Mix(self._gated_lam(input, self.p), self.sample_index(input))

    def _gated_lam(self, input: Tensor, p: float) -> Tensor:
        lam = self.sample_lam(input)
        if not is_lam(lam, input.shape[0]):
            mix_inputs(input, Mix(lam, self.sample_index(input)))  # refused there, before it is broadcast here
        return sampling.gate(lam, p)

    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        """Return the mixed batch. A given ``mix`` is applied in training and eval mode alike."""
        if not self.training:
            return input if mix is None else mix_inputs(input, mix)
        if "_is_replica" in self.__dict__:  # made by nn.DataParallel: the criterion would follow an earlier draw
            raise RuntimeError("expected no replicas in training, got nn.DataParallel; use DistributedDataParallel")
        mix = self.sample(input) if mix is None and isinstance(input, Tensor) else mix
        mixed = mix_inputs(input, mix)
        object.__setattr__(self, "_last_mix", mix)  # what nn.Module does takes as long as an operation
        return mixed

    def extra_repr(self) -> str:
        options = {name: getattr(self, name, None) for name in ("alpha", "weights", "p", "per_sample", "spatial_dims")}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_mix": None}  # type: ignore[no-untyped-call]


class _BetaMixer(Mixer):
    """What MixUp and CutMix share: the parameter of the Beta distribution, and one draw per batch or per sample."""

    def __init__(self, alpha: float, p: float, per_sample: bool) -> None:
        super().__init__(p=p)
        self.alpha = alpha
        self.per_sample = per_sample

    @property
    def alpha(self) -> float:
        """The parameter of the Beta distribution. May be set at any time."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = sampling.check_alpha(alpha)


class MixUp(_BetaMixer):
    r"""Trains on convex combinations of the samples of a batch, as in *mixup: Beyond Empirical Risk Minimization*.

    .. math::
        \lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\, x_{\text{index}_i}

    See :class:`Mixer` for what all mixers have in common, such as ``last_mix`` and errors.

    Args:
        alpha: parameter of the Beta distribution, a finite number >= 0. 0.2 suits ImageNet, 1.0 CIFAR-10; the larger,
            the closer to equal parts; 0 is plain training.
        p: probability of mixing. One decision per batch, or per sample with ``per_sample``.
        per_sample: draw one ``lam`` per sample instead of one per batch.

    All three may be set at any time.

    Shape:
        - input: ``(B, *)``, float16, bfloat16, float32 or float64.
        - output: like the input, in shape, dtype, device and memory format.

    Raises:
        ValueError: ``alpha`` is negative or not finite.

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

    def __init__(self, alpha: float = 0.2, *, p: float = 1.0, per_sample: bool = False) -> None:
        super().__init__(alpha, p, per_sample)

    def sample_lam(self, input: Tensor) -> Tensor:
        """Draw ``lam`` as :func:`sampling.sample_mixup` does, before the gate of ``p``."""
        return sampling.mixup_lam(input.shape[:1] if self.per_sample else (), self.alpha, input.device)


class CutMix(_BetaMixer):
    r"""Replaces a box of each sample by that of its partner, as in the CutMix paper.

    .. math::
        \tilde x = M \odot x + (1 - M) \odot x_{\text{index}}, \qquad
        \tilde y = \bar M y + (1 - \bar M)\, y_{\text{index}}

    The mask :math:`M`, here a ``lam`` per position, is 0 inside the box; its mean :math:`\bar M` is the share of the
    original. :func:`sampling.sample_cutmix` says how the box is drawn. See :class:`Mixer` for what all mixers have in
    common.

    Args:
        alpha: parameter of the Beta distribution of the box's share, a finite number >= 0; 1 is uniform, 0 is plain
            training.
        p: probability of mixing.
        per_sample: draw one box per sample instead of one per batch.
        spatial_dims: how many of the last dimensions the box cuts, 1 to 3; it goes whole through those between the
            first two and these. If not given, all of one or two spatial dimensions; for three it must be given, as 3
            for volumes ``(B, C, D, H, W)``, and as 2 for clips, ``(B, C, T, H, W)`` or ``(B, T, C, H, W)``, with one
            box for all frames.

    The first three may be set at any time.

    Shape:
        - input: ``(B, C, *spatial)`` with one to three spatial dimensions: audio, images, volumes or clips.
        - output: like the input, in shape, dtype, device and memory format.

    Raises:
        ValueError: ``alpha`` is negative or not finite, or ``spatial_dims`` is not 1, 2 or 3; on call, an input without
            one to three spatial dimensions, with fewer than ``spatial_dims``, or with three and no ``spatial_dims``.

    Example:
        >>> import torch
        >>> from mixup_nn import CutMix
        >>> cutmix = CutMix()
        >>> cutmix(torch.randn(4, 3, 8, 8)).shape, cutmix.last_mix.lam.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([1, 1, 8, 8]))

    Reference:
        https://arxiv.org/abs/1905.04899
    """

    def __init__(
        self, alpha: float = 1.0, *, p: float = 1.0, per_sample: bool = False, spatial_dims: int | None = None
    ) -> None:
        super().__init__(alpha, p, per_sample)
        self.spatial_dims = sampling.check_spatial_dims(spatial_dims)

    def sample_lam(self, input: Tensor) -> Tensor:
        """Draw ``lam`` as :func:`sampling.sample_cutmix` does, before the gate of ``p``."""
        return sampling.cutmix_lam(input.shape, self.alpha, self.per_sample, self.spatial_dims, input.device)


class RandomChoice(Mixer):
    r"""One of several mixers for each batch, or for each sample.

    .. math::
        \lambda = \lambda_k \quad \text{with probability } \frac{w_k}{\sum_j w_j}

    Every mixer draws a ``lam``, and one of them is picked; all share the same partners. So it is one graph under
    ``torch.compile``. There is no ``alpha``: set that of the mixers.

    Args:
        mixers: the mixers to choose from, at least one. Each keeps its own ``p`` and ``per_sample``; a mixer in eval
            mode mixes nothing.
        weights: relative weight of each mixer, numbers >= 0 as in ``random.choices``; equal if not given.
        p: probability of mixing at all, decided once for each choice.
        per_sample: choose for each sample instead of once per batch. A mixer without ``per_sample`` of its own still
            draws one ``lam`` for all samples that choose it.

    The last three may be set at any time.

    Shape:
        - input: what every mixer takes.
        - output: like the input, in shape, dtype, device and memory format.

    Raises:
        TypeError: ``mixers`` is not a list, or one of them is not a :class:`Mixer` or has a ``sample``,
            ``sample_index`` or ``forward`` of its own, which a choice would never call.
        ValueError: on call, ``weights`` of another length, with a negative number, or without a positive one.

    Example:
        >>> import torch
        >>> from mixup_nn import CutMix, MixUp, RandomChoice
        >>> mixer = RandomChoice([MixUp(0.8), CutMix(1.0)])
        >>> mixer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    mixers: MutableSequence[Mixer]

    def __init__(
        self, mixers: Iterable[Mixer], weights: Sequence[float] | None = None, *, p: float = 1.0,
        per_sample: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(p=p)
        if not isinstance(mixers, Iterable):
            raise TypeError(f"expected a list of mixers, as [MixUp(), CutMix()], got {kind_of(mixers)}")
        self.mixers = nn.ModuleList(_checked_entry(mixer) for mixer in mixers)  # type: ignore[assignment]
        self.weights = weights
        self.per_sample = per_sample

    alpha = property()  # or a schedule would set it in vain: the mixers have one each

    def sample_lam(self, input: Tensor) -> Tensor:
        """Draw the ``lam`` of every mixer, and pick one of them; one in eval mode leaves unmixed what chooses it."""
        mixers = [_checked_entry(mixer) for mixer in self.mixers]
        weights = [float(weight) for weight in ([1] * len(mixers) if self.weights is None else self.weights)]
        if len(weights) != len(mixers) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            expected = f"{len(mixers)} numbers >= 0, one for each mixer and not all of them 0"
            raise ValueError(f"expected weights to be {expected}, got {weights}")
        lams = [mixer._gated_lam(input, mixer.p if mixer.training or not self.training else 0.0) for mixer in mixers]
        return sampling.choose(lams, weights, input.shape[0] if self.per_sample else None)

    def _gated_lam(self, input: Tensor, p: float) -> Tensor:
        return sampling.gate(self.sample_lam(input), p, input.shape[:1] if self.per_sample else ())


def _checked_entry(mixer: object) -> Mixer:
    """``mixer``, which a :class:`RandomChoice` can choose by its ``lam`` alone."""
    kind: Any = type(mixer)
    own = (Mixer.sample, Mixer.sample_index, Mixer.forward)
    if not isinstance(mixer, Mixer) or (kind.sample, kind.sample_index, kind.forward) != own:
        expected = "Mixer modules with no sample, sample_index or forward of their own"
        raise TypeError(f"expected {expected}, got {kind_of(mixer)}; see docs: Guide, Mixers of your own")
    return mixer
