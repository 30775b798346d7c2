"""MixUpCriterion: which mix it uses, which of the two things it interpolates, and that it leaves the loss alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from mixup_nn import Mix, Mixer, MixUp, MixUpCriterion
from mixup_nn.functional import mix_loss, mix_targets

from . import reference
from .cases import PER_SAMPLE, SCALAR, applied, both_lams, each_mixer, every_lam, through_pickle

INPUT = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
INDICES = torch.tensor([0, 1, 2, 0])
DENSE = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 4, 5, generator=torch.Generator().manual_seed(2))
each_lam = every_lam(4, 5)


def linked(alpha: float = 1.0) -> tuple[MixUp, MixUpCriterion]:
    mixup = MixUp(alpha)
    return mixup, MixUpCriterion(nn.CrossEntropyLoss(), mixup)


# Which mix


@each_mixer
def test_uses_the_draw_of_the_linked_mixer_and_draws_nothing_itself(make: Callable[[], Mixer]) -> None:
    mixer = make()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    mixer(IMAGES)
    state = torch.get_rng_state()
    loss = criterion(INPUT, INDICES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(loss, reference.cross_entropy(INPUT, INDICES, applied(mixer)).float())
    assert torch.equal(criterion(INPUT, INDICES), loss)


def test_a_mix_passed_comes_before_the_linked_one() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    for training in (True, False):
        mixup.train(training)
        criterion.train(training)
        torch.testing.assert_close(criterion(INPUT, INDICES, SCALAR), mix_loss(F.cross_entropy, INPUT, INDICES, SCALAR))


def test_the_latest_of_two_forwards_counts_and_an_older_one_is_passed() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    older = applied(mixup)
    mixup(INPUT)
    assert torch.equal(criterion(INPUT, INDICES), criterion(INPUT, INDICES, applied(mixup)))
    assert criterion(INPUT, INDICES, older) != criterion(INPUT, INDICES)


def test_follows_a_mix_of_ones_own_that_the_mixer_applied() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    mixup(INPUT, SCALAR)
    assert torch.equal(criterion(INPUT, INDICES), criterion(INPUT, INDICES, SCALAR))
    mixup.last_mix = PER_SAMPLE  # as a model does that mixes in a way of its own
    assert torch.equal(criterion(INPUT, INDICES), criterion(INPUT, INDICES, PER_SAMPLE))


# No stale draw in silence

OFF = "^expected gradients while the linked mixer is in training mode, got them off: .*EMA copy.* reentrant checkpoint"


def assert_raises_and_the_ways_out_give_the_plain_loss(
    mixer: Mixer, criterion: MixUpCriterion, output: Tensor, error: type[Exception], message: str
) -> None:
    target = INDICES[: len(output)]
    plain = F.cross_entropy(output, target)
    with pytest.raises(error, match=message) as raised:
        criterion(output, target)
    for way_out in (
        "criterion.loss(output, target)",
        "mixer.eval()",
        "criterion.eval()",
        "criterion(output, target, mix)",
    ):
        assert way_out in str(raised.value)
    assert torch.equal(criterion.loss(output, target), plain)
    assert torch.equal(criterion.eval()(output, target), plain)
    criterion.train()
    mixer.eval()
    assert torch.equal(criterion(output, target), plain)


@each_mixer
def test_validation_of_an_ema_copy_while_the_student_trains(make: Callable[[], Mixer]) -> None:
    student = nn.Sequential(make(), nn.Flatten(), nn.Linear(60, 3))
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), student[0])  # type: ignore[arg-type]
    ema = AveragedModel(student)
    criterion(student(IMAGES), INDICES).backward()
    ema.eval()
    with torch.no_grad():
        assert_raises_and_the_ways_out_give_the_plain_loss(student[0], criterion, ema(IMAGES), RuntimeError, OFF)  # type: ignore[arg-type]


def test_validation_with_a_mixer_that_model_eval_does_not_reach() -> None:
    mixup, criterion = linked()
    model = nn.Linear(3, 3)
    criterion(model(mixup(INPUT)), INDICES).backward()
    model.eval()
    with torch.inference_mode():
        assert_raises_and_the_ways_out_give_the_plain_loss(mixup, criterion, model(INPUT), RuntimeError, OFF)


def test_another_batch_size_than_the_last_mixed() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    message = "^expected target to have the batch size of the last mix, 4, got 3; keep the batch as first dimension, "
    assert_raises_and_the_ways_out_give_the_plain_loss(mixup, criterion, INPUT[:3], ValueError, message)


@pytest.mark.parametrize("gradients", (True, False))
def test_nothing_mixed_yet(gradients: bool) -> None:
    mixup, criterion = linked()
    message = "^expected the linked mixer to have mixed a batch, got none; call the model first; a criterion copied "
    with torch.set_grad_enabled(gradients):
        assert_raises_and_the_ways_out_give_the_plain_loss(mixup, criterion, INPUT, RuntimeError, message)


def test_a_mix_passed_is_applied_without_gradients_too() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    with torch.no_grad():
        assert torch.equal(
            criterion(INPUT, INDICES, SCALAR), MixUpCriterion(nn.CrossEntropyLoss())(INPUT, INDICES, SCALAR)
        )


def test_flattened_or_time_first_outputs_are_told_to_keep_the_batch_first() -> None:
    mixup, criterion = linked()
    mixup(torch.randn(4, 5, 6))
    with pytest.raises(
        ValueError, match="^expected target to have the batch size of the last mix, 4, got 20; "
    ) as error:
        criterion(torch.randn(20, 3), torch.randint(3, (20,)))
    assert str(error.value).index("neither flattened") < str(error.value).index("to validate")
    with pytest.raises(ValueError, match="neither flattened with another nor second"):
        criterion(torch.randn(5, 3, 4), torch.randint(3, (5, 4)))


def test_inside_a_reentrant_checkpoint_the_mix_is_passed() -> None:
    mixup, criterion = linked()
    input = mixup(INPUT.clone().requires_grad_())
    mix = applied(mixup)
    with pytest.raises(RuntimeError, match="a reentrant checkpoint must be passed its mix"):
        checkpoint(lambda x: criterion(x, INDICES), input, use_reentrant=True)
    loss = checkpoint(lambda x: criterion(x, INDICES, mix), input, use_reentrant=True)
    assert torch.equal(loss, criterion(input, INDICES))


def test_a_criterion_copied_without_its_model_says_so() -> None:
    mixup, criterion = linked()
    model = nn.Sequential(mixup, nn.Linear(3, 3))
    model, criterion = copy.deepcopy(model), copy.deepcopy(criterion)
    with pytest.raises(RuntimeError, match="a criterion copied without its model follows a mixer that is not called"):
        criterion(model(INPUT), INDICES)


@pytest.mark.parametrize("target", (INDICES, DENSE), ids=("indices", "dense"))
@pytest.mark.parametrize("interpolate_loss", (None, True, False))
def test_is_the_plain_loss_without_a_mix(interpolate_loss: bool | None, target: Tensor) -> None:
    mixup, loss = MixUp(1.0), nn.CrossEntropyLoss()
    mixup(INPUT)
    mixup.eval()
    for link in (None, mixup):
        criterion = MixUpCriterion(loss, link, interpolate_loss=interpolate_loss)
        assert torch.equal(criterion(INPUT, target), loss(INPUT, target))


def test_is_the_plain_loss_where_mixer_or_criterion_is_in_eval_mode() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    mixed, plain = criterion(INPUT, INDICES), F.cross_entropy(INPUT, INDICES)
    assert mixed != plain
    assert torch.equal(criterion.eval()(INPUT, INDICES), plain)
    assert mixup.training
    mixup.eval()
    assert torch.equal(criterion.train()(INPUT, INDICES), plain)
    assert not mixup.training
    mixup.train()
    assert torch.equal(criterion(INPUT, INDICES), mixed)


def test_one_criterion_for_two_heads() -> None:
    mixup, criterion = linked()
    hidden = mixup(INPUT)
    total = criterion(hidden, INDICES) + criterion(2 * hidden, INDICES.flip(0))
    expected = mix_loss(F.cross_entropy, hidden, INDICES, applied(mixup))
    expected = expected + mix_loss(F.cross_entropy, 2 * hidden, INDICES.flip(0), applied(mixup))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("assigned", (False, True))
def test_the_link_is_no_submodule(assigned: bool) -> None:
    mixup, criterion = linked()
    if assigned:
        mixup = MixUp()
        criterion.mixer = mixup
    criterion.eval()
    assert mixup.training
    parent = nn.ModuleDict({"mixup": mixup, "criterion": criterion})
    assert not parent.state_dict()
    assert mixup not in list(criterion.modules())
    parent["criterion"].to(torch.float64)
    assert [name for name, _ in criterion.named_modules()] == ["", "loss"]


def test_a_criterion_moved_after_linking_moves_the_loss() -> None:
    mixup = MixUp(1.0)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(weight=torch.ones(3)), mixup).double()
    nn.Sequential(mixup).double()
    for per_sample in (False, True):
        mixup.per_sample = per_sample
        output = mixup(INPUT.double())
        assert criterion(output, INDICES).dtype == torch.float64
    bce = MixUpCriterion(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), interpolate_loss=True).double()
    assert bce(INPUT.double(), DENSE.double(), PER_SAMPLE).dtype == torch.float64


def test_moves_between_devices_with_its_model(device: str) -> None:
    model = nn.Sequential(MixUp(1.0), nn.Linear(3, 3))
    mixup = model[0]
    assert isinstance(mixup, MixUp)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(weight=torch.ones(3)), mixup)
    model.to(device)
    criterion.to(device)
    criterion(model(INPUT.to(device)), INDICES.to(device)).backward()


# One type of target


class Seen(nn.Module):
    """Notes the targets that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.targets.append(target)
        return (input - target).square().mean()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_class_indices_are_dense_for_such_a_loss_in_training_and_in_validation(dtype: torch.dtype) -> None:
    mixup, seen = MixUp(1.0), Seen()
    criterion = MixUpCriterion(seen, mixup, interpolate_loss=False)
    input = INPUT.to(dtype)
    mixup(input)
    criterion(input, INDICES)
    one_hot = F.one_hot(INDICES, 3).to(dtype)
    assert not torch.equal(seen.targets[-1], one_hot)
    for validation in (lambda: criterion.eval(), lambda: (criterion.train(), mixup.eval()), lambda: None):
        validation()
        criterion(input, INDICES)
        assert torch.equal(seen.targets[-1], one_hot)
        assert seen.targets[-1].dtype == dtype
        criterion(input, DENSE)
        assert seen.targets[-1] is DENSE
    assert criterion.loss is seen
    criterion(torch.randn(1, 3, 2), torch.tensor([[2, -100]]))
    assert seen.targets[-1].tolist() == [[[0, 0], [0, 0], [1, 0]]]


def test_binary_cross_entropy_over_all_classes_is_one_line_for_training_and_validation() -> None:
    mixup = MixUp(1.0)
    criterion = MixUpCriterion(nn.BCEWithLogitsLoss(), mixup, interpolate_loss=False)
    mixup(INPUT)
    expected = F.binary_cross_entropy_with_logits(INPUT, mix_targets(INDICES, applied(mixup), 3))
    torch.testing.assert_close(criterion(INPUT, INDICES), expected)
    mixup.eval()
    plain = F.binary_cross_entropy_with_logits(INPUT, F.one_hot(INDICES, 3).float())
    torch.testing.assert_close(criterion(INPUT, INDICES), plain)


def test_cross_entropy_with_a_forward_of_its_own_gets_dense_targets() -> None:
    seen: list[Tensor] = []
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda input, target: seen.append(target) or input.sum()  # type: ignore[method-assign, func-returns-value]
    criterion = MixUpCriterion(loss, interpolate_loss=False)
    criterion(INPUT, INDICES, SCALAR)
    criterion(INPUT, INDICES)
    assert torch.equal(seen[0], mix_targets(INDICES, SCALAR, 3))
    assert torch.equal(seen[1], F.one_hot(INDICES, 3).float())


# Nested: two mixes in a row


def test_two_mixes_in_a_row_nest_where_the_first_is_drawn_per_batch() -> None:
    first, second, per_sample = MixUp(1.0), MixUp(1.0, per_sample=True), MixUp(1.0, per_sample=True)
    loss = nn.CrossEntropyLoss(reduction="none")
    second(first(INPUT))
    dense = mix_targets(mix_targets(F.one_hot(INDICES, 3).float(), applied(first)), applied(second))
    nested = MixUpCriterion(MixUpCriterion(loss, second), first)
    torch.testing.assert_close(nested(INPUT, INDICES), loss(INPUT, dense))
    nested.mixer = per_sample
    second(per_sample(INPUT))
    with pytest.raises(ValueError, match="^expected one lam per batch of the mix applied first, got one per sample; "):
        nested(INPUT, INDICES)


# Replaced after construction


def test_loss_and_mode_and_link_may_be_replaced_and_are_checked_again() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    for loss in (nn.MSELoss(), F.mse_loss, nn.MSELoss()):
        criterion.loss = loss
        assert criterion.loss is loss
        assert torch.equal(criterion(INPUT, DENSE), F.mse_loss(INPUT, mix_targets(DENSE, applied(mixup))))
    criterion.interpolate_loss = True
    assert torch.equal(criterion(INPUT, DENSE), mix_loss(nn.MSELoss(), INPUT, DENSE, applied(mixup)))
    criterion.interpolate_loss = False
    with pytest.raises(ValueError, match="^expected a loss of dense targets, got HingeEmbeddingLoss "):
        criterion.loss = nn.HingeEmbeddingLoss()
    with pytest.raises(TypeError, match="^expected a loss, got the class MSELoss"):
        criterion.loss = nn.MSELoss  # type: ignore[assignment]
    with pytest.raises(TypeError, match="^expected interpolate_loss to be True, False or None, got 1$"):
        criterion.interpolate_loss = 1  # type: ignore[assignment]
    assert isinstance(criterion.loss, nn.MSELoss)
    assert criterion.interpolate_loss is False
    criterion.interpolate_loss = None
    criterion.loss = nn.HingeEmbeddingLoss()
    with pytest.raises(ValueError, match="^expected a loss of dense targets"):
        criterion.interpolate_loss = False
    criterion.mixer = None
    assert torch.equal(criterion(INPUT, DENSE.sign()), F.hinge_embedding_loss(INPUT, DENSE.sign()))


# Which of the two things


@each_lam
def test_integer_targets_interpolate_the_loss_and_floating_ones_the_target(mix: Mix) -> None:
    mse = nn.MSELoss()
    by_default, by_loss, by_target = (
        MixUpCriterion(mse, interpolate_loss=mode)(INPUT, DENSE, mix) for mode in (None, True, False)
    )
    assert torch.equal(by_default, by_target)
    assert torch.equal(by_loss, mix_loss(mse, INPUT, DENSE, mix))
    assert torch.equal(by_target, mse(INPUT, mix_targets(DENSE, mix)))
    assert not torch.isclose(by_loss, by_target)
    cross_entropy = nn.CrossEntropyLoss()
    by_default = MixUpCriterion(cross_entropy)(INPUT, INDICES, mix)
    assert torch.equal(by_default, mix_loss(cross_entropy, INPUT, INDICES, mix))


@each_lam
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


@each_lam
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
        with pytest.raises(ValueError, match="^expected a loss per sample"):
            MixUpCriterion(own, interpolate_loss=True)(INPUT, target, mix)
    else:
        torch.testing.assert_close(MixUpCriterion(own, interpolate_loss=True)(INPUT, target, mix), 10 * plain)
    torch.testing.assert_close(MixUpCriterion(after, interpolate_loss=True)(INPUT, target, mix), 10 * plain)
    torch.testing.assert_close(MixUpCriterion(before, interpolate_loss=True)(INPUT, target, mix), tripled)


@pytest.mark.parametrize("mode", (None, True, False))
@pytest.mark.parametrize("kind", ("backward", "backward_pre"))
@both_lams
def test_backward_hooks_of_the_loss_run(mix: Mix, kind: str, mode: bool | None) -> None:
    loss, input, seen = nn.CrossEntropyLoss(), INPUT.clone().requires_grad_(), []
    if kind == "backward":
        loss.register_full_backward_hook(lambda *_: seen.append(1))
    else:
        loss.register_full_backward_pre_hook(lambda *_: seen.append(1))
    MixUpCriterion(loss, interpolate_loss=mode)(input, INDICES, mix).backward()
    assert seen


@pytest.mark.parametrize("interpolate_loss", (None, True, False))
@pytest.mark.parametrize("mix", (SCALAR, PER_SAMPLE, None), ids=("per_batch", "per_sample", "plain"))
@pytest.mark.parametrize("target", (INDICES, DENSE), ids=("indices", "dense"))
def test_hooks_of_the_loss_run_on_every_path(target: Tensor, mix: Mix | None, interpolate_loss: bool | None) -> None:
    for loss in (nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()):
        if isinstance(loss, nn.BCEWithLogitsLoss) and target is INDICES and interpolate_loss is not False:
            continue  # torch takes no class indices there
        before: list[int] = []
        after: list[int] = []
        behind: list[int] = []
        loss.register_forward_pre_hook(lambda *_, seen=before: seen.append(1))
        loss.register_forward_hook(lambda *_, seen=after: seen.append(1))
        loss.register_full_backward_hook(lambda *_, seen=behind: seen.append(1))
        input = INPUT.clone().requires_grad_()
        MixUpCriterion(loss, interpolate_loss=interpolate_loss)(input, target, mix).backward()
        assert before
        assert len(before) == len(after) == len(behind)


@both_lams
def test_hooks_of_all_modules_run(mix: Mix) -> None:
    criterion, seen = MixUpCriterion(nn.CrossEntropyLoss()), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        criterion(INPUT, INDICES, mix)
    finally:
        handle.remove()
    assert nn.CrossEntropyLoss in seen


@both_lams
def test_a_call_of_its_own_is_part_of_the_loss(mix: Mix) -> None:
    class Doubled(nn.CrossEntropyLoss):
        def __call__(self, *args: Tensor) -> Tensor:
            loss: Tensor = super().__call__(*args)
            return 2 * loss

    expected = 2 * MixUpCriterion(nn.CrossEntropyLoss())(INPUT, INDICES, mix)
    torch.testing.assert_close(MixUpCriterion(Doubled())(INPUT, INDICES, mix), expected)


def test_the_loss_is_called_in_its_own_mode() -> None:
    class Moded(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) * (1 if self.training else 10)

    criterion = MixUpCriterion(Moded(), interpolate_loss=True)
    trained = criterion(INPUT, DENSE, PER_SAMPLE)
    torch.testing.assert_close(criterion.eval()(INPUT, DENSE, PER_SAMPLE), 10 * trained)


@pytest.mark.parametrize("copy_of", (copy.deepcopy, through_pickle))
def test_copies_keep_what_is_interpolated(copy_of: Callable[[MixUpCriterion], MixUpCriterion]) -> None:
    for mode in (None, True, False):
        criterion = MixUpCriterion(nn.MSELoss(), interpolate_loss=mode)
        copied = copy_of(criterion)
        assert copied.interpolate_loss is mode
        assert torch.equal(copied(INPUT, DENSE, SCALAR), criterion(INPUT, DENSE, SCALAR))


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignoring": {"ignore_index": 2},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0])},
    "all": {"weight": torch.tensor([0.5, 1.0, 2.0]), "ignore_index": 2, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
@pytest.mark.parametrize("positions", (False, True), ids=("samples", "positions"))
@each_lam
def test_every_setting_is_one_path_for_cross_entropy_on_class_indices(
    mix: Mix, positions: bool, options: dict[str, Any]
) -> None:
    input = torch.randn(4, 3, *((4, 5) if positions else ()), requires_grad=True)
    target = torch.randint(3, (4, *input.shape[2:]))
    expected = reference.cross_entropy(input, target, mix, **options)
    gradient = torch.autograd.grad(expected, input)[0]
    for mode in (None, True, False):
        for loss in (nn.CrossEntropyLoss(**options), torch.compile(nn.CrossEntropyLoss(**options))):
            value = MixUpCriterion(loss, interpolate_loss=mode)(input, target, mix)
            torch.testing.assert_close(value, expected.float())
            torch.testing.assert_close(torch.autograd.grad(value, input)[0], gradient)


@pytest.mark.parametrize("mode", (None, True, False))
def test_ignored_positions_have_no_gradient(mode: bool | None) -> None:
    input = torch.randn(4, 3, 4, 5, requires_grad=True)
    target = torch.randint(3, (4, 4, 5))
    target[:, 2:] = -100
    criterion = MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=0.1), interpolate_loss=mode)
    (gradient,) = torch.autograd.grad(criterion(input, target, SCALAR), input)
    assert (gradient[:, :, 2:] == 0).all()
    assert (gradient[:, :, :2] != 0).all()


@pytest.mark.parametrize("mode", (None, True, False))
@pytest.mark.parametrize("loss", (nn.CrossEntropyLoss(), nn.MSELoss()))
@each_lam
def test_a_class_that_does_not_exist_raises(mix: Mix, loss: nn.Module, mode: bool | None) -> None:
    if mode is not False and isinstance(loss, nn.MSELoss):
        return  # takes integers as values
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"out of bounds|below num_classes, 3, got 77"):
        MixUpCriterion(loss, interpolate_loss=mode)(INPUT, torch.tensor([0, 77, 2, 0]), mix)


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool))
def test_class_indices_that_torch_refuses_are_refused_in_training_and_validation(dtype: torch.dtype) -> None:
    mixup, criterion = linked()
    input, target = INPUT[..., None], INDICES[:, None].to(dtype)  # bytes torch takes per sample, not per position
    mixup(input)
    with pytest.raises(TypeError, match="^expected class indices of dtype int64, "):
        criterion(input, target)
    with pytest.raises(RuntimeError):
        criterion.eval()(input, target)


@pytest.mark.parametrize("interpolate_loss", (None, True, False))
@each_lam
def test_nothing_of_the_users_is_modified(mix: Mix, interpolate_loss: bool | None) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    before = copy.deepcopy((INPUT, INDICES, DENSE, mix, loss.__dict__))
    criterion = MixUpCriterion(loss, interpolate_loss=interpolate_loss)
    criterion(INPUT, INDICES, mix)
    criterion(INPUT, DENSE, mix)
    after = (INPUT, INDICES, DENSE, mix, loss.__dict__)
    assert repr(before) == repr(after)
    assert criterion.loss is loss


@each_lam
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


@both_lams
def test_a_metric_of_floating_labels_interpolates_what_it_returns(mix: Mix) -> None:
    def binary_accuracy(output: Tensor, target: Tensor) -> Tensor:
        return ((output > 0).float() == target).float().mean(1)

    labels = (DENSE > 0.5).float()
    perfect = 2 * labels - 1
    hits = MixUpCriterion(binary_accuracy, interpolate_loss=True)(perfect, labels, mix)
    partner = (labels == labels[mix.index]).float().mean(1)
    torch.testing.assert_close(hits, mix.lam + (1 - mix.lam) * partner)


def test_the_loss_of_a_perfect_model_is_the_entropy_of_the_mixture_and_0_in_eval() -> None:
    mixup, criterion = linked()
    mixup(INPUT)
    dense = mix_targets(INDICES, applied(mixup), 3)
    entropy = -(dense * dense.clamp_min(1e-12).log()).sum(1).mean()
    assert entropy > 0
    perfect = dense.clamp_min(1e-12).log().requires_grad_()
    loss = criterion(perfect, INDICES)
    torch.testing.assert_close(loss, entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, perfect)[0], torch.zeros(4, 3), atol=1e-6, rtol=0)
    mixup.eval()
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
    with pytest.raises(TypeError, match="^expected loss to be callable, got str; "):
        MixUpCriterion("cross_entropy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got MixUp; as in MixUpCriterion\(loss, mixer\)$"):
        MixUpCriterion(MixUp(), nn.MSELoss())  # type: ignore[arg-type]


def test_the_loss_must_be_an_instance() -> None:
    with pytest.raises(TypeError, match=r"^expected a loss, got the class MSELoss; use MSELoss\(\)$"):
        MixUpCriterion(nn.MSELoss)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ("targets", 0, 1))
def test_interpolate_loss_must_be_a_bool(mode: Any) -> None:
    with pytest.raises(TypeError, match=f"^expected interpolate_loss to be True, False or None, got {mode!r}$"):
        MixUpCriterion(nn.MSELoss(), interpolate_loss=mode)


def test_a_subclass_of_a_loss_of_hard_labels_is_one() -> None:
    class Signs(nn.HingeEmbeddingLoss):
        pass

    with pytest.raises(ValueError, match="^expected a loss of dense targets, got Signs of hard labels or logarithms; "):
        MixUpCriterion(Signs(), interpolate_loss=False)
    signs = DENSE.sub(0.5).sign()
    assert torch.equal(*(MixUpCriterion(Signs(), interpolate_loss=mode)(INPUT, signs, SCALAR) for mode in (None, True)))


def test_the_link_must_be_a_mixer() -> None:
    message = "^expected mixer to be a Mixer, got Sequential; link the mixer, not what holds or wraps it$"
    with pytest.raises(TypeError, match=message):
        MixUpCriterion(nn.MSELoss(), nn.Sequential(MixUp()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^expected mixer to be a Mixer, got the class MixUp; use MixUp\(\)$"):
        MixUpCriterion(nn.MSELoss(), MixUp)  # type: ignore[arg-type]
    mixup, criterion = linked()
    with pytest.raises(TypeError, match=message):
        criterion.mixer = nn.Sequential(MixUp())  # type: ignore[assignment]
    assert criterion.mixer is mixup


def test_target_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="^expected target to be a tensor, got list; use a criterion per head, "):
        MixUpCriterion(nn.CrossEntropyLoss())(INPUT, INDICES.tolist(), SCALAR)


def test_a_loss_that_reduces_itself_needs_one_lam_per_batch_or_dense_targets() -> None:
    def smoothed(output: Tensor, target: Tensor) -> Tensor:  # as timm's, without a reduction to set
        return F.cross_entropy(output, target, label_smoothing=0.1)

    with pytest.raises(
        ValueError, match=r"got \(\); let it return .*if it takes dense targets, use interpolate_loss=False"
    ):
        MixUpCriterion(smoothed)(INPUT, INDICES, PER_SAMPLE)
    expected = reference.cross_entropy(INPUT, INDICES, PER_SAMPLE, label_smoothing=0.1).float()
    torch.testing.assert_close(MixUpCriterion(smoothed, interpolate_loss=False)(INPUT, INDICES, PER_SAMPLE), expected)


@pytest.mark.parametrize("mix", (SCALAR, None), ids=("training", "validation"))
def test_class_indices_made_dense_need_an_output_with_classes(mix: Mix | None) -> None:
    criterion = MixUpCriterion(nn.MSELoss(), interpolate_loss=False)
    for output, got in ((INPUT[:, 0], r"\(4,\)"), ({"logits": INPUT}, "dict"), (INPUT[..., None], r"\(4, 3, 1\)")):
        with pytest.raises(ValueError, match=rf"^expected an output \(B, C, \*\) .*, got {got} and \(4,\); give dense"):
            criterion(output, INDICES, mix)
    for size in (3, 1):  # where (B, C, C) would broadcast with (B, C)
        multi_hot = torch.randint(2, (size, 3))
        with pytest.raises(ValueError, match="; give dense and multi-hot targets as floats"):
            criterion(torch.randn(size, 3), multi_hot, None if mix is None else Mix(mix.lam, torch.arange(size)))
    with pytest.raises(ValueError, match="^expected at least two classes for class indices, got 1; "):
        criterion(INPUT[:, :1], INDICES.clamp(max=1), mix)


def test_repr_names_the_link() -> None:
    _, criterion = linked(0.5)
    assert repr(criterion) == (
        "MixUpCriterion(\n  mixer=MixUp(alpha=0.5, p=1.0, per_sample=False), interpolate_loss=None\n"
        "  (loss): CrossEntropyLoss()\n)"
    )
    assert "mixer=None" in repr(MixUpCriterion(F.mse_loss))
