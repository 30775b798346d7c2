"""Mixers and criterion inside programs: states, checkpoints, transforms, targets in parts, and mixers of one's own."""

from __future__ import annotations

import collections
import copy
import io
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_inputs, mix_loss

from . import reference
from .cases import PER_SAMPLE, SCALAR, applied, both_lams, each_mixer, refused, slow_vmap
from .strategies import LAYOUTS

Make = Callable[[], Mixer]
IMAGES = torch.randn(8, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
OUTPUT, INDICES = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), LABELS[:4]
DENSE = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A model with a forward of its own, which calls no mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(90, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input.flatten(1))  # type: ignore[no-any-return]


class Constant(Mixer):
    """A lam of one value, which is learned."""

    def __init__(self, lam: float = 0.5, p: float = 1) -> None:
        super().__init__(p=p)
        self.lam = nn.Parameter(torch.tensor(lam))

    def sample_lam(self, input: Tensor) -> Tensor:  # noqa: ARG002
        return self.lam


class OwnForward(Mixer):
    """Adds the partners where others mix, and says with which weights the targets are to be mixed."""

    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        self.last_mix = mix or Mix(torch.tensor(0.5), torch.arange(len(input)).roll(1))
        return input + input.roll(1, 0) if self.training else input


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype))


def following(mixer: Mixer, **options: Any) -> MixUpCriterion:
    return MixUpCriterion(nn.CrossEntropyLoss(**options), mixer)


def drawn(mixer: Mixer) -> set[float]:
    return {float(mixer.sample(IMAGES).lam.detach()) for _ in range(60)}


@each_mixer
def test_a_saved_draw_loads_by_default_and_replays(make: Make) -> None:
    mixer, file = make(), io.BytesIO()
    output = mixer(IMAGES)
    torch.save(mixer.last_mix, file)
    file.seek(0)
    mix = torch.load(file)  # with weights_only, its default
    assert isinstance(mix, Mix)
    assert torch.equal(mixer(IMAGES, mix), output)


def test_repr_shows_the_options() -> None:
    assert repr(MixUp(0.7, p=0.9, per_sample=True)) == "MixUp(alpha=0.7, p=0.9, per_sample=True)"
    assert repr(CutMix(spatial_dims=2)) == "CutMix(alpha=1.0, p=1.0, per_sample=False, spatial_dims=2)"
    assert repr(Constant(p=0.5)) == "Constant(p=0.5)"
    assert "weights=(2,), p=0.5, per_sample=True" in repr(RandomChoice([MixUp()], (2,), p=0.5, per_sample=True))
    criterion = MixUpCriterion(nn.MSELoss(), MixUp(0.7), interpolate_loss=True)
    assert "mixer=MixUp(alpha=0.7, p=1.0, per_sample=False), interpolate_loss=True" in repr(criterion)


@pytest.mark.parametrize("kind", (MixUp, CutMix))
def test_a_schedule_changes_any_option(kind: type[MixUp | CutMix]) -> None:
    mixer = kind(alpha=1)
    for alpha, p, mixes in ((0, 1, False), (1e6, 0, False), (1e6, 1, True)):
        mixer.alpha, mixer.p, mixer.per_sample = alpha, p, not mixer.per_sample
        assert torch.equal(mixer(IMAGES), IMAGES) != mixes
        assert (applied(mixer).lam.shape[:1] == (8,)) == mixer.per_sample
    assert (type(mixer.alpha), type(mixer.p)) == (float, float)


def test_a_schedule_changes_the_weights_of_a_choice() -> None:
    choice = RandomChoice(iter([Constant(0.25), Constant(0.5), Constant(0.75)]))
    for weights, expected in (([0, 5, 0], {0.5}), ((1.0, 0, 2), {0.25, 0.75}), (None, {0.25, 0.5, 0.75})):
        choice.weights = weights
        assert drawn(choice) == expected
    with refused(AttributeError):
        choice.alpha = 0.0  # a choice has none, and would be scheduled in vain
    choice.per_sample = True
    assert choice.sample(IMAGES).lam.shape == (8,)


# Inputs


@pytest.mark.parametrize("size", (0, 1, 5, 33))
@each_mixer
def test_odd_last_single_and_empty_batches(make: Make, size: int) -> None:
    mixer, input, output, target = make(), torch.randn(size, 3, 4, 4), torch.randn(size, 3), torch.randint(3, (size,))
    mixed = mixer(input)
    assert (mixed.shape, applied(mixer).index.shape) == (input.shape, (size,))
    loss, plain = following(mixer, reduction="sum")(output, target), F.cross_entropy(output, target, reduction="sum")
    assert size > 1 or (torch.equal(mixed, input) and torch.equal(loss, plain))


@each_mixer
def test_fake_tensors_under_autocast_keep_their_shapes(make: Make) -> None:
    mixer = make()
    with FakeTensorMode(), torch.autocast("cpu"):
        assert mixer(torch.empty(IMAGES.shape)).shape == IMAGES.shape
        loss = following(mixer)(torch.empty(8, 3).bfloat16(), torch.empty(8).long())
        assert (loss.shape, loss.dtype) == ((), torch.float32)


# Where the mixer stands


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("wrap", ("plain", "compiled"))
def test_a_registered_mixer_follows_the_mode_of_the_model(wrap: str) -> None:
    mixer, net = MixUp(1.0), Net()
    state, criterion = list(net.state_dict()), following(mixer)
    net.mixer = mixer
    model: Any = torch.compile(net, backend="eager") if wrap == "compiled" else net
    for _ in range(2):
        output = model.eval()(mixer(IMAGES))
        assert torch.equal(criterion(output, LABELS), F.cross_entropy(output, LABELS))
        model.train()
        seen = mixer(IMAGES)
        assert not torch.equal(seen, IMAGES)
        output = model(seen)
        assert_close(criterion(output, LABELS), reference.cross_entropy(output, LABELS, applied(mixer)))
    assert list(net.state_dict()) == state


@pytest.mark.parametrize("use_reentrant", (False, True))
@each_mixer
def test_a_checkpoint_recomputes_the_same_draw(make: Make, use_reentrant: bool) -> None:
    mixer, layer, net, input = make(), nn.Conv2d(3, 3, 1), Net(), IMAGES.clone().requires_grad_()

    def step(input: Tensor) -> Tensor:
        output = net(mixer(layer(input)).tanh())
        mix = mixer.last_mix if use_reentrant else None  # there gradients are off, so that it must be passed
        return following(mixer)(output, LABELS, mix)  # type: ignore[no-any-return]

    loss, mix = checkpoint(step, input, use_reentrant=use_reentrant), applied(mixer)
    loss.backward()
    torch.testing.assert_close(mixer.last_mix, mix)
    expected = reference.cross_entropy(net(mix_inputs(layer(input), mix).tanh()), LABELS, mix).float()
    torch.testing.assert_close((loss, input.grad), (expected, *torch.autograd.grad(expected, input)))


@each_mixer
def test_functional_transforms_see_through_it(make: Make) -> None:
    mixer, net = make(), Net()
    model, criterion = nn.Sequential(mixer, net), following(mixer)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return criterion(torch.func.functional_call(model, parameters, (IMAGES,)), LABELS)  # type: ignore[no-any-return]

    torch.manual_seed(3)
    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    torch.manual_seed(3)
    mix = make().sample(IMAGES)
    expected = reference.cross_entropy(net(mix_inputs(IMAGES, mix)), LABELS, mix)
    torch.testing.assert_close(tuple(gradients.values()), torch.autograd.grad(expected, list(net.parameters())))


@slow_vmap
@each_mixer
def test_vmap_draws_for_each_of_its_batches(make: Make) -> None:
    output = torch.func.vmap(make(), randomness="different")(torch.eye(8).view(8, 1, 4, 2).expand(3, 8, 1, 4, 2))
    assert (output[0] != output[1]).any()
    inputs, mix = torch.randn(3, *IMAGES.shape), make().sample(IMAGES)
    output = torch.func.vmap(lambda input: make()(input, mix))(inputs)
    assert_close(output, torch.stack([reference.mixed(input, mix) for input in inputs]))


# Mixers of one's own


@pytest.mark.parametrize("where", ("alone", "gated", "chosen"))
def test_a_learned_lam_has_its_gradient(where: str) -> None:
    entries = [Constant(0.25, p=0.5 if where == "gated" else 1), Constant(0.75)]
    mixer, input, seen = RandomChoice(entries) if where == "chosen" else entries[0], IMAGES.double(), set()
    for _ in range(20):
        mixed, logits = mixer(input), torch.randn(8, 3)
        lam, index = applied(mixer)
        used = [bool(lam == entry.lam) for entry in entries]
        seen.add(tuple(used))
        nll = [F.cross_entropy(logits, labels, reduction="none") for labels in (LABELS, LABELS[index])]
        for value, slope in (
            (mixed.square().sum(), 2 * (mixed * (input - input[index])).sum()),
            (following(mixer)(logits, LABELS), (nll[0] - nll[1]).mean()),
        ):
            got = torch.autograd.grad(value, [entry.lam for entry in entries], retain_graph=True, allow_unused=True)
            for gradient, mine in zip(got, used, strict=True):
                expected = slope.detach().float() * mine
                torch.testing.assert_close(torch.zeros(()) if gradient is None else gradient, expected)
    others = {"alone": set(), "gated": {(False, False)}, "chosen": {(False, True)}}
    assert seen == {(True, False)} | others[where]


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", ((), (8,), (1, 1, 6, 5), (8, 1, 6, 5)), ids=str)
def test_what_sample_lam_returns_is_never_written_into(shape: tuple[int, ...], layout: str) -> None:
    class Kept(Mixer):
        def sample_lam(self, input: Tensor) -> Tensor:  # noqa: ARG002
            return kept

    kept, input = torch.full(shape, 0.25), LAYOUTS[layout](IMAGES)
    for mixer in (Kept(), Kept(p=0.5), RandomChoice([Kept(), Kept()]), RandomChoice([Kept()], p=0.5, per_sample=True)):
        output = mixer(input)
        following(mixer)(torch.randn(8, 3), LABELS)
        MixUpCriterion(nn.MSELoss(), mixer)(output, IMAGES)
        assert (kept == 0.25).all()
        assert kept._version == 0


def test_a_lam_in_float64_mixes_every_dtype_of_inputs_and_logits() -> None:
    """A mixer that draws by NumPy or in double precision."""

    class Double(Mixer):
        def sample_lam(self, input: Tensor) -> Tensor:
            return torch.rand(input.shape[:1], dtype=torch.float64)

    mixer = Double(p=0.9)
    choice = RandomChoice([mixer, MixUp(1.0)])
    for each, dtype in itertools.product((mixer, choice), (torch.bfloat16, torch.float32, torch.float64)):
        mixed, logits = each(IMAGES.to(dtype)), torch.randn(8, 3).to(dtype)
        loss, eps = following(each)(logits, LABELS), torch.finfo(dtype).eps
        assert (mixed.dtype, loss.dtype) == (dtype, dtype)
        expected = reference.mixed(IMAGES.to(dtype), applied(each))
        torch.testing.assert_close(mixed.double(), expected, rtol=2 * eps, atol=4 * eps)
        expected = reference.cross_entropy(logits, LABELS, applied(each))
        torch.testing.assert_close(loss.double(), expected, rtol=eps, atol=1e-6)


def test_a_forward_of_ones_own_sets_the_mix_that_is_meant() -> None:
    mixer, logits = OwnForward(), torch.randn(8, 3)
    criterion, mix = following(mixer), Mix(torch.tensor(0.5), torch.arange(8).roll(1))
    mixer(IMAGES)
    assert_close(criterion(logits, LABELS), reference.cross_entropy(logits, LABELS, mix))
    mixer.eval()(IMAGES)
    assert mixer.last_mix is None
    assert torch.equal(criterion(logits, LABELS), F.cross_entropy(logits, LABELS))


# The criterion and its loss


@both_lams
@pytest.mark.parametrize("mode", (None, True, False))
def test_modes_and_hooks_that_change_the_input_are_part_of_the_loss(mode: bool | None, mix: Mix) -> None:
    class Moded(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) * (10 if self.training else 1)

    before, plain = nn.CrossEntropyLoss(), reference.cross_entropy(OUTPUT, INDICES, mix)
    before.register_forward_pre_hook(lambda _, args: (3 * args[0], args[1]))
    criterion = MixUpCriterion(Moded(), interpolate_loss=mode)
    assert_close(criterion(OUTPUT, INDICES, mix), 10 * plain)
    assert_close(criterion.eval()(OUTPUT, INDICES, mix), plain)
    criterion.loss = before
    assert_close(criterion(OUTPUT, INDICES, mix), reference.cross_entropy(3 * OUTPUT, INDICES, mix))


@pytest.mark.parametrize("per_sample", (False, True))
def test_what_a_loss_is_told_later_counts(per_sample: bool) -> None:
    """Its reduction, its options, and that its targets are logarithms now."""
    loss = nn.KLDivLoss(reduction="sum")
    criterion, log_probs, mix = MixUpCriterion(loss), OUTPUT.log_softmax(1), PER_SAMPLE if per_sample else SCALAR
    probs = OUTPUT.flip(0).softmax(1)
    assert_close(criterion(log_probs, probs, mix), loss(log_probs, reference.mix_targets(probs, mix).float()))
    loss.log_target, loss.reduction = True, "batchmean"
    expected = reference.mix_loss(loss, log_probs, probs.log(), mix)
    assert_close(criterion(log_probs, probs.log(), mix), expected)


@both_lams
def test_the_unreduced_copy_of_a_loss_shares_parameters_and_buffers(mix: Mix) -> None:
    class Scaled(nn.MSELoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.seen = nn.Parameter(torch.tensor(2.0)), nn.Buffer(torch.zeros(3))

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            self.seen.add_(target.sum(0))
            return self.scale * super().forward(input, target)

    loss = Scaled()
    MixUpCriterion(loss, interpolate_loss=True)(OUTPUT, DENSE, mix).backward()
    assert loss.scale.grad is not None
    assert_close(loss.seen, 2 * DENSE.sum(0))
    assert loss.reduction == "mean"


# Targets in parts


class Head(NamedTuple):
    labels: Tensor
    weight: Tensor


TASKS = {"class": Head(LABELS, torch.linspace(0, 2, 8)), "more": {"values": torch.linspace(-1, 1, 24).view(8, 3)}}


def of_heads(output: dict[str, Tensor], target: dict[str, Any]) -> Tensor:
    """A head of classes, with a weight for each sample, and one of values: one loss for each sample."""
    labels, weight = target["class"]
    of_classes = F.cross_entropy(output["class"], labels, reduction="none")
    losses: Tensor = weight * of_classes + (output["values"] - target["more"]["values"]).square().sum(1)
    return losses


def heads() -> dict[str, Tensor]:
    return {"class": torch.randn(8, 3, requires_grad=True), "values": torch.randn(8, 3, requires_grad=True)}


@each_mixer
def test_each_part_of_a_target_is_that_of_the_partner(make: Make) -> None:
    mixer, output = make(), heads()
    criterion = MixUpCriterion(of_heads, mixer)
    mixer(IMAGES)
    expected = reference.mix_loss(of_heads, output, TASKS, applied(mixer))
    for loss in (criterion(output, TASKS), mix_loss(of_heads, output, TASKS, applied(mixer))):
        assert_close(loss, expected)
        both = (torch.autograd.grad(each.sum(), list(output.values()), retain_graph=True) for each in (loss, expected))
        torch.testing.assert_close(*both)
    copied = copy.deepcopy(criterion)
    for evaluated in (criterion.eval(), copied.eval()):
        assert torch.equal(evaluated(output, TASKS), of_heads(output, TASKS))
        assert_close(evaluated(output, TASKS, applied(mixer)), expected)


def test_parts_are_kept_as_they_came() -> None:
    """The same types and names, in the same order, whatever their dtypes; floats are not averaged."""
    seen: list[Any] = []

    def loss(output: Tensor, target: Any) -> Tensor:
        seen.append(target)
        return output

    target = {"b": Head(LABELS[:4], LABELS[:4] > 0), "a": collections.OrderedDict(x=DENSE.half())}
    assert_close(MixUpCriterion(loss)(OUTPUT, target, SCALAR), OUTPUT)
    for kept, index in zip(seen, (torch.arange(4), SCALAR.index), strict=True):
        assert (list(kept), type(kept["b"]), type(kept["a"])) == (["b", "a"], Head, collections.OrderedDict)
        assert torch.equal(kept["b"].labels, LABELS[index])
        assert torch.equal(kept["b"].weight, LABELS[index] > 0)
        assert torch.equal(kept["a"]["x"], DENSE.half()[index])


class Mirrored(RandomChoice):
    def sample_index(self, input: Tensor) -> Tensor:
        return torch.arange(len(input)).flip(0)


class Halves(Mixer):
    def sample(self, input: Tensor) -> Mix:  # which answers for p itself
        return Mix(torch.tensor(0.5), torch.arange(len(input)).flip(0))


@pytest.mark.parametrize("mixer", (Mirrored([MixUp(), CutMix()]), Mirrored([MixUp()], per_sample=True), Halves(p=0.0)))
def test_partners_and_draws_of_ones_own_are_what_a_call_applies(mixer: Mixer) -> None:
    input, flipped = torch.randn(4, 2, 3, 3), torch.tensor([3, 2, 1, 0])
    mixed, (lam, index) = mixer(input), applied(mixer)
    assert torch.equal(index, flipped)
    assert torch.equal(mixed, mix_inputs(input, Mix(lam, flipped)))
    assert not isinstance(mixer, Halves) or torch.equal(lam, torch.tensor(0.5))
