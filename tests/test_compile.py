"""torch.compile as a promise: one graph, the numbers of eager mode, no more graphs than the plain model has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import combinations
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn._mix import target_mix
from mixup_nn.functional import mix_inputs, mix_targets, mixup_batch

from .cases import MIXERS, applied, each_mixer, through_pickle
from .compiled import CLASSES, Counted, Parts, Steps, batch, classifier, compiled, images, mixers_of
from .strategies import KINDS, LAYOUTS, Program, programs
from .versions import COPIES_OF_A_LOSS, MESSAGES, PROPERTIES_OF_A_MIX, UNKNOWN_SIZES

pytestmark = pytest.mark.usefixtures("fresh_compiler")
each_size = pytest.mark.parametrize("dynamic", (None, True), ids=("static", "dynamic"))


# Whole programs of the strategy with a mixer: the numbers of eager mode, on the same draw

ROLES = "drawn", "given", "given in eval mode", "criterion in eval mode", "mixer in eval mode"
DTYPES = torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    program: Program
    role: str
    autocast: bool
    layout: str

    def pairs(self) -> set[Any]:
        program, lam, (target, *parts) = self.program, self.program.mix.lam, tree_leaves(self.program.target)
        floating, of_kind = target.is_floating_point(), (program.kind.module, program.form, program.interpolate_loss)
        shapes = min(lam.ndim, 2), lam.shape[:1] == target.shape[:1], program.output.ndim, len(target) == 1, len(parts)
        values = floating, target.ndim, program.output.dtype, not floating and bool((target < 0).any())
        options = [(k, v if isinstance(v, (bool, str)) else "set") for k, v in program.options.items()]
        return {*combinations((*enumerate((*of_kind, *shapes, *values, *self[1:])), *options), 2)}


@cache
def cases() -> list[Case]:
    """So chosen that as many pairs of options meet as in so few can: greedy."""
    pool: list[Case] = []

    def collect(program: Program) -> None:
        i, known = len(pool), program.output.dtype in (torch.float32, torch.float64)
        try:
            MixUpCriterion(program.loss(), interpolate_loss=program.interpolate_loss)(*program[3:6]).sum()
        except (RuntimeError, NotImplementedError):
            assert not known  # of some losses torch has no other on a CPU
            return
        pool.append(Case(program, ROLES[i % 5], i % 4 == 0, ("contiguous", "channels_last", "strided")[i % 3]))

    for share, kinds in ((5, KINDS), (3, [kind for kind in KINDS if kind.module is nn.CrossEntropyLoss])):
        of_kinds = given(programs(dtypes=DTYPES, kinds=kinds))(collect)
        settings(max_examples=share * settings().max_examples, phases=[Phase.generate], database=None)(of_kinds)()
    random, chosen, left = Random(0), [], {i: case.pairs() for i, case in enumerate(pool)}
    for _ in range(settings().max_examples):
        best = max(random.sample(sorted(left), 60), key=lambda i: len(left[i]))
        seen = left.pop(best)
        left = {i: pairs - seen for i, pairs in left.items()}
        chosen.append(pool[best])
    return chosen


def leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


class Whole(nn.Module):
    """A mixer, and a criterion on the output of the program."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, (kind, *_, output, target, mix, mode, _) = case, case.program
        labels = tree_leaves(target)[0]
        of_positions = mix.lam.ndim > 2 and target_mix(labels, mix).lam.ndim > 2
        sizes = labels.shape[2 - mix.lam.ndim :] if of_positions and case.role == "drawn" else mix.lam.shape[2:]
        own: dict[str, Any] = {"per_sample": mix.lam.shape[:1] == labels.shape[:1]}
        self.mixer: Mixer = MixUp(1.0, **own)
        if sizes:
            self.mixer = RandomChoice([CutMix(1.0, **own, spatial_dims=len(sizes)), MixUp(1.0)], **own)
        linked = None if case.role.startswith("given") else self.mixer
        self.criterion = MixUpCriterion(case.program.loss(), linked, interpolate_loss=mode)
        self.train(case.role != "given in eval mode")
        for name in ("mixer", "criterion"):
            if case.role == f"{name} in eval mode":
                getattr(self, name).eval()
        input = LAYOUTS[case.layout](torch.randn(len(labels), 2, *sizes, dtype=output.dtype))
        lam = leaf(mix.lam)
        if not kind.grad_of_target and labels.is_floating_point():
            lam = lam.detach()  # its gradient would reach the target
        target = tree_map(leaf, target) if kind.grad_of_target else target
        self.arguments = leaf(input), leaf(output), target, Mix(lam, mix.index)

    def forward(self, input: Tensor, output: Tensor, target: Any, mix: Mix) -> tuple[Tensor, Tensor]:
        given = () if self.criterion.mixer else (mix,)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
            return self.mixer(input, *given), self.criterion(output, target, *given)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The same in eager mode, with the mix that the compiled program drew or was given."""
        input, output, target, mix = self.arguments
        of_input = self.mixer.last_mix if self.criterion.mixer else mix
        of_loss = of_input if self.criterion.training or not self.criterion.mixer else None
        plain = MixUpCriterion(self.case.program.loss(), interpolate_loss=self.criterion.interpolate_loss)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
            return input if of_input is None else mix_inputs(input, of_input), plain(output, target, of_loss)

    def gradients(self, values: tuple[Tensor, Tensor]) -> list[Tensor]:
        leaves = [value for value in tree_leaves(self.arguments) if value.requires_grad]
        weighed = [(v.double() * torch.linspace(1, 2, v.numel()).view(v.shape)).sum() for v in values]
        return list(torch.autograd.grad(weighed, leaves, materialize_grads=True, retain_graph=True))


def assert_compiled_as_eager(chosen: list[Case], backend: str, **options: Any) -> None:
    wholes = [Whole(case) for case in chosen]

    def every(arguments: list[Any]) -> list[tuple[Tensor, Tensor]]:
        return [whole(*each) for whole, each in zip(wholes, arguments, strict=True)]

    results = compiled(every, backend=backend, **options)([whole.arguments for whole in wholes])
    for whole, result in zip(wholes, results, strict=True):
        values, eps = whole.expected(), torch.finfo(whole.case.program.output.dtype).eps
        assert result[0].stride() == values[0].stride(), whole.case
        close: dict[str, Any] = {
            "rtol": 64 * eps,
            "atol": 64 * eps,
            "equal_nan": True,
            "msg": lambda text, case=whole.case: f"{text}\n{case}",
        }
        torch.testing.assert_close(result, values, **close)
        for got, value in zip(whole.gradients(result), whole.gradients(values), strict=True):
            scale = max(1.0, float(value.abs().nan_to_num().max()))
            torch.testing.assert_close(got / scale, value / scale, **close)


@COPIES_OF_A_LOSS.required
@pytest.mark.parametrize("part", range(3))
def test_whole_programs_are_as_in_eager_mode(part: int) -> None:
    assert_compiled_as_eager(cases()[part::3], "eager")


@COPIES_OF_A_LOSS.required
def test_whole_programs_of_any_size_are_as_in_eager_mode() -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # each loss of a graph has a backward of its own
        chosen = [case for case in cases() if case.program.kind.module is not nn.MultiLabelMarginLoss]  # wrong there
        assert_compiled_as_eager(chosen[::15], "aot_eager", dynamic=True)


# In programs


@each_size
def test_targets_and_their_parts_are_mixed_in_one_graph(dynamic: bool | None) -> None:
    model, (input, target) = Steps(*("mixup_per_sample", "choice") if dynamic else ()), batch()
    step = compiled(model, backend="aot_eager" if dynamic else "eager", dynamic=dynamic)
    for training in (True, False):
        model.train(training)
        results = step(input, target)
        assert all((mix is not None) == training for *_, mix in results)
        model.assert_formula(results, input, target)


def test_ignored_labels_made_dense_are_rows_of_zeros() -> None:
    criterion = MixUpCriterion(nn.BCEWithLogitsLoss(), interpolate_loss=False)
    output, target = torch.randn(6, CLASSES), torch.tensor([0, -100, 2, 3, -1, 5])
    step = compiled(lambda mix: criterion(output, target, mix), backend="eager")
    for mix in (MIXERS["mixup_per_sample"]().sample(output), None):
        torch.testing.assert_close(step(mix), criterion(output, target, mix))


def test_inside_checkpoints_and_torch_func_a_given_mix_is_one_graph() -> None:
    mixer, layer, head = RandomChoice([MixUp(), CutMix()]), nn.Conv2d(3, 3, 1), classifier()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)

    def step(input: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        mix = mixer.sample(input)
        mixer.last_mix = mix  # outside: what is checkpointed in a graph may have no side effects
        block = checkpoint(lambda x: mix_inputs(layer(x), mix).tanh(), input, use_reentrant=False)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(head, parameters, (mix_inputs(input, mix),))
            return criterion(output, target)  # type: ignore[no-any-return]

        return criterion(head(block), target), torch.func.grad(loss)(dict(head.named_parameters()))

    input, target = images()
    (loss, of_func), mix = compiled(step, backend="aot_eager")(input, target), applied(mixer)
    expected = criterion(head(mix_inputs(layer(input), mix).tanh()), target, mix)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, list(layer.parameters())) for value in (loss, expected)))
    other = criterion(head(mix_inputs(input, mix)), target, mix)
    torch.testing.assert_close(tuple(of_func.values()), torch.autograd.grad(other, list(head.parameters())))


def test_transforms_around_mixers_and_the_functional_form_are_in_the_same_graph() -> None:
    mixers, before, after = mixers_of(), nn.Hardtanh(), nn.LayerNorm(4)
    step = compiled(lambda x: ([after(mixer(before(x))) for mixer in mixers], mixup_batch(x, x)), backend="aot_eager")
    input, _ = images()
    outputs, (mixed, permuted, mixing) = step(input)
    torch.testing.assert_close(outputs, [after(mix_inputs(before(input), applied(mixer))) for mixer in mixers])
    torch.testing.assert_close(mixed, (1 - mixing) * input + mixing * permuted)


# Graphs


@each_size
def test_batch_sizes_and_modes_cost_the_graphs_of_the_plain_model(dynamic: bool | None) -> None:
    counts = []
    for names in (("cutmix_per_sample", "choice_per_sample"), ()):
        torch._dynamo.reset()
        model = Steps(*names)
        backend = "aot_eager" if dynamic else "eager"  # unknown sizes may be asked for in its tracing too
        step, graphs = Counted(model if names else model.plain, backend, dynamic=dynamic), []
        for training, sizes in ((True, (16, 16, 8, 2, 1)), (False, (16, 1)), (True, (8,))):
            model.train(training)
            graphs.append([step.graphs_after(*batch(size)) for size in sizes])
        counts.append(graphs)
    assert counts[0] == counts[1]


@UNKNOWN_SIZES.required
def test_a_batch_size_that_the_data_decide_is_one_graph() -> None:
    model, (input, target) = Steps("mixup", "mixup_per_sample", "cutmix", "choice"), batch(9)

    def chosen(kept: Tensor) -> tuple[Tensor, Parts]:
        return input[kept], tree_map(lambda part: part[kept], target)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = Counted(lambda kept: model(*chosen(kept)), "aot_eager")
        for size in (6, 2):
            kept = torch.arange(9) < size
            model.assert_formula(step.function(kept), *chosen(kept))
    assert step.counter.frame_count == 1


@PROPERTIES_OF_A_MIX.required
def test_user_code_reads_the_draw_and_its_share_in_training_mode_alone() -> None:
    mixers, (image, _), table = mixers_of(), images(), torch.randn(6, 5)

    def step(image: Tensor, table: Tensor) -> list[Any]:
        results = []
        for mixer in mixers:
            mixed, mix = mixer(image), mixer.last_mix
            results.append((mixed, table, None) if mix is None else (mixed, mix_targets(table, mix), mix.share))
        return results

    of_users = compiled(step, backend="eager")
    for _ in range(2):
        for result, mixer in zip(of_users(image, table), mixers, strict=True):
            mix = applied(mixer)
            share = mix.lam if mix.lam.ndim < 2 else mix.lam.mean() if len(mix.lam) == 1 else mix.lam.mean((1, 2, 3))
            torch.testing.assert_close(result, (mix_inputs(image, mix), mix_targets(table, mix), share))
        nn.ModuleList(mixers).eval()
        assert all(result[0] is image and result[1:] == (table, None) for result in of_users(image, table))
        nn.ModuleList(mixers).train()


# What may be replaced


@COPIES_OF_A_LOSS.required
def test_what_a_criterion_is_given_later_counts_from_the_next_call() -> None:
    mixers = mixers_of("mixup_per_sample", "cutmix")
    criterion = MixUpCriterion(nn.MSELoss(), mixers[0])

    def step(input: Tensor, output: Tensor, target: Tensor) -> Tensor:
        for mixer in mixers:
            mixer(input)
        return criterion(output, target)  # type: ignore[no-any-return]

    step, arguments = compiled(step, backend="eager"), (images()[0], torch.randn(6, CLASSES), torch.rand(6, CLASSES))
    changes = (
        (criterion, "interpolate_loss", True), (criterion.loss, "reduction", "sum"), (criterion, "mixer", mixers[1]),
        (criterion, "interpolate_loss", False), (criterion, "loss", nn.CrossEntropyLoss(label_smoothing=0.5)),
        (criterion, "loss", nn.L1Loss()), (criterion, "interpolate_loss", True),
    )  # fmt: skip
    for owner, name, value in ((criterion, "interpolate_loss", None), *changes):
        setattr(owner, name, value)
        result = step(*arguments)
        plain = MixUpCriterion(criterion.loss, interpolate_loss=criterion.interpolate_loss)
        torch.testing.assert_close(result, plain(*arguments[1:], applied(criterion.mixer or mixers[0])), msg=name)


def scheduled(mixers: nn.Module, name: str) -> list[Any]:
    """The mixers, and those in them, that have such an option of their own."""
    return [mixer for mixer in mixers.modules() if isinstance(mixer, Mixer) and hasattr(mixer, name)]


@pytest.mark.parametrize(
    ("dynamic", "values"),
    ((None, (1.0, 0.9, 0.5, 0.25, 0.0, 1.0)), (True, (0.0, 0.5, 1.0, 0))),
    ids=("falling", "rising"),
)
@pytest.mark.parametrize("name", ("alpha", "p"))
def test_a_schedule_costs_at_most_one_more_graph(name: str, values: tuple[float, ...], dynamic: bool | None) -> None:
    kinds: list[Mixer] = [kind(8.0, per_sample=own) for kind in (MixUp, CutMix) for own in (False, True)]
    mixers, (input, _) = nn.ModuleList([*kinds, RandomChoice([MixUp(8.0), CutMix(8.0)])]), images(size=8)
    step = Counted(lambda input: [mixer(input) for mixer in mixers], dynamic=dynamic)
    for graphs, value in zip((1, 2, 2, 2, 2, 2), values, strict=False):
        for mixer in scheduled(mixers, name):
            setattr(mixer, name, value)
        assert step.graphs_after(input) <= graphs
        for outputs in zip(*(step.function(input) for _ in range(30)), strict=True):
            kept = sum(torch.equal(output, input) for output in outputs)
            if value == 0:
                assert kept == len(outputs)
            elif name == "p" and value == 1:
                assert kept == 0
            else:  # of batches mixed with probability 1/4, all 30 are kept with one of 2e-4
                assert kept < len(outputs)


def test_new_weights_of_a_choice_are_those_of_the_next_call() -> None:
    mixer = RandomChoice([MixUp(8.0), CutMix(8.0)], (1, 0))
    step, (input, _) = compiled(mixer, backend="eager"), images(size=8)
    for weights, low, high in (((1, 0), 1, 1), ((0, 1), 2, 2), ((1, 1), 1, 2)):
        mixer.weights = weights
        values: list[int] = []
        for _ in range(20):
            step(input)
            values.append(applied(mixer).lam.unique().numel())
        assert (min(values), max(values)) == (low, high)


# Errors and copies


@pytest.mark.parametrize("fullgraph", (False, True), ids=("with_breaks", "fullgraph"))
def test_errors_are_those_of_eager_mode(fullgraph: bool) -> None:
    mixer, (input, _), output = CutMix(), images(), torch.randn(6, CLASSES)
    labels = torch.ones(6, CLASSES).long()
    linked = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    dense, plain = MixUpCriterion(nn.BCEWithLogitsLoss(), interpolate_loss=False), MixUpCriterion(nn.MSELoss())

    def assert_same(function: Callable[..., Any], *args: Any) -> None:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as eager:
            function(*args)
        torch._dynamo.reset()  # or sizes that differ from call to call have no numbers
        with pytest.raises(Exception) as raised:  # noqa: PT011  # older torch does not pass the message on
            torch.compile(function, fullgraph=fullgraph, backend="eager")(*args)
        assert raised.type is (Unsupported if fullgraph else eager.type)
        assert str(eager.value) in str(raised.value) or (fullgraph and not MESSAGES)

    assert_same(linked, output, labels[:, 0])  # nothing drawn
    assert_same(mixer, output)  # no positions
    mix = mixer.sample(input)
    mixer(input, mix)
    assert_same(mixer, input[..., :1], mix)
    assert_same(linked, output[:4], labels[:4, 0])  # another batch size
    with torch.no_grad():
        assert_same(linked, output, labels[:, 0])
    for drawn in (mix, None):  # in training, in validation
        assert_same(dense, output, labels, drawn)
    assert_same(plain, output, {"a": output, "b": output[:4]}, mix)
    assert_same(plain, output, {"a": [output]}, mix)
    assert_same(lambda x, y: MixUpCriterion(MixUpCriterion(nn.CrossEntropyLoss()))(x, y), output, labels)


def test_a_seed_reproduces_compiled_draws_and_each_step_draws_afresh() -> None:
    mixers, (input, _) = mixers_of(), images(8, size=16)
    step = Counted(lambda input: [mixer(input) for mixer in mixers], "aot_eager")
    torch.manual_seed(1)
    first, second = step.function(input), step.function(input)
    torch.manual_seed(1)
    torch.testing.assert_close([step.function(input) for _ in range(2)], [first, second], atol=0, rtol=0)
    assert step.counter.frame_count == 1
    for name, *outputs in zip(MIXERS, first, second, strict=True):
        assert not torch.equal(*outputs), name


@each_mixer
def test_compiled_in_place_it_draws_afresh_and_copies_of_it_have_a_mode_of_their_own(make: Callable[[], Mixer]) -> None:
    mixer, (input, _) = make(), images(8, size=16)  # so large that a box without a pixel is rare
    mixer.compile(backend="eager", fullgraph=True)
    outputs = [mixer(input) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], mix_inputs(input, applied(mixer)))
    copies: tuple[Callable[[Any], Any], ...] = copy.deepcopy, through_pickle, AveragedModel
    for copy_of in copies:
        twin, before = copy_of(mixer).eval(), applied(mixer)
        assert twin(input) is input
        assert not torch.equal(mixer(input), input)
        kept = applied(mixer)
        assert kept is not before
        assert not torch.equal(twin.train()(input), input)
        assert applied(mixer) is kept
