"""Many processes: gradients are those of one on the joined batch, and a stopped run resumes to the same bits."""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mixup_nn import CutMix, Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mix_cross_entropy, mix_inputs
from mixup_nn.sampling import sample_mixup

from .cases import MIXERS, applied

ROOT = Path(__file__).parent.parent
PAGE, SCRIPT = ROOT / "docs" / "distributed.md", ROOT / "examples" / "train_distributed.py"
WORLD, SIZE, CPU = 4, 16, torch.device("cpu")
Step = tuple[Mix, list[Tensor]]  # what was drawn, and the gradients
MIX = Mix(torch.tensor(0.3), torch.arange(8).roll(1))
LOGITS = torch.rand(8, 6, generator=torch.Generator().manual_seed(2))  # of 1.08 for 1.76
LABELS = torch.randint(3, (8,), generator=torch.Generator().manual_seed(3))
# torch's own, on reading a checkpoint of many ranks in one process
pytestmark = pytest.mark.xdist_group("processes")  # started once
reads_checkpoints = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def batch_of(part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(part)
    return torch.randn(SIZE, 3, 4, 4, generator=generator), torch.randint(5, (SIZE,), generator=generator)


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [*(nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(count - 1)), nn.Linear(48, 5)]


def make_net() -> nn.Sequential:
    first, last = stages(2)
    return nn.Sequential(*first.children(), last)


def loss_by_hand(net: nn.Module, x: Tensor, y: Tensor, mix: Mix) -> Tensor:
    lam, index = mix
    output = net((lam * x + (1 - lam) * x[index]).flatten(1))
    return lam * F.cross_entropy(output, y) + (1 - lam) * F.cross_entropy(output, y[index])


def full(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(net: nn.Module) -> list[Tensor]:
    return [full(weight.grad) for weight in net.parameters()]


# In each of four processes, with the functions of the page


def step(
    page: dict[str, Any], form: str, net: nn.Module, mixer: Any, mesh: DeviceMesh, seed: int | None = None
) -> Step:
    model = page[form](net, mixer, mesh, 5)
    if seed is not None:
        torch.manual_seed(seed)
    x, y = batch_of(mesh["dp"].get_local_rank())
    MixUpCriterion(nn.CrossEntropyLoss(), mixer)(model(x if form == "data_parallel" else x.flatten(1)), y).backward()
    return applied(mixer), gradients(model)


def data_parallel(page: dict[str, Any], mesh: DeviceMesh) -> dict[tuple[str, str], Step]:
    steps: dict[tuple[str, str], Step] = {}
    wraps: dict[str, Any] = {"ddp": DistributedDataParallel, "fsdp": lambda model: fully_shard(model, mesh=mesh["dp"])}
    for kind, page["DistributedDataParallel"] in wraps.items():
        for name, make in MIXERS.items():
            steps[name, kind] = step(page, "data_parallel", nn.Sequential(nn.Flatten(), make_net()), make(), mesh)
    return steps


def tensor_parallel(page: dict[str, Any], mesh: DeviceMesh) -> dict[str, Step]:
    seeds = {"data": None, "global": 5 + dist.get_rank()}  # None: as the page does
    return {by: step(page, "tensor_parallel", make_net(), MixUp(1.0), mesh, seed) for by, seed in seeds.items()}


def pipeline(page: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    (x, y), rank = batch_of(0), dist.get_rank()
    stage = stages(WORLD)[rank]
    schedule = ScheduleGPipe(PipelineStage(stage, rank, WORLD, CPU), 4, nn.CrossEntropyLoss())
    return page["pipeline_step"](schedule, x.flatten(1), y, 7, 5), gradients(stage)


def linked_pipeline() -> tuple[list[Tensor], list[Mix]]:
    """The losses and the draws of micro-batches where rank 0 has the first stage, with a mixer, and the last."""
    (x, y), rank, mixer = batch_of(0), dist.get_rank(), MixUp(1.0)
    draws, losses, modules = list[Mix](), list[Tensor](), stages(2 * WORLD)
    mixer.register_forward_hook(lambda *_: draws.append(applied(mixer)))
    modules[0] = nn.Sequential(mixer, modules[0])
    mine: list[Any] = [PipelineStage(modules[k], k, 2 * WORLD, CPU) for k in (rank, 2 * WORLD - 1 - rank)]
    schedule = ScheduleDualPipeV(mine, 8, MixUpCriterion(nn.CrossEntropyLoss(), mixer))
    schedule.step(*([x.flatten(1)] if rank == 0 else []), target=y, losses=losses)
    return losses, draws[-8:]


def trained(criterion: MixUpCriterion, logits: Tensor) -> Tensor:
    loss = criterion(logits, LABELS, MIX)
    loss.backward()
    return loss  # type: ignore[no-any-return]


def sharded_logits(page: dict[str, Any], mesh: DeviceMesh) -> dict[str, tuple[Tensor, Tensor]]:
    plain, smooth = (MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=value)) for value in (0.0, 0.1))
    ways: dict[str, Any] = {
        "loss_parallel": lambda logits: page["class_parallel_loss"](logits, LABELS, MIX),
        "full_tensor": lambda logits: trained(plain, logits.full_tensor()),
        "to_local": lambda logits: trained(plain, logits.to_local()),
    }
    leaves = {name: distribute_tensor(LOGITS, mesh, [Shard(1)]).requires_grad_() for name in ways}
    with pytest.raises(RuntimeError):  # torch has no smoothing there
        loss_parallel()(trained)(smooth, leaves["loss_parallel"])
    return {name: (full(way(leaves[name])), full(leaves[name].grad)) for name, way in ways.items()}


def mixed_dtensors(mesh: DeviceMesh) -> list[tuple[Mix, Tensor, Tensor]]:
    results = []
    for mixer, placement in product((MixUp(1.0), CutMix(1.0, per_sample=True)), (Replicate(), Shard(0), Shard(3))):
        torch.manual_seed(0)
        x = distribute_tensor(batch_of(0)[0], mesh, [placement]).requires_grad_()
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            mixer(x)
        with implicit_replication():
            output = mixer(x)
            output.square().sum().backward()
        results.append((applied(mixer), full(output), full(x.grad)))
    return results


def resumed(folder: Path, tensor_ranks: int) -> tuple[str, Tensor]:
    """Two epochs of the example, then the second from a copy of the first checkpoint: what it prints and draws next."""
    sys.path.insert(0, str(SCRIPT.parent))
    train = runpy.run_path(str(SCRIPT))["train"]
    options = Namespace(seed=0, alpha=1.0, epochs=2, batch_size=50, fsdp=False, tensor_parallel=tensor_ranks)
    for options.checkpoints in (folder / "whole", folder / "resumed"):
        if dist.get_rank() == 0 and options.checkpoints.name == "resumed":
            shutil.copytree(folder / "whole" / "epoch-1", folder / "resumed" / "epoch-1")
        dist.barrier()
        with redirect_stdout(io.StringIO()) as printed:
            train(options, CPU)
    return printed.getvalue(), torch.rand(())


def on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # that of RowwiseParallel
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), world_size=WORLD, rank=rank)
    page: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)), page)
    meshes = {n: init_device_mesh("cpu", (WORLD // n, n), mesh_dim_names=("dp", "tp")) for n in (1, 2, 4)}
    results = {
        "data": data_parallel(page, meshes[1]),
        "tensor": {n: tensor_parallel(page, meshes[n]) for n in (2, 4)},
        "pipeline": pipeline(page),
        "linked": linked_pipeline(),
        "logits": sharded_logits(page, meshes[2]["tp"]),
        "dtensors": mixed_dtensors(meshes[2]["tp"]),
        "resumed": {n: resumed(folder / str(n), n) for n in (1, 2)},
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # as in cases.run_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes found that are started once for all tests: of a server that has imported torch once."""
    folder = tmp_path_factory.mktemp("ranks")
    get_context("forkserver").set_forkserver_preload([__name__, "sklearn.model_selection", "matplotlib.figure"])
    start_processes(on_rank, (folder,), nprocs=WORLD, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


# Gradients


@pytest.mark.parametrize("kind", ("ddp", "fsdp"))
@pytest.mark.parametrize("name", MIXERS)
def test_data_parallel_gradients_are_those_of_the_joined_batch(ranks: list[Any], name: str, kind: str) -> None:
    mixes, found = zip(*(results["data"][name, kind] for results in ranks), strict=True)
    assert not torch.equal(mixes[0].lam, mixes[1].lam)
    x, y = (torch.cat(parts) for parts in zip(*map(batch_of, range(WORLD)), strict=True))
    lam = torch.cat([mix.lam.expand(SIZE, *mix.lam.shape[1:]) for mix in mixes])
    joined = Mix(lam, torch.cat([mix.index + SIZE * rank for rank, mix in enumerate(mixes)]))
    net = make_net()
    mix_cross_entropy(net(mix_inputs(x, joined).flatten(1)), y, joined).backward()
    torch.testing.assert_close(list(found), [gradients(net)] * WORLD)


@pytest.mark.parametrize("tensor_ranks", (2, 4))
@pytest.mark.parametrize("seeded_by", ("data", "global"))
def test_tensor_parallel_gradients_are_right_if_the_ranks_of_a_batch_draw_alike(
    ranks: list[Any], tensor_ranks: int, seeded_by: str
) -> None:
    mixes, found = zip(*(results["tensor"][tensor_ranks][seeded_by] for results in ranks), strict=True)
    net, parts = make_net(), WORLD // tensor_ranks
    for part in range(parts):
        (loss_by_hand(net, *batch_of(part), mixes[part * tensor_ranks]) / parts).backward()
    errors = [(a - b).abs().max() for each in found for a, b in zip(each, gradients(net), strict=True)]
    assert (max(errors) < 1e-6) if seeded_by == "data" else (max(errors) > 1e-3)
    assert len({float(mix.lam) for mix in mixes}) == (parts if seeded_by == "data" else WORLD)


def test_pipeline_gradients_are_right_if_the_mix_comes_before_the_schedule(ranks: list[Any]) -> None:
    net = nn.Sequential(*stages(WORLD))
    loss = loss_by_hand(net, *batch_of(0), sample_mixup(SIZE, 0.2, generator=torch.Generator().manual_seed(7)))
    loss.backward()
    torch.testing.assert_close(torch.stack(ranks[-1]["pipeline"][0]).mean(), loss)
    torch.testing.assert_close([each for results in ranks for each in results["pipeline"][1]], gradients(net))


def test_a_linked_criterion_scores_micro_batches_by_the_draws_of_others(ranks: list[Any]) -> None:
    net, (x, y), (losses, draws) = nn.Sequential(*stages(2 * WORLD)), batch_of(0), ranks[0]["linked"]
    own = [loss_by_hand(net, *batch) for batch in zip(x.split(2), y.split(2), draws, strict=True)]
    assert (torch.stack(losses) - torch.stack(own)).abs().max() > 1e-3


# Sharded tensors


def test_class_sharded_logits_are_right_under_loss_parallel_or_gathered(ranks: list[Any]) -> None:
    logits, found = LOGITS.clone().requires_grad_(), ranks[0]["logits"]
    own, partner = (F.cross_entropy(logits, y) for y in (LABELS, LABELS[MIX.index]))
    loss = MIX.lam * own + (1 - MIX.lam) * partner
    loss.backward()
    for name in ("loss_parallel", "full_tensor"):
        torch.testing.assert_close(found[name], (loss.detach(), logits.grad))
    assert f"{found['to_local'][0]:.2f} for {loss:.2f}" == "1.08 for 1.76"


def test_a_mixer_takes_dtensors_of_every_placement_under_implicit_replication(ranks: list[Any]) -> None:
    for (lam, index), output, gradient in ranks[0]["dtensors"]:
        x = batch_of(0)[0].requires_grad_()
        expected = lam * x + (1 - lam) * x[index]
        expected.square().sum().backward()
        torch.testing.assert_close((output, gradient), (expected.detach(), x.grad))


# Stopped runs


def weights(checkpoint: Path) -> dict[str, Tensor]:
    dcp_to_torch_save(checkpoint, checkpoint.with_suffix(".pt"))
    return torch.load(checkpoint.with_suffix(".pt"), weights_only=False)["model"]  # type: ignore[no-any-return]


@reads_checkpoints
@pytest.mark.parametrize("tensor_ranks", (1, 2), ids=("ddp", "tensor_parallel"))
def test_a_resumed_run_ends_with_the_same_bits(ranks: list[Any], folder: Path, tensor_ranks: int) -> None:
    printed, drawn = zip(*(results["resumed"][tensor_ranks] for results in ranks), strict=True)
    assert re.findall("epoch .:", printed[0]) == ["epoch 2:"]
    assert [drawn.index(each) for each in drawn] == [rank - rank % tensor_ranks for rank in range(WORLD)]  # alike
    whole, resumed = (weights(folder / str(tensor_ranks) / name / "epoch-2") for name in ("whole", "resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def start(checkpoints: Path, epochs: int) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    options = ["--fsdp", f"--epochs={epochs}", f"--checkpoints={checkpoints}"]
    return subprocess.Popen(
        [*launch, "--nproc-per-node=2", str(SCRIPT), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.needs("psutil")
@reads_checkpoints
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    import psutil

    killed = start(tmp_path / "killed", 1000)  # more than it can finish, however late it is killed
    while killed.poll() is None and not (tmp_path / "killed" / "epoch-1").exists():
        time.sleep(0.01)
    with suppress(psutil.NoSuchProcess):  # a rank can end first, when the other is gone; the rest then ends by itself
        for process in (*psutil.Process(killed.pid).children(recursive=True), killed):
            process.kill()
    output, _ = killed.communicate(timeout=600)
    done = len(list((tmp_path / "killed").glob("epoch-*[0-9]")))
    assert done, output

    for name in ("killed", "whole"):
        run = start(tmp_path / name, done + 2)
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
        assert ("epoch 1:" in output) == (name == "whole")
    resumed, whole = (weights(tmp_path / name / f"epoch-{done + 2}") for name in ("killed", "whole"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
