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
# float16 holds no more than 65504, and a difference of two values must not overflow either (see functional.mixup).
values = st.floats(-30000, 30000, width=32)
weights = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))


@st.composite
def tensors(
    draw: st.DrawFn, *, batch_size: int | None = None, rank: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A floating tensor of rank 1 to 5, any batch size, any floating dtype."""
    batch_size = draw(batch_sizes) if batch_size is None else batch_size
    rank = draw(st.integers(1, 5)) if rank is None else rank
    shape = (batch_size, *draw(st.tuples(*[st.integers(1, 3)] * (rank - 1))))
    dtype = draw(st.sampled_from(FLOATING)) if dtype is None else dtype
    return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=values))).to(dtype)


@st.composite
def mixes(draw: st.DrawFn, batch_size: int, *, per_sample: bool | None = None) -> Mix:
    """Any permutation, also one with fixed points, and any weights: more than the library itself ever draws."""
    per_sample = draw(st.booleans()) if per_sample is None else per_sample
    lam = draw(st.lists(weights, min_size=batch_size, max_size=batch_size) if per_sample else weights)
    index = draw(st.permutations(range(batch_size)))
    return Mix(torch.tensor(lam, dtype=torch.float32), torch.tensor(index, dtype=torch.int64))


@st.composite
def batches(draw: st.DrawFn, *, per_sample: bool | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Mix]:
    """A tensor and a mix of its batch size."""
    input = draw(tensors(dtype=dtype))
    return input, draw(mixes(input.shape[0], per_sample=per_sample))


@st.composite
def classification(
    draw: st.DrawFn, *, per_sample: bool | None = None, ignored: bool = False
) -> tuple[Tensor, Tensor, Mix]:
    """Logits ``(B, C, *)`` in float64, class indices ``(B, *)`` and a mix; ``ignored`` puts -100 among the indices."""
    batch_size = draw(batch_sizes.filter(bool))
    num_classes = draw(st.integers(2, 5))
    shape = draw(st.sampled_from([(), (2,), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    input = torch.randn((batch_size, num_classes, *shape), generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (batch_size, *shape), generator=generator)
    if ignored:
        target = target.where(torch.rand(target.shape, generator=generator) < 0.7, -100)
    return input, target, draw(mixes(batch_size, per_sample=per_sample))
