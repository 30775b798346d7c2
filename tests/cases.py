"""The mixes, mixers, decorators and processes that several test files share."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixup_nn import CutMix, Mix, Mixer, MixUp, RandomChoice

RANKS = 2
CYCLE = torch.tensor([2, 3, 1, 0])
SCALAR = Mix(torch.tensor(0.3), CYCLE)
PER_SAMPLE = Mix(torch.tensor([0.1, 0.6, 1.0, 0.0]), CYCLE)
both_lams = pytest.mark.parametrize("mix", (SCALAR, PER_SAMPLE), ids=("per_batch", "per_sample"))


def per_position(*spatial: int, per_sample: bool = True) -> Mix:
    """A mix of four samples whose weights differ from position to position, beside whole zeros and ones."""
    lam = torch.rand((4 if per_sample else 1, 1, *spatial), generator=torch.Generator().manual_seed(7))
    return Mix(torch.where(lam < 0.3, 0, torch.where(lam > 0.7, 1, lam)), CYCLE)


def lams_of(*spatial: int) -> dict[str, Mix]:
    """A mix of every shape of lam, for inputs of four samples."""
    shared, own = (per_position(*spatial, per_sample=per_sample) for per_sample in (False, True))
    return {"per_batch": SCALAR, "per_sample": PER_SAMPLE, "per_position": shared, "per_sample_and_position": own}


def every_lam(*spatial: int) -> pytest.MarkDecorator:
    """Parametrise ``mix`` over a lam of every shape, for these positions."""
    mixes = lams_of(*spatial)
    return pytest.mark.parametrize("mix", mixes.values(), ids=mixes)


slow_vmap = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # lerp_ has no rule of its own


class Dominant(MixUp):
    """A mixer of a user's own: the original keeps at least half."""

    def sample_lam(self, input: Tensor) -> Tensor:
        lam = super().sample_lam(input)
        return torch.maximum(lam, 1 - lam)


MIXERS: dict[str, Callable[[], Mixer]] = {
    "mixup": lambda: MixUp(1.0),
    "mixup_per_sample": lambda: MixUp(1.0, per_sample=True, p=0.9),
    "cutmix": lambda: CutMix(1.0),
    "cutmix_per_sample": lambda: CutMix(1.0, per_sample=True, p=0.9),
    "choice": lambda: RandomChoice([MixUp(1.0), CutMix(1.0)]),
    "choice_per_sample": lambda: RandomChoice([MixUp(1.0, p=0.9), CutMix(per_sample=True)], (1, 3), per_sample=True),
    "own": lambda: Dominant(1.0),
}
each_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def applied(mixer: Mixer) -> Mix:
    """The mix last applied."""
    assert mixer.last_mix is not None
    return mixer.last_mix


def tenfold(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """A hook."""
    return 10 * output


def refused(*errors: type[Exception]) -> pytest.RaisesExc[Exception]:
    """Expect one of these errors; the table of errors has the texts."""
    return pytest.raises(errors)


def through_pickle(module: Any) -> Any:
    """A copy by way of pickle."""
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: Any) -> Any:
    """A copy by way of a file."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def run_rank(rank: int, work: Callable[[], Any], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), world_size=RANKS, rank=rank)
    torch.save(work(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # torch's caches hold the group of a sharded model, and with it gloo's threads. One that frees a tensor only while
    # Python shuts down aborts the process (torch 2.13), so that the exit code would be a matter of chance.
    os._exit(0)


def results_of_ranks(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What ``work`` returned in each process of a group; raises with the traceback of a process that failed."""
    spawn(run_rank, (work, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


class Operations(TorchDispatchMode):
    """Notes each operation of torch that made tensors, with the size of the largest, and those that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, int]] = []
        self.launched: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(output) if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        if sizes:
            self.made.append((name, max(sizes)))
        if not (func.is_view or name.startswith("empty")):
            self.launched.append(name)
        return output
