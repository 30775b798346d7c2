"""More than one process: gradients equal those of the joined batch, and a killed run resumes to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixup_nn import Mix, Mixer, MixUpCriterion
from mixup_nn.functional import mix_cross_entropy, mix_inputs

from .cases import MIXERS, RANKS, applied, results_of_ranks

SCRIPT = Path(__file__).parent.parent / "examples" / "train_distributed.py"
SIZE = 5


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(SIZE, 3, 4, 4, generator=generator), torch.randint(3, (SIZE,), generator=generator)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


def train_one_step(rank: int, mixer: Mixer, sharded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What was drawn, and the gradient."""
    net = make_net()
    model: nn.Module = nn.Sequential(mixer, net)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    else:
        model = DistributedDataParallel(model)
    torch.manual_seed(rank)
    input, target = batch_of(rank)
    MixUpCriterion(nn.CrossEntropyLoss(), mixer)(model(input), target).backward()
    gradient = net.get_parameter("1.weight").grad
    assert gradient is not None
    return (*applied(mixer), gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)


def train_each_mixer() -> dict[tuple[str, bool], tuple[Tensor, Tensor, Tensor]]:
    cases = product(MIXERS, (False, True))
    return {(name, sharded): train_one_step(dist.get_rank(), MIXERS[name](), sharded) for name, sharded in cases}


def lam_of_samples(lam: Tensor) -> Tensor:
    """The weights that each sample has, also where they are those of the batch."""
    return lam.expand(SIZE) if lam.ndim == 0 else lam.expand(SIZE, *lam.shape[1:])


def test_gradients_are_those_of_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    results = results_of_ranks(train_each_mixer, tmp_path)
    input, target = (torch.cat(parts) for parts in zip(*map(batch_of, range(RANKS)), strict=True))
    for step in results[0]:
        lams, indices, gradients = zip(*(result[step] for result in results), strict=True)
        assert not torch.equal(lams[0], lams[1])
        torch.testing.assert_close(gradients[0], gradients[1])

        joined = Mix(
            torch.cat([lam_of_samples(lam) for lam in lams]),
            torch.cat([index + rank * SIZE for rank, index in enumerate(indices)]),
        )
        net = make_net()
        mix_cross_entropy(net(mix_inputs(input, joined)), target, joined).backward()
        torch.testing.assert_close(gradients[0], net.get_parameter("1.weight").grad)


def start(checkpoints: Path, epochs: int, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={RANKS}",
    ]
    return subprocess.Popen(
        [*command, str(SCRIPT), f"--epochs={epochs}", "--batch-size=50", f"--checkpoints={checkpoints}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def weights(checkpoint: Path) -> dict[str, Tensor]:
    dcp_to_torch_save(checkpoint, checkpoint.with_suffix(".pt"))
    state: dict[str, Tensor] = torch.load(checkpoint.with_suffix(".pt"), weights_only=False)["model"]
    return state


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, on reading a checkpoint of many ranks in one process
@pytest.mark.parametrize("options", ((), ("--fsdp",)), ids=("ddp", "fsdp"))
def test_a_killed_run_resumes_to_the_same_bits(options: tuple[str, ...], tmp_path: Path) -> None:
    killed = start(tmp_path / "killed", 1000, *options)  # more than it can finish, however late it is killed
    while killed.poll() is None and not (tmp_path / "killed" / "epoch-1").exists():
        time.sleep(0.01)
    with suppress(psutil.NoSuchProcess):  # a rank can end first, when the other is gone; the rest then ends by itself
        for process in (*psutil.Process(killed.pid).children(recursive=True), killed):
            process.kill()
    output, _ = killed.communicate(timeout=600)
    done = len(list((tmp_path / "killed").glob("epoch-*[0-9]")))
    assert done, output

    for name in ("killed", "whole"):
        run = start(tmp_path / name, done + 2, *options)
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
        assert ("epoch 1:" in output) == (name == "whole")
    resumed, whole = (weights(tmp_path / name / f"epoch-{done + 2}") for name in ("killed", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
