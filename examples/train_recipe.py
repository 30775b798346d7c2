"""The modern image recipe, whole: MixUp or CutMix for each batch, and everything that usually stands around them.

    python examples/train_recipe.py
    python examples/train_recipe.py --compile   # forward pass and loss as one graph

The parts: ``RandomChoice([MixUp(0.8), CutMix(1.0)])``, label smoothing, an exponential moving average (EMA) of the
weights, bfloat16 autocast, channels_last, warm-up and cosine, gradient accumulation, and no mixing in the last epochs.
The data are scikit-learn's digits, 8x8 pixels, with clean training labels and with half of them redrawn at random. The
same recipe is trained without mixing, with MixUp, with CutMix and with the choice of both.

Clean digits are so easy that mixing loses a point of accuracy. With half of the labels random, CutMix gains 23 points,
the choice 18 and MixUp 9. Smoothing and mixing together leave the model underconfident: calibration gets worse.

A checkpoint is written after each epoch. Kill the script at any time and start it again with the same options: it
resumes after the last complete epoch and prints what it would have printed.

Prints the test scores of the EMA weights, and the training accuracy, weighted by the two labels of a mixture.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Runs, Samples, Scores, evaluate, example_parser, load_digits, mean_and_spread, redraw, report, table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from mixup_nn import CutMix, Mixer, MixUp, MixUpCriterion, RandomChoice

MIXERS: dict[str, Callable[[], Mixer]] = {
    "no mixing": lambda: MixUp(0),
    "MixUp": lambda: MixUp(0.8),
    "CutMix": lambda: CutMix(1.0),
    "MixUp or CutMix": lambda: RandomChoice([MixUp(0.8), CutMix(1.0)]),
}


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A convolution with batch normalisation."""
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


def network(width: int = 32) -> nn.Module:
    """A small CNN."""
    stages = convolution(1, width), convolution(width, 2 * width, 2), convolution(2 * width, 4 * width, 2)
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the samples classified correctly."""
    return (logits.argmax(1) == target).float().mean()


class Recipe:
    """One training run: what it is made of, an epoch of it, and all that a checkpoint must hold."""

    def __init__(self, mixer: Mixer, train: Samples, seed: int, args: Namespace) -> None:
        torch.manual_seed(seed)
        torch.compiler.reset()  # forgets the graphs of the run before
        self.train, self.seed, self.args, self.mixer = train, seed, args, mixer
        self.model = nn.Sequential(mixer, network()).to(args.device, memory_format=torch.channels_last)
        # use_buffers averages the running statistics of batch normalisation too. The copy has a mixer of its own, which
        # the criterion does not follow: score the copy with the plain loss.
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
        self.criterion = MixUpCriterion(nn.CrossEntropyLoss(label_smoothing=args.smoothing), mixer)
        self.accuracy = MixUpCriterion(accuracy, mixer)  # lam * accuracy on y + (1 - lam) * accuracy on y[index]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.warmup_and_cosine)
        self.compute = torch.compile(self.forward, fullgraph=True) if args.compile else self.forward

    def warmup_and_cosine(self, step: int) -> float:
        """The learning rate of an optimizer step, over its highest."""
        per_epoch = math.ceil(len(self.train.input) / (self.args.batch_size * self.args.accumulate))
        warmup, total = self.args.warmup_epochs * per_epoch, self.args.epochs * per_epoch
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mix, predict; loss and training accuracy."""
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.model(x)
            return self.criterion(logits, y), self.accuracy(logits.detach(), y)

    def train_epoch(self, epoch: int) -> float:
        """Returns the training accuracy."""
        self.model.train()
        if epoch > self.args.epochs - self.args.unmixed_epochs:
            self.mixer.eval()  # after model.train(): the criteria see it too, and become the plain ones
        order = torch.randperm(len(self.train.input), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        batches = order.to(self.train.input.device).split(self.args.batch_size)
        accuracies = []
        for number, batch in enumerate(batches, start=1):
            x = self.train.input[batch].contiguous(memory_format=torch.channels_last)
            loss, correct = self.compute(x, self.train.target[batch])
            (loss / self.args.accumulate).backward()
            accuracies.append(correct)
            if number % self.args.accumulate == 0 or number == len(batches):
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.ema.update_parameters(self.model)
        return torch.stack(accuracies).mean().item()

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. A mixer has no state: what it draws depends on the generator alone."""
        cuda = self.args.device.type == "cuda"
        generator = torch.cuda.get_rng_state(self.args.device) if cuda else torch.get_rng_state()
        parts = self.model, self.ema, self.optimizer, self.schedule
        return {"parts": [part.state_dict() for part in parts], "generator": generator}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        for part, saved in zip((self.model, self.ema, self.optimizer, self.schedule), state["parts"], strict=True):
            part.load_state_dict(saved)
        cuda = self.args.device.type == "cuda"
        generator = state["generator"]
        torch.cuda.set_rng_state(generator, self.args.device) if cuda else torch.set_rng_state(generator)


def load_progress(path: Path, options: dict[str, str]) -> dict[str, Any]:
    """The scores of all runs and the state of the unfinished one; empty, unless a run with the same options stopped."""
    saved = torch.load(path) if path.exists() else {}
    if saved.get("options") == options:
        print(f"resuming from {path}")
        return saved
    return {"options": options, "histories": {}, "state": None}


def save_progress(path: Path, progress: dict[str, Any]) -> None:
    """Write atomically: the file is complete or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(progress, partial := path.with_suffix(".partial"))
    partial.replace(path)


def main() -> None:
    """Train with every mixer on every seed, then print the results."""
    parser = example_parser(__doc__, epochs=40, batch_size=50)
    parser.add_argument("--noise", type=float, default=0.5, help="share of training labels redrawn")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    parser.add_argument("--ema-decay", type=float, default=0.98, help="decay of the averaged weights")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per optimizer step")
    parser.add_argument("--warmup-epochs", type=int, default=4, help="epochs of rising learning rate")
    parser.add_argument("--unmixed-epochs", type=int, default=4, help="last epochs, without mixing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, test = load_digits(args.device)
    path = args.out / "recipe.pt"
    progress = load_progress(path, {name: str(value) for name, value in vars(args).items()})

    noises = {"clean labels": 0.0, f"{args.noise:.0%} random labels": args.noise}
    runs: Runs = {labels: {name: [] for name in MIXERS} for labels in noises}
    trained: dict[str, dict[str, list[float]]] = {labels: {name: [] for name in MIXERS} for labels in noises}
    for labels, seed, name in tqdm(list(product(noises, range(args.seeds), MIXERS)), unit="run"):
        history = progress["histories"].setdefault((labels, seed, name), [])  # training accuracy and test scores
        if len(history) < args.epochs:
            noisy = train._replace(target=redraw(train.target, noises[labels], seed))
            recipe = Recipe(MIXERS[name](), noisy, seed, args)
            if history:
                recipe.load_state(progress["state"])
            for epoch in range(len(history) + 1, args.epochs + 1):
                history.append((recipe.train_epoch(epoch), *evaluate(recipe.ema, test)))
                progress["state"] = recipe.state()
                save_progress(path, progress)
        runs[labels][name].append([Scores(*scores) for _, *scores in history])
        trained[labels][name].append(history[max(args.epochs - args.unmixed_epochs, 1) - 1][0])

    print("\nTraining accuracy in the last mixed epoch, each sample weighted by its two labels:\n")
    rows = [[name, *(mean_and_spread(trained[labels][name]) for labels in noises)] for name in MIXERS]
    print(table(["", *noises], rows))
    print(report(runs))
    path.unlink()  # done: the next start is a new one


if __name__ == "__main__":
    main()
