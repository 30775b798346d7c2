"""What Inductor writes: mixing fuses with its neighbours, the criterion adds no kernel, CUDA graphs are captured."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_inputs
from mixup_nn.sampling import sample_cutmix, sample_mixup

from .cases import applied, each_mixer, lams_of
from .compiled import CLASSES, Counted, Steps, batch, classifier, compiled, images
from .versions import FEWEST_LOOPS

# One process has all that uses Inductor: its first compilation takes as long as several more.
pytestmark = [pytest.mark.usefixtures("fresh_compiler"), pytest.mark.xdist_group("inductor")]

LAMS = lams_of(8, 8)
WEIGHT = torch.linspace(0.5, 2, CLASSES)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "weighted": lambda: nn.CrossEntropyLoss(WEIGHT),
    "smoothed": lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "none": lambda: nn.CrossEntropyLoss(ignore_index=1, reduction="none"),
}
DRAW_AND_MIX = 3  # functions: the uniform numbers, their order, the mix
LAUNCH = re.compile(r"^ +(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)


class Code(NamedTuple):
    """What Inductor wrote: the functions that each graph launches, and the loops in all of them."""

    launches: list[int]
    loops: int


def inductor_code(function: Callable[..., Any], *args: Any, backward: bool = False) -> Code:
    torch._dynamo.reset()
    metrics.reset()

    def run() -> None:
        output = compiled(function)(*args)
        if backward:
            torch.autograd.backward(output)

    with fresh_cache():  # a cached graph would generate none
        _, sources = run_and_get_code(run)
    assert metrics.generated_kernel_count > 0
    return Code([len(LAUNCH.findall(source)) for source in sources], metrics.generated_kernel_count)


def normalize(input: Tensor) -> Tensor:
    return (input - 0.5) / 0.25


# The mixers


@pytest.mark.parametrize("name", ("per_batch", "per_sample_and_position"))
def test_normalize_mix_and_activate_are_one_kernel(name: str) -> None:
    mix, half = LAMS[name], name.startswith("per_sample")
    dtype, layout = ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last))[half]
    mixer, input = MixUp(), torch.randn(4, 3, 8, 8).to(dtype, memory_format=layout)
    assert inductor_code(lambda input, mix: F.relu(mixer(normalize(input), mix)), input, mix) == ([1], 1)


def test_a_step_with_a_choice_launches_three_functions_more_than_one_without() -> None:
    mixer, head, loss = RandomChoice([MixUp(), CutMix()]), classifier(), nn.CrossEntropyLoss()
    criterion, arguments = MixUpCriterion(loss, mixer), images()
    plain = inductor_code(lambda x, y: loss(head(F.relu(normalize(x))), y), *arguments, backward=True).launches
    step = inductor_code(lambda x, y: criterion(head(F.relu(mixer(normalize(x)))), y), *arguments, backward=True)
    assert len(step.launches) == len(plain) == 2
    assert step.launches[0] <= plain[0] + DRAW_AND_MIX
    assert step.launches[1] <= plain[1]


def test_inductor_computes_the_formula_on_its_draw() -> None:
    model, (input, target) = Steps("choice_per_sample"), batch()
    input = input.to(memory_format=torch.channels_last)
    model.assert_formula(compiled(model)(input, target), input, target)


# The criterion


def test_the_criterion_is_one_log_softmax_in_the_graph_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixup_nn._losses.LARGE", 0)
    criteria = [MixUpCriterion(loss()) for loss in LOSSES.values()]
    mixes = list(LAMS.values())

    def every(inputs: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        pairs = list(zip(inputs, targets, strict=True))
        return [criterion(*pair, mix) for criterion in criteria for mix in mixes for pair in pairs]

    sizes: tuple[tuple[int, ...], ...] = (), (8, 8)
    step = Counted(every)
    inputs, targets = [torch.randn(4, CLASSES, *s) for s in sizes], [torch.randint(CLASSES, (4, *s)) for s in sizes]
    losses = step.function(inputs, targets)
    nodes = step.counter.graphs[0].graph.nodes
    called = [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]
    found = [name for name in called if name in ("log_softmax", "softmax", "cross_entropy", "gather")]
    assert found == ["log_softmax"] * len(losses)


@pytest.mark.parametrize("name, per_sample", (("cross_entropy", False), ("weighted", True)))
def test_the_criterion_adds_no_kernel_and_no_loop(name: str, per_sample: bool) -> None:
    input, target = torch.randn(64, CLASSES, requires_grad=True), torch.randint(CLASSES, (64,))
    mix, loss = sample_mixup(64, per_sample=per_sample), LOSSES[name]()
    code = inductor_code(MixUpCriterion(loss), input, target, mix, backward=True)
    assert code.launches == [1, 1]
    assert not FEWEST_LOOPS or code.loops <= inductor_code(loss, input, target, backward=True).loops


def test_smoothing_and_a_lam_per_position_are_one_kernel_forward_and_one_backward() -> None:
    criteria = [MixUpCriterion(LOSSES[name]()) for name in ("weighted", "smoothed")]
    mixes = [sample_cutmix((64, 3, 8, 8), per_sample=True), sample_mixup(64)]
    inputs = [torch.randn(64, CLASSES, 8, 8, requires_grad=True) for _ in range(4)]

    def step(inputs: list[Tensor], target: Tensor, mixes: list[Mix]) -> list[Tensor]:
        pairs = [(criterion, mix) for criterion in criteria for mix in mixes]
        return [criterion(input, target, mix) for (criterion, mix), input in zip(pairs, inputs, strict=True)]

    code = inductor_code(step, inputs, torch.randint(CLASSES, (64, 8, 8)), mixes, backward=True)
    assert code.launches == [1, 1]


# CUDA graphs


@pytest.mark.cuda
@each_mixer
def test_cuda_graphs_replay_with_a_fresh_draw_each_step(make: Callable[[], Mixer]) -> None:
    mixer, head, (input, target) = make(), classifier().cuda(), images(8, device="cuda")
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    step = compiled(lambda x, y: criterion(head(mixer(x)), y), mode="reduce-overhead")
    partners = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        loss = step(input, target)
        loss.backward()
        mix = Mix(*(tensor.clone() for tensor in applied(mixer)))
        torch.testing.assert_close(loss, criterion(head(mix_inputs(input, mix)), target, mix))
        partners.append(tuple(mix.index.tolist()))
    assert len(set(partners)) > 1


@pytest.mark.cuda
@each_mixer
def test_a_graph_captured_by_hand_draws_afresh_at_each_replay(make: Callable[[], Mixer]) -> None:
    mixer, head, (input, target) = make(), classifier().cuda(), images(8, device="cuda")
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what initialises on the first call cannot be captured
        criterion(head(mixer(input)), target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(head(mixer(input)), target)
    mix, draws = applied(mixer), set()
    for _ in range(6):
        graph.replay()
        torch.testing.assert_close(loss, criterion(head(mix_inputs(input, mix)), target, mix))
        draws.add((tuple(mix.index.tolist()), mix.lam.mean().item()))
    assert len(draws) > 1
