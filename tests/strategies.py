"""Whole programs, drawn by Hypothesis or as a covering array: small enough to shrink, odd enough to hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import combinations
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from mixup_nn import Mix, Mixer, RandomChoice

from . import reference

Draw = st.DrawFn
Shape = tuple[int, ...]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Among them sizes that are also those of the batch and of its channels, so that a wrong axis fits too.
SPATIAL: tuple[Shape, ...] = ((), (2,), (1,), (3,), (2, 3), (1, 3), (2, 1), (3, 3), (2, 1, 2), (2, 3, 3))

seeds = st.integers(0, 2**16)


def random(draw: Draw, shape: Sequence[int], low: float = -3, high: float = 3) -> Tensor:
    """Random numbers of a drawn seed: Hypothesis seldom draws all the digits of a float."""
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.empty(tuple(shape), dtype=torch.float64).uniform_(low, high, generator=generator)


# Draws


Choose = Callable[[str, Sequence[Any]], Any]  # one of some values, for what they are called


def mix_of(choose: Choose, numbers: torch.Generator, batch_size: int, spatial: Shape) -> Mix:
    """A mix of any shape of lam, for inputs of these sizes, with any partners; some sizes of a map may be 1."""
    shape: Shape = choose("lam", [(), (batch_size,), (batch_size,)])
    if spatial and choose("maps", [False, True, True]):
        ones = choose("ones_of_map", [0, 0, 0, 1, len(spatial)])
        shape = (*(shape or (1,)), 1, *[1] * ones, *spatial[ones:])
    lam = torch.rand(shape, generator=numbers, dtype=torch.float64)
    if choose("lam_of", ["fractions", "fractions", "edges"]) == "edges":
        lam = (lam * 4).round() / 4
    index = torch.randperm(batch_size, generator=numbers)
    if choose("partners", ["permuted", "permuted", "repeating"]) == "repeating":
        index = torch.randint(max(batch_size, 1), (batch_size,), generator=numbers)
    return Mix(lam.to(choose("lam_dtype", [torch.float64, torch.float64, torch.float32])), index)


@st.composite
def mixes(draw: Draw, /, batch_size: int, spatial: Shape = (), *, maps: bool | None = None) -> Mix:
    """Any ``lam`` and any partners; for ``spatial`` sizes ``maps`` of them too."""

    def choose(name: str, values: Sequence[Any]) -> Any:
        return maps if name == "maps" and maps is not None else draw(st.sampled_from(values))

    return mix_of(choose, torch.Generator().manual_seed(draw(seeds)), batch_size, spatial)


# Layouts: other strides, the same values


def with_odd_strides(value: Tensor) -> Tensor:
    """Contiguous, but for the strides of dimensions of size 1, which mean nothing."""
    value = value.contiguous()
    strides = [stride if size > 1 else 5 for size, stride in zip(value.shape, value.stride(), strict=True)]
    return value.as_strided(value.shape, strides)


def channels_last(value: Tensor, last: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> Tensor:
    """With the channels last in memory, in a layout of that."""
    return last(value.movedim(1, -1)).movedim(-1, 1) if value.ndim > 2 else last(value)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "strided": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "every_second": lambda x: x.repeat_interleave(2, 0)[::2],
    "part_of_channels_last": lambda x: channels_last(x.repeat_interleave(2, 0))[::2],
    "inner_part": lambda x: torch.cat((x, x), -1).narrow(-1, 0, x.shape[-1]),
    "odd_strides": with_odd_strides,
    "odd_strides_of_channels_last": lambda x: channels_last(x, with_odd_strides),
}
KEPT = {"contiguous", "channels_last"}  # the memory formats


def expanded(axis: int) -> Callable[[Tensor], Tensor]:
    """All slices are the first, at a stride of 0."""
    return lambda x: x.narrow(axis % x.ndim, 0, 1).expand_as(x) if x.numel() else x


EXPANDED = {"one_sample": expanded(0), "one_channel": expanded(1), "one_column": expanded(-1)}
EVERY_LAYOUT = LAYOUTS | EXPANDED


@st.composite
def batches(draw: Draw, /, dtypes: Sequence[torch.dtype] = FLOATING, *, empty: bool = True) -> tuple[Tensor, Mix]:
    """An input of any rank, dtype and layout, and a mix of it."""
    spatial = draw(st.sampled_from(SPATIAL))
    batch_size = draw(st.integers(0 if empty else 1, 5))
    flat = not spatial and draw(st.booleans())
    channels: Shape = () if flat else (draw(st.integers(1, 3)),)
    sizes = (batch_size, *channels, *spatial)
    layout = EVERY_LAYOUT[draw(st.sampled_from(sorted(EVERY_LAYOUT)))]
    value = layout(random(draw, sizes).to(draw(st.sampled_from(dtypes))))
    return value, draw(mixes(batch_size, spatial))


@st.composite
def targets(draw: Draw, /) -> tuple[Tensor, Mix]:
    """Targets of any shape beside a map of any sizes: the rule says what is meant, or that nothing is."""
    batch_size = draw(st.integers(1, 3))
    sizes = st.integers(1, 3)
    spatial = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    mix = draw(mixes(batch_size, spatial, maps=draw(st.integers(0, 4)) > 0))
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    if mix.lam.ndim > 2 and draw(st.booleans()):
        near = [draw(st.sampled_from([size, size, 1, size + 1])) for size in mix.lam.shape[2:]]  # fits, or just not
        shape = (*draw(st.sampled_from([(), (2,)])), *near)
    if draw(st.booleans()):
        return random(draw, (batch_size, *shape), 0, 1), mix
    labels = random(draw, (batch_size, *shape), -1, 3).floor().long()
    return torch.where(labels < 0, draw(st.sampled_from([-100, -1])), labels), mix


# Losses


class Kind(NamedTuple):
    """A loss of torch: its class, its function, and what it takes."""

    module: type[nn.Module]
    function: Callable[..., Tensor]
    options: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012
    target: str = "values"
    domain: Callable[[Tensor], Tensor] = lambda output: output
    class_weights: Sequence[str] = ()
    hard: bool = False
    linear: bool = False  # in the target, so that both modes give the same value
    positions: bool = True
    grad_of_target: bool = True


def log_softmax(output: Tensor) -> Tensor:
    return output.log_softmax(1 if output.ndim > 1 else 0)


IGNORED: dict[str, tuple[Any, ...]] = {"ignore_index": (-100, -1, 0, 1, 255)}
SMOOTHED: dict[str, tuple[Any, ...]] = {"label_smoothing": (0.0, 0.1, 1.0)}
KINDS = (  # in the order of docs/criterion.md
    Kind(nn.BCELoss, F.binary_cross_entropy, domain=torch.sigmoid, class_weights=("weight",), linear=True),
    Kind(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, class_weights=("weight", "pos_weight"), linear=True),
    Kind(nn.CrossEntropyLoss, F.cross_entropy, IGNORED | SMOOTHED, "indices", class_weights=("weight",), linear=True),
    Kind(nn.HingeEmbeddingLoss, F.hinge_embedding_loss, {"margin": (1.0, 0.3)}, "signs", hard=True),
    Kind(nn.HuberLoss, F.huber_loss, {"delta": (1.0, 0.3)}),
    Kind(nn.KLDivLoss, F.kl_div, {"log_target": (False, True)}, domain=log_softmax),
    Kind(nn.L1Loss, F.l1_loss),
    Kind(nn.MSELoss, F.mse_loss),
    Kind(nn.MultiLabelMarginLoss, F.multilabel_margin_loss, target="sets", hard=True, positions=False),
    Kind(
        nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, class_weights=("weight",), linear=True,
        positions=False,
    ),
    Kind(
        nn.MultiMarginLoss, F.multi_margin_loss, {"p": (1, 2), "margin": (1.0, 0.5)}, "indices",
        class_weights=("weight",), hard=True, positions=False,
    ),
    Kind(nn.NLLLoss, F.nll_loss, IGNORED, "indices", log_softmax, ("weight",), hard=True),
    Kind(nn.PoissonNLLLoss, F.poisson_nll_loss, {"log_input": (True, False), "full": (False, True)}, linear=True),
    Kind(nn.SmoothL1Loss, F.smooth_l1_loss, {"beta": (1.0, 0.3)}),
    Kind(nn.SoftMarginLoss, F.soft_margin_loss, target="signs", grad_of_target=False),
)  # fmt: skip
KIND = {kind.module.__name__: kind for kind in KINDS}
FUNCTIONS = ("partial", "lambda", "function_of_parts")  # which reduce as they please
PARTS = ("parts", "function_of_parts")
FORMS = ("module", "module", "subclass", "doubled", "called", "hooked", "compiled", "partial", "lambda", *PARTS)
METHODS = {"subclass": None, "doubled": "forward", "called": "__call__"}


class Weighed(NamedTuple):
    """A target and a weight for each sample."""

    labels: Tensor
    weight: Tensor


class OfParts(nn.Module):
    """A loss of a target in parts: another loss, times the weight of each sample."""

    def __init__(self, each: Callable[[Tensor, Tensor], Tensor], reduction: str) -> None:
        super().__init__()
        self.each, self.reduction = each, reduction

    def forward(self, output: Tensor, target: dict[str, Weighed]) -> Tensor:
        labels, weight = target["weighed"]
        losses = self.each(output, labels)
        return reference.reduce(losses * weight.reshape(-1, *[1] * (losses.ndim - 1)), self.reduction)


class Program(NamedTuple):
    """One call of a criterion, with all that an oracle must know of it."""

    kind: Kind
    form: str
    options: dict[str, Any]
    output: Tensor
    target: Any
    mix: Mix
    interpolate_loss: bool | None
    large: bool

    def moved(self) -> Program:
        """The same on ``meta``."""
        target = reference.each_part(lambda part: part.to("meta"), self.target)
        return self._replace(output=self.output.to("meta"), target=target, mix=on_meta(self.mix))

    @property
    def labels(self) -> Tensor:
        """The target, or the part of it that is one for torch's loss."""
        labels: Tensor = self.target if isinstance(self.target, Tensor) else self.target["weighed"].labels
        return labels

    @property
    def of_indices(self) -> bool:
        return self.kind.target == "indices" and not self.labels.is_floating_point()

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the library knows the loss as linear."""
        return self.kind.module is nn.CrossEntropyLoss and self.form not in (*FUNCTIONS, "doubled", "parts")

    @property
    def keeps_targets(self) -> bool:
        """Whether ``None`` keeps floating targets apart: of labels or logarithms, as far as the loss shows it."""
        shown = self.form not in FUNCTIONS
        return (self.kind.hard and shown) or (self.options.get("log_target", False) and self.form != "lambda")

    @property
    def interpolates_loss(self) -> bool:
        if self.form in PARTS:
            return True
        apart = self.keeps_targets or not self.target.is_floating_point()
        if self.interpolate_loss is False:
            return self.is_cross_entropy and not self.target.is_floating_point()
        return apart if self.interpolate_loss is None else True

    def loss(self, device: str = "cpu") -> Callable[[Tensor, Any], Tensor]:
        """The loss as a user has it, with class weights in the dtype of the output."""
        moved = {k: v.to(device, self.output.dtype) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        kind = self.kind
        if self.form in PARTS:
            of_parts = OfParts(partial(kind.function, **moved | {"reduction": "none"}), self.options["reduction"])
            return of_parts if self.form == "parts" else lambda output, target: of_parts(output, target)
        if self.form in FUNCTIONS:
            bound = partial(kind.function, **moved)
            return bound if self.form == "partial" else lambda output, target: bound(output, target)
        if self.form in METHODS:
            own: Callable[[Tensor, Any], Tensor] = make_subclass(kind.module, METHODS[self.form])(**moved)
            return own
        loss = kind.module(**moved)
        if self.form == "hooked":
            loss.register_forward_hook(lambda _module, _args, losses: 2 * losses)
        return torch.compile(loss, backend="eager") if self.form == "compiled" else loss

    def expected(self, output: Tensor, target: Any, mix: Mix | None) -> Tensor:
        """What the oracle says, in float64."""
        options: dict[str, Any] = {k: v.double() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        of_parts = self.form in PARTS
        loss = reference.of_torch(self.kind.module(**options | ({"reduction": "none"} if of_parts else {})))
        loss = OfParts(loss, options["reduction"]) if of_parts else loss
        target = reference.each_part(lambda part: part.double() if part.is_floating_point() else part, target)
        modes: dict[str, Any] = {"hard": self.keeps_targets, "cross_entropy": self.is_cross_entropy}
        value = reference.criterion(loss, output.double(), target, mix, self.interpolate_loss, **modes)
        return 2 * value if self.form in ("hooked", "doubled", "called") else value


def on_meta(mix: Mix) -> Mix:
    return Mix(*(part.to("meta") for part in mix))


@contextmanager
def large_logits(large: bool) -> Iterator[None]:
    """The path of large logits, for small ones."""
    with mock.patch("mixup_nn._losses.LARGE", 0 if large else 2**22):
        yield


def make_subclass(base: Any, doubling: str | None = None) -> Any:
    """A subclass with ``pass``, or one that doubles what a method returns."""

    def double(self: Any, output: Tensor, target: Tensor) -> Tensor:
        losses: Tensor = getattr(base, str(doubling))(self, output, target)
        return 2 * losses

    return type("Own", (base,), {} if doubling is None else {doubling: double})


def program_of(
    choose: Choose, numbers: torch.Generator, dtypes: Sequence[torch.dtype], kinds: Sequence[Kind], forms: Sequence[str]
) -> Program:
    """A call of a criterion with any loss of torch, in any form, on any kind of target, under any mix."""

    def uniform(shape: Sequence[int], low: float = -3, high: float = 3) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.float64).uniform_(low, high, generator=numbers)

    kind = KIND[choose("kind", [kind.module.__name__ for kind in kinds])]
    batch_size, channels = choose("batch_size", [1, 2, 3, 3, 4]), choose("channels", [2, 3, 3, 4])
    spatial: Shape = choose("spatial", SPATIAL) if kind.positions else ()
    of_sample = () if kind.target == "sets" or spatial else choose("sizes_of_inputs", SPATIAL)  # integers take no map
    mix = mix_of(choose, numbers, batch_size, spatial or of_sample)
    form = choose("form", [form for form in forms if form not in PARTS or not spatial or mix.lam.ndim < 2])
    dtype = choose("dtype", dtypes)
    options = {name: choose(name, values) for name, values in kind.options.items()}
    apart = kind.hard or options.get("log_target") or form in PARTS
    mode = choose("mode", [None, True] if apart else [None, True, False])

    classes = kind.target in ("indices", "sets") or kind.class_weights or kind.domain is log_softmax
    of_channels = (channels,) if classes or choose("has_channels", [True, False]) else ()
    sizes = (batch_size, *of_channels, *spatial)
    dense = kind.module is nn.CrossEntropyLoss and choose("dense", [False, False, True])
    made_dense = kind.target == "values" and mode is False and choose("made_dense", [False, bool(of_channels)])
    own_forward = mode is False and form in (*FUNCTIONS, "doubled")  # gets dense targets
    if dense or made_dense or own_forward:
        options.pop("ignore_index", None)
    if kind.target == "sets":
        target = torch.stack([torch.randperm(channels, generator=numbers) for _ in range(batch_size)])
        target[:, choose("sets_of", [1, channels - 1]) :] = -1
    elif kind.target == "signs":
        target = uniform(sizes).sign().to(dtype)
    elif made_dense or (kind.target == "indices" and not dense):
        target = torch.randint(channels, (batch_size, *spatial), generator=numbers)
        ignored = options.get("ignore_index", -100) if kind.positions else 0
        share = choose("share_ignored", [0, 0.3, 0.3, 0.3, 1])
        target = target.where(uniform(target.shape, 0, 1) >= share, ignored)
    else:
        target = uniform(sizes, 0.05, 0.95).to(dtype)
        target = target.log() if options.get("log_target") else target
    for name in kind.class_weights:
        if (which := choose(name, ["none", "some", "some", "zero"])) != "none":
            weight = uniform((channels,), 0.5, 2)
            weight[0] *= which != "zero"
            elementwise = kind.module in (nn.BCELoss, nn.BCEWithLogitsLoss)
            options[name] = (weight.reshape(-1, *[1] * len(spatial)) if elementwise else weight).to(dtype)
    mean = "batchmean" if kind.module is nn.KLDivLoss and form not in PARTS else "mean"  # torch warns of the other
    options["reduction"] = choose("reduction", [mean, mean, "sum", "none"])

    output = kind.domain(uniform(sizes))
    output = (output.exp() if options.get("log_input") is False else output).to(dtype)
    if kind.module is not nn.NLLLoss:  # whose backward torch has for contiguous inputs alone
        output = EVERY_LAYOUT[choose("layout", list(EVERY_LAYOUT))](output)
    of_target = choose("layout_of_target", ["contiguous", "transposed", "odd_strides", "one_sample"])
    target = EVERY_LAYOUT[of_target](target)
    parts = {"weighed": Weighed(target, uniform((batch_size,), 0.5, 2).to(dtype))}
    whole = parts if form in PARTS else target
    program = Program(kind, form, options, output, whole, mix, mode, choose("large", [False, True]))
    if program.interpolates_loss and reference.of_target(program.target, mix).lam.ndim:
        if form in FUNCTIONS:
            options["reduction"] = "none"  # one number could not be weighed
        elif form in PARTS and options["reduction"] == "mean":
            options["reduction"] = "sum"  # of a mean it is not known what it is divided by
    if form == "compiled" and not program.interpolates_loss:
        program = program._replace(form="module")  # would compile it
    return program


@st.composite
def programs(
    draw: Draw, /, *, dtypes: Sequence[torch.dtype] = (torch.float64,), kinds: Sequence[Kind] = KINDS,
    forms: Sequence[str] = FORMS,
) -> Program:  # fmt: skip
    """Any program, as :func:`program_of` makes it."""
    numbers = torch.Generator().manual_seed(draw(seeds))
    return program_of(lambda _name, values: draw(st.sampled_from(values)), numbers, dtypes, kinds, forms)


CORE = (
    "form", "mode", "lam", "maps", "partners", "dense", "ignore_index", "share_ignored", "label_smoothing", "weight",
    "reduction", "large",
)  # fmt: skip


@cache
def covering(dtypes: Sequence[torch.dtype], kinds: Sequence[str], forms: Sequence[str], pool: int) -> list[Program]:
    """Few programs in which choices meet, two of any kind and three of the core, as often as in a pool: greedy."""
    random, left = Random(0), set[Any]()
    candidates: list[tuple[Program, set[Any]]] = []
    for seed in range(pool):
        row: dict[str, Any] = {}

        def choose(name: str, values: Sequence[Any], row: dict[str, Any] = row) -> Any:
            return row.setdefault(name, random.choice(values))

        numbers = torch.Generator().manual_seed(seed)
        program = program_of(choose, numbers, dtypes, [KIND[name] for name in kinds], forms)
        core = combinations([(name, value) for name, value in row.items() if name in CORE], 3)
        candidates.append((program, {*combinations(row.items(), 2), *core}))
        left |= candidates[-1][1]
    chosen = []
    while left:
        for _, met in (some := random.sample(candidates, min(40, len(candidates)))):
            met &= left
        program, met = max(some, key=lambda candidate: len(candidate[1]))
        candidates = [candidate for candidate in candidates if candidate[1]]
        chosen += [program] if met else []
        left -= met
    return chosen


# Trees of choices


class Constant(Mixer):
    """Draws one number, per batch, per sample or per position."""

    def __init__(self, value: float, shape: str, p: float) -> None:
        super().__init__(p=p)
        self.value = value
        self.shape = shape

    def sample_lam(self, input: Tensor) -> Tensor:
        sizes = {"": (), "b": input.shape[:1], "1": (1, 1, *input.shape[2:]), "b1": (len(input), 1, *input.shape[2:])}
        return torch.full(sizes[self.shape], self.value, device=input.device)


@st.composite
def trees(draw: Draw, /, depth: int = 2) -> tuple[Mixer, set[float]]:
    """A tree of choices of one to five entries, and the numbers that it may draw."""
    p = draw(st.sampled_from([1.0, 1.0, 0.5, 0.0]))
    if depth == 0 or draw(st.booleans()):
        value = draw(st.integers(0, 7)) / 8
        mixer: Mixer = Constant(value, draw(st.sampled_from(["", "b", "1", "b1"])), p)
        return mixer, ({value} if p else set()) | ({1.0} if p < 1 else set())
    entries = draw(st.lists(trees(depth - 1), min_size=1, max_size=5))
    weights = draw(st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=len(entries), max_size=len(entries))))
    weights = None if weights is None or not any(weights) else weights
    mixer = RandomChoice([entry for entry, _ in entries], weights, p=p, per_sample=draw(st.booleans()))
    chosen = [values for i, (_, values) in enumerate(entries) if weights is None or weights[i]]
    return mixer, (set().union(*chosen) if p else set()) | ({1.0} if p < 1 else set())
