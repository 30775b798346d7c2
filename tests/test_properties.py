"""What MixUp must be for every batch and every draw, whatever its values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mix_targets, mixup, mixup_cross_entropy, mixup_loss
from mixup_nn.sampling import sample_mix

from . import reference
from .strategies import alphas, batch_sizes, batches, classification, mixes, tensors, weights

given_batch = given(batches())


@given_batch
def test_every_mixed_value_lies_between_its_sources(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    partner, output = input[mix.index], mixup(input, mix)
    assert (output >= torch.minimum(input, partner)).all()
    assert (output <= torch.maximum(input, partner)).all()


@given_batch
def test_mixup_is_the_formula_within_the_rounding_of_the_dtype(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    larger = torch.maximum(input.abs(), input[mix.index].abs()).double()
    error = (mixup(input, mix).double() - reference.mixed(input, mix)).abs()
    assert (error <= torch.finfo(input.dtype).eps * larger + torch.finfo(input.dtype).tiny).all()


@given_batch
def test_shape_and_dtype_are_kept_and_the_input_is_not_modified(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    before, lam, index = input.clone(), mix.lam.clone(), mix.index.clone()
    output = mixup(input, mix)
    assert (output.shape, output.dtype, output.device) == (input.shape, input.dtype, input.device)
    assert torch.equal(input, before)
    assert torch.equal(mix.lam, lam)
    assert torch.equal(mix.index, index)
    assert input.numel() == 0 or output.data_ptr() != input.data_ptr()


@given(tensors(), st.data())
def test_lam_one_returns_the_input_and_lam_zero_its_partners(input: Tensor, data: st.DataObject) -> None:
    index = data.draw(mixes(input.shape[0])).index
    assert torch.equal(mixup(input, Mix(torch.tensor(1.0), index)), input)
    assert torch.equal(mixup(input, Mix(torch.tensor(0.0), index)), input[index])


@given(batches(dtype=torch.float64, per_sample=False))
def test_swapping_partner_and_weight_gives_the_same_batch(batch: tuple[Tensor, Mix]) -> None:
    input, (lam, index) = batch
    swapped = mixup(input[index], Mix(1 - lam.double(), index.argsort()))
    torch.testing.assert_close(swapped, mixup(input, Mix(lam.double(), index)))


@given(batches(dtype=torch.float64, per_sample=False))
def test_sums_over_the_batch_are_conserved(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    torch.testing.assert_close(mixup(input, mix).sum(0), input.sum(0), atol=1e-6, rtol=1e-9)


@given(classification())
def test_dense_targets_are_distributions(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    dense = mix_targets(target, mix, input.shape[1])
    assert dense.shape == input.shape
    assert (dense >= 0).all()
    torch.testing.assert_close(dense.sum(1), torch.ones(target.shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(dense.double(), reference.mixed(reference.one_hot(target, input.shape[1]), mix))


@given(classification(per_sample=False))
def test_class_counts_of_the_batch_are_conserved(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    dense = mix_targets(target, mix, input.shape[1])
    counts = reference.one_hot(target, input.shape[1]).sum(0)
    torch.testing.assert_close(dense.sum(0).double(), counts, atol=1e-4, rtol=0)


@given(st.data(), batch_sizes, weights, weights)
def test_mixing_is_linear_in_the_target(data: st.DataObject, batch_size: int, a: float, b: float) -> None:
    mix = data.draw(mixes(batch_size))
    first, second = torch.randn(2, batch_size, 3, dtype=torch.float64)
    together = mix_targets(a * first + b * second, mix)
    torch.testing.assert_close(together, a * mix_targets(first, mix) + b * mix_targets(second, mix))


@given(batch_sizes, alphas, st.booleans(), st.floats(0, 1), st.integers(0, 2**32))
def test_a_draw_is_a_cycle_through_the_whole_batch_with_weights_in_the_unit_interval(
    batch_size: int, alpha: float, per_sample: bool, p: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lam, index = sample_mix(batch_size, alpha, per_sample=per_sample, p=p, generator=generator)
    assert lam.shape == ((batch_size,) if per_sample else ())
    assert (lam.dtype, index.dtype) == (torch.float32, torch.int64)
    assert ((lam >= 0) & (lam <= 1)).all()
    sample, walk = 0, []
    for _ in range(batch_size):
        walk.append(sample)
        sample = int(index[sample])
    assert sorted(walk) == list(range(batch_size))
    assert batch_size < 2 or (index != torch.arange(batch_size)).all()


@given(classification())
def test_index_and_dense_cross_entropy_are_the_same_number(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    dense = mix_targets(target, Mix(mix.lam.double(), mix.index), input.shape[1])
    torch.testing.assert_close(mixup_cross_entropy(input, target, mix), F.cross_entropy(input, dense))


@given(classification(ignored=True), st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_cross_entropy_is_the_reference_with_weights_ignored_positions_and_smoothing(
    batch: tuple[Tensor, Tensor, Mix], weighted: bool, label_smoothing: float
) -> None:
    input, target, mix = batch
    weight = torch.rand(input.shape[1], dtype=torch.float64) + 0.1 if weighted else None
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            mixup_cross_entropy(
                input, target, mix, weight=weight, reduction=reduction, label_smoothing=label_smoothing
            ),
            reference.cross_entropy(
                input, target, mix, weight=weight, reduction=reduction, label_smoothing=label_smoothing
            ),
            equal_nan=True,  # a batch of nothing but ignored positions has no mean, as in torch
        )


@given(batches(dtype=torch.float64))
def test_both_modes_agree_for_binary_cross_entropy(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    target = torch.rand_like(input)
    by_loss, by_target = (
        MixUpCriterion(torch.nn.BCEWithLogitsLoss(), interpolate_loss=mode)(input, target, mix)
        for mode in (True, False)
    )
    torch.testing.assert_close(by_loss, by_target, equal_nan=True)


@given(batches(dtype=torch.float64, per_sample=False))
def test_the_modes_differ_for_mse_by_the_spread_of_the_two_targets(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    target = torch.randn_like(input)
    gap = mixup_loss(F.mse_loss, input, target, mix) - F.mse_loss(input, mix_targets(target, mix))
    lam = mix.lam.double()
    expected = lam * (1 - lam) * (target - target[mix.index]).square().mean()
    torch.testing.assert_close(gap, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@given(tensors())
def test_eval_is_the_identity_object_and_training_never_returns_the_input(input: Tensor) -> None:
    module = MixUp(alpha=0.0)
    assert module.eval()(input) is input
    assert module.last_mix is None
    assert module.train()(input) is not input
    assert torch.equal(module(input), input)
