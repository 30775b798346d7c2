"""Programs of torch.export: drawn anew at each call, with a given mix, with a criterion, at any batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup_nn import Mix, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_inputs, mix_loss

from .cases import MIXERS, applied, lams_of
from .compiled import CLASSES, Parallel, classifier, images, mixers_of
from .versions import ANY_BATCH_SIZE, EXPORT_RESTORES

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),  # last_mix
    pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning"),  # torch puts them back
]
strict_and_not = pytest.mark.parametrize("strict", (True, False), ids=("strict", "not_strict"))


@strict_and_not
def test_export_of_the_eval_model_is_the_model_without_it(strict: bool) -> None:
    head, (input, _) = classifier(), images()
    model = nn.Sequential(*mixers_of(), head).eval()
    exported = torch.export.export(model, (input,), strict=strict).module()
    torch.testing.assert_close(exported(input), head(input))


@EXPORT_RESTORES.required
@strict_and_not
def test_export_in_training_mode_draws_at_each_call_and_leaves_last_mix_alone(strict: bool) -> None:
    model, input = Parallel(mixers_of()), torch.eye(4).view(4, 4, 1, 1).expand(4, 4, 3, 3)
    for mixer in model.mixers[::2]:
        mixer(input)
    before = [repr(mixer.last_mix) for mixer in model.mixers]
    program = torch.export.export(model, (input,), strict=strict).module()
    assert [repr(mixer.last_mix) for mixer in model.mixers] == before  # no fake tensor
    for name, first, second in zip(MIXERS, program(input), program(input), strict=True):
        assert not torch.equal(first, second), name
        torch.testing.assert_close(first.sum(1), torch.ones(4, 3, 3))


class Given(nn.Module):
    """A program that gets its mix, as a second stage would: inputs, criterion and loss of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = RandomChoice(mixers_of("mixup", "cutmix"))
        self.head = nn.Conv2d(3, CLASSES, 1)
        self.criterion = MixUpCriterion(nn.CrossEntropyLoss(torch.linspace(0.5, 2, CLASSES), label_smoothing=0.1))

    def forward(self, input: Tensor, target: dict[str, Tensor], mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
        output = self.head(self.mixer(input, mix)).mean((2, 3))
        return output, self.criterion(output, target["label"], mix), mix_loss(weighted, output, target, mix)


def weighted(output: Tensor, target: dict[str, Tensor]) -> Tensor:
    return target["weight"] * F.cross_entropy(output, target["label"], reduction="none")


def labelled(batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    input, label = images(batch_size, 8)
    return input, {"label": label, "weight": torch.rand(batch_size)}


BATCH = {0: torch.export.Dim("b", min=1)}
TARGET = {"label": BATCH, "weight": BATCH}


@ANY_BATCH_SIZE.required
@pytest.mark.parametrize("name", lams_of(8, 8))
def test_a_program_with_a_given_mix_takes_any_batch_and_has_its_gradients(name: str) -> None:
    model, (input, target), mix = Given(), labelled(4), lams_of(8, 8)[name]
    shapes = {"input": BATCH, "target": TARGET, "mix": (BATCH if mix.lam.shape[:1] == (4,) else None, BATCH)}
    program = torch.export.export(model, (input, target, mix), dynamic_shapes=shapes).module()
    for size in (4, 1, 2, 7):
        input, target = labelled(size)
        lam = mix.lam[:1].expand(size, *mix.lam.shape[1:]).clone() if mix.lam.shape[:1] == (4,) else mix.lam
        lam, index = lam.requires_grad_(), torch.arange(size).roll(1)
        results = [module(input, target, Mix(lam, index)) for module in (program, model)]
        torch.testing.assert_close(*results)
        gradients = [
            torch.autograd.grad(result[1] + result[2].sum(), (lam, *module.parameters()))
            for module, result in zip((program, model), results, strict=True)
        ]
        torch.testing.assert_close(*gradients)


class Linked(nn.Module):
    """Training steps with linked criteria, and the mixes that they followed."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = mixers_of()
        self.branches, self.head = nn.ModuleList(self.mixers), nn.Conv2d(3, CLASSES, 1)
        self.criteria = nn.ModuleList(MixUpCriterion(nn.CrossEntropyLoss(), mixer) for mixer in self.mixers)
        self.of_parts = nn.ModuleList(MixUpCriterion(weighted, mixer) for mixer in self.mixers)

    def forward(self, input: Tensor, target: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        results = []
        for mixer, criterion, of_parts in zip(self.mixers, self.criteria, self.of_parts, strict=True):
            output = self.head(mixer(input)).mean((2, 3))
            losses = criterion(output, target["label"]), of_parts(output, target)
            results.append((*losses, *(part.clone() for part in applied(mixer))))
        return results


@ANY_BATCH_SIZE.required
@EXPORT_RESTORES.required
@strict_and_not
def test_a_program_with_a_criterion_mixes_the_targets_of_its_draw_at_any_batch_size(strict: bool) -> None:
    model, (input, target) = Linked(), labelled(4)
    shapes = {"input": BATCH, "target": TARGET}
    program = torch.export.export(model, (input, target), dynamic_shapes=shapes, strict=strict).module()
    for size in (4, 1, 2, 7):
        input, target = labelled(size)
        for loss, of_parts, lam, index in program(input, target):
            mix = Mix(lam, index)
            output = model.head(mix_inputs(input, mix)).mean((2, 3))
            torch.testing.assert_close(loss, MixUpCriterion(nn.CrossEntropyLoss())(output, target["label"], mix))
            own, partner = (weighted(output, {k: v[i] for k, v in target.items()}) for i in (torch.arange(size), index))
            torch.testing.assert_close(of_parts, mix.share * own + (1 - mix.share) * partner)
            assert sorted(index.tolist()) == list(range(size))
            assert size == 1 or (index != torch.arange(size)).all()
