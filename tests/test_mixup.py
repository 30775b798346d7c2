"""The MixUp module: what it does in training, in eval, inside models and through the life of one."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mixup, mixup_batch
from mixup_nn.sampling import sample_mix


def test_training_mixes_with_the_draw_it_leaves_behind() -> None:
    module, input = MixUp(alpha=1.0), torch.randn(8, 3)
    output = module(input)
    assert module.last_mix is not None
    assert torch.equal(output, mixup(input, module.last_mix))
    assert not torch.equal(output, input)


def test_each_training_call_draws_afresh() -> None:
    module, input = MixUp(alpha=1.0), torch.randn(8, 3)
    module(input)
    first = module.last_mix
    module(input)
    assert first is not None
    assert module.last_mix is not None
    assert first.lam != module.last_mix.lam


def test_eval_returns_its_input_and_touches_nothing() -> None:
    module, input = MixUp().eval(), torch.randn(8, 3)
    state = torch.get_rng_state()
    assert module(input) is input
    assert module.last_mix is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", (True, False))
def test_a_given_mix_is_applied_and_not_kept(training: bool) -> None:
    module, input = MixUp().train(training), torch.randn(4, 3)
    mix = Mix(torch.tensor(0.25), torch.tensor([1, 2, 3, 0]))
    assert torch.equal(module(input, mix), mixup(input, mix))
    assert module.last_mix is None


def test_hyperparameters_reach_the_draw() -> None:
    input = torch.randn(64, 2)
    per_sample = MixUp(8.0, p=0.5, per_sample=True).sample(input)
    assert per_sample.lam.shape == (64,)
    assert 0 < (per_sample.lam == 1).sum() < 64
    assert MixUp(0.0).sample(input).lam == 1
    assert MixUp(1e6).sample(input).lam.sub(0.5).abs() < 0.01
    assert MixUp().alpha == 0.2
    torch.manual_seed(7)
    expected = sample_mix(64, 3.0, per_sample=True, p=0.7)
    torch.manual_seed(7)
    torch.testing.assert_close(MixUp(3.0, p=0.7, per_sample=True).sample(input), expected)


def test_a_schedule_changes_alpha_and_p_by_assignment() -> None:
    module, input = MixUp(alpha=1), torch.randn(4, 2)
    module.alpha = 0
    assert torch.equal(module(input), input)
    module.alpha, module.p = 1e6, 0
    assert torch.equal(module(input), input)
    module.p = 1
    assert not torch.equal(module(input), input)
    assert (type(module.alpha), type(module.p)) == (float, float)


def test_a_failed_call_leaves_last_mix_alone() -> None:
    module = MixUp()
    module(torch.randn(4))
    before = module.last_mix
    with pytest.raises(TypeError):
        module(torch.arange(4))
    assert module.last_mix is before


@pytest.mark.parametrize("batch_size", (0, 1, 5, 33))
@pytest.mark.parametrize("per_sample", (False, True))
def test_odd_last_single_and_empty_batches(batch_size: int, per_sample: bool) -> None:
    module, input = MixUp(1.0, per_sample=per_sample), torch.randn(batch_size, 3)
    output = module(input)
    assert output.shape == input.shape
    assert batch_size > 1 or torch.equal(output, input)


def test_runs_on_the_device_of_the_input(device: str) -> None:
    module = MixUp(per_sample=True, p=0.5)
    assert module(torch.randn(4, 2, device=device)).device.type == device
    assert module.last_mix is not None
    assert module.last_mix.index.device.type == device


# Anywhere in a model


def test_mixes_hidden_layers_and_embeddings() -> None:
    module, head = MixUp(1.0), nn.Linear(5, 3)
    tokens = torch.randint(10, (4, 7))
    model = nn.Sequential(nn.Embedding(10, 5), module, head)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    criterion(model(tokens).mean(1), torch.randint(3, (4,))).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_composes_with_transforms_before_and_after() -> None:
    class Normalize(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return (input - 0.5) / 0.25

    class RandomFlip(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.flip(-1) if self.training else input

    module, input = MixUp(1.0), torch.rand(6, 3, 4, 4)
    output = nn.Sequential(RandomFlip(), module, Normalize())(input)
    assert module.last_mix is not None
    torch.testing.assert_close(output, (mixup(input.flip(-1), module.last_mix) - 0.5) / 0.25)


def test_a_forward_pre_hook_adds_it_to_a_model_without_renaming_its_parameters() -> None:
    module, net = MixUp(1.0), nn.Linear(3, 2)
    names = list(net.state_dict())
    net.register_forward_pre_hook(lambda _, args: (module(*args),))
    input = torch.randn(4, 3)
    output = net(input)
    assert module.last_mix is not None
    torch.testing.assert_close(output, nn.functional.linear(mixup(input, module.last_mix), net.weight, net.bias))
    assert list(net.state_dict()) == names


# Stateless


def test_has_no_state() -> None:
    module = MixUp()
    module(torch.randn(4, 2))
    assert not module.state_dict()
    assert not list(module.parameters())
    assert not list(module.buffers())


def test_weights_load_into_a_model_with_and_without_it() -> None:
    plain, mixed = nn.Sequential(nn.Identity(), nn.Linear(3, 2)), nn.Sequential(MixUp(), nn.Linear(3, 2))
    mixed(torch.randn(4, 3))
    plain.load_state_dict(mixed.state_dict(), strict=True)
    mixed.load_state_dict(plain.state_dict(), strict=True)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, mixed.get_parameter(name))


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", (copy.copy, copy.deepcopy, through_pickle, through_torch_save))
def test_copies_in_the_middle_of_training_carry_no_draw_and_keep_working(copy_of: Callable[[Any], Any]) -> None:
    module = MixUp(0.7, p=0.9, per_sample=True)
    module(torch.randn(4, 2))
    kept = module.last_mix
    twin = copy_of(module)
    assert twin.last_mix is None
    assert module.last_mix is kept
    assert repr(twin) == repr(module) == "MixUp(alpha=0.7, p=0.9, per_sample=True)"
    twin(torch.randn(4, 2))
    assert twin.last_mix is not None
    assert module.last_mix is kept


def test_a_model_and_its_criterion_copied_together_stay_linked() -> None:
    module = MixUp()
    model = nn.Sequential(module, nn.Linear(2, 3))
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    model(torch.randn(4, 2))
    for twin, twin_criterion in (copy.deepcopy((model, criterion)), through_pickle((model, criterion))):
        assert twin_criterion.mixup is twin[0]
        twin_criterion(twin(torch.randn(4, 2)), torch.tensor([0, 1, 2, 0])).backward()


def test_ema_copies_follow_and_evaluate_without_mixing() -> None:
    model = nn.Sequential(MixUp(1.0), nn.Linear(3, 2))
    model(torch.randn(4, 3))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    input = torch.randn(4, 3)
    torch.testing.assert_close(ema.eval()(input), model.eval()(input))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing_recomputes_the_same_draw(use_reentrant: bool) -> None:
    module, layer = MixUp(1.0, per_sample=True), nn.Linear(3, 3)
    input = torch.randn(6, 3, requires_grad=True)
    output = checkpoint(lambda x: module(layer(x)).tanh(), input, use_reentrant=use_reentrant)
    assert module.last_mix is not None
    before = module.last_mix
    output.sum().backward()
    torch.testing.assert_close(module.last_mix, before)
    expected = torch.autograd.grad(mixup(layer(input), before).tanh().sum(), input)[0]
    torch.testing.assert_close(input.grad, expected)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpointed_backward_sets_last_mix_again(use_reentrant: bool) -> None:
    module = MixUp(1.0)
    input = torch.randn(6, 3, requires_grad=True)
    first = checkpoint(lambda x: module(x).tanh(), input, use_reentrant=use_reentrant)
    first_mix = module.last_mix
    module(torch.randn(6, 3))
    first.sum().backward()
    torch.testing.assert_close(module.last_mix, first_mix)  # documented: not that of the second forward


def test_two_modules_and_two_models_do_not_meet() -> None:
    first, second = MixUp(1.0), MixUp(1.0)
    criteria = [MixUpCriterion(nn.CrossEntropyLoss(), module) for module in (first, second)]
    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    outputs = [module(input) for module in (first, second)]
    for module, criterion, output in zip((first, second), criteria, outputs, strict=True):
        assert module.last_mix is not None
        assert torch.equal(criterion(output, target), criterion(output, target, module.last_mix))
    assert criteria[0](outputs[0], target) != criteria[1](outputs[0], target)


def test_gradient_accumulation_mixes_each_micro_batch_on_its_own() -> None:
    module, head = MixUp(1.0), nn.Linear(3, 2)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    expected = torch.zeros_like(head.weight)
    for _ in range(3):
        input, target = torch.randn(4, 3), torch.randint(2, (4,))
        output = head(module(input))
        assert module.last_mix is not None
        lam, index = module.last_mix
        loss = lam * nn.functional.cross_entropy(output, target)
        loss = loss + (1 - lam) * nn.functional.cross_entropy(output, target[index])
        expected += torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        criterion(output, target).backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_threads_with_their_own_modules_do_not_disturb_each_other() -> None:
    failures: list[str] = []

    def train() -> None:
        module = MixUp(1.0)
        for _ in range(50):
            input = torch.randn(8, 3)
            output = module(input)
            if module.last_mix is None or not torch.equal(output, mixup(input, module.last_mix)):
                failures.append("the draw left behind is not the draw applied")

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Other ways in which torch calls a module


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_mixes_in_the_dtype_of_its_input_and_keeps_that_of_the_loss(dtype: torch.dtype) -> None:
    module, layer, loss = MixUp(1.0, per_sample=True), nn.Linear(3, 3), nn.CrossEntropyLoss()
    target = torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", dtype):
        output = module(layer(torch.randn(4, 3)))
        logits = layer(output)
        mixed, plain = MixUpCriterion(loss, module)(logits, target), loss(logits, target)
    assert (output.dtype, mixed.dtype) == (dtype, plain.dtype)
    mixed.backward()
    assert layer.weight.grad is not None


def test_inference_mode() -> None:
    with torch.inference_mode():
        assert MixUp()(torch.randn(4, 2)).is_inference()


def test_meta_and_fake_tensors_keep_their_shape() -> None:
    module = MixUp()
    assert module(torch.empty(4, 3, device="meta")).shape == (4, 3)
    assert module.last_mix is not None
    assert module.last_mix.lam.is_meta
    assert module.last_mix.index.is_meta
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    assert criterion(torch.empty(4, 3, device="meta"), torch.empty(4, device="meta").long()).shape == ()
    with FakeTensorMode(), torch.autocast("cpu"):
        module.per_sample, module.p = True, 0.5
        assert module(torch.empty(4, 3)).shape == (4, 3)
        loss = criterion(torch.empty(4, 3).bfloat16(), torch.empty(4).long())
        assert (loss.shape, loss.dtype) == ((), torch.float32)


def test_functional_transforms_see_through_it() -> None:
    model = nn.Sequential(MixUp(1.0), nn.Linear(3, 1))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    input = torch.randn(4, 3)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (input,))
        return output.square().mean()

    torch.manual_seed(3)
    gradients = torch.func.grad(loss)(parameters)
    torch.manual_seed(3)
    model(input).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


slow_vmap = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # lerp_ has no rule of its own


@slow_vmap
@pytest.mark.parametrize("in_dims", ((0, None), (None, 0), (0, 0)), ids=("inputs", "mixes", "both"))
def test_vmap_over_inputs_and_mixes(in_dims: tuple[int | None, int | None]) -> None:
    inputs, drawn = torch.randn(3, 4, 2), [sample_mix(4, 1.0) for _ in range(3)]
    mixes = Mix(torch.stack([mix.lam for mix in drawn]), torch.stack([mix.index for mix in drawn]))
    each_input, each_mix = (dim == 0 for dim in in_dims)
    output = torch.func.vmap(mixup, in_dims)(inputs if each_input else inputs[0], mixes if each_mix else drawn[0])
    for i in range(3):
        expected = mixup(inputs[i if each_input else 0], drawn[i if each_mix else 0])
        torch.testing.assert_close(output[i], expected)


@slow_vmap
def test_vmap_draws_for_each_of_its_batches() -> None:
    output = torch.func.vmap(MixUp(1.0, p=0.9), randomness="different")(torch.eye(4).expand(3, 4, 4))
    assert (output[0] != output[1]).any()
    torch.testing.assert_close(output.sum((1, 2)), torch.full((3,), 4.0))


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


@pytest.mark.parametrize("alpha", (-1.0, math.nan, math.inf))
def test_alpha_out_of_range(alpha: float) -> None:
    message = f"^MixUp: expected alpha to be a finite number >= 0, got {alpha}$"
    with pytest.raises(ValueError, match=message):
        MixUp(alpha)
    module = MixUp()
    with pytest.raises(ValueError, match=message):
        module.alpha = alpha
    assert module.alpha == 0.2


@pytest.mark.parametrize("p", (-0.1, 1.1, math.nan))
def test_p_out_of_range(p: float) -> None:
    message = rf"^MixUp: expected p to be a probability in \[0, 1\], got {p}$"
    with pytest.raises(ValueError, match=message):
        MixUp(p=p)
    module = MixUp()
    with pytest.raises(ValueError, match=message):
        module.p = p
    assert module.p == 1


def test_alpha_and_p_must_be_numbers() -> None:
    with pytest.raises(TypeError, match="^MixUp: expected alpha to be a number, got str$"):
        MixUp("0.2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^MixUp: expected p to be a number, got Tensor$"):
        MixUp(p=torch.tensor(0.5))  # type: ignore[arg-type]


def test_alpha_and_p_may_be_numbers_of_numpy() -> None:
    module = MixUp(np.float32(0.5), p=np.float64(0.25))  # type: ignore[arg-type]
    assert (type(module.alpha), module.alpha, module.p) == (float, 0.5, 0.25)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        MixUp(0.2, 0.5)  # type: ignore[call-arg]


def test_input_must_be_a_batch_of_floats() -> None:
    with pytest.raises(TypeError, match="^MixUp: expected input to be a tensor, got list$"):
        MixUp()([1.0])
    with pytest.raises(ValueError, match="^MixUp: expected input to have a batch dimension, "):
        MixUp()(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^mixup: expected a floating-point input, got torch.uint8; .*input\.float"):
        MixUp()(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="MixUpCriterion"):
        MixUp()(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
