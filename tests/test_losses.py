"""Every loss of torch.nn that takes (input, target), both modes and every lam: the table of docs/criterion.md."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses

from mixup_nn import Mix, MixUpCriterion

from . import reference
from .cases import SCALAR, every_lam, unreduced
from .versions import LINEAR_CROSS_ENTROPY

each_lam = every_lam(2, 2)


def real(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SIGNS = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])
LABEL_SETS = torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 2], [2, -1, -1]])


class Case(NamedTuple):
    """A loss, its target, and what docs/criterion.md says of it."""

    loss: nn.Module
    target: Tensor
    takes_mixed_targets: bool = True
    linear: bool = False  # in the target, so that both modes give the same value
    input: Callable[[Tensor], Tensor] = lambda input: input


CASES = (
    Case(nn.BCELoss(weight=real(3)), real(4, 3), linear=True, input=torch.sigmoid),
    Case(nn.BCEWithLogitsLoss(pos_weight=real(3)), real(4, 3), linear=True),
    Case(nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, linear=True),
    Case(nn.HingeEmbeddingLoss(), SIGNS, takes_mixed_targets=False),
    Case(nn.HuberLoss(delta=0.3), real(4, 3)),
    Case(nn.KLDivLoss(reduction="batchmean"), real(4, 3), input=lambda input: input.log_softmax(1)),
    Case(nn.L1Loss(), 6 * real(4, 3) - 3),
    Case(nn.MSELoss(), real(4, 3)),
    Case(nn.MultiLabelMarginLoss(), LABEL_SETS, takes_mixed_targets=False),
    Case(nn.MultiLabelSoftMarginLoss(weight=real(3)), real(4, 3), linear=True),
    Case(nn.MultiMarginLoss(weight=real(3)), LABELS, takes_mixed_targets=False),
    Case(nn.NLLLoss(), LABELS, takes_mixed_targets=False, input=lambda input: input.log_softmax(1)),
    Case(nn.PoissonNLLLoss(), real(4, 3), linear=True),
    Case(nn.SmoothL1Loss(beta=0.3), real(4, 3)),
    Case(nn.SoftMarginLoss(), SIGNS),
)
each_case = pytest.mark.parametrize("case", CASES, ids=[type(case.loss).__name__ for case in CASES])
OTHER_ARGUMENTS = {  # what these take instead of (input, target) or return instead of a tensor
    "CTCLoss", "CosineEmbeddingLoss", "GaussianNLLLoss", "MarginRankingLoss",
    "TripletMarginLoss", "TripletMarginWithDistanceLoss",
}  # fmt: skip


def logits() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def assert_same_values_and_gradients(ours: Tensor, expected: Tensor, input: Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.sum(), input, retain_graph=True)[0] for value in (ours, expected))
    )


def test_no_loss_of_torch_is_left_out() -> None:
    public = {name for name in torch_losses.__all__ if inspect.isclass(getattr(nn, name)) and name != "NLLLoss2d"}
    assert {type(case.loss).__name__ for case in CASES} | OTHER_ARGUMENTS == public - {"LinearCrossEntropyLoss"}


@each_lam
@each_case
@pytest.mark.parametrize("reduction", (None, "none", "sum"))
def test_interpolated_loss_equals_the_loop(case: Case, reduction: str | None, mix: Mix) -> None:
    loss, raw = copy.deepcopy(case.loss), logits()
    reduction = str(loss.reduction) if reduction is None else reduction
    loss.reduction = reduction  # type: ignore[assignment]
    input = case.input(raw)
    ours = MixUpCriterion(loss, interpolate_loss=True)(input, case.target, mix)
    expected = reference.interpolated_loss(unreduced(loss), input, case.target, mix, reduction)
    assert_same_values_and_gradients(ours, expected, raw)


def at_positions(target: Tensor) -> Tensor:
    """Another target at each of four positions: ``(4, 2, 2)`` or ``(4, 3, 2, 2)``."""
    return torch.stack([target.roll(shift, 0) for shift in range(4)], -1).view(*target.shape, 2, 2)


OF_SAMPLES_ALONE = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)  # classes come last


@each_lam
@each_case
@pytest.mark.parametrize("reduction", (None, "none", "sum"))
@pytest.mark.parametrize("interpolate_loss", (True, False))
def test_targets_of_positions_equal_the_loop(
    case: Case, interpolate_loss: bool, reduction: str | None, mix: Mix
) -> None:
    if isinstance(case.loss, OF_SAMPLES_ALONE) or not (interpolate_loss or case.takes_mixed_targets):
        return
    loss = copy.deepcopy(case.loss)
    for name in ("weight", "pos_weight"):  # of classes, along the second dimension
        if getattr(loss, name, None) is not None:
            setattr(loss, name, getattr(loss, name).view(3, 1, 1))
    loss.reduction = str(loss.reduction) if reduction is None else reduction  # type: ignore[assignment]
    target = at_positions(case.target)
    raw = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    input = case.input(raw)
    ours = MixUpCriterion(loss, interpolate_loss=interpolate_loss)(input, target, mix)
    loop = reference.interpolated_loss if interpolate_loss else reference.interpolated_targets_loss
    if not interpolate_loss and not target.is_floating_point():
        target = reference.one_hot(target, 3)
    expected = loop(unreduced(loss), input, target, mix, str(loss.reduction), of_positions=True)
    assert_same_values_and_gradients(ours, expected, raw)


@each_lam
@each_case
def test_interpolated_targets_equal_the_loop_or_raise(case: Case, mix: Mix) -> None:
    if not case.takes_mixed_targets:
        with pytest.raises(ValueError, match=f"got {type(case.loss).__name__} of hard labels or logarithms; use"):
            MixUpCriterion(case.loss, interpolate_loss=False)
        return
    raw = logits()
    input = case.input(raw)
    ours = MixUpCriterion(case.loss, interpolate_loss=False)(input, case.target, mix)
    dense = case.target if case.target.is_floating_point() else reference.one_hot(case.target, 3)
    expected = reference.interpolated_targets_loss(unreduced(case.loss), input, dense, mix, str(case.loss.reduction))
    assert_same_values_and_gradients(ours, expected, raw)


@each_lam
@each_case
def test_both_modes_agree_for_losses_linear_in_the_target_and_for_no_other(case: Case, mix: Mix) -> None:
    input = case.input(logits().detach())
    if case.takes_mixed_targets:
        values = [MixUpCriterion(case.loss, interpolate_loss=mode)(input, case.target, mix) for mode in (True, False)]
        assert torch.isclose(*values) == case.linear


@each_lam
@each_case
def test_the_default_mixes_values_and_keeps_labels_apart(case: Case, mix: Mix) -> None:
    input = case.input(logits().detach())
    mode = not (case.takes_mixed_targets and case.target.is_floating_point())
    default, chosen = (
        MixUpCriterion(case.loss, interpolate_loss=option)(input, case.target, mix) for option in (None, mode)
    )
    assert torch.equal(default, chosen)


@each_lam
def test_targets_that_are_logarithms_are_kept_apart(mix: Mix) -> None:
    loss = nn.KLDivLoss(reduction="batchmean", log_target=True)
    raw, target = logits(), real(4, 3).log_softmax(1)
    input = raw.log_softmax(1)
    expected = reference.interpolated_loss(unreduced(loss), input, target, mix, "batchmean")
    assert_same_values_and_gradients(MixUpCriterion(loss)(input, target, mix), expected, raw)
    with pytest.raises(ValueError, match="got KLDivLoss of hard labels or logarithms; use"):
        MixUpCriterion(loss, interpolate_loss=False)


def test_a_compiled_loss_of_labels_is_recognised() -> None:
    with pytest.raises(ValueError, match="of hard labels or logarithms; use"):
        MixUpCriterion(torch.compile(nn.HingeEmbeddingLoss()), interpolate_loss=False)


@each_lam
def test_the_stirling_term_of_the_poisson_loss_is_not_linear_in_the_target(mix: Mix) -> None:
    loss, input, target = nn.PoissonNLLLoss(full=True), logits().detach(), 6 * real(4, 3)
    kept_apart, mixed = (MixUpCriterion(loss, interpolate_loss=mode)(input, target, mix) for mode in (True, False))
    assert not torch.isclose(kept_apart, mixed)


INDEX_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)},
    "ignoring": {"ignore_index": 2},
    "all": {
        "weight": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), "ignore_index": 2, "label_smoothing": 0.1,
    },
}  # fmt: skip
each_index_option = pytest.mark.parametrize("options", INDEX_OPTIONS.values(), ids=INDEX_OPTIONS)


@LINEAR_CROSS_ENTROPY.required
@each_index_option
@each_lam
def test_linear_cross_entropy_is_the_cross_entropy_of_its_logits(mix: Mix, options: dict[str, Any]) -> None:
    loss = nn.LinearCrossEntropyLoss(5, 3, dtype=torch.float64, **options)
    input = torch.randn(4, 5, dtype=torch.float64)
    expected = reference.cross_entropy(loss.linear(input), LABELS, mix, **options)
    torch.testing.assert_close(MixUpCriterion(loss)(input, LABELS, mix), expected)


@LINEAR_CROSS_ENTROPY.required
@each_lam
def test_linear_cross_entropy_without_an_ignore_index_ignores_that_of_cross_entropy(mix: Mix) -> None:
    loss, target = nn.LinearCrossEntropyLoss(5, 3, dtype=torch.float64), torch.tensor([0, -100, 1, 2])
    input = torch.randn(4, 5, dtype=torch.float64)
    expected = reference.cross_entropy(loss.linear(input), target, mix)
    torch.testing.assert_close(MixUpCriterion(loss)(input, target, mix), expected)


class Tempered(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input / 2, target)


@each_index_option
@each_lam
def test_a_subclass_of_cross_entropy_has_its_mean(mix: Mix, options: dict[str, Any]) -> None:
    raw = logits()
    expected = reference.cross_entropy(raw / 2, LABELS, mix, **options)
    assert_same_values_and_gradients(MixUpCriterion(Tempered(**options))(raw, LABELS, mix), expected, raw)


def test_the_docs_say_the_same() -> None:
    text = (Path(__file__).parent.parent / "docs" / "criterion.md").read_text()
    rows = re.findall(r"^\| `(\w+Loss)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert rows == [
        (
            type(case.loss).__name__,
            "yes",
            "yes" if case.takes_mixed_targets else "raises",
            "equal" if case.linear else "different" if case.takes_mixed_targets else "",
        )
        for case in CASES
    ]


def test_a_loss_that_returns_no_tensor_raises() -> None:
    loss = nn.AdaptiveLogSoftmaxWithLoss(4, 10, cutoffs=[5])
    with pytest.raises(TypeError, match="expected loss to return a tensor, got _ASMoutput; wrap it"):
        MixUpCriterion(loss)(torch.randn(4, 4), LABELS, SCALAR)
