"""What the tests of compiled code share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mixup_nn import Mixer

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


class Parallel(nn.Module):
    """Mixers side by side: compiled together, because compiling is what takes the time."""

    def __init__(self, mixers: Iterable[Mixer]) -> None:
        super().__init__()
        self.mixers = list(mixers)
        self.branches = nn.ModuleList(self.mixers)

    def forward(self, input: Tensor) -> list[Tensor]:
        return [branch(input) for branch in self.branches]
