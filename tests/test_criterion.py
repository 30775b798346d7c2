"""MixUpCriterion: which mix it uses, which of the two things it interpolates, and that it leaves the loss alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mix_targets, mixup_loss

from . import reference

INPUT = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
INDICES = torch.tensor([0, 1, 2, 0])
DENSE = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
CYCLE = torch.tensor([2, 3, 1, 0])
SCALAR = Mix(torch.tensor(0.3), CYCLE)
PER_SAMPLE = Mix(torch.tensor([0.1, 0.6, 1.0, 0.0]), CYCLE)
both_lams = pytest.mark.parametrize("mix", (SCALAR, PER_SAMPLE), ids=("per_batch", "per_sample"))


def linked(alpha: float = 1.0) -> tuple[MixUp, MixUpCriterion]:
    module = MixUp(alpha)
    return module, MixUpCriterion(nn.CrossEntropyLoss(), module)


# Which mix


def test_uses_the_draw_of_the_linked_module_and_draws_nothing_itself() -> None:
    module, criterion = linked()
    module(INPUT)
    state = torch.get_rng_state()
    loss = criterion(INPUT, INDICES)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.last_mix is not None
    torch.testing.assert_close(loss, mixup_loss(F.cross_entropy, INPUT, INDICES, module.last_mix))
    assert torch.equal(criterion(INPUT, INDICES), loss)


def test_a_mix_passed_comes_before_the_linked_one() -> None:
    module, criterion = linked()
    module(INPUT)
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(
            criterion(INPUT, INDICES, SCALAR), mixup_loss(F.cross_entropy, INPUT, INDICES, SCALAR)
        )


def test_the_latest_of_two_forwards_counts_and_an_older_one_is_passed() -> None:
    module, criterion = linked()
    module(INPUT)
    older = module.last_mix
    module(INPUT)
    assert older is not None
    assert module.last_mix is not None
    assert torch.equal(criterion(INPUT, INDICES), criterion(INPUT, INDICES, module.last_mix))
    assert criterion(INPUT, INDICES, older) != criterion(INPUT, INDICES)


@pytest.mark.parametrize("target", (INDICES, DENSE), ids=("indices", "dense"))
@pytest.mark.parametrize("interpolate_loss", (None, True, False))
def test_is_the_plain_loss_without_a_mix(interpolate_loss: bool | None, target: Tensor) -> None:
    module, loss = MixUp(1.0), nn.CrossEntropyLoss()
    module(INPUT)
    module.eval()
    for link in (None, module):
        criterion = MixUpCriterion(loss, link, interpolate_loss=interpolate_loss)
        assert torch.equal(criterion(INPUT, target), loss(INPUT, target))


def test_follows_the_mode_of_the_linked_module_not_its_own() -> None:
    module, criterion = linked()
    module(INPUT)
    mixed = criterion(INPUT, INDICES)
    assert torch.equal(criterion.eval()(INPUT, INDICES), mixed)
    assert module.training
    module.eval()
    assert torch.equal(criterion.train()(INPUT, INDICES), F.cross_entropy(INPUT, INDICES))
    assert not module.training


def test_nothing_drawn_yet() -> None:
    _, criterion = linked()
    with pytest.raises(RuntimeError, match="^MixUpCriterion: expected the linked MixUp to have drawn .*call the model"):
        criterion(INPUT, INDICES)


def test_one_criterion_for_two_heads() -> None:
    module, criterion = linked()
    hidden = module(INPUT)
    assert module.last_mix is not None
    total = criterion(hidden, INDICES) + criterion(2 * hidden, INDICES.flip(0))
    expected = mixup_loss(F.cross_entropy, hidden, INDICES, module.last_mix)
    expected = expected + mixup_loss(F.cross_entropy, 2 * hidden, INDICES.flip(0), module.last_mix)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("assigned", (False, True))
def test_the_link_is_no_submodule(assigned: bool) -> None:
    module, criterion = linked()
    if assigned:
        module = MixUp()
        criterion.mixup = module
    criterion.eval()
    assert module.training
    parent = nn.ModuleDict({"mixup": module, "criterion": criterion})
    assert not parent.state_dict()
    assert module not in list(criterion.modules())
    parent["criterion"].to(torch.float64)
    assert [name for name, _ in criterion.named_modules()] == ["", "loss"]


def test_a_criterion_moved_after_linking_moves_the_loss() -> None:
    module = MixUp(1.0)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(weight=torch.ones(3)), module).double()
    nn.Sequential(module).double()
    for per_sample in (False, True):
        module.per_sample = per_sample
        output = module(INPUT.double())
        assert criterion(output, INDICES).dtype == torch.float64
    bce = MixUpCriterion(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), interpolate_loss=True).double()
    assert bce(INPUT.double(), DENSE.double(), PER_SAMPLE).dtype == torch.float64


def test_moves_between_devices_with_its_model(device: str) -> None:
    model = nn.Sequential(MixUp(1.0), nn.Linear(3, 3))
    module = model[0]
    assert isinstance(module, MixUp)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(weight=torch.ones(3)), module)
    model.to(device)
    criterion.to(device)
    criterion(model(INPUT.to(device)), INDICES.to(device)).backward()


# Which of the two things


@both_lams
def test_integer_targets_interpolate_the_loss_and_floating_ones_the_target(mix: Mix) -> None:
    mse = nn.MSELoss()
    by_default, by_loss, by_target = (
        MixUpCriterion(mse, interpolate_loss=mode)(INPUT, DENSE, mix) for mode in (None, True, False)
    )
    assert torch.equal(by_default, by_target)
    assert torch.equal(by_loss, mixup_loss(mse, INPUT, DENSE, mix))
    assert torch.equal(by_target, mse(INPUT, mix_targets(DENSE, mix)))
    assert not torch.isclose(by_loss, by_target)
    cross_entropy = nn.CrossEntropyLoss()
    by_default = MixUpCriterion(cross_entropy)(INPUT, INDICES, mix)
    assert torch.equal(by_default, mixup_loss(cross_entropy, INPUT, INDICES, mix))


@both_lams
def test_index_targets_become_dense_in_the_dtype_of_the_input_and_floating_ones_keep_theirs(mix: Mix) -> None:
    seen: list[Tensor] = []

    def loss(input: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return input.sum()

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        criterion = MixUpCriterion(loss, interpolate_loss=False)
        criterion(INPUT.to(dtype), INDICES, mix)
        assert (seen[-1].shape, seen[-1].dtype) == ((4, 3), dtype)
        torch.testing.assert_close(seen[-1], mix_targets(INDICES, mix, 3).to(dtype))
        criterion(INPUT, DENSE.to(dtype), mix)
        assert seen[-1].dtype == dtype


@both_lams
@pytest.mark.parametrize("shape", ((), (5,), (2, 3)), ids=("per_sample", "per_token", "per_pixel"))
def test_both_modes_agree_for_cross_entropy_and_equal_the_loop_with_gradients(shape: tuple[int, ...], mix: Mix) -> None:
    input = torch.randn(4, 3, *shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (4, *shape))
    mix = Mix(mix.lam.double(), mix.index)
    values = [
        MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=0.1), interpolate_loss=mode)(input, target, mix)
        for mode in (None, True, False)
    ]
    values.append(reference.cross_entropy(input, target, mix, label_smoothing=0.1))
    gradients = [torch.autograd.grad(value, input)[0] for value in values]
    for value, gradient in zip(values[:-1], gradients[:-1], strict=True):
        torch.testing.assert_close(value, values[-1])
        torch.testing.assert_close(gradient, gradients[-1])


@both_lams
@pytest.mark.parametrize("loss", (nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()))
def test_interpolated_targets_equal_the_loop_with_gradients(loss: nn.Module, mix: Mix) -> None:
    input = torch.randn(4, dtype=torch.float64, requires_grad=True)  # targets of shape (B,)
    target = torch.rand(4, dtype=torch.float64)
    unreduced = copy.copy(loss)
    unreduced.reduction = "none"  # type: ignore[assignment]
    ours = MixUpCriterion(loss)(input, target, mix)
    expected = reference.interpolated_targets_loss(unreduced, input, target, mix, "mean")
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, input)[0] for value in (ours, expected)))


def test_the_options_of_the_loss_are_read_at_each_call() -> None:
    loss = nn.CrossEntropyLoss()
    criterion = MixUpCriterion(loss)
    for reduction, label_smoothing in (("sum", 0.0), ("none", 0.3)):
        loss.reduction, loss.label_smoothing = reduction, label_smoothing
        for mix in (SCALAR, PER_SAMPLE):
            expected = reference.cross_entropy(
                INPUT, INDICES, mix, reduction=reduction, label_smoothing=label_smoothing
            )
            torch.testing.assert_close(criterion(INPUT, INDICES, mix).double(), expected)
    assert (loss.reduction, loss.label_smoothing) == ("none", 0.3)


@pytest.mark.parametrize("loss", (nn.MSELoss(), nn.CrossEntropyLoss(), nn.NLLLoss()))
@both_lams
def test_hooks_and_a_forward_of_its_own_are_part_of_the_loss(loss: nn.Module, mix: Mix) -> None:
    target = DENSE if isinstance(loss, nn.MSELoss) else INDICES
    plain = MixUpCriterion(loss, interpolate_loss=True)(INPUT, target, mix)
    tripled = MixUpCriterion(loss, interpolate_loss=True)(3 * INPUT, target, mix)
    own, after, before = (copy.deepcopy(loss) for _ in range(3))
    kind = type(loss)
    own.forward = lambda input, target: 10 * kind.forward(own, input, target)
    after.register_forward_hook(lambda _module, _args, output: 10 * output)
    before.register_forward_pre_hook(lambda _, args: (3 * args[0], args[1]))
    if mix.lam.ndim:  # a forward bound to the loss that it was made for reduces like that one
        with pytest.raises(ValueError, match="expected per-sample losses"):
            MixUpCriterion(own, interpolate_loss=True)(INPUT, target, mix)
    else:
        torch.testing.assert_close(MixUpCriterion(own, interpolate_loss=True)(INPUT, target, mix), 10 * plain)
    torch.testing.assert_close(MixUpCriterion(after, interpolate_loss=True)(INPUT, target, mix), 10 * plain)
    torch.testing.assert_close(MixUpCriterion(before, interpolate_loss=True)(INPUT, target, mix), tripled)


@pytest.mark.parametrize("interpolate_loss", (None, True, False))
@both_lams
def test_nothing_of_the_users_is_modified(mix: Mix, interpolate_loss: bool | None) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    before = copy.deepcopy((INPUT, INDICES, DENSE, mix, loss.__dict__))
    criterion = MixUpCriterion(loss, interpolate_loss=interpolate_loss)
    criterion(INPUT, INDICES, mix)
    criterion(INPUT, DENSE, mix)
    after = (INPUT, INDICES, DENSE, mix, loss.__dict__)
    assert repr(before) == repr(after)
    assert criterion.loss is loss


@both_lams
@pytest.mark.parametrize("target", (INDICES, DENSE), ids=("indices", "dense"))
def test_the_output_of_the_model_is_whatever_the_loss_takes(target: Tensor, mix: Mix) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        first, second = output["heads"]
        return F.cross_entropy(first, target, reduction="none") + F.cross_entropy(second, target, reduction="none")

    head = INPUT.flip(1)
    single = MixUpCriterion(nn.CrossEntropyLoss(reduction="none"))
    expected = single(INPUT, target, mix) + single(head, target, mix)
    torch.testing.assert_close(MixUpCriterion(loss)({"heads": (INPUT, head)}, target, mix), expected)


# What to report of training


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


@both_lams
def test_the_accuracy_of_a_mixed_batch_is_the_weight_of_the_class_predicted(mix: Mix) -> None:
    output = F.one_hot(torch.tensor([0, 0, 1, 1]), 3).float()  # its own, its partner's, its partner's, neither's
    lam = mix.lam.expand(4).tolist()
    expected = torch.tensor([lam[0], 1 - lam[1], 1 - lam[2], 0.0])
    torch.testing.assert_close(MixUpCriterion(accuracy)(output, INDICES, mix), expected)
    assert MixUpCriterion(accuracy)(output, INDICES).tolist() == [1.0, 0.0, 0.0, 0.0]  # the plain one without a mix


def test_the_loss_of_a_perfect_model_is_the_entropy_of_the_mixture_and_0_in_eval() -> None:
    module, criterion = linked()
    module(INPUT)
    assert module.last_mix is not None
    dense = mix_targets(INDICES, module.last_mix, 3)
    entropy = -(dense * dense.clamp_min(1e-12).log()).sum(1).mean()
    assert entropy > 0
    perfect = dense.clamp_min(1e-12).log().requires_grad_()
    loss = criterion(perfect, INDICES)
    torch.testing.assert_close(loss, entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, perfect)[0], torch.zeros(4, 3), atol=1e-6, rtol=0)
    module.eval()
    assert criterion(1e3 * F.one_hot(INDICES, 3).float(), INDICES) == 0


# Gradients


@both_lams
@pytest.mark.parametrize("interpolate_loss", (True, False))
@pytest.mark.parametrize("loss", (nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()))
def test_gradients_to_second_order_through_mix_and_criterion(loss: nn.Module, interpolate_loss: bool, mix: Mix) -> None:
    input, target = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), DENSE.double()
    criterion, mix = MixUpCriterion(loss, interpolate_loss=interpolate_loss), Mix(mix.lam.double(), mix.index)
    targets = INDICES if isinstance(loss, nn.CrossEntropyLoss) else target

    def step(input: Tensor) -> Tensor:
        output: Tensor = criterion(MixUp()(input, mix).square(), targets, mix)
        return output

    assert torch.autograd.gradcheck(step, input)
    assert torch.autograd.gradgradcheck(step, input)


# Errors


def test_loss_must_be_callable() -> None:
    with pytest.raises(TypeError, match="^MixUpCriterion: expected loss to be callable, got str$"):
        MixUpCriterion("cross_entropy")  # type: ignore[arg-type]


def test_the_loss_must_be_an_instance() -> None:
    with pytest.raises(TypeError, match=r"^MixUpCriterion: expected a loss, got the class MSELoss; use MSELoss\(\)$"):
        MixUpCriterion(nn.MSELoss)  # type: ignore[arg-type]


def test_interpolate_loss_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="^MixUpCriterion: expected interpolate_loss to be True, .*, got 'targets'$"):
        MixUpCriterion(nn.MSELoss(), interpolate_loss="targets")  # type: ignore[arg-type]


def test_the_link_must_be_a_mixup() -> None:
    message = "^MixUpCriterion: expected mixup to be a MixUp, got Sequential; link the MixUp"
    with pytest.raises(TypeError, match=message):
        MixUpCriterion(nn.MSELoss(), nn.Sequential(MixUp()))  # type: ignore[arg-type]
    module, criterion = linked()
    with pytest.raises(TypeError, match=message):
        criterion.mixup = nn.Sequential(MixUp())  # type: ignore[assignment]
    assert criterion.mixup is module


def test_target_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="^MixUpCriterion: expected target to be a tensor, got list$"):
        MixUpCriterion(nn.CrossEntropyLoss())(INPUT, INDICES.tolist(), SCALAR)


def test_the_last_partial_batch_against_a_stale_mix_names_both_sizes() -> None:
    module, criterion = linked()
    module(INPUT)
    with pytest.raises(ValueError, match="^mixup_loss: expected target to have .* of the mix, 4, got 3"):
        criterion(INPUT[:3], INDICES[:3])


def test_a_scalar_loss_needs_one_lam_per_batch() -> None:
    with pytest.raises(ValueError, match=r"got \(\); use a loss with a reduction attribute"):
        MixUpCriterion(F.cross_entropy)(INPUT, INDICES, PER_SAMPLE)


def test_index_targets_without_a_class_dimension_in_the_input() -> None:
    with pytest.raises(ValueError, match="^mix_targets: expected num_classes"):
        MixUpCriterion(nn.MSELoss(), interpolate_loss=False)(INPUT[:, 0], INDICES, SCALAR)


def test_repr_names_the_link() -> None:
    _, criterion = linked(0.5)
    assert repr(criterion) == (
        "MixUpCriterion(\n  mixup=MixUp(alpha=0.5, p=1.0, per_sample=False), interpolate_loss=None\n"
        "  (loss): CrossEntropyLoss()\n)"
    )
    assert "mixup=None" in repr(MixUpCriterion(F.mse_loss))
