"""Whole programs against one oracle: any mix, layout, loss, option and target together, in values and gradients."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from mixup_nn import Mix, Mixer, MixUp, MixUpCriterion
from mixup_nn.functional import mix_inputs, mix_targets, mixup_batch
from mixup_nn.sampling import sample_mixup

from . import reference
from .cases import lams_of
from .reference import each_part
from .strategies import (
    EVERY_LAYOUT,
    FLOATING,
    FORMS,
    FUNCTIONS,
    KEPT,
    KIND,
    KINDS,
    PARTS,
    Kind,
    Program,
    batches,
    covering,
    large_logits,
    make_subclass,
    on_meta,
    programs,
    seeds,
    targets,
    trees,
)


def eps(*tensors: Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point())


def assert_close(ours: Tensor, expected: Tensor, eps: float, scale: float = 1) -> None:
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected.double(), rtol=64 * eps, atol=64 * eps * scale, equal_nan=True)


def leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum whose terms weigh differently, so that no swap of them goes unseen."""
    factors = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()].reshape(value.shape)
    found = torch.autograd.grad((value * factors).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True)]


def frozen(*values: Any) -> str:
    """All that a call must not modify, with versions, flags and strides."""
    found = tree_leaves(values)
    return repr([(v.tolist(), v._version, v.stride()) if isinstance(v, Tensor) else v for v in found])


# Inputs


def check_gradients(input: Tensor, mix: Mix) -> None:
    input, mix = leaf(input), Mix(leaf(mix.lam), mix.index)
    output, expected = mix_inputs(input, mix), reference.mixed(input, mix)
    assert_close(output, expected, eps(input, mix.lam))
    for ours, theirs in zip(*(gradients(v, [input, mix.lam]) for v in (output, expected)), strict=True):
        assert_close(ours, theirs, eps(input, mix.lam), 100)


@given(batches())
def test_inputs_are_the_formula_and_lie_between_their_sources(batch: tuple[Tensor, Mix]) -> None:
    """In every layout, under autocast and on meta."""
    input, mix = batch
    before = frozen(input, *mix)
    output = mix_inputs(input, mix)
    assert frozen(input, *mix) == before
    assert (output.shape, output.dtype) == (input.shape, input.dtype)
    assert output.numel() == 0 or output.data_ptr() != input.data_ptr()
    larger = torch.maximum(input.abs(), input[mix.index].abs()).double()
    bound = eps(input, mix.lam) * larger + torch.finfo(input.dtype).tiny
    assert ((output.double() - reference.mixed(input, mix)).abs() <= bound).all()
    assert (output >= torch.minimum(input, input[mix.index])).all()
    assert (output <= torch.maximum(input, input[mix.index])).all()
    assert torch.equal(output, mix_inputs(input.contiguous(), mix))
    with torch.autocast("cpu", torch.bfloat16):
        again = mix_inputs(input, mix)
    assert again.dtype == input.dtype
    assert torch.equal(again, output)
    meta = mix_inputs(input.to("meta"), on_meta(mix))
    assert (meta.shape, meta.dtype, meta.is_meta) == (output.shape, output.dtype, True)
    if len(input) and input.dtype in (torch.float32, torch.float64):
        check_gradients(input, mix)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("spatial", ((4,), (4, 4), (3, 5), (2, 4, 4), (2, 3, 5)), ids=str)
def test_inputs_of_every_layout_rank_and_lam_with_their_gradients(layout: str, spatial: tuple[int, ...]) -> None:
    """Sizes that repeat, and others; among them clips in channels_last with a map of each sample's own."""
    for channels, ones in ((4, 0), (3, 0), (3, 1), (1, len(spatial))):
        input = EVERY_LAYOUT[layout](torch.randn(4, channels, *spatial, dtype=torch.float64))
        for mix in lams_of(*[1] * ones, *spatial[ones:]).values():
            check_gradients(input, mix)
            assert layout not in KEPT or mix_inputs(input, mix).stride() == input.stride()


# Targets


@given(targets())
def test_targets_follow_the_rule_with_gradients(batch: tuple[Tensor, Mix]) -> None:
    target, mix = batch
    try:
        reference.of_target(target, mix)
    except ValueError:
        with pytest.raises(ValueError, match="^expected a target "):
            mix_targets(target, mix, 3)
        return
    floating, before = target.is_floating_point(), frozen(target, *mix)
    leaves = [leaf(mix.lam)] + ([leaf(target)] if floating else [])
    mix, target = Mix(leaves[0], mix.index), leaves[-1] if floating else target
    ours, expected = mix_targets(target, mix, 3), reference.mix_targets(target, mix, 3)
    assert frozen(target.detach(), mix.lam.detach(), mix.index) == before
    assert ours.dtype == (target.dtype if floating else mix.lam.dtype)
    assert_close(ours, expected, eps(target, mix.lam))
    for one, other in zip(*(gradients(v, leaves) for v in (ours, expected)), strict=True):
        assert_close(one, other, eps(target, mix.lam), 100)
    meta = mix_targets(target.to("meta"), on_meta(mix), 3)
    assert (meta.shape, meta.dtype) == (ours.shape, ours.dtype)


# The criterion


def run(program: Program, *, device: str = "cpu", mix: Mix | None = None) -> Tensor:
    mode = program.interpolate_loss
    criterion = MixUpCriterion(program.loss(device), interpolate_loss=mode)
    with large_logits(program.large):
        value: Tensor = criterion(program.output, program.target, program.mix if mix is None else mix)
    return value


def check_program(program: Program) -> None:
    lam, leaves = leaf(program.mix.lam), list[Tensor]()

    def with_gradient(part: Tensor) -> Tensor:
        leaves.append(leaf(part) if part.is_floating_point() else part)
        return leaves[-1]

    target = each_part(with_gradient, program.target) if program.kind.grad_of_target else program.target
    if not program.interpolates_loss and not program.kind.grad_of_target:
        lam.requires_grad_(False)  # would reach the target
    program = program._replace(output=leaf(program.output), target=target, mix=Mix(lam, program.mix.index))
    leaves = [value for value in (program.output, lam, *leaves) if value.requires_grad]
    before = frozen(program.output.detach(), each_part(Tensor.detach, target), lam.detach(), program.options)
    ours, expected = run(program), program.expected(program.output, program.target, program.mix)
    assert frozen(program.output.detach(), each_part(Tensor.detach, target), lam.detach(), program.options) == before
    precision = eps(program.output, lam)
    assert_close(ours, expected, precision, 10)
    if expected.isfinite().all():
        for one, other in zip(*(gradients(value, leaves) for value in (ours, expected)), strict=True):
            assert_close(one, other, precision, 100)


OF_INDICES = ("module", "module", "subclass", "doubled", "called", "hooked", "partial", *PARTS)


def test_every_three_options_of_cross_entropy_are_the_oracle_together() -> None:
    for program in covering((torch.float64,), ("CrossEntropyLoss",), OF_INDICES, 1000):
        check_program(program)


def test_one_lam_per_batch_keeps_both_denominators() -> None:
    """Of torch's two means, which differ where partners repeat: with class weights, or where some are ignored."""
    for program in covering((torch.float64,), ("CrossEntropyLoss",), OF_INDICES, 1000):
        size, options = len(program.labels), {**program.options, "reduction": "mean"}
        if program.of_indices and program.form not in PARTS:
            mix = Mix(torch.tensor(0.3, dtype=torch.float64), torch.full((size,), size - 1))
            check_program(program._replace(mix=mix, options=options))


def test_every_two_options_of_every_loss_are_the_oracle_together() -> None:
    for program in covering((torch.float64, torch.float32), tuple(KIND), FORMS, 300):
        check_program(program)


@given(programs(dtypes=(torch.float64, torch.float64, torch.float32)))
def test_losses_are_the_oracle_with_gradients(program: Program) -> None:
    check_program(program)


@given(programs(dtypes=FLOATING))
def test_losses_have_shape_and_dtype_of_the_plain_loss_and_on_meta(program: Program) -> None:
    criterion = MixUpCriterion(program.loss(), interpolate_loss=program.interpolate_loss)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                plain = criterion(program.output, program.target)
            except (RuntimeError, NotImplementedError):
                continue  # torch has no such loss in half precision
            value = run(program)
        assert (value.shape, value.dtype) == (plain.shape, plain.dtype)
        if autocast and program.output.dtype == torch.float32:
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(run(program)))
        elif not autocast:
            expected = program.expected(program.output, program.target, None)
            assert_close(plain, expected, eps(program.output), 10)
            expected = program.expected(program.output, program.target, program.mix)
            assert_close(value, expected, eps(program.output, program.mix.lam), 10)
            meta = run(program.moved(), device="meta")
            assert (meta.shape, meta.dtype) == (value.shape, value.dtype)


@given(programs(), st.booleans(), st.sampled_from(["made", "subclass", "replaced", "copied"]))
def test_a_linked_draw_is_the_one_passed(program: Program, training: bool, how: str) -> None:
    mixer: Any = (make_subclass(MixUp) if how == "subclass" else MixUp)()
    sizes = program.output.shape[2:] if program.mix.lam.ndim < 3 else program.mix.lam.shape[2:]
    mixer(torch.randn(len(program.output), 2, *sizes), program.mix)
    assert mixer.last_mix is program.mix
    kind = make_subclass(MixUpCriterion) if how == "subclass" else MixUpCriterion
    if how == "replaced":
        loss = program.loss()
        criterion = MixUpCriterion(nn.L1Loss() if isinstance(loss, nn.Module) else F.l1_loss, MixUp())
        criterion.loss, criterion.mixer, criterion.interpolate_loss = loss, mixer, program.interpolate_loss
    else:
        criterion = kind(program.loss(), mixer, interpolate_loss=program.interpolate_loss)
    criterion = (copy.copy(criterion) if how == "copied" else criterion).train(training)
    value = criterion(program.output, program.target)
    given = (program.output, program.target) + ((program.mix,) if training else ())
    expected = MixUpCriterion(program.loss(), interpolate_loss=program.interpolate_loss)(*given)
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "global")
of_modules = programs(forms=[form for form in FORMS if form not in ("compiled", *FUNCTIONS)])


@pytest.mark.parametrize("hook", HOOKS)
@settings(max_examples=settings().max_examples // 2)
@given(st.one_of(of_modules, programs(kinds=[KIND["CrossEntropyLoss"]], forms=["module", "subclass"])))
def test_hooks_of_the_loss_run_wherever_it_is_called(hook: str, program: Program) -> None:
    """Each kind alone: a loss that nothing else watches may take a shorter path."""
    loss, seen = program.loss(), list[type]()
    register = register_module_forward_hook if hook == "global" else getattr(loss, f"register_{hook}")
    with register(lambda module, *_: seen.append(type(module))):
        for mix in (program.mix, None):
            seen.clear()
            value = MixUpCriterion(loss, interpolate_loss=program.interpolate_loss)(
                leaf(program.output), program.target, mix
            )
            value.sum().backward()
            assert seen.count(type(loss)) == (1 if mix is None or not program.interpolates_loss else 2)
            assert_close(value, program.expected(program.output, program.target, mix), eps(program.mix.lam), 10)


# The losses of torch

OTHER_ARGUMENTS = {  # what these take instead of (input, target) or return instead of a tensor
    "CTCLoss", "CosineEmbeddingLoss", "GaussianNLLLoss", "MarginRankingLoss",
    "TripletMarginLoss", "TripletMarginWithDistanceLoss",
}  # fmt: skip


def test_no_loss_of_torch_is_left_out() -> None:
    public = {name for name in torch_losses.__all__ if inspect.isclass(getattr(nn, name)) and name != "NLLLoss2d"}
    assert {kind.module.__name__ for kind in KINDS} | OTHER_ARGUMENTS == public - {"LinearCrossEntropyLoss"}


@pytest.mark.parametrize("kind", KINDS, ids=[kind.module.__name__ for kind in KINDS])
def test_both_modes_agree_for_losses_linear_in_the_target_alone(kind: Kind) -> None:
    output, mix = kind.domain(torch.randn(4, 3)), sample_mixup(4, 1.0, per_sample=True)
    target = torch.tensor([0, 2, 1, 2]) if kind.target == "indices" else torch.rand(4, 3)
    if kind.hard:
        with pytest.raises(ValueError, match="interpolate_loss=True"):
            MixUpCriterion(kind.module(), interpolate_loss=False)
        return
    values = [
        MixUpCriterion(kind.module(reduction="sum"), interpolate_loss=mode)(output, target, mix)
        for mode in (True, False)
    ]
    assert torch.isclose(*values) == kind.linear


# mixup_batch


@given(batches(empty=False), seeds, st.sampled_from((0, 0.2, 8.0)), st.sampled_from((torch.float32, torch.bool)))
def test_mixup_batch_is_the_draw_of_sample_mixup(
    batch: tuple[Tensor, Mix], seed: int, alpha: float, dtype: torch.dtype
) -> None:
    input, target = batch[0], torch.randint(5, (len(batch[0]), 2)).to(dtype)
    torch.manual_seed(seed)
    mix = sample_mixup(len(input), alpha)
    torch.manual_seed(seed)
    mixed, permuted, mixing = mixup_batch(input, target, alpha)
    assert torch.equal(mixed, mix_inputs(input, mix))
    assert (permuted.dtype, permuted.tolist()) == (dtype, target[mix.index].tolist())
    assert torch.equal(mixing, 1 - mix.lam)


# Trees of choices


@given(trees(), seeds)
def test_a_choice_is_one_of_its_entries(tree: tuple[Mixer, set[float]], seed: int) -> None:
    mixer, possible = tree
    torch.manual_seed(seed)
    mix = mixer.sample(torch.randn(5, 2, 3, 2))
    whole = mix.lam.double().reshape(len(mix.lam) if mix.lam.ndim else 1, -1)
    assert set(whole.unique().float().tolist()) <= possible
    assert (whole == whole[:, :1]).all()
    assert torch.equal(mix.index.sort().values, torch.arange(5))
