"""What a GPU would see, on a machine that has none: tensors on ``meta`` have no data to wait for or to move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixup_nn import CutMix, Mix, Mixer, MixUpCriterion
from mixup_nn._mix import input_mix, target_mix
from mixup_nn.functional import mix_cross_entropy, mix_inputs, mix_loss, mix_targets, mixup_batch

from .cases import MIXERS, Operations, each_mixer
from .strategies import FORMS, KIND, LAYOUTS, covering, large_logits

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
CLASSES = 5


class OnlyMeta(TorchDispatchMode):
    """Fails at an operation that takes or makes a tensor of another device than ``meta``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, output)):
            assert not isinstance(value, Tensor) or value.is_meta, f"{func} on {value.device}"
        return output


def meta(*shape: int, **options: Any) -> Tensor:
    return torch.empty(shape, device="meta", **options)


def labels(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "strided"))
@pytest.mark.parametrize("shape", ((8, 5), (8, 3, 16), (8, 3, 16, 12), (8, 3, 4, 16, 12)))
@each_mixer
def test_mixing_reads_no_value_and_moves_nothing(
    make: Callable[[], Mixer], shape: tuple[int, ...], layout: str
) -> None:
    mixer = make()
    for each in mixer.modules():
        if isinstance(each, CutMix):
            if len(shape) == 2:
                return  # no positions
            each.spatial_dims = 2 if len(shape) == 5 else None
    for dtype, hidden in product(DTYPES, (False, True)):
        x = LAYOUTS[layout](meta(*shape, dtype=dtype)).requires_grad_(hidden)
        with OnlyMeta():
            output = mixer(x * 1 if hidden else x)
            if hidden:
                output.sum().backward()
        assert (output.dtype, output.shape, output.device) == (dtype, x.shape, x.device)


def test_the_criterion_reads_no_value_and_moves_nothing() -> None:
    with_kernels_on_meta = [name for name, kind in KIND.items() if kind.positions]
    for program in covering((torch.float32,), tuple(with_kernels_on_meta), FORMS, 300):
        moved = program.moved()
        criterion = MixUpCriterion(moved.loss("meta"), interpolate_loss=moved.interpolate_loss)
        with OnlyMeta(), large_logits(program.large):
            criterion(moved.output.requires_grad_(), moved.target, moved.mix).sum().backward()


def test_the_functions_read_no_value_and_move_nothing() -> None:
    with OnlyMeta():
        mixup_batch(meta(8, 3), labels(8))
        for lam in ((), (8,), (1, 1, 4, 4), (8, 1, 4, 4)):
            mix = Mix(meta(*lam), labels(8))
            assert mix.share.is_meta
            for target in (labels(8), labels(8, 4, 4), meta(8, CLASSES), meta(8, CLASSES, 4, 4)):
                mix_targets(target, mix, CLASSES)


def test_a_target_of_mixup_batch_stays_on_its_device() -> None:
    _, permuted, _ = mixup_batch(torch.randn(4, 2), torch.empty(4, device="meta"))
    assert permuted.is_meta


@pytest.mark.parametrize("lam, index", (("cpu", "meta"), ("meta", "cpu"), ("cpu", "cpu")))
def test_a_mix_follows_the_tensor_whichever_part_is_elsewhere(lam: str, index: str) -> None:
    mix = Mix(torch.tensor(0.3, device=lam), torch.arange(8, device=index))
    for door, value in ((input_mix, meta(8, 3)), (target_mix, labels(8))):
        assert [part.device.type for part in door(value, mix)] == ["meta", "meta"]


@pytest.mark.parametrize("shape", ((), (8,), (1, 1, 4), (8, 1, 4)), ids=str)
def test_the_gradient_of_a_lam_that_moves_goes_with_it(shape: tuple[int, ...]) -> None:
    mix = Mix(torch.rand(shape, requires_grad=True), torch.arange(8).roll(1))
    loss = nn.MSELoss()
    for value in (
        mix_inputs(meta(8, 3, 4), mix),
        mix_targets(meta(8, 3, 4), mix),
        mix_targets(labels(8), mix, CLASSES),
        mix_loss(loss, meta(8, 3, 4), meta(8, 3, 4), mix),
        mix_cross_entropy(meta(8, CLASSES, 4), labels(8, 4), mix),
    ):
        assert value.requires_grad
        assert value.is_meta


@pytest.mark.parametrize("shape", ((), (8,), (1, 1, 4), (8, 1, 4)), ids=str)
def test_each_part_of_a_target_stays_on_its_device(shape: tuple[int, ...]) -> None:
    seen: list[Any] = []

    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        seen.append([(name, part.device.type, part.dtype) for name, part in target.items()])
        return output * target["here"]

    target = {"here": meta(8), "there": torch.arange(8)}
    for of in (MixUpCriterion(loss), partial(mix_loss, loss)):
        value = of(meta(8), target, Mix(torch.rand(shape, requires_grad=True), torch.arange(8)))
        assert (value.shape, value.device.type, value.requires_grad) == ((8,), "meta", True)
    assert seen == 4 * [[("here", "meta", torch.float32), ("there", "cpu", torch.int64)]]


# What a hidden layer costs


@pytest.mark.parametrize("name", ("mixup", "mixup_per_sample", "cutmix", "cutmix_per_sample", "choice"))
def test_backward_of_a_hidden_layer_takes_as_many_passes_in_either_layout(name: str) -> None:
    mixer, passes = MIXERS[name](), {}
    mix = mixer.sample(torch.empty(4, 3, 8, 8))
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 8, 8).to(memory_format=format).requires_grad_()
        output = mixer(x.relu(), mix).relu()
        with Operations() as operations:
            output.backward(torch.ones_like(output))
        passes[format] = sum(size >= x.numel() and name in operations.launched for name, size in operations.made)
    assert passes[torch.channels_last] <= passes[torch.contiguous_format]


# In the graph of a compiled step


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", (MIXERS["choice"], MIXERS["choice_per_sample"]), ids=("choice", "choice_per_sample"))
def test_the_graph_of_a_step_has_no_node_on_the_host(make: Callable[[], Mixer]) -> None:
    on_the_host: list[str] = []

    def note(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG001
        for node in module.graph.nodes:
            values = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
            on_the_host.extend(str(node) for value in values if not value.is_meta)
        return module.forward

    mixer = make()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=0.1), mixer)
    step = torch.compile(
        lambda x, y: criterion(mixer(x).flatten(1)[:, :CLASSES], y),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=note),
    )
    step(meta(8, 3, 4, 4), labels(8))
    assert not on_the_host
