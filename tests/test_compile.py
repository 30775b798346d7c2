"""torch.compile as a promise: one graph, no kernel added, no recompilation, the same numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_targets, mixup_batch
from mixup_nn.sampling import sample_cutmix, sample_mixup

from .cases import MIXERS, applied, each_mixer, every_lam, lams_of, through_pickle
from .versions import COPIES_OF_A_LOSS, EXPORT_RESTORES, FEWEST_LOOPS, MESSAGES, PROPERTIES_OF_A_MIX, UNKNOWN_SIZES

CLASSES = 10  # from 8 on Inductor does not unroll a row of logits
LAMS = lams_of(8, 8)
each_lam = every_lam(8, 8)
each_target = pytest.mark.parametrize("sizes", ((), (8, 8)), ids=("targets_of_samples", "targets_of_positions"))
strict_and_not = pytest.mark.parametrize("strict", (True, False), ids=("strict", "not_strict"))


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **options)


def images(batch_size: int = 6, size: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, size, size, device=device), torch.randint(CLASSES, (batch_size,), device=device)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))


class Parallel(nn.Module):
    """Mixers side by side: compiled together, because compiling is what takes the time."""

    def __init__(self, mixers: Iterable[Mixer]) -> None:
        super().__init__()
        self.mixers = list(mixers)
        self.branches = nn.ModuleList(self.mixers)

    def forward(self, input: Tensor) -> list[Tensor]:
        return [branch(input) for branch in self.branches]


def mixers_of(*names: str) -> list[Mixer]:
    return [MIXERS[name]() for name in names or MIXERS]


# The same numbers, on the same draw: whole programs that cover each pair of options

WEIGHT = torch.linspace(0.5, 2, CLASSES)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "weighted": lambda: nn.CrossEntropyLoss(WEIGHT),
    "smoothed": lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "none": lambda: nn.CrossEntropyLoss(ignore_index=1, reduction="none"),
    "nll": lambda: nn.NLLLoss(WEIGHT, ignore_index=1),
    "bce": lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    "kl": lambda: nn.KLDivLoss(reduction="batchmean", log_target=True),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "mixer": ("mixup_per_sample", "cutmix_per_sample", "choice", "choice_per_sample"),
    "loss": tuple(LOSSES),
    "interpolate_loss": (None, True, False),
    "indices": (True, False),
    "positions": (True, False),
    "dtype": (torch.float32, torch.bfloat16),
    "mix": ("linked", "given", "none"),
    "training": (True, False),
    "layout": ("contiguous", "channels_last"),
    "hook": (False, True),
    "autocast": (False, True),
}
Row = dict[str, Any]


def is_possible(row: Row) -> bool:
    """What neither torch nor the library refuses."""
    hard, of_indices = row["loss"] in ("nll", "kl"), row["loss"] in ("cross_entropy", "weighted", "smoothed", "none")
    if row["interpolate_loss"] is False and hard:
        return False
    if row["indices"]:
        return of_indices or row["loss"] == "nll" or (row["interpolate_loss"] is False and not hard)
    if row["autocast"] and row["dtype"] != torch.float32:
        return False
    return row["loss"] not in ("none", "nll")  # torch takes no dense targets with ignore_index >= 0


def covering(seed: int = 0) -> list[Row]:
    """Few rows in which each possible pair of options comes at least once: greedy, and the same at each run."""
    random, rows = Random(seed), []
    possible = [
        row
        for row in (dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values()))
        if is_possible(row)
    ]
    random.shuffle(possible)

    def pairs(row: Row) -> set[Any]:
        return set(combinations(row.items(), 2))

    left = set().union(*map(pairs, possible[:4000]))
    while left:
        rows.append(max(random.sample(possible, 60), key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


class Whole(nn.Module):
    """A model with its mixer, and its loss."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(len(str(row)))
        self.row, self.mixer, loss = row, MIXERS[row["mixer"]](), LOSSES[row["loss"]]().to(row["dtype"])
        if row["hook"]:
            loss.register_forward_hook(lambda _module, _args, output: 10 * output)
        linked = self.mixer if row["mix"] == "linked" else None
        self.criterion = MixUpCriterion(loss, linked, interpolate_loss=row["interpolate_loss"])
        self.weight = nn.Parameter(torch.randn(CLASSES, 3, generator=generator).to(row["dtype"]))
        self.train(row["training"])
        input = torch.randn(4, 3, 8, 8, generator=generator).to(row["dtype"])
        if row["layout"] == "channels_last":
            input = input.to(memory_format=torch.channels_last)
        self.input = input.requires_grad_()
        sizes = (8, 8) if row["positions"] else ()
        self.target = torch.rand(4, CLASSES, *sizes, generator=generator).to(row["dtype"]).requires_grad_()
        if row["indices"]:
            self.target = torch.randint(CLASSES, (4, *sizes), generator=generator)
        self.given = self.mixer.sample(input) if row["mix"] == "given" else None

    def leaves(self) -> list[Tensor]:
        return [value for value in (self.input, self.weight, self.target) if value.requires_grad]

    def loss_of(self, mixed: Tensor, *mix: Mix) -> Tensor:
        output = F.conv2d(mixed, self.weight[:, :, None, None])
        output = output if self.row["positions"] else output.mean((2, 3))
        output = output.log_softmax(1) if self.row["loss"] in ("nll", "kl") else output
        return self.criterion(output, self.target, *mix)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        given = () if self.given is None else (self.given,)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.row["autocast"]):
            mixed = self.mixer(input, *given)
            return mixed, self.loss_of(mixed, *given)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The same in eager mode, on the draw that the compiled program has made."""
        mix = applied(self.mixer) if self.training else self.given
        mixed = self.input if mix is None else mix_inputs(self.input, mix)
        mix = None if self.row["mix"] == "none" else mix
        with torch.autocast("cpu", torch.bfloat16, enabled=self.row["autocast"]):
            return mixed, self.loss_of(mixed, *(() if mix is None else (mix,)))


ROWS = covering()


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.double().square().sum(), leaves, materialize_grads=True, retain_graph=True)


def assert_compiled_as_eager(rows: Sequence[Row], backend: str, **options: Any) -> None:
    programs = [Whole(row) for row in rows]

    def every(inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [each(input) for each, input in zip(programs, inputs, strict=True)]

    outputs = compiled(every, backend=backend, **options)([each.input for each in programs])
    for each, (mixed, loss) in zip(programs, outputs, strict=True):
        values, leaves = each.expected(), each.leaves()
        half = each.row["autocast"] or each.row["dtype"] == torch.bfloat16
        close: dict[str, Any] = {"atol": 0.05 if half else 1e-5, "rtol": 0.05 if half else 1e-5}
        assert mixed.stride() == values[0].stride(), each.row
        torch.testing.assert_close((mixed, loss), values, **close, msg=f"values of {each.row}")
        wanted = gradients(values[1], leaves)
        scale = max(float(value.abs().max()) for value in wanted)
        for got, value in zip(gradients(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(got / scale, value / scale, **close, msg=f"gradients of {each.row}")


@pytest.fixture
def many_backwards() -> Iterator[None]:
    with torch._functorch.config.patch(donated_buffer=False):  # each loss of a graph has a backward of its own
        yield


@COPIES_OF_A_LOSS.required
@pytest.mark.usefixtures("many_backwards")
@pytest.mark.parametrize("part", range(3))
def test_compiled_equals_eager_for_every_pair_of_options(part: int) -> None:
    assert_compiled_as_eager(ROWS[part::3], "aot_eager")


def test_cross_entropy_equals_eager_for_all_options_together() -> None:
    """Pairs of options do not meet three: a lam per sample, an ignored class, autocast."""
    logits, labels = torch.randn(4, CLASSES, 8, 8), torch.randint(CLASSES, (4, 8, 8))
    cases = list(product(LAMS.values(), (False, True), (None, WEIGHT), (-100, 1), (0.0, 0.1), ("none", "mean")))

    def every(logits: Tensor) -> list[Tensor]:
        losses = []
        for mix, half, weight, ignored, smoothing, reduction in cases:
            options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction}
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                input = logits.bfloat16() if half else logits
                weight = weight if weight is None else weight.to(input.dtype)
                losses.append(mix_cross_entropy(input, labels, mix, weight=weight, **options))
        return losses

    for case, got, expected in zip(cases, compiled(every, backend="eager")(logits), every(logits), strict=True):
        tolerance = 0.05 if case[1] else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=f"loss of {case}")


@COPIES_OF_A_LOSS.required
@pytest.mark.usefixtures("many_backwards")
def test_dynamic_sizes_equal_eager() -> None:
    assert_compiled_as_eager(ROWS[::17], "aot_eager", dynamic=True)


@COPIES_OF_A_LOSS.required
@pytest.mark.usefixtures("many_backwards")
def test_inductor_equals_eager_on_its_draw() -> None:
    rows = [row for row in ROWS if row["training"] and row["mix"] == "linked" and not row["autocast"]]
    assert_compiled_as_eager([row for row in rows if row["mixer"] in ("choice", "mixup_per_sample")][:3], "inductor")


def test_functional_form_in_one_graph() -> None:
    def step(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mixup_batch(X, y, alpha=0.2)

    input = torch.randn(6, 3)
    mixed, permuted, mixing = compiled(step)(input, input)
    torch.testing.assert_close(mixed, (1 - mixing) * input + mixing * permuted)


def test_inside_a_checkpointed_block_a_given_mix_is_one_graph() -> None:
    mixer, layer = CutMix(), nn.Conv2d(3, 3, 1)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)

    def step(input: Tensor, target: Tensor) -> Tensor:
        mix = mixer.sample(input)
        mixer.last_mix = mix  # outside: what is checkpointed in a graph may have no side effects
        block = checkpoint(lambda x: mix_inputs(layer(x), mix).tanh(), input, use_reentrant=False)
        return criterion(block, target)  # type: ignore[no-any-return]

    input, target = torch.randn(6, 3, 4, 4), torch.randint(3, (6, 4, 4))
    loss, mix = compiled(step)(input, target), applied(mixer)
    expected = criterion(mix_inputs(layer(input), mix).tanh(), target, mix)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, layer.weight)[0] for value in (loss, expected)))


def test_inside_torch_func_a_given_mix_is_one_graph() -> None:
    mixer, head = RandomChoice([MixUp(), CutMix()]), classifier()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)

    def gradients(input: Tensor, target: Tensor) -> Any:
        mix = mixer.sample(input)
        mixer.last_mix = mix

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(head, parameters, (mix_inputs(input, mix),))
            return criterion(output, target)  # type: ignore[no-any-return]

        return torch.func.grad(loss)(dict(head.named_parameters()))

    input, target = images()
    results, mix = compiled(gradients, backend="aot_eager")(input, target), applied(mixer)
    loss = criterion(head(mix_inputs(input, mix)), target, mix)
    torch.testing.assert_close(list(results.values()), list(torch.autograd.grad(loss, list(head.parameters()))))


def test_transforms_around_mixers_are_in_the_same_graph() -> None:
    mixers, before, after = mixers_of(), nn.Hardtanh(), nn.LayerNorm(4)
    step = Counted(lambda input: [after(mixer(before(input))) for mixer in mixers], "aot_eager")
    input, _ = images()
    outputs = step.function(input)
    torch.testing.assert_close(outputs, [after(mix_inputs(before(input), applied(mixer))) for mixer in mixers])
    assert step.counter.frame_count == 1


# Graphs


class Counted:
    """Compile a function, and count its graphs."""

    def __init__(self, function: Callable[..., Any], backend: str = "eager", **options: Any) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.function = compiled(function, backend=self.counter, **options)

    def graphs_after(self, *args: Any) -> int:
        self.function(*args)
        return self.counter.frame_count


@each_mixer
def test_twelve_steps_are_one_graph(make: Callable[[], Mixer]) -> None:
    mixer, head = make(), classifier()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    step = Counted(lambda input, target: criterion(head(mixer(input)), target))
    assert [step.graphs_after(*images()) for _ in range(12)] == [1] * 12


def graphs_of_batch_sizes(function: Callable[..., Any]) -> list[int]:
    torch._dynamo.reset()
    step = Counted(function)
    return [step.graphs_after(*images(batch_size)) for batch_size in (8, 8, 7, 6, 5, 1, 2, 9)]


@cache
def graphs_without_a_mixer() -> list[int]:
    head, loss = classifier(), nn.CrossEntropyLoss()
    return graphs_of_batch_sizes(lambda x, y: loss(head(x), y))


@each_mixer
def test_batch_sizes_cost_no_more_graphs_than_without_a_mixer(make: Callable[[], Mixer]) -> None:
    mixer, head = make(), classifier()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    assert graphs_of_batch_sizes(lambda x, y: criterion(head(mixer(x)), y)) == graphs_without_a_mixer()


@UNKNOWN_SIZES.required
def test_a_batch_size_that_the_data_decide_is_one_graph() -> None:
    backend, names = "aot_eager", ("mixup", "mixup_per_sample", "cutmix", "choice")
    mixers = mixers_of(*names)
    criteria, head = [MixUpCriterion(nn.CrossEntropyLoss(), mixer) for mixer in mixers], classifier()

    def step(input: Tensor, target: Tensor, kept: Tensor) -> list[Tensor]:
        input, target = input[kept], target[kept]
        outputs = [head(mixer(input)) for mixer in mixers]
        return [criterion(output, target) for criterion, output in zip(criteria, outputs, strict=True)]

    input, target = images(9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        counted = Counted(step, backend)
        for size in (6, 4):
            kept = torch.arange(9) < size
            losses, expected = counted.function(input, target, kept), []
            for criterion, mixer in zip(criteria, mixers, strict=True):
                mix = applied(mixer)
                expected.append(criterion(head(mix_inputs(input[kept], mix)), target[kept], mix))
            torch.testing.assert_close(losses, expected)
            parameters, sums = list(head.parameters()), [torch.stack(values).sum() for values in (losses, expected)]
            torch.testing.assert_close(*(torch.autograd.grad(value, parameters) for value in sums))
    assert counted.counter.frame_count == 1


@each_mixer
def test_train_and_eval_settle_at_one_graph_each(make: Callable[[], Mixer]) -> None:
    mixer = make()
    model = nn.Sequential(mixer, classifier())
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    step = Counted(lambda x, y: criterion(model(x), y))
    counts = []
    for _ in range(4):
        for training in (True, False):
            model.train(training)
            counts.append(step.graphs_after(*images()))
    assert counts == [1] + [2] * 7


class TwoInputs(nn.Module):
    """The second input is mixed by the draw of the first, as a user writes it."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        image, mix = self.mixer(image), self.mixer.last_mix
        return image, table if mix is None else mix_targets(table, mix)


@pytest.mark.parametrize("name", ("mixup", "cutmix_per_sample"))
def test_there_is_no_draw_in_eval_mode_in_compiled_code(name: str) -> None:
    model, (image, _), table = TwoInputs(MIXERS[name]()), images(), torch.randn(6, 5)
    step = compiled(model, backend="aot_eager")
    for _ in range(2):
        mixed = step(image, table)
        mix = applied(model.mixer)
        torch.testing.assert_close(mixed, (mix_inputs(image, mix), mix_targets(table, mix)))
        model.eval()
        torch.testing.assert_close(step(image, table), (image, table))
        model.train()


@PROPERTIES_OF_A_MIX.required
@pytest.mark.parametrize("name", ("mixup", "cutmix", "cutmix_per_sample"))
def test_the_share_of_a_mix_in_compiled_code(name: str) -> None:
    mixer, (image, _) = MIXERS[name](), images()

    def share(image: Tensor) -> Tensor:
        mixer(image)
        return applied(mixer).share

    torch.testing.assert_close(compiled(share, backend="aot_eager")(image), applied(mixer).share)


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
    mixers = Parallel([*kinds, RandomChoice([MixUp(8.0), CutMix(8.0)])])
    step, (input, _) = Counted(mixers, dynamic=dynamic), images(size=8)
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


def test_alpha_of_0_leaves_the_batch_as_it_is() -> None:
    mixers, (input, _) = [MixUp(0.0), CutMix(0.0), CutMix(0.0, per_sample=True)], images()
    assert all(torch.equal(output, input) for output in compiled(Parallel(mixers), backend="eager")(input))


# Errors and copies


@pytest.mark.parametrize("fullgraph", (False, True), ids=("with_breaks", "fullgraph"))
def test_errors_are_those_of_the_library(fullgraph: bool) -> None:
    mixer = CutMix()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    loss_of, mix = (torch.compile(module, fullgraph=fullgraph, backend="eager") for module in (criterion, mixer))
    input, target = images()
    output = torch.randn(6, CLASSES)

    def assert_raises(kind: type[Exception], message: str, function: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(Exception) as raised:  # noqa: PT011  # older torch does not pass the message on
            function(*args)
        assert raised.type is (Unsupported if fullgraph else kind)
        assert message in str(raised.value) or (fullgraph and not MESSAGES)

    assert_raises(RuntimeError, "to have mixed a batch, got none", loss_of, output, target)
    assert_raises(ValueError, "expected inputs (B, C, *spatial)", mix, output)
    mix(input)
    assert_raises(ValueError, "with the positions of mix.lam", mix, input[..., :1], mixer.last_mix)
    message = "batch size of the mix first, 6, got shape (4,)"
    assert_raises(ValueError, message, loss_of, output[:4], target[:4])
    with torch.no_grad():
        assert_raises(RuntimeError, "expected gradients while the linked", loss_of, output, target)
    bce = MixUpCriterion(nn.BCEWithLogitsLoss(), interpolate_loss=False)
    loss_of = torch.compile(bce, fullgraph=fullgraph, backend="eager")
    for drawn in (mixer.last_mix, None):  # in training, in validation
        assert_raises(ValueError, "to be made dense", loss_of, output, torch.ones(6, CLASSES).long(), drawn)


def test_a_seed_reproduces_compiled_draws_and_each_step_draws_afresh() -> None:
    step, (input, _) = compiled(Parallel(mixers_of()), backend="aot_eager"), images(8, size=16)
    torch.manual_seed(1)
    first, second = step(input), step(input)
    torch.manual_seed(1)
    torch.testing.assert_close([step(input), step(input)], [first, second], atol=0, rtol=0)
    for name, *outputs in zip(MIXERS, first, second, strict=True):
        assert not torch.equal(*outputs), name


def test_a_criterion_in_a_criterion_is_refused_in_compiled_code() -> None:
    def nested(input: Tensor, target: Tensor) -> Tensor:
        return MixUpCriterion(MixUpCriterion(nn.CrossEntropyLoss()))(input, target)  # type: ignore[no-any-return]

    with pytest.raises((TypeError, Unsupported)):
        compiled(nested, backend="eager")(torch.randn(4, CLASSES), torch.randint(CLASSES, (4,)))


@each_mixer
@pytest.mark.parametrize("copy_of", (copy.deepcopy, through_pickle, AveragedModel))
def test_compiled_in_place_it_draws_afresh_and_a_copy_of_it_has_its_own_mode(
    make: Callable[[], Mixer], copy_of: Callable[[Any], Any]
) -> None:
    mixer, (input, _) = make(), images(8, size=16)  # so large that a box without a pixel is rare
    mixer.compile(backend="eager", fullgraph=True)
    outputs = [mixer(input) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], mix_inputs(input, applied(mixer)))
    twin, before = copy_of(mixer).eval(), applied(mixer)
    assert twin(input) is input
    assert not torch.equal(mixer(input), input)
    kept = applied(mixer)
    assert kept is not before
    assert not torch.equal(twin.train()(input), input)
    assert applied(mixer) is kept


# Kernels

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


@pytest.mark.parametrize("name", LAMS)
def test_normalize_mix_and_activate_are_one_kernel(name: str) -> None:
    mix, half = LAMS[name], name.startswith("per_sample")
    dtype, layout = ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last))[half]
    mixer, input = MixUp(), torch.randn(4, 3, 8, 8).to(dtype, memory_format=layout)
    assert inductor_code(lambda input, mix: F.relu(mixer(normalize(input), mix)), input, mix) == ([1], 1)


def test_elementwise_work_around_a_drawing_module_adds_no_kernel() -> None:
    mixer, (input, _) = MIXERS["choice"](), images(size=8)
    alone = inductor_code(mixer, input)
    assert alone.launches <= [DRAW_AND_MIX]
    assert inductor_code(lambda input: F.relu(mixer(normalize(input))), input) == alone


def test_a_step_with_a_choice_launches_three_functions_more_than_one_without() -> None:
    mixer, head, loss = RandomChoice([MixUp(), CutMix()]), classifier(), nn.CrossEntropyLoss()
    criterion = MixUpCriterion(loss, mixer)
    plain = inductor_code(lambda x, y: loss(head(x), y), *images(), backward=True).launches
    mixed = inductor_code(lambda x, y: criterion(head(mixer(x)), y), *images(), backward=True).launches
    assert len(mixed) == len(plain) == 2
    assert mixed[0] <= plain[0] + DRAW_AND_MIX
    assert mixed[1] <= plain[1]


@each_lam
@each_target
@pytest.mark.parametrize("name", ("cross_entropy", "weighted", "smoothed", "none"))
def test_criterion_is_one_log_softmax_in_the_graph(name: str, sizes: tuple[int, ...], mix: Mix) -> None:
    step = Counted(MixUpCriterion(LOSSES[name]()))
    assert step.graphs_after(torch.randn(4, CLASSES, *sizes), torch.randint(CLASSES, (4, *sizes)), mix) == 1
    nodes = step.counter.graphs[0].graph.nodes
    called = [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]
    assert [name for name in called if name in ("log_softmax", "softmax", "cross_entropy")] == ["log_softmax"]


def test_large_logits_are_compiled_as_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    for large in (2**22, 0):
        monkeypatch.setattr("mixup_nn._losses.LARGE", large)
        step = Counted(MixUpCriterion(nn.CrossEntropyLoss()))
        step.function(torch.randn(4, CLASSES), torch.randint(CLASSES, (4,)), LAMS["per_sample"])
        graphs.append([str(node.target) for node in step.counter.graphs[0].graph.nodes])
        torch._dynamo.reset()
    assert graphs[0] == graphs[1]


@cache
def code_of_the_plain_loss(name: str) -> Code:
    input, target = torch.randn(64, CLASSES, requires_grad=True), torch.randint(CLASSES, (64,))
    return inductor_code(LOSSES[name](), input, target, backward=True)


@pytest.mark.parametrize("name, per_sample", (("cross_entropy", False), ("weighted", True), ("smoothed", False)))
def test_criterion_is_one_kernel_forward_and_one_backward(name: str, per_sample: bool) -> None:
    input, target = torch.randn(64, CLASSES, requires_grad=True), torch.randint(CLASSES, (64,))
    mix = sample_mixup(64, per_sample=per_sample)
    code = inductor_code(MixUpCriterion(LOSSES[name]()), input, target, mix, backward=True)
    assert code.launches == [1, 1]
    if name != "smoothed" and FEWEST_LOOPS:
        assert code.loops <= code_of_the_plain_loss(name).loops


@each_target
def test_criterion_with_a_lam_per_position_is_one_kernel_forward_and_one_backward(sizes: tuple[int, ...]) -> None:
    criteria = [MixUpCriterion(LOSSES[name]()) for name in ("weighted", "smoothed")]
    mixes = [sample_cutmix((64, 3, 8, 8), per_sample=per_sample) for per_sample in (False, True)]
    inputs = [torch.randn(64, CLASSES, *sizes, requires_grad=True) for _ in range(4)]

    def step(inputs: list[Tensor], target: Tensor, mixes: list[Mix]) -> list[Tensor]:
        pairs = [(criterion, mix) for criterion in criteria for mix in mixes]
        return [criterion(input, target, mix) for (criterion, mix), input in zip(pairs, inputs, strict=True)]

    code = inductor_code(step, inputs, torch.randint(CLASSES, (64, *sizes)), mixes, backward=True)
    assert code.launches == [1, 1]


# Export


@strict_and_not
def test_export_of_the_eval_model_is_the_model_without_it(strict: bool) -> None:
    head, (input, _) = classifier(), images()
    model = nn.Sequential(*mixers_of(), head).eval()
    exported = torch.export.export(model, (input,), strict=strict).module()
    torch.testing.assert_close(exported(input), head(input))


@EXPORT_RESTORES.required
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # last_mix, not kept
@pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning")  # torch puts them back
@pytest.mark.parametrize("drawn_before", (False, True))
@strict_and_not
def test_export_in_training_mode_draws_at_each_call_and_leaves_last_mix_alone(strict: bool, drawn_before: bool) -> None:
    model, input = Parallel(mixers_of()), torch.eye(4).view(4, 4, 1, 1).expand(4, 4, 3, 3)
    if drawn_before:
        model(input)
    before = [repr(mixer.last_mix) for mixer in model.mixers]
    program = torch.export.export(model, (input,), strict=strict).module()
    assert [repr(mixer.last_mix) for mixer in model.mixers] == before  # no fake tensor
    for name, first, second in zip(MIXERS, program(input), program(input), strict=True):
        assert not torch.equal(first, second), name
        torch.testing.assert_close(first.sum(1), torch.ones(4, 3, 3))


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


@pytest.mark.cuda
@each_mixer
def test_nothing_synchronises_with_the_host(make: Callable[[], Mixer]) -> None:
    mixer = make()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)
    input = torch.randn(8, CLASSES, 4, 4, device="cuda", requires_grad=True)
    of_samples, of_positions = (torch.randint(CLASSES, (8, *sizes), device="cuda") for sizes in ((), (4, 4)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = mixer(input)
        (criterion(output.mean((2, 3)), of_samples) + criterion(output, of_positions)).backward()
        mixup_batch(input, of_samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
