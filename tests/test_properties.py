"""What mixing must be for every batch and every draw, whatever its values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixup_nn import CutMix, Mix, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss, mix_targets
from mixup_nn.sampling import sample_cutmix, sample_mixup

from . import reference
from .cases import MIXERS
from .strategies import alphas, batch_sizes, batches, classification, mixes, regression, spatial_sizes, tensors, weights

given_batch = given(batches())
seeds = st.integers(0, 2**32)


def in_float64(mix: Mix) -> Mix:
    """For comparisons to more digits than the mean of a float32 map has."""
    return Mix(mix.lam.double(), mix.index)


def along(lam: Tensor, value: Tensor) -> Tensor:
    """One weight for each entry of ``value``, for comparison with plain formulas of torch."""
    if lam.ndim > 2 and value.ndim < 3:  # of samples
        lam = lam.double().flatten(1).mean(1)
    if lam.ndim > value.ndim:  # of positions, without channels
        lam = lam.squeeze(1)
    return lam.reshape(lam.shape + (1,) * (value.ndim - lam.ndim)).expand_as(value)


@given_batch
def test_every_mixed_value_lies_between_its_sources(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    partner, output = input[mix.index], mix_inputs(input, mix)
    assert (output >= torch.minimum(input, partner)).all()
    assert (output <= torch.maximum(input, partner)).all()


@given_batch
def test_mixup_is_the_formula_within_the_rounding_of_the_dtype(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    larger = torch.maximum(input.abs(), input[mix.index].abs()).double()
    error = (mix_inputs(input, mix).double() - reference.mixed(input, mix)).abs()
    assert (error <= torch.finfo(input.dtype).eps * larger + torch.finfo(input.dtype).tiny).all()


@given_batch
def test_shape_and_dtype_are_kept_and_the_input_is_not_modified(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    before, lam, index = input.clone(), mix.lam.clone(), mix.index.clone()
    output = mix_inputs(input, mix)
    assert (output.shape, output.dtype, output.device) == (input.shape, input.dtype, input.device)
    assert torch.equal(input, before)
    assert torch.equal(mix.lam, lam)
    assert torch.equal(mix.index, index)
    assert input.numel() == 0 or output.data_ptr() != input.data_ptr()


@given(tensors(), st.data())
def test_lam_one_returns_the_input_and_lam_zero_its_partners(input: Tensor, data: st.DataObject) -> None:
    index = data.draw(mixes(input.shape[0])).index
    assert torch.equal(mix_inputs(input, Mix(torch.tensor(1.0), index)), input)
    assert torch.equal(mix_inputs(input, Mix(torch.tensor(0.0), index)), input[index])


@given(batches(binary=True))
def test_weights_of_zero_and_one_take_every_value_whole_from_one_source(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    expected = torch.where(along(mix.lam, input) == 1, input, input[mix.index])
    assert torch.equal(mix_inputs(input, mix), expected)  # to the last bit, but for the sign of zero


@given(batches(dtype=torch.float64))
def test_swapping_partner_and_weight_gives_the_same_batch(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    mix = in_float64(mix)
    lam, index = mix
    back = index.argsort()
    swapped = Mix(1 - lam, back)  # for a batch in the order of the partners
    carried = Mix(swapped.lam[back] if lam.shape[:1] == index.shape else swapped.lam, back)  # lam goes along to them
    target = torch.randn(len(input), 3, dtype=torch.float64)
    for apply, value in ((mix_inputs, input), (mix_targets, target)):
        expected = apply(value, mix)
        torch.testing.assert_close(apply(value[index], swapped), expected)
        torch.testing.assert_close(apply(value, carried)[index], expected)


@given(batches(dtype=torch.float64, per_sample=False))
def test_sums_over_the_batch_are_conserved(batch: tuple[Tensor, Mix]) -> None:
    input, mix = batch
    torch.testing.assert_close(mix_inputs(input, mix).sum(0), input.sum(0), atol=1e-6, rtol=1e-9)


@given(classification())
def test_dense_targets_are_distributions(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    dense = mix_targets(target, mix, input.shape[1])
    assert dense.shape == input.shape
    assert (dense >= 0).all()
    torch.testing.assert_close(dense.sum(1), torch.ones(target.shape), atol=1e-6, rtol=0)
    expected = reference.mixed(reference.one_hot(target, input.shape[1]), mix, of_positions=target.ndim > 1)
    torch.testing.assert_close(dense.double(), expected, atol=1e-6, rtol=0)
    soft = mix_targets(input.softmax(1), mix)
    torch.testing.assert_close(soft.sum(1), torch.ones(target.shape, dtype=torch.float64))


@given(classification(per_sample=False))
def test_class_counts_of_the_batch_are_conserved(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    dense = mix_targets(target, mix, input.shape[1])
    counts = reference.one_hot(target, input.shape[1]).sum(0)
    torch.testing.assert_close(dense.sum(0).double(), counts, atol=1e-4, rtol=0)


@given(regression(), weights, weights)
def test_mixing_is_linear_in_the_target(batch: tuple[Tensor, Tensor, Mix], a: float, b: float) -> None:
    first, second, mix = batch
    together = mix_targets(a * first + b * second, mix)
    torch.testing.assert_close(together, a * mix_targets(first, mix) + b * mix_targets(second, mix))


@given(classification(ignored=True, per_position=False), st.data())
def test_a_constant_map_of_weights_is_one_weight(batch: tuple[Tensor, Tensor, Mix], data: st.DataObject) -> None:
    logits, target, mix = batch
    mix = in_float64(mix)
    spatial = tuple(logits.shape[2:]) or data.draw(spatial_sizes())
    constant = Mix(mix.lam.reshape(-1, 1, *[1] * len(spatial)).repeat(1, 1, *spatial), mix.index)
    input = torch.randn(len(target), 2, *spatial, dtype=torch.float64)
    torch.testing.assert_close(mix_inputs(input, constant), mix_inputs(input, mix))
    for value in (target, logits):
        torch.testing.assert_close(
            mix_targets(value, constant, logits.shape[1]), mix_targets(value, mix, logits.shape[1])
        )
    for reduction in ("mean", "sum", "none"):
        losses = (mix_cross_entropy(logits, target, draw, reduction=reduction) for draw in (constant, mix))
        torch.testing.assert_close(*losses, equal_nan=True)


@given(batch_sizes, spatial_sizes(0), alphas, st.booleans(), st.floats(0, 1), seeds)
def test_a_draw_is_a_cycle_through_the_whole_batch_with_weights_in_the_unit_interval(
    batch_size: int, spatial: tuple[int, ...], alpha: float, per_sample: bool, p: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if spatial:
        shape = (batch_size, 3, *spatial)
        options: dict[str, Any] = {"per_sample": per_sample, "spatial_dims": len(spatial)}
        lam, index = sample_cutmix(shape, alpha, p=p, generator=generator, **options)
        assert lam.shape == (batch_size if per_sample else 1, 1, *spatial)
        assert ((lam == 0) | (lam == 1)).all()
    else:
        lam, index = sample_mixup(batch_size, alpha, per_sample=per_sample, p=p, generator=generator)
        assert lam.shape == ((batch_size,) if per_sample else ())
        assert ((lam >= 0) & (lam <= 1)).all()
    assert (lam.dtype, index.dtype) == (torch.float32, torch.int64)
    sample, walk = 0, []
    for _ in range(batch_size):
        walk.append(sample)
        sample = int(index[sample])
    assert sorted(walk) == list(range(batch_size))
    assert batch_size < 2 or (index != torch.arange(batch_size)).all()


@given(st.sampled_from([2, 3, 7]), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans(), seeds)
def test_the_share_of_the_label_is_exactly_that_of_the_pixels(
    batch_size: int, spatial: list[int], per_sample: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    mixer = CutMix(per_sample=per_sample, p=0.9, spatial_dims=1 + seed % len(spatial))
    mix = mixer.sample(torch.empty(batch_size, 1, *spatial))
    samples = torch.arange(batch_size)
    pixels = samples.double().reshape(-1, 1, *[1] * len(spatial)).repeat(1, 1, *spatial)  # each shows whose it is
    kept = (mix_inputs(pixels, mix) == pixels).flatten(1).double().mean(1).float()
    for dense in (mix_targets(samples, mix, batch_size), mix_targets(torch.eye(batch_size), mix)):
        assert torch.equal(dense[samples, samples], kept)
        assert torch.equal(dense[samples, mix.index], 1 - kept)
    labels = mix_targets(samples.reshape(-1, *[1] * len(spatial)).repeat(1, *spatial), mix, batch_size)
    assert torch.equal(labels.argmax(1, keepdim=True), mix_inputs(pixels, mix).long())
    assert ((labels == 0) | (labels == 1)).all()


@given(st.sampled_from(list(MIXERS)), st.sampled_from(list(MIXERS)), st.booleans(), seeds)
def test_a_choice_with_certainty_of_the_first_mixer_is_that_mixer(
    first: str, second: str, per_sample: bool, seed: int
) -> None:
    input = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    choice = RandomChoice([MIXERS[first](), MIXERS[second]()], (1, 0), per_sample=per_sample)
    torch.manual_seed(seed)
    lam, index = choice.sample(input)
    torch.manual_seed(seed)
    alone = choice.mixers[0].sample(input).lam  # type: ignore[operator]
    assert torch.equal(mix_inputs(input, Mix(lam, index)), mix_inputs(input, Mix(alone, index)))


@given(classification())
def test_index_and_dense_cross_entropy_are_the_same_number(batch: tuple[Tensor, Tensor, Mix]) -> None:
    input, target, mix = batch
    mix = in_float64(mix)
    dense = mix_targets(target, mix, input.shape[1])
    torch.testing.assert_close(mix_cross_entropy(input, target, mix), F.cross_entropy(input, dense))


@given(classification(ignored=True), st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_cross_entropy_is_the_reference_with_weights_ignored_positions_and_smoothing(
    batch: tuple[Tensor, Tensor, Mix], weighted: bool, label_smoothing: float
) -> None:
    input, target, mix = batch
    mix = in_float64(mix)
    weight = torch.rand(input.shape[1], dtype=torch.float64) + 0.1 if weighted else None
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            mix_cross_entropy(input, target, mix, weight=weight, reduction=reduction, label_smoothing=label_smoothing),
            reference.cross_entropy(
                input, target, mix, weight=weight, reduction=reduction, label_smoothing=label_smoothing
            ),
            equal_nan=True,  # a batch of nothing but ignored positions has no mean, as in torch
        )


@given(regression())
def test_both_modes_agree_for_binary_cross_entropy(batch: tuple[Tensor, Tensor, Mix]) -> None:
    output, target, mix = batch
    by_loss, by_target = (
        MixUpCriterion(torch.nn.BCEWithLogitsLoss(), interpolate_loss=mode)(output, target, mix)
        for mode in (True, False)
    )
    torch.testing.assert_close(by_loss, by_target, equal_nan=True)


@given(regression())
def test_the_modes_differ_for_mse_by_the_spread_of_the_two_targets(batch: tuple[Tensor, Tensor, Mix]) -> None:
    output, target, mix = batch
    output = output / 30000
    gap = mix_loss(torch.nn.MSELoss(), output, target, mix) - F.mse_loss(output, mix_targets(target, mix))
    lam = along(mix.lam.double(), target)
    expected = (lam * (1 - lam) * (target - target[mix.index]).square()).mean()
    torch.testing.assert_close(gap, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@given(tensors(), st.data())
def test_eval_is_the_identity_object_and_training_never_returns_the_input(input: Tensor, data: st.DataObject) -> None:
    cutmix = CutMix(0.0, spatial_dims=max(input.ndim - 2, 1))
    mixers = [MixUp(0.0), cutmix, RandomChoice([MixUp(0.0), cutmix])]
    module = data.draw(st.sampled_from(mixers[: 3 if input.ndim > 2 else 1]))
    assert module.eval()(input) is input
    assert module.last_mix is None
    assert module.train()(input) is not input
    assert torch.equal(module(input), input)
