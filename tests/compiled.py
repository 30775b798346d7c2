"""What the tests of compiled code share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

from mixup_nn import Mix, Mixer, MixUpCriterion
from mixup_nn.functional import mix_inputs

from .cases import MIXERS

CLASSES = 10  # from 8 on Inductor does not unroll a row of logits


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **options)


class Counted:
    """Compile a function, and count its graphs."""

    def __init__(self, function: Callable[..., Any], backend: str = "eager", **options: Any) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.function = compiled(function, backend=self.counter, **options)

    def graphs_after(self, *args: Any) -> int:
        self.function(*args)
        return self.counter.frame_count


def images(batch_size: int = 6, size: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, size, size, device=device), torch.randint(CLASSES, (batch_size,), device=device)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))


def mixers_of(*names: str) -> list[Mixer]:
    return [MIXERS[name]() for name in names or MIXERS]


class Survival(NamedTuple):
    time: Tensor
    event: Tensor


Parts = dict[str, Any]


def batch(batch_size: int = 6) -> tuple[Tensor, Parts]:
    """Images, and a target in parts."""
    input, label = images(batch_size)
    survival = Survival(torch.randn(batch_size), torch.randint(2, (batch_size,)))
    return input, {"label": label, "survival": survival, "weight": torch.rand(batch_size)}


def losses_of(output: Tensor, target: Parts) -> Tensor:
    """A classifier, and a time that counts where its event came, with a weight for each sample."""
    time, event = target["survival"]
    losses = F.cross_entropy(output, target["label"], reduction="none")
    weighted: Tensor = target["weight"] * (losses + event * (output[:, 0] - time).square())
    return weighted


class Steps(nn.Module):
    """A model that mixes in several ways, each with a loss of labels and one of a target in parts."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.mixers, self.first, self.last = mixers_of(*names), nn.Dropout(0.0), classifier()
        self.of_labels = [MixUpCriterion(nn.CrossEntropyLoss(), mixer) for mixer in self.mixers]
        self.of_parts = [MixUpCriterion(losses_of, mixer) for mixer in self.mixers]
        self.modes = nn.ModuleList([*self.mixers, *self.of_labels, *self.of_parts])

    def forward(self, input: Tensor, target: Parts, *mix: Mix) -> list[tuple[Tensor, Tensor, Mix | None]]:
        results = []
        for mixer, of_labels, of_parts in zip(self.mixers, self.of_labels, self.of_parts, strict=True):
            output = self.last(mixer(self.first(input), *mix))
            losses = of_labels(output, target["label"], *mix), of_parts(output, target, *mix)
            results.append((*losses, mix[0] if mix else mixer.last_mix))
        return results

    def plain(self, input: Tensor, target: Parts, mix: Mix | None = None) -> tuple[Tensor, Tensor]:
        """Both losses without a mixer, or by the formula."""
        output = self.last(self.first(input if mix is None else mix_inputs(input, mix)))
        pair = F.cross_entropy(output, target["label"], reduction="none"), losses_of(output, target)
        if mix is not None:
            partners, lam = self.losses_of_partners(output, target, mix.index), mix.share
            pair = lam * pair[0] + (1 - lam) * partners[0], lam * pair[1] + (1 - lam) * partners[1]
        return pair[0].mean(), pair[1]

    def losses_of_partners(self, output: Tensor, target: Parts, index: Tensor) -> tuple[Tensor, Tensor]:
        partners: Parts = tree_map(lambda part: part[index], target)
        return F.cross_entropy(output, partners["label"], reduction="none"), losses_of(output, partners)

    def assert_formula(
        self, results: list[tuple[Tensor, Tensor, Mix | None]], input: Tensor, target: Parts, exported: bool = False
    ) -> None:
        expected = [self.plain(input, target, mix) for *_, mix in results]
        for values in zip(results, expected, strict=True):
            torch.testing.assert_close(values[0][:2], values[1])
        sums = [torch.stack([of_labels + of_parts.sum() for of_labels, of_parts, *_ in v]) for v in (results, expected)]
        if not exported:  # whose parameters are its own
            torch.testing.assert_close(
                *(torch.autograd.grad(each.sum(), list(self.last.parameters())) for each in sums)
            )
