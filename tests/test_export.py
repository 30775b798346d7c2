"""Programs of torch.export: drawn anew at each call, with a given mix, with criteria, at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixup_nn import Mix

from .cases import lams_of
from .compiled import Steps, Survival, batch, classifier, images, mixers_of
from .test_draws import is_a_cycle
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


B = {0: torch.export.Dim("b", min=1)}
TARGET = {"label": B, "survival": Survival(B, B), "weight": B}  # type: ignore[arg-type]


@ANY_BATCH_SIZE.required
@pytest.mark.parametrize("name", lams_of(4, 4))
def test_a_program_with_a_given_mix_takes_any_batch_and_has_its_gradients(name: str) -> None:
    model, mix = Steps("choice"), lams_of(4, 4)[name]
    own = mix.lam.shape[:1] == (4,)
    shapes = B, TARGET, (Mix(B if own else None, B),)  # type: ignore[arg-type]
    program = torch.export.export(model, (*batch(4), mix), dynamic_shapes=shapes).module()
    for size in (4, 1, 2, 7):
        arguments, index = batch(size), torch.arange(size).roll(1)
        lam = (mix.lam[torch.arange(size) % 4] if own else mix.lam.clone()).requires_grad_()
        results = program(*arguments, Mix(lam, index))
        model.assert_formula(results, *arguments, exported=True)
        both = results[0], model(*arguments, Mix(lam, index))[0]
        torch.testing.assert_close(*(torch.autograd.grad(a + b.sum(), lam) for a, b, _ in both))


@ANY_BATCH_SIZE.required
@EXPORT_RESTORES.required
@strict_and_not
def test_a_program_with_criteria_draws_at_each_call_and_mixes_by_its_draw_at_any_batch_size(strict: bool) -> None:
    model = Steps()
    for mixer in model.mixers[::2]:
        mixer(images()[0])
    before = [repr(mixer.last_mix) for mixer in model.mixers]
    program = torch.export.export(model, batch(4), dynamic_shapes=(B, TARGET), strict=strict).module()
    assert [repr(mixer.last_mix) for mixer in model.mixers] == before  # no fake tensor
    for size in (4, 1, 2, 7):
        arguments, indices = batch(size), []
        for _ in range(2):
            results = program(*arguments)
            model.assert_formula(results, *arguments, exported=True)
            indices.append([mix.index for *_, mix in results])
        assert all(map(is_a_cycle, indices[0]))
    assert not any(map(torch.equal, *indices))  # one of 720 cycles
