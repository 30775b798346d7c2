"""What a property says less clearly: numbers by hand, extreme and half-precision values, derivatives, odd callables."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixup_nn import Mix, MixUpCriterion
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss, mix_targets

from . import reference
from .cases import CYCLE, PER_SAMPLE, SCALAR, both_lams, every_lam, slow_vmap
from .versions import LINEAR_CROSS_ENTROPY

HALF = Mix(torch.tensor(0.5), torch.tensor([1, 0]))
INDICES = torch.tensor([0, 1, 2, 0])
each_half = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
each_dtype = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
SIZES = {"small": 2**22, "large": 0}


@pytest.fixture(params=list(SIZES.values()), ids=list(SIZES))
def either_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of cross entropy, for logits of this size."""
    monkeypatch.setattr("mixup_nn._losses.LARGE", request.param)


# By hand


def test_the_weight_of_the_original_is_lam() -> None:
    input = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert mix_inputs(input, Mix(torch.tensor(0.75), CYCLE)).tolist() == [1.75, 3.5, 3.5, 6.25]
    assert mix_inputs(input, Mix(torch.tensor([0.0, 0.25, 0.5, 1.0]), CYCLE)).tolist() == [4.0, 6.5, 3.0, 8.0]
    mix, labels = Mix(torch.tensor([[[1.0, 0.0, 0.25]]]), torch.tensor([1, 0])), torch.tensor([[0, 0, 0], [1, 1, 1]])
    input = torch.tensor([[[1.0, 2.0, 4.0]], [[5.0, 6.0, 8.0]]])
    assert mix_inputs(input, mix).tolist() == [[[1.0, 6.0, 7.0]], [[5.0, 2.0, 5.0]]]
    assert mix_targets(labels, mix, 2)[0].tolist() == [[1.0, 0.0, 0.25], [0.0, 1.0, 0.75]]
    torch.testing.assert_close(mix_targets(labels[:, 0], mix, 2)[0], torch.tensor([1.25 / 3, 1.75 / 3]))


# Extreme values


@each_dtype
def test_the_largest_finite_values_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    input = torch.tensor([largest, largest, -largest, 0.0], dtype=dtype)
    assert mix_inputs(input, Mix(torch.tensor(0.5), torch.tensor([1, 3, 3, 0]))).isfinite().all()
    for gap in (1.0, 1.1):  # float16 spans its whole range, as it is computed in float32
        output = mix_inputs(torch.tensor([gap * largest / 2, -gap * largest / 2], dtype=dtype), HALF)
        assert output.isfinite().all() == (gap == 1 or dtype == torch.float16)


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("lam", (0.0, 0.5, 1.0))
def test_infinity_and_nan_reach_their_partner_and_no_other_sample(bad: float, lam: float) -> None:
    output = mix_inputs(torch.tensor([bad, 1.0, 2.0, 3.0]), Mix(torch.tensor(lam), CYCLE))
    assert output.isfinite().tolist() == [False, True, True, False]  # sample 0 itself, and 3, which mixes with it


@both_lams
@pytest.mark.usefixtures("either_size")
@each_dtype
def test_cross_entropy_of_extreme_logits_is_finite(mix: Mix, dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4], [-6e4, 6e4], [0.0, 0.0], [6e4, 6e4]]).to(dtype)
    target = torch.tensor([0, 1, 0, 1])
    ours = mix_cross_entropy(logits, target, mix, reduction="none")
    expected = reference.cross_entropy(logits, target, mix, reduction="none")
    torch.testing.assert_close(ours.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@both_lams
@pytest.mark.usefixtures("either_size")
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_an_ignored_row_may_hold_infinities(mix: Mix, label_smoothing: float) -> None:
    input, target = torch.randn(4, 3), torch.tensor([-100, 1, 2, 0])
    input[0, :2] = -torch.inf
    input.requires_grad_()
    lam = mix.lam.clone()  # sample 0 is ignored, and mixed with itself
    whole, rest = Mix(lam, torch.tensor([0, 2, 3, 1])), Mix(lam[1:] if lam.ndim else lam, torch.tensor([1, 2, 0]))
    ours = mix_cross_entropy(input, target, whole, label_smoothing=label_smoothing)
    expected = mix_cross_entropy(input[1:], target[1:], rest, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, input)[0] for loss in (ours, expected)))


@pytest.mark.parametrize("shape", ((0,), (0, 5)))
@pytest.mark.parametrize("lam", ((), (0,)))
def test_an_empty_batch_is_mixed(shape: tuple[int, ...], lam: tuple[int, ...]) -> None:
    mix = Mix(torch.ones(lam), torch.empty(0, dtype=torch.int64))
    target = torch.empty(shape, dtype=torch.int64)
    assert mix_inputs(torch.empty(0, 3), mix).shape == (0, 3)
    assert mix_targets(target, mix, 3).shape == (0, 3, *shape[1:])
    logits = torch.empty(0, 3, *shape[1:], requires_grad=True)
    loss = mix_cross_entropy(logits, target, mix, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == logits.shape
    assert mix_cross_entropy(logits, target, mix).isnan()


# Half precision: rounded once, at the end


def assert_rounded_once(ours: Tensor, expected: Tensor, steps: float = 0.501) -> None:
    """Half a step from the number itself, and a trace for the sums in float32."""
    torch.testing.assert_close(ours.double(), expected, rtol=steps * torch.finfo(ours.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("size", ("small", "large"))
@each_half
def test_half_precision_cross_entropy_is_rounded_once(
    dtype: torch.dtype, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", SIZES[size])
    for case in itertools.product(5 * [(), (4,)], ("none", "mean", "sum"), (False, True), (0.0, 0.5)):
        shape, reduction, weighted, label_smoothing = case
        mix, labels = Mix(torch.rand(shape), CYCLE), torch.randint(3, (4,))  # in large batches roundings would cancel
        logits, weight = (3 * torch.randn(4, 3)).to(dtype), (torch.rand(3) + 0.1).to(dtype) if weighted else None
        options: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
        ours = mix_cross_entropy(logits, labels, mix, **options)
        log_probs = logits.double().log_softmax(1) if size == "small" else logits.log_softmax(1)  # large: its own dtype
        loss = reference.CrossEntropy(**options, normalised=True)
        twice = size == "large" and weighted and label_smoothing  # weights times log-probabilities are rounded too
        assert_rounded_once(ours, reference.mix_loss(loss, log_probs, labels, mix), 1.5 if twice else 0.501)


@each_half
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_half_precision_losses_of_torch_are_rounded_once_more(dtype: torch.dtype, reduction: str) -> None:
    for _ in range(20):
        mix, (input, target) = Mix(torch.rand(4), CYCLE), torch.rand(2, 4).to(dtype)
        losses = [(input - y).abs().double() for y in (target, target[CYCLE])]
        expected = reference.reduce(losses[1].lerp(losses[0], mix.lam.double()), reduction)
        assert_rounded_once(mix_loss(nn.L1Loss(reduction=reduction), input, target, mix), expected)


@pytest.mark.parametrize("shape", ((), (4,)))
def test_a_lam_in_half_precision_does_not_narrow_the_sums(shape: tuple[int, ...]) -> None:
    mix = Mix(torch.full(shape, 0.25, dtype=torch.float16), CYCLE)
    input = torch.zeros(4, 3, 200, 200, dtype=torch.float16)
    assert mix_loss(nn.L1Loss(), input, input + 1, mix).item() == 1
    rough = torch.full(shape, 0.1, dtype=torch.float16)  # 1 - lam is none of its numbers
    losses = [mix_loss(nn.L1Loss(), torch.eye(4), torch.ones(4, 4), Mix(lam, CYCLE)) for lam in (rough, rough.float())]
    torch.testing.assert_close(*losses, atol=0, rtol=0)


@both_lams
@pytest.mark.usefixtures("either_size")
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_losses_under_autocast_are_those_of_float32_or_wider(label_smoothing: float, mix: Mix) -> None:
    """With class weights in float32, as a model under autocast has them."""
    weight = torch.rand(10)
    cross_entropies = [nn.CrossEntropyLoss(w, label_smoothing=label_smoothing) for w in (None, weight)]
    for loss in (*cross_entropies, nn.NLLLoss(), nn.NLLLoss(weight)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            each = copy.deepcopy(loss).to(wide)
            logits = torch.randn(4, 10).to(dtype)
            expected = mix_loss(each, logits.to(wide), INDICES, mix)
            with torch.autocast("cpu", torch.bfloat16 if dtype != torch.float16 else dtype):
                torch.testing.assert_close(mix_loss(each, logits, INDICES, mix), expected)  # its dtype too


@pytest.mark.usefixtures("either_size", "fresh_compiler")
@pytest.mark.parametrize("mode", ("training", "eval", "compiled"))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_class_weights_of_another_dtype_are_refused_in_every_mode(label_smoothing: float, mode: str) -> None:
    logits, loss = torch.randn(4, 3).bfloat16(), nn.CrossEntropyLoss(torch.rand(3), label_smoothing=label_smoothing)
    criterion = MixUpCriterion(loss)
    call = torch.compile(criterion, backend="eager", fullgraph=True) if mode == "compiled" else criterion
    for mix in (None,) if mode == "eval" else (SCALAR, PER_SAMPLE):
        with pytest.raises(RuntimeError):
            call(logits, INDICES, mix)


# Derivatives


@every_lam(2)
@pytest.mark.parametrize("channels_last", (False, True))
def test_inputs_to_second_order_and_in_forward_mode(mix: Mix, channels_last: bool) -> None:
    input = torch.randn(4, 2, 3, dtype=torch.float64).mT
    input = (input if channels_last else input.contiguous()).requires_grad_()
    lam = mix.lam.double().clamp(0.1, 0.9).requires_grad_()

    def mixed(input: Tensor, lam: Tensor) -> Tensor:
        return mix_inputs(input, Mix(lam, mix.index)).square()

    assert torch.autograd.gradcheck(mixed, (input, lam), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mixed, (input, lam))


@both_lams
@pytest.mark.usefixtures("either_size")
def test_cross_entropy_to_second_order(mix: Mix) -> None:
    input, weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64)
    target, lam = torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]]), mix.lam.double().clamp(0.1, 0.9).requires_grad_()

    def loss(input: Tensor, lam: Tensor) -> Tensor:
        return mix_cross_entropy(input, target, Mix(lam, mix.index), weight=weight, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (input, lam))
    assert torch.autograd.gradgradcheck(loss, (input, lam))


@slow_vmap
def test_indices_become_dense_inside_a_gradient_of_each_sample() -> None:
    weight, both = torch.randn(3, requires_grad=True), torch.stack((INDICES, INDICES.flip(0)))

    def loss(weight: Tensor, target: Tensor) -> Tensor:
        return (mix_targets(target, SCALAR, 3) * weight).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, both)
    torch.testing.assert_close(gradients, torch.stack([torch.autograd.grad(loss(weight, y), weight)[0] for y in both]))


# Odd targets, mixes and callables


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32))
def test_indices_of_any_integer_dtype_become_dense(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 2, 127, 0]).to(dtype)
    for num_classes in (128, 300):  # more than a byte counts
        assert torch.equal(mix_targets(target, SCALAR, num_classes), mix_targets(target.long(), SCALAR, num_classes))


def test_values_that_cannot_be_read_are_not_read() -> None:
    with FakeTensorMode() as fake:
        mix = Mix(*(fake.from_tensor(part) for part in SCALAR))
        assert mix_targets(fake.from_tensor(INDICES), mix, 3).shape == (4, 3)


@both_lams
def test_a_loss_may_change_its_target_and_a_metric_return_integers(mix: Mix) -> None:
    def halved(input: Tensor, target: Tensor) -> Tensor:
        return (input - target.mul_(0.5)).square()

    input, target = torch.randn(4, 3), torch.randn(4, 3)
    expected = mix_loss(lambda input, target: (input - 0.5 * target).square(), input, target, mix)
    torch.testing.assert_close(mix_loss(halved, input, target.clone(), mix), expected)
    predicted = torch.tensor([0, 2, 0, 0])
    hits = mix_loss(torch.eq, predicted, INDICES, mix)
    torch.testing.assert_close(hits, mix.lam * predicted.eq(INDICES) + (1 - mix.lam) * predicted.eq(INDICES[CYCLE]))


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), "label_smoothing": 0.1, "ignore_index": 2},
)


@LINEAR_CROSS_ENTROPY.required
@pytest.mark.parametrize("options, ignored", ((OPTIONS[0], -100), (OPTIONS[1], 2)), ids=("plain", "all"))
@every_lam(2, 2)
def test_linear_cross_entropy_is_the_cross_entropy_of_its_logits(
    mix: Mix, options: dict[str, Any], ignored: int
) -> None:
    loss = nn.LinearCrossEntropyLoss(5, 3, dtype=torch.float64, **options)
    input, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, ignored, 1, 0])
    expected = reference.cross_entropy(loss.linear(input), labels, mix, **options)
    torch.testing.assert_close(MixUpCriterion(loss)(input, labels, mix), expected)


# What only some combinations of options show


def test_bytes_as_labels_are_compared_as_numbers() -> None:
    log_probs, labels = torch.randn(4, 200).log_softmax(1), torch.tensor([0, 156, 156, 7])
    ours = [mix_loss(nn.NLLLoss(), log_probs, y, PER_SAMPLE) for y in (labels, labels.byte())]
    assert torch.equal(*ours)


def test_a_loss_compiled_in_place_is_reduced_by_its_weights() -> None:
    loss, input, target = nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3)
    expected = mix_loss(loss, input, target, PER_SAMPLE)
    loss.compile(backend="eager")
    loss(input, target)  # with the old reduction
    torch.testing.assert_close(mix_loss(loss, input, target, PER_SAMPLE), expected)


def test_a_forward_set_on_cross_entropy_is_called() -> None:
    seen: list[Tensor] = []
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda input, target: seen.append(target) or input.sum()  # type: ignore[method-assign, func-returns-value]
    for mode in (None, False):
        MixUpCriterion(loss, interpolate_loss=mode)(torch.randn(4, 3), INDICES, SCALAR)
    assert torch.equal(seen[1], INDICES[CYCLE])
    assert torch.equal(seen[2], mix_targets(INDICES, SCALAR, 3))


# What planted bugs got past


@pytest.mark.usefixtures("either_size")
@each_dtype
def test_cross_entropy_of_every_dtype_on_meta(dtype: torch.dtype) -> None:
    logits, target = torch.empty(8, 3, dtype=dtype, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    loss = mix_cross_entropy(logits, target, Mix(torch.empty((), device="meta"), target))
    assert (loss.dtype, loss.is_meta) == (dtype, True)


@pytest.mark.usefixtures("either_size")
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("weight", (None, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))
def test_each_mean_has_the_denominator_of_its_own_labels(weight: Tensor | None, label_smoothing: float) -> None:
    mix, logits = Mix(torch.tensor(0.25), torch.tensor([1, 1, 1, 0])), torch.randn(4, 3, dtype=torch.float64)
    target, options = torch.tensor([0, 2, -100, 2]), {"weight": weight, "label_smoothing": label_smoothing}
    ours = mix_cross_entropy(logits, target, mix, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, reference.cross_entropy(logits, target, mix, **options))


@both_lams
@pytest.mark.usefixtures("either_size")
@pytest.mark.parametrize("label", (3, -1, 255))
def test_a_label_out_of_range_is_refused_of_any_size(label: int, mix: Mix) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        mix_cross_entropy(torch.randn(4, 3), torch.tensor([0, 2, label, 1]), mix)


def test_autocast_is_asked_of_the_device_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "is_autocast_enabled", asked.append)  # which says None: no
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            mix = Mix(torch.rand((), device=device), torch.arange(4, device=device))
            mix_cross_entropy(torch.empty(4, 3, dtype=torch.bfloat16, device=device), mix.index, mix)
    assert asked == ["cpu", "cuda"]


@pytest.mark.parametrize("mode", (None, False))
def test_a_forward_set_on_the_loss_of_a_criterion_counts_from_then_on(mode: bool | None) -> None:
    seen: list[Tensor] = []
    loss = nn.CrossEntropyLoss()
    criterion = MixUpCriterion(loss, interpolate_loss=mode)
    loss.forward = lambda input, target: seen.append(target) or input.sum()  # type: ignore[method-assign, func-returns-value]
    criterion(torch.randn(4, 3), INDICES, SCALAR)
    assert torch.equal(seen[-1], mix_targets(INDICES, SCALAR, 3) if mode is False else INDICES[SCALAR.index])


def test_a_mean_of_parts_is_refused_of_a_subclass_of_cross_entropy_too() -> None:
    class OfParts(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Any) -> Tensor:
            losses: Tensor = target["weight"] * nn.functional.cross_entropy(input, target["label"], reduction="none")
            mean: Tensor = losses.sum() / target["weight"].sum()
            return losses if self.reduction == "none" else mean

    with pytest.raises(ValueError, match="Reductions"):
        mix_loss(OfParts(), torch.randn(4, 3), {"label": INDICES, "weight": torch.rand(4)}, PER_SAMPLE)


MAPS = torch.rand(4, 1, 1, 1).expand(4, 1, 3, 2), torch.rand(4, 1, 2, 3).mT, torch.rand(1, 3, 2, 4).movedim(-1, 0)


@pytest.mark.parametrize("lam", MAPS, ids=("expanded", "transposed", "batch_last"))
def test_the_share_of_maps_in_any_layout(lam: Tensor) -> None:
    torch.testing.assert_close(Mix(lam, CYCLE).share, torch.stack([each.contiguous().mean() for each in lam]))
