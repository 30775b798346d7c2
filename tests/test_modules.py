"""The mixers: what they do in training, in eval, inside models and through the life of one."""

from __future__ import annotations

import copy
import io
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_inputs, mix_targets, mixup_batch
from mixup_nn.sampling import sample_cutmix, sample_mixup

from . import reference
from .cases import MIXERS, SCALAR, Dominant, applied, each_mixer, slow_vmap, through_pickle

Make = Callable[[], Mixer]
IMAGES = torch.randn(8, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def network(size: int = 90) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 3))


@each_mixer
def test_training_mixes_with_the_draw_it_leaves_behind(make: Make) -> None:
    mixer = make()
    outputs = []
    for _ in range(5):
        outputs.append(mixer(IMAGES))
        assert torch.equal(outputs[-1], mix_inputs(IMAGES, applied(mixer)))
    assert any(not torch.equal(output, IMAGES) for output in outputs)  # a box may hold no pixel


@pytest.mark.parametrize("gradients", (True, False))
@each_mixer
def test_each_training_call_draws_afresh(make: Make, gradients: bool) -> None:
    mixer = make()
    with torch.set_grad_enabled(gradients):
        outputs = [mixer(IMAGES) for _ in range(5)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 5


@each_mixer
def test_eval_returns_its_input_and_touches_nothing(make: Make) -> None:
    mixer = make()
    mixer(IMAGES)
    kept, state = mixer.last_mix, torch.get_rng_state()
    assert mixer.eval()(IMAGES) is IMAGES
    assert torch.equal(torch.get_rng_state(), state)
    assert mixer.train().last_mix is kept  # an eval pass between a training forward and its loss does no harm


@each_mixer
def test_there_is_no_draw_in_eval_mode_whoever_set_it(make: Make) -> None:
    mixer = make()
    model = nn.Sequential(mixer, network())
    model(IMAGES)
    for switch in (lambda: model.eval(), lambda: mixer.train(False), lambda: setattr(mixer, "training", False)):
        model.train()
        assert mixer.last_mix is not None
        switch()
        assert mixer.last_mix is None
    mixer.last_mix = SCALAR  # as a model sets it that mixes in a way of its own
    assert mixer.last_mix is None
    assert mixer.train().last_mix is SCALAR


def test_a_second_input_and_a_padding_mask_are_not_mixed_by_the_last_training_draw() -> None:
    """The model of two inputs, and the mask of the guide, as a user writes them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixup = MixUp(1.0)

        def forward(self, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            image = self.mixup(image)
            mix = self.mixup.last_mix
            return image, table if mix is None else mix_inputs(table, mix)

    model, table = Two(), torch.randn(8, 4)
    image, mixed = model(IMAGES, table)
    torch.testing.assert_close((image, mixed), tuple(mix_inputs(x, applied(model.mixup)) for x in (IMAGES, table)))
    assert model.eval()(IMAGES, table) == (IMAGES, table)


@each_mixer
def test_sample_draws_in_eval_mode_too(make: Make) -> None:
    mixer = make().eval()
    assert any(bool((mixer.sample(IMAGES).lam != 1).any()) for _ in range(5))


@each_mixer
def test_a_given_mix_is_applied_in_both_modes_and_kept_in_training(make: Make) -> None:
    mixer, own = make(), make().sample(IMAGES)
    mixer(IMAGES)
    drawn, state = mixer.last_mix, torch.get_rng_state()
    assert torch.equal(mixer.eval()(IMAGES, own), mix_inputs(IMAGES, own))
    assert mixer.train().last_mix is drawn
    assert torch.equal(mixer(IMAGES, own), mix_inputs(IMAGES, own))
    assert mixer.last_mix is own
    assert torch.equal(torch.get_rng_state(), state)


@each_mixer
def test_the_draw_is_float32_whatever_the_dtype_of_the_input(make: Make) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        mixer = make()
        mixer(IMAGES.to(dtype))
        assert applied(mixer).lam.dtype == torch.float32


def test_a_learned_lam_has_its_gradient() -> None:
    class Learned(Mixer):
        def __init__(self, **options: float) -> None:
            super().__init__(**options)
            self.logit = nn.Parameter(torch.tensor(0.3))

        def sample_lam(self, input: Tensor) -> Tensor:  # noqa: ARG002
            return self.logit.sigmoid()

    for mixer in (Learned(), Learned(p=0.5)):
        criterion, used = MixUpCriterion(nn.CrossEntropyLoss(), mixer), []
        for _ in range(20):
            output = mixer(IMAGES)
            used += [torch.autograd.grad(output.square().sum(), mixer.logit, retain_graph=True)[0] != 0]
            loss = criterion(torch.eye(8, 3, requires_grad=True), LABELS)
            used += [torch.autograd.grad(loss, mixer.logit)[0] != 0]
        assert any(used)
        assert all(used) == (mixer.p == 1)
    entries = [Learned(), Learned()]
    RandomChoice(entries).sample(IMAGES).lam.backward()
    assert sorted(entry.logit.grad != 0 for entry in entries) == [False, True]


@pytest.mark.parametrize("name", ("mixup", "cutmix", "choice"))
def test_per_sample_may_be_changed_at_any_time(name: str) -> None:
    mixer = MIXERS[name]()
    for per_sample in (True, False, True):
        mixer.per_sample = per_sample  # type: ignore[assignment]
        assert (mixer.sample(IMAGES).lam.shape[:1] == (8,)) == per_sample


def test_the_mixers_draw_as_the_functions_of_the_same_options() -> None:
    options: dict[str, Any] = {"p": 0.7, "per_sample": True}
    pairs: tuple[tuple[Mixer, Callable[[], Mix]], ...] = (
        (MixUp(3.0, **options), lambda: sample_mixup(8, 3.0, **options)),
        (CutMix(3.0, **options), lambda: sample_cutmix(IMAGES.shape, 3.0, **options)),
        (MixUp(), lambda: sample_mixup(8)),
        (CutMix(), lambda: sample_cutmix(IMAGES.shape)),
    )
    for mixer, function in pairs:
        torch.manual_seed(7)
        expected = function()
        torch.manual_seed(7)
        torch.testing.assert_close(mixer.sample(IMAGES), expected)


@pytest.mark.parametrize("kind", (MixUp, CutMix))
def test_a_schedule_changes_alpha_and_p_by_assignment(kind: type[MixUp | CutMix]) -> None:
    mixer = kind(alpha=1)
    mixer.alpha = 0
    assert torch.equal(mixer(IMAGES), IMAGES)
    mixer.alpha, mixer.p = 1e6, 0
    assert torch.equal(mixer(IMAGES), IMAGES)
    mixer.p = 1
    assert not torch.equal(mixer(IMAGES), IMAGES)
    assert (type(mixer.alpha), type(mixer.p)) == (float, float)


@each_mixer
def test_a_failed_call_leaves_last_mix_alone(make: Make) -> None:
    mixer = make()
    mixer(IMAGES)
    before = mixer.last_mix
    with pytest.raises(TypeError):
        mixer(IMAGES.long())
    assert mixer.last_mix is before


@pytest.mark.parametrize("batch_size", (0, 1, 5, 33))
@each_mixer
def test_odd_last_single_and_empty_batches(make: Make, batch_size: int) -> None:
    input = torch.randn(batch_size, 3, 4, 4)
    output = make()(input)
    assert output.shape == input.shape
    assert batch_size > 1 or torch.equal(output, input)


@each_mixer
def test_runs_on_the_device_of_the_input(make: Make, device: str) -> None:
    mixer = make()
    assert mixer(IMAGES.to(device)).device.type == device
    assert {part.device.type for part in applied(mixer)} == {device}


# Mixers of one's own


def test_a_mixer_without_sample_lam_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"^Mixer has no sample_lam\(input\)"):
        Mixer()(IMAGES)


def test_p_gates_a_mixer_of_ones_own_and_sample_lam_is_all_it_takes() -> None:
    class Halves(Mixer):
        def sample_lam(self, input: Tensor) -> Tensor:
            return torch.full((len(input),), 0.5)

    kept = Halves(p=0.0)
    assert torch.equal(kept(IMAGES), IMAGES)
    mixer = Halves()
    torch.testing.assert_close(mixer(IMAGES), (IMAGES + IMAGES[applied(mixer).index]) / 2)
    assert repr(mixer) == "Halves(p=1.0)"


def test_partners_of_ones_own() -> None:
    class Mirrored(MixUp):
        def sample(self, input: Tensor) -> Mix:
            return super().sample(input)._replace(index=torch.arange(len(input)).flip(0))

    mixer = Mirrored(1.0)
    torch.testing.assert_close(mixer(IMAGES), torch.lerp(IMAGES.flip(0), IMAGES, applied(mixer).lam))
    with pytest.raises(
        TypeError, match="^expected Mixer modules without a sample or forward of their own, got Mirrored; "
    ):
        RandomChoice([mixer])


def test_a_choice_follows_the_mode_of_its_parent_and_may_hold_choices() -> None:
    nested = RandomChoice([RandomChoice([MixUp(0.0)]), Dominant(0.0)])
    assert torch.equal(nested(IMAGES), IMAGES)
    assert not any(module.training for module in nested.eval().modules())


def test_a_choice_never_ignores_a_forward_of_an_entry() -> None:
    class Resized(MixUp):
        def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
            return super().forward(input.flip(-1), mix)

    with pytest.raises(
        TypeError, match="without a sample or forward of their own, got Resized; a choice calls neither"
    ):
        RandomChoice([MixUp(), Resized()])


def test_the_weights_of_a_choice_are_relative_and_may_be_set() -> None:
    choice = RandomChoice([MixUp(), CutMix()], (1, 3))
    assert (choice.weights, choice.p) == ((1.0, 3.0), 1.0)
    choice.weights = None
    assert choice.weights == (1.0, 1.0)
    choice.weights = [0, 5]
    assert choice.weights == (0.0, 5.0)
    choice.weights = np.array([2.0, 1.0])  # type: ignore[assignment]
    assert choice.weights == (2.0, 1.0)
    assert RandomChoice(iter([MixUp(), CutMix(), MixUp()])).weights == (1.0, 1.0, 1.0)


def test_p_turns_a_choice_off_and_on() -> None:
    choice = RandomChoice([MixUp(8.0), CutMix(8.0)], p=0)
    assert all(torch.equal(choice(IMAGES), IMAGES) for _ in range(5))
    choice.p = 1
    assert not torch.equal(choice(IMAGES), IMAGES)


# Anywhere in a model


def test_mixes_hidden_layers_and_embeddings() -> None:
    mixup, head = MixUp(1.0), nn.Linear(5, 3)
    tokens = torch.randint(10, (4, 7))
    model = nn.Sequential(nn.Embedding(10, 5), mixup, head)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
    criterion(model(tokens).mean(1), torch.randint(3, (4,))).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


@each_mixer
def test_composes_with_transforms_before_and_after(make: Make) -> None:
    class Normalize(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return (input - 0.5) / 0.25

    class RandomFlip(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.flip(-1) if self.training else input

    mixer = make()
    output = nn.Sequential(RandomFlip(), mixer, Normalize())(IMAGES)
    torch.testing.assert_close(output, (mix_inputs(IMAGES.flip(-1), applied(mixer)) - 0.5) / 0.25)


# Stateless


@each_mixer
def test_has_no_state(make: Make) -> None:
    mixer = make()
    mixer(IMAGES)
    assert not mixer.state_dict()
    assert not list(mixer.parameters())
    assert not list(mixer.buffers())


@each_mixer
def test_no_result_depends_on_an_earlier_call(make: Make) -> None:
    fresh, used = make(), make()
    for mixer in used.modules():  # in a choice also those chosen from
        if isinstance(mixer, Mixer):
            mixer(IMAGES[:3])
    torch.manual_seed(5)
    expected = fresh(IMAGES)
    torch.manual_seed(5)
    assert torch.equal(used(IMAGES), expected)


@each_mixer
def test_weights_load_into_a_model_with_and_without_it(make: Make) -> None:
    plain, mixed = nn.Sequential(nn.Identity(), network()), nn.Sequential(make(), network())
    mixed(IMAGES)
    plain.load_state_dict(mixed.state_dict(), strict=True)
    mixed.load_state_dict(plain.state_dict(), strict=True)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, mixed.get_parameter(name))


@each_mixer
def test_a_saved_draw_loads_by_default_and_replays_the_step(make: Make) -> None:
    mixer, file = make(), io.BytesIO()
    output = mixer(IMAGES)
    torch.save(mixer.last_mix, file)
    file.seek(0)
    mix = torch.load(file)  # with weights_only, its default
    assert isinstance(mix, Mix)
    assert torch.equal(mix_inputs(IMAGES, mix), output)


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", (copy.copy, copy.deepcopy, through_pickle, through_torch_save))
@each_mixer
def test_copies_in_the_middle_of_training_carry_no_draw_and_keep_working(
    make: Make, copy_of: Callable[[Any], Any]
) -> None:
    mixer = make()
    mixer(IMAGES)
    kept = mixer.last_mix
    copied = copy_of(mixer)
    assert copied.training
    assert copied.last_mix is None
    assert mixer.last_mix is kept
    assert repr(copied) == repr(mixer)
    torch.manual_seed(5)
    output = copied(IMAGES)
    assert mixer.last_mix is kept
    torch.manual_seed(5)
    assert torch.equal(mixer(IMAGES), output)
    assert not copy_of(mixer.eval()).training


def test_repr_shows_the_options() -> None:
    assert repr(MixUp(0.7, p=0.9, per_sample=True)) == "MixUp(alpha=0.7, p=0.9, per_sample=True)"
    assert repr(CutMix()) == "CutMix(alpha=1.0, p=1.0, per_sample=False)"
    assert repr(CutMix(spatial_dims=2)) == "CutMix(alpha=1.0, p=1.0, per_sample=False, spatial_dims=2)"
    choice = repr(RandomChoice([MixUp()], p=0.5))
    assert choice.startswith("RandomChoice(\n  weights=(1.0,), p=0.5, per_sample=False\n  (mixers)")


@each_mixer
def test_a_model_and_its_criterion_copied_together_stay_linked(make: Make) -> None:
    mixer = make()
    model = nn.Sequential(mixer, network())
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    model(IMAGES)
    for copied, copied_criterion in (copy.deepcopy((model, criterion)), through_pickle((model, criterion))):
        assert copied_criterion.mixer is copied[0]
        copied_criterion(copied(IMAGES), LABELS).backward()


@each_mixer
def test_ema_copies_follow_and_evaluate_without_mixing(make: Make) -> None:
    model = nn.Sequential(make(), network())
    model(IMAGES)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    torch.testing.assert_close(ema.eval()(IMAGES), model.eval()(IMAGES))


def test_a_replica_of_data_parallel_names_distributed_data_parallel() -> None:
    mixer = MixUp()
    model = nn.Sequential(mixer, network())
    model(IMAGES)  # a draw that the criterion would go on using
    replica = mixer._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"^MixUp cannot train under nn.DataParallel: .*DistributedDataParallel"):
        replica(IMAGES)
    assert replica.eval()(IMAGES) is IMAGES
    assert DataParallel(model.eval())(IMAGES).shape == (8, 3)


@pytest.mark.parametrize("use_reentrant", (False, True))
@each_mixer
def test_activation_checkpointing_recomputes_the_same_draw(make: Make, use_reentrant: bool) -> None:
    mixer, layer = make(), nn.Conv2d(3, 3, 1)
    input = IMAGES.clone().requires_grad_()
    output = checkpoint(lambda x: mixer(layer(x)).tanh(), input, use_reentrant=use_reentrant)
    before = applied(mixer)
    output.sum().backward()
    torch.testing.assert_close(mixer.last_mix, before)
    expected = torch.autograd.grad(mix_inputs(layer(input), before).tanh().sum(), input)[0]
    torch.testing.assert_close(input.grad, expected)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpointed_backward_sets_last_mix_again(use_reentrant: bool) -> None:
    mixup = MixUp(1.0)
    input = torch.randn(6, 3, requires_grad=True)
    first = checkpoint(lambda x: mixup(x).tanh(), input, use_reentrant=use_reentrant)
    first_mix = mixup.last_mix
    mixup(torch.randn(6, 3))
    first.sum().backward()
    torch.testing.assert_close(mixup.last_mix, first_mix)  # documented: not that of the second forward


@each_mixer
def test_two_mixers_and_two_models_do_not_meet(make: Make) -> None:
    mixers = [make(), make()]
    criteria = [MixUpCriterion(nn.CrossEntropyLoss(), mixer) for mixer in mixers]
    logits = network()(IMAGES)
    for mixer in mixers:
        mixer(IMAGES)
    losses = [criterion(logits, LABELS) for criterion in criteria]
    for mixer, criterion, loss in zip(mixers, criteria, losses, strict=True):
        assert torch.equal(loss, criterion(logits, LABELS, applied(mixer)))
    assert losses[0] != losses[1]


@each_mixer
def test_gradient_accumulation_mixes_each_micro_batch_on_its_own(make: Make) -> None:
    mixer, net = make(), network()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    parameters = list(net.parameters())
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(3):
        input = torch.randn(8, 3, 6, 5)
        output = net(mixer(input))
        lam, index = applied(mixer)
        share = lam.flatten(1).mean(1) if lam.ndim > 1 else lam
        losses = [nn.functional.cross_entropy(output, labels, reduction="none") for labels in (LABELS, LABELS[index])]
        loss = (share * losses[0] + (1 - share) * losses[1]).mean()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected = [total + gradient for total, gradient in zip(expected, gradients, strict=True)]
        criterion(output, LABELS).backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected)


def test_threads_with_their_own_mixers_do_not_disturb_each_other() -> None:
    failures: list[str] = []

    def train() -> None:
        mixer = MixUp(1.0)
        for _ in range(50):
            input = torch.randn(8, 3)
            output = mixer(input)
            if not torch.equal(output, mix_inputs(input, applied(mixer))):
                failures.append("the draw left behind is not the draw applied")

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Other ways in which torch calls a module


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@each_mixer
def test_autocast_mixes_in_the_dtype_of_its_input_and_keeps_that_of_the_loss(make: Make, dtype: torch.dtype) -> None:
    mixer, layer, net, loss = make(), nn.Conv2d(3, 3, 1), network(), nn.CrossEntropyLoss()
    with torch.autocast("cpu", dtype):
        output = mixer(layer(IMAGES))
        logits = net(output)
        mixed, plain = MixUpCriterion(loss, mixer)(logits, LABELS), loss(logits, LABELS)
    assert (output.dtype, mixed.dtype) == (dtype, plain.dtype)
    mixed.backward()
    assert layer.weight.grad is not None


@each_mixer
def test_inference_mode(make: Make) -> None:
    with torch.inference_mode():
        assert make()(IMAGES).is_inference()


@each_mixer
def test_meta_and_fake_tensors_keep_their_shape(make: Make) -> None:
    mixer = make()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    assert mixer(IMAGES.to("meta")).shape == IMAGES.shape
    assert all(part.is_meta for part in applied(mixer))
    assert criterion(torch.empty(8, 3, device="meta"), LABELS.to("meta")).shape == ()
    with FakeTensorMode(), torch.autocast("cpu"):
        assert mixer(torch.empty(IMAGES.shape)).shape == IMAGES.shape
        loss = criterion(torch.empty(8, 3).bfloat16(), torch.empty(8).long())
        assert (loss.shape, loss.dtype) == ((), torch.float32)


@each_mixer
def test_functional_transforms_see_through_it(make: Make) -> None:
    model = nn.Sequential(make(), network())
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (IMAGES,))
        return output.square().mean()

    torch.manual_seed(3)
    gradients = torch.func.grad(loss)(parameters)
    torch.manual_seed(3)
    model(IMAGES).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@slow_vmap
@pytest.mark.parametrize("in_dims", ((0, None), (None, 0), (0, 0)), ids=("inputs", "mixes", "both"))
@each_mixer
def test_vmap_over_inputs_and_mixes(make: Make, in_dims: tuple[int | None, int | None]) -> None:
    inputs, drawn = torch.randn(3, *IMAGES.shape), [make().sample(IMAGES) for _ in range(3)]
    mixes = Mix(torch.stack([mix.lam for mix in drawn]), torch.stack([mix.index for mix in drawn]))
    each_input, each_mix = (dim == 0 for dim in in_dims)
    output = torch.func.vmap(mix_inputs, in_dims)(inputs if each_input else inputs[0], mixes if each_mix else drawn[0])
    for i in range(3):
        expected = mix_inputs(inputs[i if each_input else 0], drawn[i if each_mix else 0])
        torch.testing.assert_close(output[i], expected)


@slow_vmap
@each_mixer
def test_vmap_draws_for_each_of_its_batches(make: Make) -> None:
    input = torch.eye(8).view(8, 1, 4, 2).expand(3, 8, 1, 4, 2)
    output = torch.func.vmap(make(), randomness="different")(input)
    assert (output[0] != output[1]).any()


@slow_vmap
def test_vmap_over_class_indices() -> None:
    target = torch.randint(3, (5, 4))
    dense = torch.func.vmap(lambda target: mix_targets(target, SCALAR, 3))(target)
    torch.testing.assert_close(dense, torch.stack([mix_targets(each, SCALAR, 3) for each in target]))


def mix_and_collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    input, target = (torch.stack(column) for column in zip(*samples, strict=True))
    return mixup_batch(input, target, alpha=1.0)


@pytest.mark.parametrize("num_workers", (0, 2))
def test_inside_collate_fn_workers_are_reproducible_and_draw_differently(num_workers: int) -> None:
    dataset = TensorDataset(torch.randn(16, 2), torch.arange(16))

    def epoch() -> list[Tensor]:
        loader = DataLoader(
            dataset,
            batch_size=4,
            num_workers=num_workers,
            collate_fn=mix_and_collate,
            generator=torch.Generator().manual_seed(1),
            multiprocessing_context="fork" if num_workers else None,
        )
        torch.manual_seed(2)
        return [mixing for _, _, mixing in loader]

    first, second = epoch(), epoch()
    assert first == second
    assert len({float(mixing) for mixing in first}) == 4


# Errors

alpha_mixers = pytest.mark.parametrize("kind", (MixUp, CutMix))


@pytest.mark.parametrize("alpha", (-1.0, math.nan, math.inf))
@alpha_mixers
def test_alpha_out_of_range(kind: type[MixUp | CutMix], alpha: float) -> None:
    message = f"^expected alpha to be a finite number >= 0, got {alpha}$"
    with pytest.raises(ValueError, match=message):
        kind(alpha)
    mixer = kind(0.3)
    with pytest.raises(ValueError, match=message):
        mixer.alpha = alpha
    assert mixer.alpha == 0.3


@pytest.mark.parametrize("p", (-0.1, 1.1, math.nan))
@pytest.mark.parametrize("kind", (MixUp, CutMix, Mixer))
def test_p_out_of_range(kind: type[Mixer], p: float) -> None:
    message = rf"^expected p to be a probability in \[0, 1\], got {p}$"
    with pytest.raises(ValueError, match=message):
        kind(p=p)
    mixer = kind()
    with pytest.raises(ValueError, match=message):
        mixer.p = p
    assert mixer.p == 1


@alpha_mixers
def test_alpha_and_p_must_be_numbers(kind: type[MixUp | CutMix]) -> None:
    with pytest.raises(TypeError, match="^expected alpha to be a number, got str$"):
        kind("0.2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^expected p to be a number, got Tensor$"):
        kind(p=torch.tensor(0.5))  # type: ignore[arg-type]


@alpha_mixers
def test_alpha_and_p_may_be_any_real_numbers(kind: type[MixUp | CutMix]) -> None:
    for alpha, p in ((np.float32(0.5), np.float64(0.25)), (Fraction(1, 2), Fraction(1, 4))):
        mixer = kind(alpha, p=p)  # type: ignore[arg-type]
        assert (type(mixer.alpha), mixer.alpha, mixer.p) == (float, 0.5, 0.25)
        mixer(IMAGES)


def test_options_are_keyword_only() -> None:
    for kind in (MixUp, CutMix):
        with pytest.raises(TypeError, match="positional"):
            kind(0.2, 0.5)  # type: ignore[call-arg]


def test_what_a_choice_cannot_choose_from() -> None:
    with pytest.raises(ValueError, match="^expected at least one mixer, got none$"):
        RandomChoice([])
    for wrong, got in ((nn.Identity(), "Identity"), (MixUp, "the class MixUp")):
        message = rf"^expected Mixer modules without a sample or forward of their own, got {got}; "
        with pytest.raises(TypeError, match=message):
            RandomChoice([MixUp(), wrong])  # type: ignore[list-item]


def test_a_choice_has_no_alpha_to_set_in_vain() -> None:
    choice = RandomChoice([MixUp(), CutMix()])
    with pytest.raises(AttributeError, match=r"^a RandomChoice has no alpha, got 0; .*choice\.mixers\[0\]\.alpha$"):
        choice.alpha = 0
    assert not hasattr(choice, "alpha")


@pytest.mark.parametrize(
    "weights", ((1.0,), (0.2, 0.3, 0.5), (0, 0), (0.5, -0.5), (math.inf, 1), (math.nan, 1), 0.5, (1e308, 1e308))
)
def test_the_weights_of_a_choice_out_of_range(weights: Any) -> None:
    choice = RandomChoice([MixUp(), CutMix()])
    message = "^expected weights to be 2 numbers >= 0, one for each mixer and not all of them 0, got "
    with pytest.raises(ValueError, match=message):
        choice.weights = weights
    assert choice.weights == (1.0, 1.0)
    with pytest.raises(TypeError, match="^expected p to be the probability of mixing, got .* as weights$"):
        RandomChoice([MixUp(), CutMix()], p=[0.5, 0.5])  # type: ignore[arg-type]  # as torchvision has it
    with pytest.raises(TypeError, match="^expected weights to be a number, got str$"):
        RandomChoice([MixUp()], ("1",))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", (1.0, 0.5))
def test_a_lam_that_is_a_number_of_the_host_is_refused(p: float) -> None:
    class Quarter(Mixer):
        def sample_lam(self, input: Tensor) -> Tensor:  # noqa: ARG002
            return 0.25  # type: ignore[return-value]

    for mixer in (Quarter(p=p), RandomChoice([Quarter(p=p)])):
        with pytest.raises(
            TypeError, match="^expected sample_lam to return a tensor, got a float from Quarter; as in "
        ):
            mixer(IMAGES)


@each_mixer
def test_input_must_be_a_batch_of_floats(make: Make) -> None:
    mixer = make()
    with pytest.raises(TypeError, match="^expected input to be a tensor, got list$"):
        mixer([1.0])
    with pytest.raises(ValueError, match="^expected input to have a batch dimension, "):
        mixer(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^expected a floating-point input, got torch.uint8; scale images first"):
        mixer(torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="MixUpCriterion"):
        mixer(IMAGES, LABELS)


@each_mixer
def test_the_share_is_the_weight_of_the_original_in_each_sample(make: Make) -> None:
    for size in (8, 1):
        mix = make().sample(IMAGES[:size])
        expected = torch.stack([lam for _, _, lam in reference.pairs(mix)])
        assert mix.share.shape in ((), (size,))
        torch.testing.assert_close(mix.share.expand(size).double(), expected)


@pytest.mark.parametrize("shape", ((4,), (4, 3), (4, 3, 2, 2, 2, 2)))
def test_cutmix_needs_positions(shape: tuple[int, ...]) -> None:
    for mixer in (CutMix(), RandomChoice([MixUp(), CutMix()])):
        message = r"^expected inputs of shape \(B, C, \*spatial\) .* CutMix needs positions, MixUp does not$"
        with pytest.raises(ValueError, match=message):
            mixer(torch.randn(shape))
