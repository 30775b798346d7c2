"""Trains the digits in several processes, under DDP, FSDP2 or tensor parallel, and resumes where it was stopped.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp
    torchrun --nproc-per-node 4 examples/train_distributed.py --tensor-parallel 2

MixUp needs no communication: each data-parallel rank mixes its own part of the batch with its own draw, and ranks that
share a part draw alike. On machines with GPUs the ranks use them and NCCL, elsewhere the CPU and gloo; with
``--nnodes`` the same script runs on many machines.

A checkpoint is written after each epoch: model, optimizer and the random state of each data-parallel rank. Kill the run
at any time and start it again with the same command: it resumes after the last complete epoch, and ends with the same
weights, bit for bit, as a run that was never killed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import evaluate, load_digits, small_cnn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mixup_nn import MixUp, MixUpCriterion


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that this rank draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restore a saved state."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """The last complete epoch and its checkpoint; (0, None) if there is none."""
    epochs = [int(path.name.removeprefix("epoch-")) for path in folder.glob("epoch-*") if path.suffix != ".partial"]
    return (max(epochs), folder / f"epoch-{max(epochs)}") if epochs else (0, None)


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train one rank: its part of each batch, the draws of that part."""
    shape = dist.get_world_size() // options.tensor_parallel, options.tensor_parallel
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
    part, parts = mesh["dp"].get_local_rank(), shape[0]
    train, test = load_digits(device)

    torch.manual_seed(options.seed)  # the same weights everywhere
    mixup = MixUp(options.alpha)
    model = nn.Sequential(mixup, small_cnn()).to(device)
    if options.tensor_parallel > 1:
        parallelize_module(model, mesh["tp"], {"1.5": ColwiseParallel(), "1.7": RowwiseParallel()})
    if options.fsdp or options.tensor_parallel > 1:
        fully_shard(model, mesh=mesh["dp"])
    else:
        model = DistributedDataParallel(model)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.manual_seed(options.seed + 1 + part)  # another draw for each part, alike on the ranks that share it

    def state(epoch: int) -> dict[str, object]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, f"random_{part}": random_state(device), "epoch": epoch}

    done, checkpoint = newest_checkpoint(options.checkpoints)
    if checkpoint:
        criterion(model(train.input[:1]), train.target[:1]).backward()  # DDP orders its sums anew after the first step
        optimizer.zero_grad()
        saved = state(0)
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        set_random_state(saved[f"random_{part}"], device)

    for epoch in range(done + 1, options.epochs + 1):
        model.train()
        order = torch.randperm(len(train.input), generator=torch.Generator().manual_seed(options.seed + epoch))
        for batch in order.split(options.batch_size * parts):
            mine = batch.tensor_split(parts)[part].to(device)
            loss = criterion(model(train.input[mine]), train.target[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = evaluate(model, test)
        target = options.checkpoints / f"epoch-{epoch}"
        dcp.save(state(epoch), checkpoint_id=target.with_suffix(".partial"))
        dist.barrier()
        if dist.get_rank() == 0:
            target.with_suffix(".partial").rename(target)  # atomic: a checkpoint is complete or absent
            print(f"epoch {epoch}: accuracy {scores.accuracy:.3f}, loss {scores.loss:.6f}", flush=True)
        dist.barrier()


def main() -> None:
    """Read the options, join the other ranks, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2 instead of DDP")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share a batch; more than 1: FSDP2 too"
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="parameter of the Beta distribution")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training samples")
    parser.add_argument("--batch-size", type=int, default=50, help="training samples per step and data-parallel rank")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the draws")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/checkpoints"), help="where to resume from")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start with torchrun: torchrun --nproc-per-node 2 examples/train_distributed.py")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # torch's caches hold the group of a sharded model, and with it gloo's threads. One that frees a tensor only while
    # Python shuts down aborts the finished process (torch 2.13), so end it here.
    os._exit(0)
