"""README's "Why": what CutMix of other libraries makes of a batch. A library that is not installed is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.needs(),  # each library
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo, in kornia
]
x, y, logits = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.linspace(-2, 3, 20).view(4, 5).sin()
MODULES = {"torchvision": "torchvision.transforms.v2", "timm": "timm.data.mixup", "kornia": "kornia.augmentation"}
LABELS = torch.tensor([0, 1, -100, 3]), torch.randint(5, (4, 8, 8)), torch.rand(4) + 0.5  # ignored, of pixels, numbers
OUTCOMES: dict[str, tuple[Any, ...]] = {  # of these: an error, or the size of what comes out
    "torchvision": ("non-negative", "labels should be", "one_hot"),
    "timm": ("out of bounds", (4 * 64, 5), (4, 5)),
    "kornia": ((1, 4, 3), "equal size", (1, 4, 3)),  # pairs of labels and shares, for a loss of yours
}


@pytest.fixture(params=OUTCOMES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    monkeypatch.setattr("torch.library.register_fake", lambda *_, **__: lambda f: f)  # of operators that may be missing
    module = pytest.importorskip(MODULES[request.param], reason=f"needs {request.param}", exc_type=ImportError)
    if request.param == "timm":
        return request.param, module.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
    if request.param == "torchvision":
        return request.param, module.CutMix(num_classes=5)
    return request.param, module.RandomCutMixV2(data_keys=["input", "class"])


def test_labels_other_than_classes_and_the_settings_of_the_loss(library: tuple[str, Any]) -> None:
    name, cutmix = library
    for target, outcome in zip(LABELS, OUTCOMES[name], strict=True):
        if isinstance(outcome, tuple):
            assert (out := cutmix(x.clone(), target)[1]).shape == outcome
            assert name != "timm" or target.ndim > 1 or out[:, 2:].sum() == 0  # a number becomes the class below it
        else:
            with pytest.raises((RuntimeError, ValueError), match=outcome):
                cutmix(x.clone(), target)
    if name != "kornia":
        weight, dense = torch.tensor([1.0, 10.0, 1.0, 1.0, 1.0]), cutmix(x.clone(), y)[1]
        total = -(dense * weight * logits.log_softmax(1)).sum()
        torch.testing.assert_close(F.cross_entropy(logits, dense, weight), total / 4)  # not (dense * weight).sum()
        with pytest.raises(RuntimeError, match="ignore_index is not supported"):
            F.cross_entropy(logits, dense, ignore_index=2)


def test_no_graph_holds_the_draw_and_timm_wants_even_batches_and_overwrites(library: tuple[str, Any]) -> None:
    name, cutmix = library
    with pytest.raises(Exception, match="data-dependent|unbacked"):
        torch.compile(lambda *batch: cutmix(*batch), fullgraph=True, backend="eager")(x.clone(), y)
    while torch.equal(mixed := cutmix(batch := x.clone(), y)[0], x):  # an empty box
        pass
    assert (mixed is batch, torch.equal(batch, x)) == (name == "timm", name != "timm")
    if name == "timm":
        with pytest.raises(AssertionError, match="even"):
            cutmix(x[:3].clone(), y[:3])
