"""One table of errors: each guard of the package has a row, with what would happen without it."""

# mypy: disable-error-code="arg-type, call-arg, dict-item, list-item, no-untyped-call, return-value"
# The rows call what types forbid.

from __future__ import annotations

import ast
import functools
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import mixup_nn
from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss, mix_targets, mixup_batch
from mixup_nn.sampling import sample_beta, sample_cutmix, sample_mixup

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mixup_nn.__file__).parent

X, LOGITS, Y, SOFT = torch.rand(4, 3, 6, 6), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)
LABELS = torch.randint(3, (4, 6, 6))
INDEX = torch.tensor([1, 2, 3, 0])
MIX = Mix(torch.tensor(0.3), INDEX)
PER_SAMPLE = Mix(torch.rand(4), INDEX)
BOX = Mix((torch.rand(1, 1, 6, 6) < 0.5).float(), INDEX)
CROSS_ENTROPY = nn.CrossEntropyLoss()
MESSAGE = 200  # characters


class Mirrored(MixUp):
    def sample(self, input: Tensor) -> Mix:
        return super().sample(input)._replace(index=torch.arange(len(input)).flip(0))


class Near(MixUp):
    def sample_index(self, input: Tensor) -> Tensor:
        return torch.arange(len(input)).roll(1)


class Resized(MixUp):
    def forward(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        return super().forward(input.flip(-1), mix)


class Hits:
    """As a metric of torchmetrics: it counts what it is called with."""

    def update(self) -> None: ...

    def compute(self) -> None: ...

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float()


class Dice(nn.Module):
    """One number for the batch; a compound holds another loss, as DiceCELoss does."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.reduction = inner, "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        dense = F.one_hot(target, input.shape[1]).movedim(-1, 1)
        loss = 1 - 2 * (input.softmax(1) * dense).sum() / (1 + dense).sum()
        return loss if self.inner is None else loss + self.inner(input, target)


class Focal(nn.Module):
    """Its mean is over the targets that are not ignored, as it alone knows."""

    ignore_index, reduction = 255, "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(input, target, ignore_index=255, reduction="none")
        return losses if self.reduction == "none" else losses.sum() / (target != 255).sum()


class Ratio(nn.Module):
    """A mean of its own, whose denominator is one of the parts."""

    reduction = "mean"

    def forward(self, input: Tensor, target: dict[str, Tensor]) -> Tensor:
        losses = target["weight"] * F.cross_entropy(input, target["labels"], reduction="none")
        return losses if self.reduction == "none" else losses.sum() / target["weight"].sum()


class Pair(NamedTuple):
    first: Any
    second: Any


def of_parts(input: Tensor, target: Any) -> Tensor:  # noqa: ARG001
    """Losses of samples, from whatever target."""
    return input.sum(1)


class Updated(nn.MSELoss):
    """No metric: it has a method with a name that metrics use too."""

    def update(self) -> None: ...


class Holding(nn.MSELoss):
    """A loss that mixes something by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = MixUp()


class Quarter(Mixer):
    def sample_lam(self, input: Tensor) -> Tensor:  # noqa: ARG002
        return 0.25


def linked(mixer: Mixer | None = None, loss: Any = CROSS_ENTROPY, **options: Any) -> MixUpCriterion:
    """A criterion whose mixer has mixed a batch."""
    mixer = MixUp(1.0) if mixer is None else mixer
    mixer(X)
    return MixUpCriterion(loss, mixer, **options)


def without_gradients() -> None:
    criterion = linked()
    with torch.no_grad():
        criterion(LOGITS, Y)


def on_replicas() -> None:
    """What nn.DataParallel does: each replica draws, and the criterion follows the original."""
    mixer = MixUp()
    criterion = MixUpCriterion(CROSS_ENTROPY, mixer)
    mixer._replicate_for_data_parallel()(X)
    criterion(LOGITS, Y)


def replaced_entry(mixer: Mixer) -> None:
    choice = RandomChoice([MixUp(), CutMix()])
    choice.mixers[0] = mixer
    choice(X)


def appended_entry(weights: tuple[float, ...] | None) -> Tensor:
    choice = RandomChoice([MixUp(), CutMix()], weights)
    choice.mixers.append(MixUp())
    mixed: Tensor = choice(X)
    return mixed


class Row(NamedTuple):
    """A call, its error, a word that the error must say, and what would happen without the guard."""

    call: Callable[[], Any]
    error: type[Exception]
    word: str
    without: str


GUARDS: dict[str, Row] = {
    # The doors
    "list for an input": Row(lambda: mix_inputs([1.0], MIX), TypeError, "list", "an attribute that lists lack"),
    "array for an input": Row(lambda: MixUp()(np.ones((4, 3))), TypeError, "Guide, Where", "an attribute"),
    "proxy for an input": Row(lambda: torch.fx.symbolic_trace(MixUp()), TypeError, "Guide, Where", "one lam, traced"),
    "number for a target": Row(lambda: linked()(LOGITS, 1), TypeError, "int", "an attribute that numbers lack"),
    "third tensor": Row(lambda: linked()(LOGITS, Y, SOFT), TypeError, "Programs, Losses of more than two", "a mix"),
    "tuple for a mix": Row(lambda: mix_inputs(X, (MIX.lam, INDEX)), TypeError, "tuple", "any pair would be a mix"),
    "labels for a mix": Row(lambda: MixUp()(X, Y), TypeError, "Tensor", "labels of two samples unpacked as lam, index"),
    "None for a mix": Row(lambda: mix_inputs(X, None), TypeError, "Which mix", "None cannot be unpacked"),
    "number for lam": Row(lambda: mix_inputs(X, Mix(0.7, INDEX)), TypeError, "float", "an attribute that floats lack"),
    "number from sample_lam": Row(lambda: Quarter()(X), TypeError, "float", "the same"),
    "number from sample_lam behind a gate": Row(lambda: Quarter(p=0.5)(X), TypeError, "float", "no shape"),
    "number from sample_lam in a choice": Row(lambda: RandomChoice([Quarter()])(X), TypeError, "float", "no ndim"),
    "integer lam": Row(lambda: mix_inputs(X, Mix(Y[0], INDEX)), TypeError, "int64", "a share that no mean can have"),
    "bytes for an index": Row(lambda: mix_inputs(X, Mix(MIX.lam, INDEX.byte())), TypeError, "uint8", "taken as a mask"),
    "lam of two samples for four": Row(
        lambda: mix_inputs(X, Mix(torch.rand(2), INDEX)), ValueError, "(2,)", "torch's words about broadcasting"),
    "lam of a column": Row(
        lambda: mix_targets(SOFT, Mix(torch.rand(4, 1), INDEX)), ValueError, "(4, 1)", "a weight for each class"),
    "lam with channels": Row(lambda: mix_inputs(X, Mix(X, INDEX)), ValueError, "(4, 3, 6, 6)", "no share for a label"),
    "index of two dimensions": Row(lambda: mix_inputs(X, Mix(MIX.lam, INDEX[:, None])), ValueError, "(4, 1)", "index"),
    "another batch size": Row(lambda: linked()(LOGITS[:1], Y[:1]), ValueError, "4", "one sample broadcast to four"),
    "flattened output": Row(
        lambda: linked()(torch.rand(24, 3), torch.zeros(24).long()), ValueError, "Programs, Another batch size",
        "partners of other samples"),
    "no batch": Row(lambda: mix_targets(torch.tensor(1.0), MIX), ValueError, "()", "one number broadcast to four"),
    "bytes of an image": Row(lambda: MixUp()(X.byte()), TypeError, "Where", "lerp_kernel not implemented for Byte"),
    "token numbers": Row(lambda: MixUp()(Y), TypeError, "Where", "lerp_kernel not implemented for Long"),
    "input of other positions": Row(
        lambda: mix_inputs(torch.rand(4, 1, 3, 6, 6), BOX), ValueError, "(6, 6)", "the box in every frame, for one"),
    "input without channels": Row(lambda: mix_inputs(LABELS.float(), BOX), ValueError, "(4, 6, 6)", "lam as channels"),
    "integer target of a vector": Row(
        lambda: mix_targets(torch.zeros(4, 6).long(), BOX, 3), ValueError, "Targets", "the share, if a row was meant"),
    "target of other positions": Row(
        lambda: mix_targets(torch.zeros(4, 3, 3), BOX), ValueError, "(4, 3, 3)", "the share, or words about sizes"),
    "values per frame": Row(
        lambda: mix_targets(torch.zeros(4, 2, 3, 6), BOX), ValueError, "(4, 2, 3, 6)", "words about sizes"),
    "target of mixup_batch": Row(lambda: mixup_batch(X, Y[:3]), ValueError, "batch size", "partners that do not exist"),
    # Targets in parts
    "parts in a list": Row(lambda: linked(loss=of_parts)(LOGITS, [Y, SOFT]), TypeError, "in parts", "samples"),
    "parts in a tuple": Row(lambda: linked(loss=of_parts)(LOGITS, (Y, SOFT)), TypeError, "in parts", "samples taken"),
    "a list in a dict": Row(
        lambda: linked(loss=of_parts)(LOGITS, {"a": {"b": [Y, Y, Y, Y]}}), TypeError, "in parts", "samples for parts"),
    "a tuple in a named tuple": Row(
        lambda: mix_loss(of_parts, LOGITS, Pair(Y, (Y, Y)), MIX), TypeError, "in parts", "samples for parts"),
    "a number among the parts": Row(
        lambda: linked(loss=of_parts)(LOGITS, {"a": Y, "b": 0.5}), TypeError, "float", "an attribute that floats lack"),
    "a part of another batch size": Row(
        lambda: linked(loss=of_parts)(LOGITS, {"a": Y, "b": Y[:3]}), ValueError, "(3,)", "partners that do not exist"),
    "a part with no batch": Row(
        lambda: mix_loss(of_parts, LOGITS, Pair(Y, torch.tensor(2.0)), MIX), ValueError, "()", "no first dimension"),
    "a part with positions": Row(
        lambda: mix_loss(of_parts, X, {"a": Y, "b": LABELS}, BOX), ValueError, "in parts", "one share for all of them"),
    "parts made dense": Row(
        lambda: linked(loss=of_parts, interpolate_loss=False)(LOGITS, {"a": Y}), TypeError, "in parts",
        "one of the parts made dense"),
    "a mean of parts": Row(
        lambda: mix_loss(Ratio(), LOGITS, {"labels": Y, "weight": SOFT[:, 0]}, PER_SAMPLE), ValueError, "Reductions",
        "divided by the number of samples"),
    "parts for mix_targets": Row(lambda: mix_targets({"a": Y}, MIX, 3), TypeError, "dict", "an attribute"),
    # Targets
    "class indices without num_classes": Row(lambda: mix_targets(Y, MIX), TypeError, "num_classes", "a size of None"),
    "bool for labels": Row(lambda: mix_targets(SOFT > 0.5, MIX, 3), TypeError, "bool", "multi-hot read as indices"),
    "complex targets": Row(lambda: mix_targets(Y * 1j, MIX, 3), TypeError, "complex64", "their real part as indices"),
    "multi-hot integers": Row(
        lambda: linked(loss=nn.MSELoss(), interpolate_loss=False)(LOGITS, torch.ones(4, 3).long()),
        ValueError, "(B, C, *)", "made dense once more, and broadcast"),
    "class indices for one logit": Row(
        lambda: MixUpCriterion(nn.BCEWithLogitsLoss(), interpolate_loss=False)(LOGITS[:, :1], 0 * Y, MIX),
        ValueError, "two or more", "label 0 becomes 1.0"),
    "class indices for one logit in eval": Row(
        lambda: linked(loss=nn.BCEWithLogitsLoss(), interpolate_loss=False).eval()(LOGITS[:, :1], 0 * Y),
        ValueError, "two or more", "label 0 becomes 1.0"),
    "output without classes": Row(
        lambda: linked(loss=nn.MSELoss(), interpolate_loss=False)({"a": LOGITS}, Y), ValueError, "dict", "no shape"),
    "labels of one channel for class indices": Row(
        lambda: linked(MixUp(1.0))(X, LABELS[:, None]), ValueError, "(4, 1, 6, 6)", "large logits would gather a part"),
    "floats of one channel": Row(
        lambda: linked(MixUp(), nn.MSELoss())(X[..., 0], X[:, :1, :, 0]), ValueError, "Loss or targets",
        "the numbers of two classes averaged"),
    # Options of a loss
    "smoothing of more than one": Row(
        lambda: mix_cross_entropy(LOGITS, Y, MIX, label_smoothing=1.1), ValueError, "label_smoothing", "a wrong loss"),
    "class weights of another dtype": Row(
        lambda: mix_cross_entropy(LOGITS.bfloat16(), Y, MIX, weight=SOFT[0]), RuntimeError, "float32",
        "a loss here, and none in eval mode"),
    "class weights of more classes": Row(
        lambda: mix_cross_entropy(LOGITS, Y, PER_SAMPLE, weight=torch.rand(7)), RuntimeError, "(7,)",
        "a loss of large logits"),
    "unknown reduction": Row(
        lambda: mix_cross_entropy(LOGITS, Y, PER_SAMPLE, reduction="max"), ValueError, "'max'", "no reduction"),
    "metric with state": Row(
        lambda: mix_loss(Hits(), LOGITS, Y, MIX), TypeError, "Accuracy while mixing", "each sample counted twice"),
    "mean over ignored targets": Row(
        lambda: mix_loss(Focal(), LOGITS, Y, PER_SAMPLE), ValueError, "Reductions", "a mean over all of them"),
    # A loss of one number for the batch: one text
    "Dice per sample": Row(lambda: mix_loss(Dice(), X, LABELS, PER_SAMPLE), ValueError, "Reductions", "broadcast"),
    "Dice per position": Row(lambda: mix_loss(Dice(), X, LABELS, BOX), ValueError, "Reductions", "broadcast"),
    "Dice and cross entropy": Row(
        lambda: mix_loss(Dice(nn.CrossEntropyLoss()), X, LABELS, BOX), ValueError, "Reductions", "half of it weighed"),
    "a function": Row(
        lambda: mix_loss(F.cross_entropy, LOGITS, Y, PER_SAMPLE), ValueError, "Reductions", "a mean, weighed B times"),
    "a loss per column": Row(
        lambda: mix_loss(lambda a, b: (a - b).square().mean(2), X, X.flip(0), BOX), ValueError, "(4, 3, 6)", "same"),
    "a loss per class": Row(
        lambda: mix_loss(lambda a, b: (a - b).square().mean((2, 3), keepdim=True), X, X.flip(0), BOX),
        ValueError, "(4, 3, 1, 1)", "enlarged to the map of lam"),
    # The criterion
    "class for a loss": Row(lambda: MixUpCriterion(nn.MSELoss), TypeError, "MSELoss()", "a tensor has no truth value"),
    "criterion in a criterion": Row(
        lambda: MixUpCriterion(MixUpCriterion(nn.KLDivLoss(log_target=True))), TypeError, "Two mixes", "logs mixed"),
    "compiled criterion in a criterion": Row(
        lambda: MixUpCriterion(torch.compile(MixUpCriterion(nn.L1Loss()), backend="eager")), TypeError, "Two", "same"),
    "criterion in a loss": Row(
        lambda: setattr(linked(), "loss", nn.ModuleList([MixUpCriterion(CROSS_ENTROPY)])), TypeError, "Two", "same"),
    "word for interpolate_loss": Row(
        lambda: MixUpCriterion(CROSS_ENTROPY, interpolate_loss="targets"), TypeError, "'targets'", "taken for True"),
    "mixed targets of hinge": Row(
        lambda: MixUpCriterion(nn.HingeEmbeddingLoss(), interpolate_loss=False), ValueError, "True", "labels averaged"),
    "mixed logarithms": Row(
        lambda: MixUpCriterion(functools.partial(F.kl_div, log_target=True), interpolate_loss=False), ValueError,
        "logarithms", "logarithms averaged"),
    "a model for a mixer": Row(
        lambda: MixUpCriterion(CROSS_ENTROPY, nn.Sequential(MixUp())), TypeError, "Sequential", "no last_mix, later"),
    "class for a mixer": Row(lambda: MixUpCriterion(CROSS_ENTROPY, MixUp), TypeError, "the class MixUp", "later"),
    "mixer and loss swapped": Row(lambda: MixUpCriterion(MixUp(), CROSS_ENTROPY), TypeError, "CrossEntropy", "later"),
    "nothing mixed": Row(
        lambda: MixUpCriterion(CROSS_ENTROPY, MixUp())(LOGITS, Y), RuntimeError, "Which mix is used", "the plain loss"),
    "on replicas": Row(on_replicas, RuntimeError, "DistributedDataParallel", "an earlier draw"),
    "gradients off": Row(without_gradients, RuntimeError, "Criterion, Which mix", "the mix of the last batch"),
    # Draws and mixers
    "alpha of zero": Row(lambda: sample_beta(0), ValueError, "> 0", "NaN"),
    "negative alpha": Row(lambda: MixUp(-1), ValueError, ">= 0", "NaN"),
    "infinite alpha": Row(lambda: sample_mixup(4, float("inf")), ValueError, "inf", "lam = 1/2 in silence"),
    "alpha of mixup_batch": Row(lambda: mixup_batch(X, Y, alpha=-1), ValueError, "alpha", "NaN"),
    "p above one": Row(lambda: CutMix(p=1.1), ValueError, "[0, 1]", "always mixed"),
    "p that is NaN": Row(lambda: sample_mixup(4, p=float("nan")), ValueError, "nan", "never mixed"),
    "spatial_dims of a float": Row(lambda: CutMix(spatial_dims=2.0), ValueError, "2.0", "slices need integers, later"),
    "spatial_dims of four": Row(lambda: sample_cutmix((2, 3, 4), spatial_dims=4), ValueError, "4", "cuts the batch"),
    "a box in a table": Row(lambda: CutMix()(SOFT), ValueError, "Where", "cuts the classes"),
    "more dimensions cut than there are": Row(
        lambda: CutMix(spatial_dims=3)(X), ValueError, "spatial", "cuts the channels"),
    "six dimensions": Row(lambda: CutMix(spatial_dims=2)(X[:, :, None, None]), ValueError, "1 to 3", "untried sizes"),
    "five dimensions": Row(lambda: CutMix()(X[:, :, None]), ValueError, "spatial_dims", "a volume, for clips too"),
    "no sample_lam": Row(lambda: Mixer()(X), NotImplementedError, "sample_lam", "None for lam"),
    "mixers without a list": Row(lambda: RandomChoice(MixUp(), CutMix()), TypeError, "[MixUp(), CutMix()]", "iterable"),
    "classes in a choice": Row(lambda: RandomChoice([MixUp, CutMix]), TypeError, "the class MixUp", "a module is due"),
    "a sample of its own in a choice": Row(lambda: RandomChoice([Mirrored()]), TypeError, "Mirrored", "ignored"),
    "partners of its own in a choice": Row(lambda: RandomChoice([Near()]), TypeError, "Near", "ignored"),
    "a forward of its own in a choice": Row(lambda: RandomChoice([Resized()]), TypeError, "Resized", "ignored"),
    "a sample of its own put in later": Row(lambda: replaced_entry(Mirrored()), TypeError, "Mirrored", "ignored"),
    "an entry without a weight": Row(lambda: appended_entry((1, 3)), ValueError, "weights", "zip() has another length"),
    "negative weight": Row(lambda: RandomChoice([MixUp(), CutMix()], (2, -1))(X), ValueError, "weights", "wrong share"),
    "weights that are NaN": Row(lambda: RandomChoice([MixUp()], [float("nan")])(X), ValueError, "nan", "the last"),
    "infinite weights": Row(lambda: RandomChoice([MixUp()], [float("inf")])(X), ValueError, "inf", "the last"),
    "no weights": Row(lambda: RandomChoice([MixUp()], [])(X), ValueError, "weights", "zip() has another length"),
    "weights of zero": Row(lambda: RandomChoice([MixUp(), CutMix()], (0, 0))(X), ValueError, "weights", "the last"),
}  # fmt: skip


PASSES: dict[str, Callable[[], Any]] = {  # just inside of a door
    "lam of one sample": lambda: mix_inputs(X[:1], Mix(torch.rand(1), torch.tensor([0]))),
    "a map of one pixel": lambda: mix_inputs(X, Mix(torch.rand(4, 1, 1, 1), INDEX)),
    "floats per frame": lambda: mix_targets(torch.rand(4, 1, 6), Mix(torch.rand(1, 1, 6), INDEX)),
    "floats (B, N) under a map of N": lambda: mix_targets(torch.rand(4, 6), Mix(torch.rand(1, 1, 6), INDEX)),
    "a loss with a method update": lambda: mix_loss(Updated(), LOGITS, SOFT, PER_SAMPLE),
    "a loss that holds a mixer": lambda: MixUpCriterion(Holding())(LOGITS, SOFT, MIX),
    "ignore_index of None": lambda: mix_loss(
        type("Own", (nn.MSELoss,), {"ignore_index": None})(), LOGITS, SOFT, PER_SAMPLE
    ),
    "a sum over targets that are not ignored": lambda: mix_loss(
        type("Own", (Focal,), {"reduction": "sum"})(), LOGITS, Y, MIX
    ),
    "a function of one number for one lam": lambda: mix_loss(F.cross_entropy, LOGITS, Y, MIX),
    "a function of one number for one map": lambda: mix_loss(F.cross_entropy, LOGITS, Y, BOX),
    "floats of one channel for an output of one": lambda: MixUpCriterion(nn.MSELoss())(X[:, :1], X[:, 1:2], BOX),
    "floats of one channel, said to be values": lambda: MixUpCriterion(
        lambda a, b: (a - b).square(), interpolate_loss=False
    )(X, X[:, :1], BOX),
    "parts that are mean in all": lambda: mix_loss(Ratio(), LOGITS, {"labels": Y, "weight": SOFT[:, 0]}, MIX),
    "parts of one box": lambda: mix_loss(Ratio(), LOGITS, {"labels": Y, "weight": SOFT[:, 0]}, BOX),
    "a list without a mix": lambda: linked(loss=of_parts).eval()(LOGITS, [Y]),
    "sizes in a list": lambda: sample_cutmix([4, 3, 6, 6]).lam,
    "weights in an array": lambda: RandomChoice([MixUp(), CutMix()], np.array([0.0, 1.0]))(X),
    "weights in a tensor": lambda: RandomChoice([MixUp(), CutMix()], torch.tensor([0.0, 1.0]))(X),
    "a learned number for p": lambda: MixUp(p=np.float32(0.5))(X),
    "gradients off while the criterion is in eval mode": lambda: torch.no_grad()(linked().eval())(LOGITS, Y),
    "a given mix without gradients": lambda: torch.no_grad()(linked())(LOGITS, Y, MIX),
    "a replica in eval mode": lambda: MixUp().eval()._replicate_for_data_parallel()(X),
    "an entry that joins a choice of equal weights": lambda: appended_entry(None),
    "one box through a volume": lambda: CutMix(spatial_dims=1)(X[:, :, None]),
}

LEFT_TO_PYTHON_AND_TORCH: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "an option that does not exist": (lambda: MixUp(num_classes=10), TypeError),
    "options are keyword-only": (lambda: MixUp(0.2, 0.5), TypeError),
    "None for p": (lambda: MixUp(p=None), TypeError),
    "a list for p, as torchvision has it": (lambda: RandomChoice([MixUp()], p=[1.0]), TypeError),
    "a word for a weight": (lambda: RandomChoice([MixUp()], ("one",))(X), ValueError),
    "the alpha of a choice": (lambda: setattr(RandomChoice([MixUp()]), "alpha", 0.2), AttributeError),
    "no mixers": (lambda: RandomChoice([])(X), ValueError),
    "a batch for its size": (lambda: sample_mixup(X), TypeError),
    "a number for a shape": (lambda: sample_cutmix(4), TypeError),
    "a class that does not exist": (lambda: mix_targets(Y, MIX, 2), RuntimeError),
    "a class that has no logit": (lambda: mix_cross_entropy(LOGITS[:, :2], Y, MIX), IndexError),
    "class indices of 32 bits": (lambda: mix_cross_entropy(LOGITS, Y.int(), MIX), RuntimeError),
    "a reduction that torch does not have": (lambda: mix_cross_entropy(LOGITS, Y, MIX, reduction="max"), ValueError),
    "an output that is no tensor": (lambda: linked()({"logits": LOGITS}, Y), (TypeError, AttributeError)),
    "a loss that returns no tensor": (lambda: mix_loss(lambda *_: None, LOGITS, Y, MIX), AttributeError),
    "a sparse input": (lambda: mix_inputs(SOFT.to_sparse(), MIX), (RuntimeError, NotImplementedError)),
    "text for a loss": (lambda: MixUpCriterion("mse")(LOGITS, Y), TypeError),
}


@functools.cache
def error_of(name: str) -> pytest.ExceptionInfo[Exception]:
    with pytest.raises(GUARDS[name].error) as raised:
        GUARDS[name].call()
    return raised


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_says_what_was_expected(name: str) -> None:
    row, error = GUARDS[name], error_of(name).value
    assert type(error) is row.error
    assert row.word in str(error)
    assert "expected" in str(error) or row.error is NotImplementedError
    assert len(str(error)) <= MESSAGE
    assert not any(advice in str(error) for advice in ("criterion.eval()", "link the choice"))  # right in some cases


@pytest.mark.parametrize("name", PASSES)
def test_a_door_lets_pass_what_is_meant(name: str) -> None:
    value = PASSES[name]()
    assert value.isfinite().all()


@pytest.mark.parametrize("name", LEFT_TO_PYTHON_AND_TORCH)
def test_what_python_or_torch_refuses_is_loud(name: str) -> None:
    call, error = LEFT_TO_PYTHON_AND_TORCH[name]
    with pytest.raises(error):
        call()


def raises_of_the_package() -> Iterator[tuple[str, int, int]]:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.end_lineno is not None:
                yield path.name, node.lineno, node.end_lineno


def test_every_guard_has_a_row_and_most_texts_are_short() -> None:
    """A guard that no row reaches fails here: give it a row, or take it away."""
    seen: set[tuple[str, int]] = set()
    for name in GUARDS:
        frames = [frame for frame in traceback.extract_tb(error_of(name).tb) if Path(frame.filename).parent == PACKAGE]
        seen.add((Path(frames[-1].filename).name, frames[-1].lineno or 0))
    for file, first, last in raises_of_the_package():
        assert any(file == where and first <= line <= last for where, line in seen), (file, first)
    assert sorted(len(str(error_of(name).value)) for name in GUARDS)[len(GUARDS) // 2] <= 110


def test_the_pages_that_errors_name_exist() -> None:
    """Of messages as they are raised, however they are put together, and of the source."""
    pages = {page.read_text().partition("\n")[0].removeprefix("# "): page for page in (ROOT / "docs").glob("*.md")}
    texts = ["".join(path.read_text() for path in PACKAGE.glob("*.py"))]
    texts += [str(error_of(name).value) for name in GUARDS]
    named = {match for text in texts for match in re.findall(r"see docs: ([A-Z]\w+)(?:, ([A-Z][\w ]*\w))?", text)}
    assert len(named) > 8
    for page, section in sorted(named):
        headings = re.findall(r"^##+ (.*)$", pages[page].read_text(), re.MULTILINE)
        assert not section or section in headings, (page, section)
