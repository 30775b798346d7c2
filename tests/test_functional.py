"""The pure functions: layouts, devices, gradients, extreme values, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mixup_nn.functional as cf
from mixup_nn import Mix, MixUpCriterion
from mixup_nn._mix import input_mix, target_mix
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss, mix_targets, mixup_batch
from mixup_nn.sampling import sample_mixup

from . import reference
from .cases import CYCLE, PER_SAMPLE, SCALAR, Operations, both_lams, every_lam, lams_of, per_position, slow_vmap


def test_the_weight_of_the_original_is_lam() -> None:
    output = mix_inputs(torch.tensor([1.0, 2.0, 4.0, 8.0]), Mix(torch.tensor(0.75), CYCLE))
    assert output.tolist() == [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 8, 0.75 * 4 + 0.25 * 2, 0.75 * 8 + 0.25 * 1]


def test_each_sample_has_its_own_lam() -> None:
    mix = Mix(torch.tensor([0.0, 0.25, 0.5, 1.0]), CYCLE)
    expected = [4.0, 0.25 * 2 + 0.75 * 8, 3.0, 8.0]
    assert mix_inputs(torch.tensor([1.0, 2.0, 4.0, 8.0]), mix).tolist() == expected
    assert mix_inputs(torch.tensor([[[1.0]], [[2.0]], [[4.0]], [[8.0]]]), mix).flatten().tolist() == expected


def test_each_position_has_its_own_lam() -> None:
    lam = torch.tensor([[[1.0, 0.0, 0.25]]])
    input = torch.tensor([[[1.0, 2.0, 4.0]], [[5.0, 6.0, 8.0]]])
    mix = Mix(lam, torch.tensor([1, 0]))
    assert mix_inputs(input, mix).tolist() == [[[1.0, 6.0, 7.0]], [[5.0, 2.0, 5.0]]]
    labels = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert mix_targets(labels, mix, 2)[0].tolist() == [[1.0, 0.0, 0.25], [0.0, 1.0, 0.75]]
    share = torch.tensor(1.25 / 3)  # of the original
    torch.testing.assert_close(mix_targets(labels[:, 0], mix, 2)[0], torch.stack((share, 1 - share)))
    own = Mix(torch.cat((lam, 1 - lam)), mix.index)
    assert mix_inputs(input, own).tolist() == [[[1.0, 6.0, 7.0]], [[1.0, 6.0, 7.0]]]


@pytest.mark.parametrize("spatial", ((7,), (4, 5), (2, 3, 4)), ids=("audio", "images", "volumes"))
@pytest.mark.parametrize("lam", ("per_position", "per_sample_and_position"))
def test_every_position_is_that_of_the_loop(lam: str, spatial: tuple[int, ...]) -> None:
    input, mix = torch.randn(4, 3, *spatial), lams_of(*spatial)[lam]
    torch.testing.assert_close(mix_inputs(input, mix).double(), reference.mixed(input, mix))


@every_lam(5, 6)
@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_memory_format_and_dtype_are_kept(mix: Mix, format: torch.memory_format, dtype: torch.dtype) -> None:
    input = torch.randn(4, 3, 5, 6).to(dtype, memory_format=format)
    output = mix_inputs(input, mix)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=format)


def test_channels_last_3d_is_kept() -> None:
    input = torch.randn(4, 3, 2, 5, 6).to(memory_format=torch.channels_last_3d)
    for mix in lams_of(2, 5, 6).values():
        assert mix_inputs(input, mix).is_contiguous(memory_format=torch.channels_last_3d)


AMBIGUOUS: dict[str, Tensor] = {  # contiguous in both formats, told apart by their strides alone
    "one_channel": torch.randn(4, 1, 5, 6),
    "one_channel_last": torch.randn(4, 5, 6, 1).movedim(-1, 1),
    "one_pixel": torch.randn(4, 3, 1, 1),
    "one_pixel_last": torch.randn(4, 1, 1, 3).movedim(-1, 1),
    "one_of_each": torch.randn(4, 1, 1, 1),
}


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_strides_are_kept_where_the_memory_format_is_ambiguous(layout: str) -> None:
    input = AMBIGUOUS[layout]
    output = mix_inputs(input, SCALAR)
    assert output.stride() == input.clone().stride()
    torch.testing.assert_close(output.double(), reference.mixed(input, SCALAR))


LAYOUTS: dict[str, tuple[Tensor, str]] = {
    "contiguous": (torch.randn(4, 3, 5), "index_select"),
    "channels_last_1d": (torch.randn(4, 5, 3).transpose(1, 2), "index_select"),
    "channels_last": (torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last), "index_select"),
    "channels_last_3d": (torch.randn(4, 3, 2, 5, 6).to(memory_format=torch.channels_last_3d), "index_select"),
    "batch_last": (torch.randn(3, 5, 4).permute(2, 0, 1), "index"),
    "strided": (torch.randn(4, 3, 10)[..., ::2], "index"),
    "channels_last_strided": (torch.randn(8, 3, 5, 6).to(memory_format=torch.channels_last)[::2], "index"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_samples_are_gathered_where_the_layout_allows_it(layout: str) -> None:
    input, expected = LAYOUTS[layout]
    with Operations() as operations:
        output = mix_inputs(input, SCALAR)
    assert [name for name, _ in operations.made if name.startswith("index")] == [expected]
    torch.testing.assert_close(output.double(), reference.mixed(input, SCALAR))
    assert expected == "index" or output.stride() == input.stride()


def test_part_of_a_batch_in_channels_last_keeps_its_memory_format() -> None:
    input = torch.randn(8, 3, 5, 6).to(memory_format=torch.channels_last)
    for part in (input[::2], input[:4, :2], input[:4, :, 1:]):
        assert mix_inputs(part, SCALAR).is_contiguous(memory_format=torch.channels_last)


def test_one_map_for_all_samples_is_spread_along_channels_that_come_last() -> None:
    """The CPU is slow to broadcast along channels that lie side by side."""
    input = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    with Operations() as operations:
        mix_inputs(input, per_position(5, 6, per_sample=False))
    assert ("clone", 3 * 5 * 6) in operations.made


def test_works_on_the_device_of_the_input(device: str) -> None:
    input, mix = torch.randn(4, 3, device=device), Mix(*(tensor.to(device) for tensor in PER_SAMPLE))
    assert mix_inputs(input, mix).device == input.device
    torch.testing.assert_close(mix_inputs(input, mix).cpu(), mix_inputs(input.cpu(), PER_SAMPLE))


@pytest.mark.parametrize("view", ("expanded", "transposed", "strided"))
def test_views_are_mixed_and_left_alone(view: str) -> None:
    input = {
        "expanded": torch.randn(4, 1).expand(4, 3),
        "transposed": torch.randn(3, 4).T,
        "strided": torch.randn(8, 6)[::2, ::2],
    }[view]
    before = input.clone()
    torch.testing.assert_close(mix_inputs(input, SCALAR).double(), reference.mixed(input, SCALAR))
    assert torch.equal(input, before)


@every_lam(2)
@pytest.mark.parametrize("channels_last", (False, True))
def test_gradients_to_second_order_in_input_and_lam(mix: Mix, channels_last: bool) -> None:
    input = torch.randn(4, 2, 3, dtype=torch.float64).mT
    input = (input if channels_last else input.contiguous()).requires_grad_()
    lam = mix.lam.double().clamp(0.1, 0.9).requires_grad_()

    def mixed(input: Tensor, lam: Tensor) -> Tensor:
        return mix_inputs(input, Mix(lam, mix.index)).square()

    assert torch.autograd.gradcheck(mixed, (input, lam), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mixed, (input, lam))


@every_lam(2)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_gradients_to_second_order(mix: Mix, reduction: str) -> None:
    input = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def loss(input: Tensor) -> Tensor:
        return mix_cross_entropy(input, target, mix, weight=weight, reduction=reduction, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, input)
    assert torch.autograd.gradgradcheck(loss, input)


# Extreme values


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_the_largest_finite_values_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    input = torch.tensor([largest, largest, -largest, 0.0], dtype=dtype)
    assert mix_inputs(input, Mix(torch.tensor(0.5), torch.tensor([1, 3, 3, 0]))).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_sources_farther_apart_than_the_largest_number_are_the_documented_exception(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    mix = Mix(torch.tensor(0.5), torch.tensor([1, 0]))
    for gap, finite in ((largest, True), (1.1 * largest, False)):
        output = mix_inputs(torch.tensor([gap / 2, -gap / 2], dtype=dtype), mix)
        assert output.isfinite().tolist() == [finite, finite]


def test_float16_spans_its_whole_range() -> None:
    input = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert mix_inputs(input, Mix(torch.tensor(0.75), torch.tensor([1, 0]))).tolist() == [32752.0, -32752.0]


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("lam", (0.0, 0.5, 1.0))
def test_infinity_and_nan_reach_their_partner_and_no_other_sample(bad: float, lam: float) -> None:
    input = torch.tensor([bad, 1.0, 2.0, 3.0])
    output = mix_inputs(input, Mix(torch.tensor(lam), CYCLE))
    assert output.isfinite().tolist() == [False, True, True, False]  # sample 0 itself, and 3, which mixes with it


@both_lams
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_cross_entropy_of_extreme_logits_is_finite(mix: Mix, dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4], [-6e4, 6e4], [0.0, 0.0], [6e4, 6e4]]).to(dtype)
    target = torch.tensor([0, 1, 0, 1])
    loss = mix_cross_entropy(logits, target, mix, reduction="none")
    assert loss.dtype == dtype
    expected = reference_of_log_softmax(logits, target, mix)
    torch.testing.assert_close(loss.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def reference_of_log_softmax(logits: Tensor, target: Tensor, mix: Mix) -> Tensor:
    log_probs = logits.double().log_softmax(1)  # the loop of the reference overflows where log-softmax must not
    rows = [-lam * log_probs[i, target[i]] - (1 - lam) * log_probs[i, target[j]] for i, j, lam in reference.pairs(mix)]
    return torch.stack(rows)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_losses_are_rounded_once_at_the_end(dtype: torch.dtype, reduction: str) -> None:
    def weighed(losses: list[Tensor], lam: Tensor) -> Tensor:
        mixed = lam.double() * losses[0].double() + (1 - lam.double()) * losses[1].double()
        return (mixed if reduction == "none" else getattr(mixed, reduction)()).to(dtype)

    l1, l1_of_samples = nn.L1Loss(reduction=reduction), nn.L1Loss(reduction="none")
    for per_sample in 50 * (False, True):  # small batches: over many samples the roundings of single terms cancel
        lam, index = mix = sample_mixup(4, 1.0, per_sample=per_sample)
        logits, labels = torch.randn(4, 3).to(dtype), torch.randint(3, (4,))
        log_probs = logits.log_softmax(1)
        losses = [F.nll_loss(log_probs, y, reduction="none") for y in (labels, labels[index])]
        assert torch.equal(mix_cross_entropy(logits, labels, mix, reduction=reduction), weighed(losses, lam))
        if per_sample:  # one lam per batch interpolates the two losses as they are reduced
            input, target = torch.rand(2, 4).to(dtype)
            losses = [l1_of_samples(input, y) for y in (target, target[index])]
            assert torch.equal(mix_loss(l1, input, target, mix), weighed(losses, lam))


@both_lams
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_class_weights_of_large_half_precision_logits_are_not_rounded(
    dtype: torch.dtype, mix: Mix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", 0)
    for _ in range(20):
        logits, labels, weight = torch.randn(4, 3).to(dtype), torch.randint(3, (4,)), torch.rand(3).to(dtype)
        losses, weights = [], []
        for y in (labels, labels[mix.index]):
            losses.append(weight[y].double() * -logits.log_softmax(1).double().gather(1, y[:, None])[:, 0])
            weights.append(weight[y].double())
        mixed, total = (torch.lerp(b, a, mix.lam.double()).sum() for a, b in (losses, weights))
        assert torch.equal(mix_cross_entropy(logits, labels, mix, weight=weight, reduction="sum"), mixed.to(dtype))
        if mix.lam.ndim:
            assert torch.equal(mix_cross_entropy(logits, labels, mix, weight=weight), (mixed / total).to(dtype))


@both_lams
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_smoothed_loss_of_half_precision_logits_is_rounded_once(dtype: torch.dtype, mix: Mix) -> None:
    for _ in range(20):
        logits, labels = torch.randn(4, 3).to(dtype), torch.randint(3, (4,))
        log_probs = logits.log_softmax(1).double()
        losses = [F.nll_loss(log_probs, y, reduction="none") for y in (labels, labels[mix.index])]
        expected = torch.lerp(losses[1], losses[0], mix.lam.double()).lerp(-log_probs.mean(1), 0.5)
        ours = mix_cross_entropy(logits, labels, mix, reduction="none", label_smoothing=0.5)
        assert torch.equal(ours, expected.to(dtype))


@both_lams
@pytest.mark.parametrize("loss", (nn.CrossEntropyLoss(), nn.NLLLoss()))
def test_losses_under_autocast_are_those_of_float32(loss: nn.Module, mix: Mix) -> None:
    logits = torch.randn(4, 10).bfloat16()
    expected = mix_loss(loss, logits.float(), INDICES, mix)
    with torch.autocast("cpu", torch.bfloat16):
        ours = mix_loss(loss, logits, INDICES, mix)
    torch.testing.assert_close(ours, expected)  # its dtype too


@both_lams
def test_autocast_does_not_narrow_float64(mix: Mix) -> None:
    logits = torch.randn(4, 10, dtype=torch.float64)
    expected = mix_cross_entropy(logits, INDICES, mix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mix_cross_entropy(logits, INDICES, mix), expected)


# Composer's functional form


def composer_loop(model: nn.Module, X: Tensor, y: Tensor, *, dense: bool) -> Tensor:
    """Composer's two documented loops, with ``cf`` imported from here as the only change."""
    loss_fn = F.cross_entropy
    X_mixed, y_perm, mixing = cf.mixup_batch(X, y, alpha=0.2)
    if dense:
        y_mixed = (1 - mixing) * y + mixing * y_perm
        y_hat = model(X_mixed)
        return loss_fn(y_hat, y_mixed)
    y_hat = model(X_mixed)
    return (1 - mixing) * loss_fn(y_hat, y) + mixing * loss_fn(y_hat, y_perm)


@pytest.mark.parametrize("integer_one_hot", (False, True))
def test_both_loops_of_composer_run_unchanged_and_agree(integer_one_hot: bool) -> None:
    model, X, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    one_hot = F.one_hot(y, 3) if integer_one_hot else F.one_hot(y, 3).float()
    losses = []
    for dense in (False, True):
        torch.manual_seed(1)
        losses.append(composer_loop(model, X, one_hot if dense else y, dense=dense))
        losses[-1].backward()
    torch.testing.assert_close(*losses)


def test_mixing_weights_the_permuted_sample() -> None:
    input = torch.arange(8.0)
    mixed, permuted, mixing = mixup_batch(input, input.clone(), alpha=1.0)
    assert mixing.shape == ()
    torch.testing.assert_close(mixed, (1 - mixing) * input + mixing * permuted)
    assert sorted(permuted.tolist()) == input.tolist()
    assert (permuted != input).all()
    assert mixup_batch(input, input, alpha=0)[2] == 0


def test_mixup_batch_draws_on_the_device_of_the_input() -> None:
    input = torch.empty(4, 3, device="meta")
    assert all(tensor.is_meta for tensor in mixup_batch(input, input))


def test_mixing_is_one_minus_a_beta_draw() -> None:
    input = torch.randn(4).bfloat16()
    torch.manual_seed(5)
    lam = sample_mixup(4, 0.2).lam
    torch.manual_seed(5)
    assert mixup_batch(input, input)[2] == 1 - lam  # 0.2 is the default


# Losses


@every_lam(2)
@pytest.mark.parametrize("subclass", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("kind", (nn.CrossEntropyLoss, nn.NLLLoss))
def test_index_losses_take_weights_and_ignored_positions_into_the_mean(
    kind: type[nn.Module], reduction: str, subclass: bool, mix: Mix
) -> None:
    class Subclass(kind):  # type: ignore[misc, valid-type]
        pass

    input = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 1], [2, 7], [1, 1], [0, 2]])
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss = (Subclass if subclass else kind)(weight=weight, ignore_index=7, reduction=reduction)
    ours = mix_loss(loss, input.log_softmax(1) if kind is nn.NLLLoss else input, target, mix)
    expected = reference.cross_entropy(input, target, mix, weight=weight, ignore_index=7, reduction=reduction)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(value.sum(), input)[0] for value in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_a_scalar_lam_interpolates_the_two_losses_of_torch(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(torch.rand(3), ignore_index=1, reduction=reduction, label_smoothing=0.2)
    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    expected = 0.3 * loss(input, target) + 0.7 * loss(input, target[CYCLE])
    torch.testing.assert_close(mix_loss(loss, input, target, SCALAR), expected)


def test_a_subclass_with_its_own_forward_is_called() -> None:
    class Doubled(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    for mix in (SCALAR, PER_SAMPLE):
        doubled, plain = (mix_loss(loss, input, target, mix) for loss in (Doubled(), nn.CrossEntropyLoss()))
        torch.testing.assert_close(doubled, 2 * plain)


def test_a_callable_that_returns_per_sample_losses_gets_them_back_weighed() -> None:
    def squared_error(input: Tensor, target: Tensor) -> Tensor:
        return (input - target).square().mean(1)

    input, target = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ours = mix_loss(squared_error, input, target, PER_SAMPLE)
    torch.testing.assert_close(ours, reference.interpolated_loss(squared_error, input, target, PER_SAMPLE, "none"))


@every_lam(2, 3)
def test_the_loss_keeps_its_dtype(mix: Mix) -> None:
    input, target = torch.randn(4, 3).bfloat16(), torch.rand(4, 3).bfloat16()
    assert mix_loss(nn.MSELoss(), input, target, mix).dtype == torch.bfloat16
    assert mix_cross_entropy(input, torch.tensor([0, 1, 2, 0]), mix).dtype == torch.bfloat16


@every_lam(2, 3)
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(500)}))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_class_indices_cost_one_log_softmax_and_no_dense_target(
    mix: Mix, options: dict[str, Any], reduction: str
) -> None:
    input, target = torch.randn(4, 500), torch.tensor([0, 1, 2, 0])
    with Operations() as operations:
        mix_cross_entropy(input, target, mix, reduction=reduction, **options)
    assert [name for name, size in operations.made if size >= input.numel()] == ["_log_softmax"]


@every_lam(2, 3)
def test_the_loss_module_takes_the_same_short_way(mix: Mix) -> None:
    input, loss = torch.randn(4, 500), nn.CrossEntropyLoss()
    with Operations() as operations:
        mix_loss(loss, input, INDICES, mix)
    assert [name for name, size in operations.made if size >= input.numel()] == ["_log_softmax"]


@both_lams
def test_a_mixed_padding_mask_is_the_union_where_anything_was_mixed(mix: Mix) -> None:
    valid = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    union = valid | valid[mix.index]
    if mix.lam.ndim:  # lam is 1 for sample 2, which keeps its own mask, and 0 for sample 3, which takes its partner's
        union[2], union[3] = valid[2], valid[mix.index[3]]
    assert torch.equal(mix_inputs(valid.float(), mix) > 0, union)


@both_lams
def test_a_metric_of_integers_is_not_truncated(mix: Mix) -> None:
    predicted = torch.tensor([0, 2, 0, 0])
    hits = mix_loss(torch.eq, predicted, INDICES, mix)
    torch.testing.assert_close(hits, mix.lam * predicted.eq(INDICES) + (1 - mix.lam) * predicted.eq(INDICES[CYCLE]))
    assert (hits % 1).any()


@pytest.mark.parametrize("shape", ((), (4,)))
def test_a_lam_in_half_precision_does_not_narrow_the_sums(shape: tuple[int, ...]) -> None:
    mix = Mix(torch.full(shape, 0.25, dtype=torch.float16), CYCLE)
    input, target = torch.zeros(4, 3, 200, 200, dtype=torch.float16), torch.zeros(4, 200, 200, dtype=torch.int64)
    torch.testing.assert_close(mix_cross_entropy(input, target, mix).item(), math.log(3), atol=1e-3, rtol=0)
    mean = mix_loss(nn.L1Loss(), input, input + 1, mix)
    assert (mean.item(), mean.dtype) == (1, torch.float16)
    rough = torch.full(shape, 0.1, dtype=torch.float16)  # 1 - lam is none of its numbers
    losses = [mix_loss(nn.L1Loss(), EXAMPLE, EXAMPLE.flip(0), Mix(lam, CYCLE)) for lam in (rough, rough.float())]
    torch.testing.assert_close(*losses, atol=0, rtol=0)


@both_lams
def test_a_compiled_loss_is_taken_out_of_its_compilation(mix: Mix) -> None:
    target = torch.randn(4, 3)
    in_place = nn.MSELoss()
    in_place.compile()
    for loss in (in_place, torch.compile(nn.MSELoss())):
        ours = mix_loss(loss, EXAMPLE, target, mix)
        torch.testing.assert_close(ours, mix_loss(nn.MSELoss(), EXAMPLE, target, mix))


def test_a_scalar_lam_interpolates_the_loss_as_it_reduces_itself() -> None:
    class HalfMean(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) / (2 if self.reduction == "mean" else 1)

    input, target = torch.randn(4, 3), torch.randn(4, 3)
    expected = mix_loss(nn.MSELoss(), input, target, SCALAR) / 2
    torch.testing.assert_close(mix_loss(HalfMean(), input, target, SCALAR), expected)


def test_a_loss_and_its_parameters_are_shared_with_the_unreduced_evaluation_not_copied() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction = "mean"
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            losses: Tensor = self.scale * (input - target).square()
            return losses if self.reduction == "none" else losses.mean()

    loss = Scaled()
    mix_loss(loss, torch.randn(4), torch.randn(4), PER_SAMPLE).backward()
    assert loss.scale.grad is not None
    assert loss.reduction == "mean"
    assert list(loss.state_dict()) == ["scale"]


CROSS_ENTROPY_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)},
    "class_ignored": {"ignore_index": 1},
    "negative_ignored": {"ignore_index": -1},
    "no_class_ignored": {"ignore_index": 255},
    "smoothed": {"label_smoothing": 0.2},
    "all": {
        "weight": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), "ignore_index": 1, "label_smoothing": 0.2,
    },
}  # fmt: skip
either_size = pytest.mark.parametrize("large", (0, 2**22), ids=("large_logits", "small_logits"))


@every_lam(2)
@either_size
@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS.values(), ids=CROSS_ENTROPY_OPTIONS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_of_every_size_and_option_is_the_reference_with_gradients(
    mix: Mix, large: int, options: dict[str, Any], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", large)
    input = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 1], [2, options.get("ignore_index", -100)], [1, 1], [0, 2]])
    ours = mix_cross_entropy(input, target, mix, reduction=reduction, **options)
    expected = reference.cross_entropy(input, target, mix, reduction=reduction, **options)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), input)[0] for loss in (ours, expected)))


@both_lams
def test_large_logits_are_looked_up_once_for_both_labels(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lookup has a dense gradient, which at that size is what a loss costs."""
    lookups = {}
    for large in (EXAMPLE.numel() + 1, EXAMPLE.numel()):
        monkeypatch.setattr("mixup_nn._losses.LARGE", large)
        with Operations() as operations:
            mix_cross_entropy(EXAMPLE, INDICES, mix)
        lookups[large] = sum(operations.launched.count(name) for name in ("nll_loss_forward", "gather"))
    assert list(lookups.values()) == [2, 1]


@either_size
@both_lams
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_an_ignored_row_may_hold_infinities(
    mix: Mix, large: int, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", large)
    input, target = torch.randn(4, 3), torch.tensor([-100, 1, 2, 0])
    input[0, :2] = -torch.inf
    input.requires_grad_()
    lam = mix.lam.clone()  # sample 0 is ignored, and mixed with itself
    whole, rest = Mix(lam, torch.tensor([0, 2, 3, 1])), Mix(lam[1:] if lam.ndim else lam, torch.tensor([1, 2, 0]))
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    ours = mix_cross_entropy(input, target, whole, **options)
    expected = mix_cross_entropy(input[1:], target[1:], rest, **options)
    torch.testing.assert_close(ours, expected)
    gradient, same = (torch.autograd.grad(loss, input)[0] for loss in (ours, expected))
    torch.testing.assert_close(gradient, same)  # 0 for sample 0
    kept = whole._replace(lam=torch.ones_like(lam))
    torch.testing.assert_close(
        mix_cross_entropy(input, target, kept, **options), F.cross_entropy(input, target, **options)
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("weight", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
@either_size
def test_class_weights_of_a_dtype_that_torch_refuses_are_refused_at_every_size(
    dtype: torch.dtype, weight: torch.dtype, autocast: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", large)
    loss, input = nn.CrossEntropyLoss(torch.rand(3).to(weight)), EXAMPLE.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            plain = loss(input, INDICES)
        except RuntimeError:
            plain = None
        for mix in (SCALAR, PER_SAMPLE):
            if plain is not None:
                assert mix_loss(loss, input, INDICES, mix).dtype == plain.dtype
                continue
            with pytest.raises(TypeError, match="^expected class weights of the dtype of the logits, "):
                mix_loss(loss, input, INDICES, mix)


@either_size
def test_class_weights_have_no_gradient_at_any_size(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", large)
    loss = nn.CrossEntropyLoss(torch.rand(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="not differentiable"):
        loss(EXAMPLE, INDICES)
    with pytest.raises(TypeError, match=r"without gradient, got torch\.float32 with one$"):
        mix_loss(loss, EXAMPLE, INDICES, SCALAR)


@either_size
@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS.values(), ids=CROSS_ENTROPY_OPTIONS)
def test_partners_may_repeat(options: dict[str, Any], large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one lam per batch each of torch's two means has its own denominator; per sample they share one."""
    monkeypatch.setattr("mixup_nn._losses.LARGE", large)
    index, input = torch.tensor([1, 1, 3, 3]), EXAMPLE.double()
    target = torch.tensor([0, 2, options.get("ignore_index", -100), 1])
    loss = nn.CrossEntropyLoss(**options)
    expected = 0.3 * loss(input, target) + 0.7 * loss(input, target[index])
    torch.testing.assert_close(mix_loss(loss, input, target, Mix(SCALAR.lam.double(), index)), expected)
    mix = Mix(PER_SAMPLE.lam.double(), index)
    torch.testing.assert_close(
        mix_loss(loss, input, target, mix), reference.cross_entropy(input, target, mix, **options)
    )
    torch.testing.assert_close(mix_inputs(input, mix), reference.mixed(input, mix))
    torch.testing.assert_close(mix_targets(input, mix), reference.mixed(input, mix))


@every_lam(2)
def test_losses_and_dense_targets_are_differentiable_in_lam(mix: Mix) -> None:
    input, values = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    labels = torch.tensor([[0, 1], [2, 1], [1, 1], [0, 2]])
    ways: tuple[Callable[[Mix], Tensor], ...] = (
        lambda mix: mix_cross_entropy(input, labels, mix),
        lambda mix: mix_cross_entropy(input, labels, mix, label_smoothing=0.1),
        lambda mix: mix_loss(nn.MSELoss(), input, values, mix),
        lambda mix: mix_loss(nn.NLLLoss(), input, labels, mix),
        lambda mix: mix_targets(values, mix),
        lambda mix: mix_targets(labels, mix, 3),
        lambda mix: mix_targets(values[..., 0], mix),  # by the share
    )
    lam = mix.lam.double().clamp(0.1, 0.9).requires_grad_()
    for way in ways:
        assert torch.autograd.gradcheck(lambda lam, way=way: way(Mix(lam, mix.index)), lam)


def test_dense_targets_are_differentiable() -> None:
    target = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    for mix in (SCALAR, PER_SAMPLE):
        assert torch.autograd.gradcheck(lambda target, mix=mix: mix_targets(target, mix), target)


# Targets

OF_SAMPLES = "per sample"
OF_POSITIONS = "per position"


@pytest.mark.parametrize(
    "spatial, shape, floating, meaning",
    (
        ((5, 6), (4,), False, OF_SAMPLES),
        ((5, 6), (4,), True, OF_SAMPLES),
        ((5, 6), (4, 3), False, OF_SAMPLES),
        ((5, 6), (4, 3), True, OF_SAMPLES),
        ((5, 6), (4, 5, 6), False, OF_POSITIONS),
        ((5, 6), (4, 5, 6), True, OF_POSITIONS),
        ((5, 6), (4, 3, 5, 6), True, OF_POSITIONS),
        ((5, 6), (4, 3, 6), True, None),
        ((5, 6), (4, 10, 12), False, None),
        ((5, 6), (4, 3, 10, 12), True, None),
        ((5, 6), (4, 2, 3, 5, 6), True, None),
        ((7,), (4,), False, OF_SAMPLES),
        ((7,), (4, 3), True, OF_SAMPLES),
        ((7,), (4, 7), True, OF_SAMPLES),
        ((7,), (4, 7), False, OF_POSITIONS),
        ((7,), (4, 3, 7), True, OF_POSITIONS),
        ((7,), (4, 6), False, None),
        ((7,), (4, 3, 6), True, None),
        ((2, 3, 4), (4, 2, 3, 4), False, OF_POSITIONS),
        ((2, 3, 4), (4, 3), True, OF_SAMPLES),
        ((2, 3, 4), (4, 3, 4), True, None),
        ((1, 3, 4), (4, 2, 3, 4), False, OF_POSITIONS),  # one box for all frames of a clip
        ((1, 3, 4), (4, 5, 2, 3, 4), True, OF_POSITIONS),
        ((1, 3, 4), (4, 2), False, OF_SAMPLES),  # a label per frame
        ((1, 3, 4), (4, 3, 4), False, None),
        ((1,), (4, 7), False, OF_POSITIONS),
        ((1, 4), (4, 7, 4), False, OF_POSITIONS),
        ((1, 4), (4, 4, 4), True, OF_POSITIONS),  # as many as there are samples
        ((1, 4), (4, 7, 5), False, None),
        ((1, 4), (4, 4), False, None),  # labels along the one dimension that is cut, or of the sample?
        ((1, 4), (4, 4), True, OF_SAMPLES),
        ((1, 1), (4, 4), False, OF_SAMPLES),
        ((2, 3, 4), (4, 2), False, None),  # labels per frame?
        ((1, 3, 4), (4, 1), False, OF_SAMPLES),
        ((2, 3, 4), (4, 3), False, OF_SAMPLES),
        ((2, 3), (4, 5, 2, 3), False, OF_POSITIONS),  # several labels per position
    ),
)
@pytest.mark.parametrize("per_sample", (False, True))
def test_per_sample_and_per_position_targets_are_told_apart(
    spatial: tuple[int, ...], shape: tuple[int, ...], floating: bool, meaning: str | None, per_sample: bool
) -> None:
    mix = per_position(*spatial, per_sample=per_sample)
    target = torch.rand(shape, dtype=torch.float64) if floating else torch.randint(3, shape)
    if meaning is None:
        with pytest.raises(ValueError, match="^expected a target per sample, ") as error:
            mix_targets(target, mix, 3)
        assert str(spatial) in str(error.value)
        assert str(shape) in str(error.value)
        return
    expected = reference.mixed(
        target if floating else reference.one_hot(target, 3), mix, of_positions=meaning == OF_POSITIONS
    )
    torch.testing.assert_close(mix_targets(target, mix, 3).double(), expected, atol=1e-6, rtol=1e-6)


def test_dense_targets_of_indices_per_position() -> None:
    target = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])
    dense = mix_targets(target, PER_SAMPLE, 3)
    assert (dense.shape, dense.dtype) == ((4, 3, 2), torch.float32)
    torch.testing.assert_close(dense.double(), reference.mixed(reference.one_hot(target, 3), PER_SAMPLE))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64))
def test_indices_of_any_integer_dtype_become_dense(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 2, 127, 0]).to(dtype)
    for num_classes in (128, 300):  # more than a byte counts
        assert torch.equal(mix_targets(target, SCALAR, num_classes), mix_targets(target.long(), SCALAR, num_classes))


def test_dense_targets_are_made_on_the_device_of_the_indices() -> None:
    mix = Mix(*(tensor.to("meta") for tensor in SCALAR))
    assert mix_targets(torch.empty(4, dtype=torch.int64, device="meta"), mix, 3).device.type == "meta"


def test_an_ignored_index_becomes_a_row_of_zeros() -> None:
    dense = mix_targets(torch.tensor([-100, 1, -100, 0]), Mix(torch.tensor(0.75), torch.tensor([2, 0, 1, 2])), 2)
    assert dense.tolist() == [[0.0, 0.0], [0.0, 0.75], [0.0, 0.25], [0.75, 0.0]]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_floating_targets_keep_shape_and_dtype(dtype: torch.dtype) -> None:
    target = torch.rand(4).to(dtype)
    mixed = mix_targets(target, SCALAR)
    assert (mixed.shape, mixed.dtype) == ((4,), dtype)
    assert torch.equal(mixed, mix_inputs(target, SCALAR))


def test_a_mix_moves_to_the_device_of_what_it_is_applied_to(device: str) -> None:
    for place in (device, "meta"):
        for mix in lams_of(2, 3).values():
            input, labels = torch.randn(4, 3, 2, 3, device=place), torch.zeros(4, dtype=torch.int64, device=place)
            assert mix_inputs(input, mix).device.type == place
            assert (
                mix_targets(labels, Mix(mix.lam.double(), mix.index), 3).dtype == torch.float64
            )  # moved, not converted
            assert mix_targets(labels, mix, 3).device.type == place
            assert mix_loss(nn.MSELoss(), input, input, mix).device.type == place
            assert mix_cross_entropy(input[:, :, 0, 0], labels, mix).device.type == place


@pytest.mark.parametrize("door", (input_mix, target_mix))
def test_either_part_of_a_mix_moves_alone_and_lam_keeps_its_dtype_and_gradient(door: Callable[..., Mix]) -> None:
    value = torch.empty(4, 3, dtype=torch.bfloat16, device="meta")
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for mix in (Mix(lam, CYCLE), Mix(lam.to("meta"), CYCLE), Mix(lam, CYCLE.to("meta"))):
        moved = door(value, mix)
        assert moved.lam.is_meta
        assert moved.index.is_meta
        assert (moved.lam.dtype, moved.lam.requires_grad) == (torch.float64, True)


# Errors

EXAMPLE = torch.randn(4, 3)
INDICES = torch.tensor([0, 1, 2, 0])
TAKE_A_MIX: dict[str, Callable[..., Tensor]] = {
    "mix_inputs": mix_inputs,
    "mix_targets": mix_targets,
    "mix_loss": lambda target, mix: mix_loss(nn.MSELoss(), EXAMPLE, target, mix),
    "mix_cross_entropy": lambda target, mix: mix_cross_entropy(EXAMPLE, target, mix),
}
each_function = pytest.mark.parametrize("name", TAKE_A_MIX)


def argument(name: str) -> str:
    return "input" if name == "mix_inputs" else "target"


@each_function
def test_a_tensor_where_the_mix_belongs(name: str) -> None:
    message = (
        "^expected mix to be a Mix, got Tensor; targets go to MixUpCriterion or mixup_batch; a loss of three tensors"
    )
    with pytest.raises(TypeError, match=message):
        TAKE_A_MIX[name](EXAMPLE, INDICES)


@each_function
@pytest.mark.parametrize("mix", (None, tuple(SCALAR)), ids=("None", "tuple"))
def test_what_is_no_mix(name: str, mix: Any) -> None:
    message = (
        f"^expected mix to be a Mix, got {type(mix).__name__}; draw one by sampling.sample_mixup; .* in eval mode$"
    )
    with pytest.raises(TypeError, match=message):
        TAKE_A_MIX[name](EXAMPLE, mix)


@each_function
def test_a_batch_of_another_size_names_both_sizes(name: str) -> None:
    message = f"^expected {argument(name)} to have the batch size of the mix, 4, got 3; .*keep the batch as first dim"
    with pytest.raises(ValueError, match=message):
        TAKE_A_MIX[name](EXAMPLE[:3], SCALAR)


@each_function
def test_a_scalar_has_no_batch_dimension(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^expected {argument(name)} to have a batch dimension, got shape \(\); for one sample"
    ):
        TAKE_A_MIX[name](torch.tensor(1.0), SCALAR)


@each_function
def test_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=f"^expected {argument(name)} to be a tensor, got Mix$"):
        TAKE_A_MIX[name](SCALAR, INDICES)
    for value in ([1.0, 2.0], (EXAMPLE, EXAMPLE), {"labels": INDICES}):
        fix = (
            "; use a criterion per head, or sample numbers as the target: docs/recipes.md"
            if name != "mix_inputs"
            else ""
        )
        with pytest.raises(
            TypeError, match=f"^expected {argument(name)} to be a tensor, got {type(value).__name__}{fix}$"
        ):
            TAKE_A_MIX[name](value, SCALAR)
    with pytest.raises(TypeError, match=f"^expected {argument(name)} to be a tensor, got float$"):
        TAKE_A_MIX[name](1.0, SCALAR)


@each_function
@pytest.mark.parametrize(
    "lam, index, got",
    (
        (0.5, CYCLE, "float and torch.int64"),
        (torch.tensor(1), CYCLE, "torch.int64 and torch.int64"),
        (torch.tensor(0.5), [2, 0, 3, 1], "torch.float32 and list"),
        (torch.tensor(0.5), torch.rand(4), "torch.float32 and torch.float32"),
        (torch.tensor(0.5), CYCLE > 0, "torch.float32 and torch.bool"),
    ),
)
def test_a_mix_of_other_types(name: str, lam: Any, index: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^expected mix.lam to be a floating .* got {got}; as in Mix"):
        TAKE_A_MIX[name](EXAMPLE, Mix(lam, index))


@each_function
@pytest.mark.parametrize(
    "lam",
    (
        torch.rand(3),
        torch.rand(4, 1),
        torch.rand(1),
        torch.rand(3, 1, 2, 2),
        torch.rand(4, 3, 2, 2),
        torch.rand(1, 2, 2),
    ),
    ids=("short", "matrix", "one", "too_many_samples", "per_channel", "no_channel"),
)
def test_a_mix_of_inconsistent_shape(name: str, lam: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected mix.index of shape \(B,\), mix.lam of \(\), "):
        TAKE_A_MIX[name](EXAMPLE, Mix(lam, CYCLE))


def test_a_mix_whose_index_is_no_vector() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(\)$"):
        mix_inputs(EXAMPLE, Mix(torch.tensor(0.5), CYCLE.view(2, 2)))


@pytest.mark.parametrize(
    "dtype, fix",
    (
        (torch.uint8, r"scale images first: input\.float\(\) / 255"),
        (torch.int64, "mix token ids after their embedding, convert other numbers by input"),
        (torch.bool, "convert other numbers by input"),
        (torch.complex64, r"use torch\.view_as_real\(input\)"),
    ),
)
def test_inputs_must_be_floating(dtype: torch.dtype, fix: str) -> None:
    with pytest.raises(TypeError, match=rf"^expected a floating-point input, got {dtype}; .*{fix}"):
        mix_inputs(torch.ones(4, 3, dtype=dtype), SCALAR)


@pytest.mark.parametrize("dtype", (torch.bool, torch.complex64))
def test_targets_must_be_floating_or_indices(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^expected floating targets or .* got {dtype}; .*\.float\(\)"):
        mix_targets(torch.ones(4, dtype=dtype), SCALAR, 2)


def test_index_targets_made_dense_need_num_classes() -> None:
    with pytest.raises(
        ValueError, match=r"^expected num_classes with class indices, got None with torch.int64 targets$"
    ):
        mix_targets(INDICES, SCALAR)


@both_lams
@pytest.mark.parametrize("target", ([0, 77, 1, 0], [0, 3, 1, 0]))
def test_classes_that_do_not_exist_raise(target: list[int], mix: Mix) -> None:
    with pytest.raises(ValueError, match=f"^expected class indices below num_classes, 3, got {max(target)}; "):
        mix_targets(torch.tensor(target), mix, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        mix_cross_entropy(EXAMPLE, torch.tensor(target), mix)


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_class_indices_of_a_single_class_are_refused_by_their_shapes(device: str) -> None:
    labels, mix = torch.zeros(4, dtype=torch.int64, device=device), Mix(*(part.to(device) for part in SCALAR))
    with pytest.raises(
        ValueError, match=r"^expected at least two classes for class indices, got 1; .*target\.float\(\)"
    ):
        mix_targets(labels, mix, 1)


def test_values_that_cannot_be_read_are_not_read() -> None:
    with FakeTensorMode() as fake:
        mix = Mix(*(fake.from_tensor(part) for part in SCALAR))
        assert mix_targets(fake.from_tensor(INDICES), mix, 3).shape == (4, 3)


@slow_vmap
def test_indices_become_dense_inside_a_gradient_of_each_sample() -> None:
    weight = torch.randn(3, requires_grad=True)

    def loss(weight: Tensor, target: Tensor) -> Tensor:
        return (mix_targets(target, SCALAR, 3) * weight).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, torch.stack((INDICES, INDICES.flip(0))))
    expected = [torch.autograd.grad(loss(weight, y), weight)[0] for y in (INDICES, INDICES.flip(0))]
    torch.testing.assert_close(gradients, torch.stack(expected))


@pytest.mark.parametrize("shape", ((0,), (0, 5)))
def test_an_empty_batch_of_indices_becomes_dense(shape: tuple[int, ...]) -> None:
    mix = Mix(torch.tensor(0.3), torch.empty(0, dtype=torch.int64))
    assert mix_targets(torch.empty(shape, dtype=torch.int64), mix, 3).shape == (0, 3, *shape[1:])


def test_inputs_of_other_positions_name_both_sizes_and_the_ways_out() -> None:
    mix = per_position(5, 6)
    for shape in ((4, 3, 5, 7), (4, 3, 1, 1), (4, 5, 6), (4, 3), (4,), (4, 3, 2, 5, 6)):
        input = torch.randn(shape)
        with pytest.raises(ValueError, match=r"^expected input of shape \(B, C, \*spatial\) .*\(5, 6\), got") as error:
            mix_inputs(input, mix)
        assert str(shape) in str(error.value)
        assert "mix._replace(lam=mix.share)" in str(error.value)
        assert "mix._replace(lam=interpolate(mix.lam, size))" in str(error.value)
        mixed = mix_inputs(input, mix._replace(lam=mix.share))
        torch.testing.assert_close(mixed, reference.mixed(input, mix, of_positions=False).float())
    resized = mix._replace(lam=F.interpolate(mix.lam, (10, 12)))
    assert mix_inputs(torch.randn(4, 3, 10, 12), resized).shape == (4, 3, 10, 12)


def test_targets_per_frame_are_not_taken_for_targets_per_sample() -> None:
    mix, labels = per_position(6, 2, 3), torch.randint(3, (4, 6))
    for target in (labels, labels.int()):
        with pytest.raises(ValueError, match=r"; labels along a dimension take .*lam\.mean\(\(3, 4\)\)"):
            mix_targets(target, mix, 3)
    frames = mix._replace(lam=mix.lam.mean((3, 4)))
    expected = reference.mixed(reference.one_hot(labels, 3), frames)
    torch.testing.assert_close(mix_targets(labels, frames, 3), expected.float())
    assert mix_targets(labels, mix._replace(lam=mix.share), 3).shape == (4, 3, 6)


def test_labels_along_the_one_dimension_that_is_cut_are_not_taken_for_labels_of_a_sample() -> None:
    mix, labels = per_position(1, 7), torch.randint(3, (4, 7))  # of a spectrogram cut in time
    with pytest.raises(ValueError, match=r"; labels along a dimension take .*lam=mix\.lam\.flatten\(2\)"):
        mix_targets(labels, mix, 3)
    along = mix._replace(lam=mix.lam.flatten(2))
    dense = reference.one_hot(labels, 3)
    torch.testing.assert_close(mix_targets(labels, along, 3), reference.mixed(dense, along).float())
    torch.testing.assert_close(mix_targets(labels, along, 3), mix_targets(dense, mix).float())


def test_integer_vectors_under_a_mix_of_one_dimension_lead_to_floats_or_the_share() -> None:
    mix, tags = per_position(7), torch.randint(2, (4, 5))
    with pytest.raises(ValueError, match=r"int64 of shape \(4, 5\); .* multi-hot ones are floats, ") as error:
        mix_targets(tags, mix, 2)
    assert "mix._replace(lam=mix.share)" in str(error.value)
    torch.testing.assert_close(mix_targets(tags.float(), mix).double(), reference.mixed(tags, mix, of_positions=False))
    assert mix_targets(tags, mix._replace(lam=mix.share), 2).shape == (4, 2, 5)


class Dice(nn.Module):
    """As MONAI's: a loss for each sample and class, of shape (B, C, 1, 1)."""

    reduction = "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        overlap = (input * target).sum((2, 3), keepdim=True)
        losses: Tensor = 1 - 2 * overlap / (input + target).sum((2, 3), keepdim=True)
        return losses if self.reduction == "none" else losses.mean()


def test_losses_of_whole_samples_under_a_mix_per_position_lead_to_mixed_targets() -> None:
    def of_columns(input: Tensor, target: Tensor) -> Tensor:
        return (input - target).square().mean(2)

    input, target, mix = torch.rand(4, 3, 2, 5), torch.rand(4, 3, 2, 5), per_position(2, 5)
    for loss, shape in ((of_columns, r"\(4, 3, 5\)"), (Dice(), r"\(4, 3, 1, 1\)")):
        message = (
            rf"^expected a loss per position of mix.lam, \(2, 5\), got losses of shape {shape}; .*interpolate_loss"
        )
        with pytest.raises(ValueError, match=message):
            mix_loss(loss, input, target, mix)
    losses = [1 - 2 * (input * y).sum((2, 3)) / (input + y).sum((2, 3)) for y in (target, target[CYCLE])]
    expected = (mix.share[:, None] * losses[0] + (1 - mix.share[:, None]) * losses[1]).mean()
    torch.testing.assert_close(mix_loss(Dice(), input, target, mix._replace(lam=mix.share)), expected)
    mixed = MixUpCriterion(Dice(), interpolate_loss=False)(input, target, mix)
    torch.testing.assert_close(mixed, Dice()(input, mix_targets(target, mix)))


def test_a_loss_is_reduced_as_it_is_told_and_not_as_its_class() -> None:
    summed, input, target = Dice(), torch.rand(4, 3, 2, 5), torch.rand(4, 3, 2, 5)
    summed.reduction = "sum"
    means = mix_loss(Dice(), input, target, PER_SAMPLE)
    torch.testing.assert_close(mix_loss(summed, input, target, PER_SAMPLE), 12 * means)


@pytest.mark.filterwarnings("ignore:(Sparse CSR|The PyTorch API of nested tensors):UserWarning")
@each_function
def test_sparse_nested_and_distributed_tensors_are_refused_by_name(name: str) -> None:
    jagged = torch.nested.nested_tensor([torch.randn(3)] * 4, layout=torch.jagged)
    nested = torch.nested.nested_tensor([torch.randn(3)] * 4, layout=torch.strided)
    refused = {
        "tensor of layout torch.sparse_coo": EXAMPLE.to_sparse(),
        "tensor of layout torch.sparse_csr": EXAMPLE.to_sparse_csr(),
        "nested tensor": jagged,
        "DTensor": DistributedLookalike(),
    }
    fix = r"use its to_dense\(\), to_padded_tensor\(0\) or to_local\(\)"
    for got, value in (*refused.items(), ("nested tensor", nested)):
        with pytest.raises(
            TypeError, match=f"^expected {argument(name)} to be a dense strided tensor, got a {got}; {fix}$"
        ):
            TAKE_A_MIX[name](value, SCALAR)


class DistributedLookalike(Tensor):
    """A DTensor needs a process group; it is told by this attribute."""

    device_mesh = None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bool, torch.int8, torch.uint8, torch.int32))
def test_cross_entropy_takes_indices(dtype: torch.dtype) -> None:
    message = rf"^expected class indices of dtype int64, got {dtype}; .*target.long\(\), and give dense targets"
    target = torch.ones(4, dtype=dtype)
    with pytest.raises(TypeError, match=message):
        mix_cross_entropy(EXAMPLE, target, SCALAR)
    with pytest.raises(TypeError, match=message):
        mix_loss(nn.NLLLoss(), EXAMPLE.log_softmax(1), target, SCALAR)
    for loss in (nn.CrossEntropyLoss(), nn.NLLLoss()):  # as torch's own, outside: bytes per position
        with pytest.raises((RuntimeError, ValueError)):
            loss(EXAMPLE[..., None], target[:, None])


@pytest.mark.parametrize(
    "input, target",
    (((4,), (4,)), ((4, 3), (4, 3)), ((4, 3), (4, 1)), ((4, 3, 5), (4,)), ((5, 3), (4,)), ((4, 3, 5), (4, 6))),
)
def test_class_indices_fit_their_logits(input: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^expected input of shape \(B, C, \*\)") as error:
        mix_cross_entropy(torch.randn(input), torch.zeros(target, dtype=torch.int64), SCALAR)
    assert f"got {input} and {target}" in str(error.value)
    assert str(error.value).endswith("; one-hot targets must be floats") == (input == target)


def test_logits_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="^expected input to be a tensor, got tuple$"):
        mix_cross_entropy((EXAMPLE, EXAMPLE), INDICES, SCALAR)  # type: ignore[arg-type]


@pytest.mark.parametrize("label_smoothing", (-0.1, 1.1))
def test_label_smoothing_out_of_range(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"expected label_smoothing in \[0, 1\], got {label_smoothing}$"):
        mix_cross_entropy(EXAMPLE, INDICES, SCALAR, label_smoothing=label_smoothing)


@pytest.mark.parametrize("reduction", ("max", "batchmean", None))
def test_unknown_reduction_of_a_cross_entropy(reduction: Any) -> None:
    message = f"^expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}$"
    with pytest.raises(ValueError, match=message):
        mix_cross_entropy(EXAMPLE, INDICES, SCALAR, reduction=reduction)


def test_unknown_reduction_of_a_loss() -> None:
    class Largest(nn.Module):
        reduction = "max"

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return (input - target).abs()

    with pytest.raises(ValueError, match="^expected reduction to be 'none', .* or 'batchmean', got 'max'$"):
        mix_loss(Largest(), EXAMPLE, torch.randn(4, 3), PER_SAMPLE)


class Wrapped(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        output: Tensor = 2 * self.loss(input, target)
        return output


class Averaged(Wrapped):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).mean()


class Stubborn(nn.MSELoss):
    """Has a reduction, and does not look at it."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target).square().mean()


class NotAModule:
    reduction = "mean"

    def __call__(self, input: Any, target: Tensor) -> Tensor:
        losses: Tensor = (input - target).square()
        return losses.mean() if self.reduction == "mean" else losses


NUMBER, DENSE_TARGETS = "let it return one value per sample", "interpolate_loss=False"


@pytest.mark.parametrize(
    "loss, input, fixes",
    (
        (F.mse_loss, EXAMPLE, (NUMBER, DENSE_TARGETS)),
        (lambda input, target: (input - target).flatten(), EXAMPLE, (NUMBER, DENSE_TARGETS)),
        (lambda heads, target: F.mse_loss(heads["a"], target), {"a": EXAMPLE}, (NUMBER,)),
        (Wrapped(nn.MSELoss()), EXAMPLE, ("make the MSELoss inside Wrapped with reduction='none'",)),
        (Averaged(nn.MSELoss(reduction="none")), EXAMPLE, (NUMBER, DENSE_TARGETS)),
        (Stubborn(), EXAMPLE, (NUMBER, DENSE_TARGETS)),
        (NotAModule(), EXAMPLE, ("set its reduction to 'none'",)),
    ),
    ids=("function", "other_shape", "dict", "wrapper", "averaging_wrapper", "stubborn", "no_module"),
)
def test_a_loss_of_one_number_under_weights_per_sample_is_told_what_fits_it(
    loss: Callable[[Any, Tensor], Tensor], input: Any, fixes: tuple[str, ...]
) -> None:
    message = r"^expected a loss per sample, of shape \(4, ...\), .*, or draw one lam per batch$"
    with pytest.raises(ValueError, match=message) as error:
        mix_loss(loss, input, torch.randn(4, 3), PER_SAMPLE)
    for fix in (NUMBER, DENSE_TARGETS, "make the MSELoss", "set its reduction"):
        assert (fix in str(error.value)) == any(fix in named for named in fixes)


def test_what_that_error_advises_works() -> None:
    target = torch.randn(4, 3)
    expected = mix_loss(nn.MSELoss(reduction="none"), EXAMPLE, target, PER_SAMPLE)
    torch.testing.assert_close(
        mix_loss(Wrapped(nn.MSELoss(reduction="none")), EXAMPLE, target, PER_SAMPLE), 2 * expected
    )
    loss = NotAModule()
    loss.reduction = "none"
    torch.testing.assert_close(mix_loss(loss, EXAMPLE, target, PER_SAMPLE), expected)


def test_a_loss_of_hard_labels_is_not_told_to_take_dense_targets() -> None:
    class Margin(nn.MultiMarginLoss):  # reduces whatever it is told
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return F.multi_margin_loss(input, target)

    with pytest.raises(ValueError, match="^expected a loss per sample") as error:
        mix_loss(Margin(), EXAMPLE, INDICES, PER_SAMPLE)
    assert DENSE_TARGETS not in str(error.value)


class Hits:
    """As a metric of torchmetrics: it counts what it is called with."""

    def __init__(self) -> None:
        self.hits = self.seen = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.hits, self.seen = self.hits + int((output.argmax(1) == target).sum()), self.seen + len(target)

    def compute(self) -> float:
        return self.hits / self.seen

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.update(output, target)
        return (output.argmax(1) == target).float()


@both_lams
def test_a_metric_with_state_is_refused_where_it_would_be_called_twice(mix: Mix) -> None:
    metric = Hits()
    for call in (mix_loss, lambda metric, *args: MixUpCriterion(metric)(*args)):
        with pytest.raises(
            TypeError, match="^expected a loss without state, got Hits with update and compute, .*functional"
        ):
            call(metric, EXAMPLE, INDICES, mix)
    assert metric.seen == 0
    MixUpCriterion(metric)(EXAMPLE, INDICES)  # plain validation: once
    assert metric.seen == 4


class Focal(nn.Module):
    """Its mean is over the targets that are not ignored, as it alone knows."""

    ignore_index, reduction = 255, "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(input, target, ignore_index=255, reduction="none")
        losses = (1 - (-losses).exp()) * losses
        return losses if self.reduction == "none" else losses.sum() / (target != 255).sum()


def test_a_mean_that_only_the_loss_knows_is_not_guessed() -> None:
    loss, target = Focal(), torch.tensor([0, 255, 2, 0])
    expected = 0.3 * loss(EXAMPLE, target) + 0.7 * loss(EXAMPLE, target[CYCLE])
    torch.testing.assert_close(mix_loss(loss, EXAMPLE, target, SCALAR), expected)
    with pytest.raises(ValueError, match="^expected a loss whose mean over ignored targets is known, got Focal; "):
        mix_loss(loss, EXAMPLE, target, PER_SAMPLE)
    loss.reduction = "none"
    assert mix_loss(loss, EXAMPLE, target, PER_SAMPLE).shape == (4,)


@every_lam(2)
def test_a_loss_may_change_its_target_in_place(mix: Mix) -> None:
    def halved(input: Tensor, target: Tensor) -> Tensor:
        return (input - target.mul_(0.5)).square()

    input, target = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    expected = mix_loss(lambda input, target: (input - 0.5 * target).square(), input, target, mix)
    torch.testing.assert_close(mix_loss(halved, input, target.clone(), mix), expected)


def test_mixup_batch_errors() -> None:
    with pytest.raises(ValueError, match="^expected target to have the batch size of the mix, 4, got 3"):
        mixup_batch(EXAMPLE, INDICES[:3])
    with pytest.raises(TypeError, match="^expected input to be a tensor, got list$"):
        mixup_batch([1.0], INDICES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^expected target to be a tensor, got NoneType$"):
        mixup_batch(EXAMPLE, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^expected a floating-point input, got torch.int64"):
        mixup_batch(INDICES, INDICES)
    with pytest.raises(ValueError, match="expected alpha to be a finite number >= 0, got -1"):
        mixup_batch(EXAMPLE, INDICES, alpha=-1)
