"""How much work is done: whole samples are gathered, one log-softmax is taken, no dense target is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mixup_nn import Mix, MixUpCriterion
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss

from .cases import SCALAR, Operations, both_lams, every_lam, per_position
from .strategies import LAYOUTS

INDICES = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", ((5,), (5, 6), (2, 5, 6)))
def test_whole_samples_are_gathered_where_the_layout_allows_it(layout: str, spatial: tuple[int, ...]) -> None:
    input = LAYOUTS[layout](torch.randn(4, 3, *spatial))
    with Operations() as operations:
        output = mix_inputs(input, SCALAR)
    kept = {"contiguous", "channels_last", "odd_strides", "odd_strides_of_channels_last"}
    whole = layout in kept or (layout == "transposed" and spatial == (5,))
    gathered = [name for name, _ in operations.made if name.startswith("index")]
    assert gathered == ["index_select" if whole else "index"]
    assert not whole or output.stride() == input.stride()


def test_one_map_for_all_samples_is_spread_along_channels_that_come_last() -> None:
    """The CPU is slow to broadcast along channels that lie side by side."""
    input = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    with Operations() as operations:
        mix_inputs(input, per_position(5, 6, per_sample=False))
    assert ("clone", 3 * 5 * 6) in operations.made


@every_lam(2, 3)
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(500)}))
def test_class_indices_cost_one_log_softmax_and_no_dense_target(mix: Mix, options: dict[str, Any]) -> None:
    input = torch.randn(4, 500)
    with Operations() as operations:
        mix_loss(nn.CrossEntropyLoss(**options), input, INDICES, mix)
    assert [name for name, size in operations.made if size >= input.numel()].count("_log_softmax") == 1
    assert not options or "label_smoothing" in options or len([1 for _, n in operations.made if n >= 2000]) == 1


@both_lams
def test_large_logits_are_looked_up_once_for_both_labels(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lookup has a dense gradient, which at that size is what a loss costs."""
    for large, lookups in ((13, 2), (12, 1)):
        monkeypatch.setattr("mixup_nn._losses.LARGE", large)
        with Operations() as operations:
            mix_cross_entropy(torch.randn(4, 3), INDICES, mix)
        assert sum(operations.launched.count(name) for name in ("nll_loss_forward", "gather")) == lookups


def of_mean(mix: Mix, dtype: torch.dtype, options: dict[str, Any], *, backward: bool) -> list[str]:
    """What the mean of a criterion launches, as in a training step."""
    logits, labels = torch.randn(256, 1000).to(dtype).requires_grad_(), torch.randint(1000, (256,))
    weight = torch.rand(1000) if options.get("weight") else None
    criterion = MixUpCriterion(nn.CrossEntropyLoss(**options | {"weight": weight}))
    with Operations() as operations:
        loss = criterion(logits, labels, mix)
        if backward:
            loss.backward()
    return [name for name in operations.launched if name not in ("ones_like", "detach", "add_")]


@pytest.mark.parametrize(
    "most, options", ((12, {}), (16, {"weight": True}), (19, {"weight": True, "label_smoothing": 0.1}))
)
def test_one_lam_per_sample_costs_few_operations(most: int, options: dict[str, Any]) -> None:
    mix = Mix(torch.rand(256), torch.randperm(256))
    assert len(of_mean(mix, torch.float32, options, backward=False)) <= most


@pytest.mark.parametrize(
    "most, dtype, label_smoothing",
    ((16, torch.float32, 0.0), (26, torch.float32, 0.1), (20, torch.bfloat16, 0.0), (30, torch.bfloat16, 0.1)),
)
def test_one_lam_per_batch_costs_few_launches_with_backward(
    most: int, dtype: torch.dtype, label_smoothing: float
) -> None:
    mix = Mix(torch.rand(()), torch.randperm(256))
    launched = of_mean(mix, dtype, {"label_smoothing": label_smoothing}, backward=True)
    assert len(launched) + launched.count("nll_loss_backward") <= most  # on CUDA it fills its result with zeros first
