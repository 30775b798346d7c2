"""Hypothesis strategies: tensors, mixes and batches small enough to shrink, odd enough to hurt."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mixup_nn import Mix

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

batch_sizes = st.sampled_from([0, 1, 2, 3, 4, 7, 33])
alphas = st.floats(0.01, 100)
# float16 holds no more than 65504, and a difference of two values must not overflow either (see functional.mix_inputs).
values = st.floats(-30000, 30000, width=32)
weights = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))


def spatial_sizes(low: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Sizes of up to three spatial dimensions."""
    return st.lists(st.integers(1, 3), min_size=low, max_size=3).map(tuple)


@st.composite
def arrays(
    draw: st.DrawFn, /, shape: tuple[int, ...], elements: st.SearchStrategy[float], *, low: float, high: float
) -> Tensor:
    """A float32 tensor of elements, or of random numbers: Hypothesis seldom draws all the digits of a float."""
    if draw(st.booleans()):
        return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.empty(shape).uniform_(low, high, generator=generator)


@st.composite
def tensors(
    draw: st.DrawFn, /, *, batch_size: int | None = None, rank: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A floating tensor of rank 1 to 5, any batch size, any floating dtype."""
    batch_size = draw(batch_sizes) if batch_size is None else batch_size
    rank = draw(st.integers(1, 5)) if rank is None else rank
    shape = (batch_size, *draw(st.tuples(*[st.integers(1, 3)] * (rank - 1))))
    dtype = draw(st.sampled_from(FLOATING)) if dtype is None else dtype
    return draw(arrays(shape, values, low=-30000, high=30000)).to(dtype)


@st.composite
def mixes(
    draw: st.DrawFn,
    /,
    batch_size: int,
    spatial: tuple[int, ...] = (),
    *,
    per_sample: bool | None = None,
    per_position: bool | None = None,
    binary: bool | None = None,
) -> Mix:
    """Any permutation, also one with fixed points, and any weights: more than the library itself ever draws.

    With ``spatial`` sizes ``lam`` may be a map of them; ``binary`` says whether its weights are only 0 and 1.
    """
    per_sample = draw(st.booleans()) if per_sample is None else per_sample
    per_position = draw(st.booleans()) if per_position is None else per_position
    binary = draw(st.booleans()) if binary is None else binary
    shape: tuple[int, ...] = (batch_size,) if per_sample else ()
    if spatial and per_position:
        shape = (*(shape or (1,)), 1, *spatial)
    lam = draw(arrays(shape, weights, low=0, high=1))
    lam = lam.round() if binary else lam
    return Mix(lam, torch.tensor(draw(st.permutations(range(batch_size))), dtype=torch.int64))


@st.composite
def batches(draw: st.DrawFn, /, *, dtype: torch.dtype | None = None, **options: bool) -> tuple[Tensor, Mix]:
    """A tensor and a mix of its batch size, per position where the tensor has spatial dimensions."""
    input = draw(tensors(dtype=dtype))
    return input, draw(mixes(input.shape[0], tuple(input.shape[2:]), **options))


@st.composite
def classification(draw: st.DrawFn, /, *, ignored: bool = False, **options: bool) -> tuple[Tensor, Tensor, Mix]:
    """Logits ``(B, C, *)`` in float64, class indices ``(B, *)`` and a mix; ``ignored`` puts -100 among the indices.

    A map of weights is of the positions of the targets; where these are of samples, of whatever inputs they have.
    """
    batch_size = draw(batch_sizes.filter(bool))
    num_classes = draw(st.integers(2, 5))
    shape = draw(st.sampled_from([(), (2,), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    input = torch.randn((batch_size, num_classes, *shape), generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (batch_size, *shape), generator=generator)
    if ignored:
        target = target.where(torch.rand(target.shape, generator=generator) < 0.7, -100)
    return input, target, draw(mixes(batch_size, shape or draw(spatial_sizes(0)), **options))


@st.composite
def regression(draw: st.DrawFn, /, **options: bool) -> tuple[Tensor, Tensor, Mix]:
    """Outputs and dense targets in float64, and a mix.

    Targets are of samples, ``(B,)`` or ``(B, K)``, or of the positions of the mix, ``(B, C, *spatial)`` or
    ``(B, *spatial)``.
    """
    output = draw(tensors(dtype=torch.float64))
    sizes = tuple(output.shape[1:])
    places = [spatial_sizes(0)] if len(sizes) < 2 else [st.just(sizes[1:])]
    if 1 < len(sizes) < 4:
        places.append(st.just(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    target = torch.rand(output.shape, generator=generator, dtype=torch.float64)
    return output, target, draw(mixes(len(output), draw(st.one_of(places)), **options))
