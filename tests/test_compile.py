"""torch.compile as a promise: one graph, no kernel added, no recompilation, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils.checkpoint import checkpoint

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mixup, mixup_batch
from mixup_nn.sampling import sample_beta, sample_mix

from .test_sampling import assert_beta

CLASSES = 10  # from 8 on Inductor does not unroll a row of logits
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "per_sample": {"per_sample": True},
    "p": {"p": 0.5},
    "per_sample_p": {"per_sample": True, "p": 0.5},
    "alpha_zero": {"alpha": 0.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
static_and_dynamic = pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **options)


# The same numbers, on the same draw


@static_and_dynamic
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_module_equals_eager_on_its_draw(dynamic: bool, dtype: torch.dtype) -> None:
    mixups = [MixUp(), MixUp(per_sample=True, p=0.5)]  # a compiled draw always has the gate of p and of alpha = 0
    input = torch.randn(6, 3, 4, 4).to(dtype)
    step = compiled(lambda input: [module(input) for module in mixups], dynamic=dynamic)
    draws = []
    for _ in range(3):
        for module, output in zip(mixups, step(input), strict=True):
            assert module.last_mix is not None
            assert output.dtype == dtype
            expected = mixup(input, module.last_mix)
            torch.testing.assert_close(output, expected, atol=2 * torch.finfo(dtype).eps * 4, rtol=0)
            draws.append(tuple(module.last_mix.index.tolist()))
    assert len(set(draws)) > len(mixups)


def test_whole_step_equals_eager_on_its_draw_with_gradients() -> None:
    mixups, net, loss = [MixUp(), MixUp(per_sample=True, p=0.5)], nn.Linear(3, CLASSES), nn.CrossEntropyLoss()
    criteria = [MixUpCriterion(loss, module) for module in mixups]
    input, target = torch.randn(6, 3), torch.randint(CLASSES, (6,))

    def step(input: Tensor, target: Tensor) -> list[Tensor]:
        return [
            criterion(nn.Sequential(module, net)(input), target)
            for module, criterion in zip(mixups, criteria, strict=True)
        ]

    losses = compiled(step, dynamic=True)(input, target)
    expected = []
    for module, criterion in zip(mixups, criteria, strict=True):
        assert module.last_mix is not None
        expected.append(criterion(net(mixup(input, module.last_mix)), target, module.last_mix))
    torch.testing.assert_close(losses, expected)
    gradients = [torch.autograd.grad(torch.stack(values).sum(), net.weight)[0] for values in (losses, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, from any compiled loss of a model
def test_model_and_criterion_compiled_apart_share_the_draw() -> None:
    module, net = MixUp(1.0), nn.Linear(3, CLASSES)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    model, loss_of = compiled(nn.Sequential(module, net)), compiled(criterion)
    input, target = torch.randn(6, 3), torch.randint(CLASSES, (6,))
    for _ in range(3):
        output = model(input)
        torch.testing.assert_close(loss_of(output, target), criterion(output, target))
    module.eval()
    torch.testing.assert_close(loss_of(model(input), target), F.cross_entropy(net(input), target))


WEIGHT = torch.linspace(0.5, 2, CLASSES)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "weighted": lambda: nn.CrossEntropyLoss(WEIGHT),
    "ignoring": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "smoothed": lambda: nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.1),
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "none": lambda: nn.CrossEntropyLoss(reduction="none"),
    "nll": nn.NLLLoss,
    "bce": nn.BCEWithLogitsLoss,
    "bce_pos_weight": lambda: nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    "mse": nn.MSELoss,
    "huber_sum": lambda: nn.HuberLoss(reduction="sum"),
}


@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
@pytest.mark.parametrize("indices", (False, True), ids=("dense", "indices"))
def test_criterion_equals_eager_for_every_kind_of_loss(indices: bool, per_sample: bool) -> None:
    if per_sample and not indices and torch.__version__ < "2.12":
        pytest.skip("before torch 2.12 Dynamo does not trace the copy of a loss that is taken without reduction")
    losses = [make() for make in LOSSES.values()]
    losses = [loss for loss in losses if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) == indices]
    dense = losses[:2] if indices else losses  # torch takes no dense targets with ignore_index >= 0 or NLLLoss
    criteria = [MixUpCriterion(loss, interpolate_loss=True) for loss in losses]
    criteria += [MixUpCriterion(loss, interpolate_loss=False) for loss in dense]
    input = torch.randn(6, CLASSES)
    target = torch.randint(CLASSES, (6,)) if indices else torch.rand(6, CLASSES)
    mix = sample_mix(6, 1.0, per_sample=per_sample)

    def every(input: Tensor, target: Tensor, mix: Mix) -> list[Tensor]:
        return [criterion(input, target, mix) for criterion in criteria]

    torch.testing.assert_close(compiled(every)(input, target, mix), every(input, target, mix))


def test_functional_form_in_one_graph() -> None:
    def step(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mixup_batch(X, y, alpha=0.2)

    input = torch.randn(6, 3)
    mixed, permuted, mixing = compiled(step)(input, input)
    torch.testing.assert_close(mixed, (1 - mixing) * input + mixing * permuted)


def test_inside_a_checkpointed_block_a_given_mix_is_one_graph() -> None:
    module, layer = MixUp(1.0), nn.Linear(3, 3)

    def step(input: Tensor) -> Tensor:
        mix = module.sample(input)  # outside: what is checkpointed in a graph may not set last_mix
        module.last_mix = mix
        output: Tensor = checkpoint(lambda x: module(layer(x), mix).tanh(), input, use_reentrant=False)
        return output

    input = torch.randn(6, 3)
    output = compiled(step)(input)
    gradient = torch.autograd.grad(output.sum(), layer.weight)[0]
    assert module.last_mix is not None
    expected = mixup(layer(input), module.last_mix).tanh()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), layer.weight)[0])


def test_transforms_around_it_are_in_the_same_graph() -> None:
    module, counter = MixUp(1.0), CompileCounterWithBackend("inductor")
    step = compiled(nn.Sequential(nn.Hardtanh(), module, nn.LayerNorm(4)), backend=counter)
    input = torch.randn(6, 4)
    output = step(input)
    assert module.last_mix is not None
    torch.testing.assert_close(output, F.layer_norm(mixup(F.hardtanh(input), module.last_mix), (4,)))
    assert counter.frame_count == 1


# Draws


def test_compiled_draw_follows_the_exact_distribution() -> None:
    alphas = (0.001, 0.2, 1.0, 1000.0)
    draws = compiled(lambda: [sample_beta(alpha, (200_000,)) for alpha in alphas])()
    for alpha, lam in zip(alphas, draws, strict=True):
        assert_beta(lam, alpha)


def test_a_seed_reproduces_compiled_draws_and_each_step_draws_afresh() -> None:
    step = compiled(MixUp(1.0, per_sample=True))
    input = torch.randn(8, 3)
    torch.manual_seed(1)
    first, second = step(input), step(input)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(step(input), first)
    assert torch.equal(step(input), second)


# Graphs


class Counted:
    """Compile a function, and count its graphs."""

    def __init__(self, function: Callable[..., Any], backend: str = "eager", **options: Any) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.function = compiled(function, backend=self.counter, **options)

    def graphs_after(self, *args: Any) -> int:
        self.function(*args)
        return self.counter.frame_count


@each_option
def test_twelve_steps_are_one_graph(options: dict[str, Any]) -> None:
    module = MixUp(**options)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    step = Counted(lambda input, target: criterion(module(input), target))
    input, target = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))
    assert [step.graphs_after(input, target) for _ in range(12)] == [1] * 12


@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
def test_batch_sizes_cost_no_more_graphs_than_without_mixup(per_sample: bool) -> None:
    sizes = (8, 8, 7, 6, 5, 1, 2, 9)
    module, net, loss = MixUp(per_sample=per_sample), nn.Linear(3, CLASSES), nn.CrossEntropyLoss()
    criterion = MixUpCriterion(loss, module)
    counts = []
    for function in (lambda x, y: loss(net(x), y), lambda x, y: criterion(net(module(x)), y)):
        torch._dynamo.reset()
        step = Counted(function)
        counts.append([step.graphs_after(torch.randn(n, 3), torch.randint(CLASSES, (n,))) for n in sizes])
    assert counts[1] == counts[0]


def test_train_and_eval_settle_at_one_graph_each() -> None:
    module = MixUp()
    net = nn.Sequential(module, nn.Linear(3, CLASSES))
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    step = Counted(lambda x, y: criterion(net(x), y))
    input, target = torch.randn(6, 3), torch.randint(CLASSES, (6,))
    counts = []
    for _ in range(4):
        for training in (True, False):
            net.train(training)
            counts.append(step.graphs_after(input, target))
    assert counts == [1] + [2] * 7


@pytest.mark.parametrize(
    "values",
    ((1.0, 0.9, 0.5, 0.25, 0.0, 1.0), (0.0, 0.5, 1.0, 0), (0.5, 1, 0, 0.25)),
    ids=("falling", "rising", "mixed"),
)
@pytest.mark.parametrize("name", ("alpha", "p"))
@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
@pytest.mark.parametrize("dynamic", (None, True), ids=("automatic", "dynamic"))
def test_a_schedule_costs_at_most_one_more_graph(
    name: str, values: tuple[float, ...], per_sample: bool, dynamic: bool | None
) -> None:
    module = MixUp(8.0, per_sample=per_sample)
    step, input = Counted(module, dynamic=dynamic), torch.randn(6, 3)
    for value in values:
        setattr(module, name, value)
        assert step.graphs_after(input) <= 2
        outputs = [step.function(input) for _ in range(1 if value in (0, 1) else 40)]
        kept = sum(torch.equal(output, input) for output in outputs)
        if value == 0:
            assert kept == len(outputs)
        elif name == "alpha" or value == 1:
            assert kept == 0
        else:  # each sample kept with probability 1 - p; a wrong decision for all of 40 batches has one below 1e-4
            assert kept < len(outputs)


def test_inductor_takes_every_alpha_and_p_in_the_same_graphs() -> None:
    module = MixUp(8.0)
    step, input = Counted(module, "inductor"), torch.randn(6, 3)
    for alpha, p in ((8.0, 1.0), (1.0, 0.5), (0.5, 0.0), (0, 1), (2.0, 1.0)):
        module.alpha, module.p = alpha, p
        assert step.graphs_after(input) <= 3  # one more for alpha, one for p
        if 0 in (alpha, p):
            assert torch.equal(step.function(input), input)


# Kernels


def kernels(function: Callable[..., Any], *args: Any, backward: bool = False) -> int:
    torch._dynamo.reset()
    metrics.reset()
    with fresh_cache():  # a cached graph would generate none
        output = compiled(function)(*args)
        if backward:
            output.sum().backward()
    assert metrics.generated_kernel_count > 0
    return metrics.generated_kernel_count


def normalize(input: Tensor) -> Tensor:
    return (input - 0.5) / 0.25


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
def test_normalize_mix_and_activate_are_one_kernel(per_sample: bool, dtype: torch.dtype) -> None:
    module, input = MixUp(), torch.randn(6, 3, 8, 8).to(dtype)
    mix = sample_mix(6, per_sample=per_sample)
    assert kernels(lambda input, mix: F.relu(module(normalize(input), mix)), input, mix) == 1


@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
def test_elementwise_work_around_a_drawing_module_adds_no_kernel(per_sample: bool) -> None:
    module, input = MixUp(p=0.5, per_sample=per_sample), torch.randn(6, 3, 8, 8)
    assert kernels(lambda input: F.relu(module(normalize(input))), input) == kernels(module, input)


@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
@pytest.mark.parametrize("name", ("cross_entropy", "weighted", "smoothed", "none"))
def test_criterion_is_one_log_softmax_in_the_graph(name: str, per_sample: bool) -> None:
    step = Counted(MixUpCriterion(LOSSES[name]()))
    input, target = torch.randn(64, CLASSES), torch.randint(CLASSES, (64,))
    assert step.graphs_after(input, target, sample_mix(64, per_sample=per_sample)) == 1
    called = [getattr(node.target, "__name__", "") for node in step.counter.graphs[0].graph.nodes]
    assert [name for name in called if name in ("log_softmax", "cross_entropy")] == ["log_softmax"]


@cache
def loops_of_the_plain_loss(name: str) -> int:
    input, target = torch.randn(64, CLASSES, requires_grad=True), torch.randint(CLASSES, (64,))
    return kernels(LOSSES[name](), input, target, backward=True)


@pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))
@pytest.mark.parametrize("name", ("cross_entropy", "weighted", "smoothed"))
def test_criterion_is_one_kernel_forward_and_one_backward(name: str, per_sample: bool) -> None:
    input, target = torch.randn(64, CLASSES, requires_grad=True), torch.randint(CLASSES, (64,))
    criterion, mix = MixUpCriterion(LOSSES[name]()), sample_mix(64, per_sample=per_sample)
    loops, code = run_and_get_code(lambda: kernels(criterion, input, target, mix, backward=True))
    assert [source.count('extern "C"') for source in code] == [1, 1]
    if name != "smoothed" and torch.__version__ >= "2.13":  # an older Inductor writes a loop or two more
        assert loops <= loops_of_the_plain_loss(name)


# Export


@pytest.mark.parametrize("strict", (True, False))
def test_export_of_the_eval_model_is_the_model_without_it(strict: bool) -> None:
    net = nn.Linear(3, CLASSES)
    model = nn.Sequential(MixUp(), net).eval()
    input = torch.randn(2, 3)
    exported = torch.export.export(model, (input,), strict=strict).module()
    torch.testing.assert_close(exported(input), net(input))


@pytest.mark.skipif(torch.__version__ < "2.10", reason="before torch 2.10 export does not put last_mix back")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # last_mix, not kept
@pytest.mark.filterwarnings("ignore:The tensor attributes self.0.last_mix:UserWarning")  # torch puts them back
@pytest.mark.parametrize("drawn_before", (False, True))
@pytest.mark.parametrize("strict", (True, False))
def test_export_in_training_mode_draws_at_each_call_and_leaves_last_mix_alone(strict: bool, drawn_before: bool) -> None:
    module, input = MixUp(1.0), torch.eye(4)
    if drawn_before:
        module(input)
    before = repr(module.last_mix)
    program = torch.export.export(nn.Sequential(module, nn.Identity()), (input,), strict=strict).module()
    assert repr(module.last_mix) == before  # no fake tensor
    first, second = program(input), program(input)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(0), torch.ones(4))


# CUDA graphs


@pytest.mark.cuda
@each_option
def test_cuda_graphs_replay_with_a_fresh_draw_each_step(options: dict[str, Any]) -> None:
    module = MixUp(**{"alpha": 1.0, **options}).cuda()
    net, loss = nn.Linear(3, CLASSES).cuda(), nn.CrossEntropyLoss()
    criterion = MixUpCriterion(loss, module)
    step = compiled(lambda x, y: criterion(net(module(x)), y), mode="reduce-overhead")
    input, target = torch.randn(8, 3, device="cuda"), torch.randint(CLASSES, (8,), device="cuda")
    indices = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        value = step(input, target)
        value.backward()
        assert module.last_mix is not None
        mix = Mix(*(tensor.clone() for tensor in module.last_mix))
        torch.testing.assert_close(value, criterion(net(mixup(input, mix)), target, mix))
        indices.append(tuple(mix.index.tolist()))
    assert len(set(indices)) > 1


@pytest.mark.cuda
def test_nothing_synchronises_with_the_host() -> None:
    module = MixUp(per_sample=True, p=0.5)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), module)
    input, target = torch.randn(8, CLASSES, device="cuda"), torch.randint(CLASSES, (8,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(module(input), target)
        mixup_batch(input, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
