"""Manifold mixup: MixUp at a layer drawn for each batch, beside MixUp of the input and none.

    python examples/train_manifold.py
    python examples/train_manifold.py --noise 0   # on clean labels
    python examples/train_manifold.py --compile   # the draw of the layer breaks no graph

The layer is drawn on the device, without a host synchronisation: the mix of a batch is applied before every stage, but
with ``lam = 1``, which changes nothing, before all except the one drawn. The data are scikit-learn's digits; half of
the training labels are redrawn at random. The method is that of https://arxiv.org/abs/1806.05236.

Prints the test scores after the last epoch.
"""

from __future__ import annotations

from itertools import product

import torch
from common import Runs, evaluate, example_parser, fit, load_digits, redraw, report, small_cnn
from torch import Tensor, nn
from tqdm import tqdm

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.functional import mix_inputs


class ManifoldMixUp(nn.Module):
    """A network that mixes before one of its first ``depth`` stages, drawn for each training batch."""

    def __init__(self, mixup: MixUp, stages: list[nn.Module], depth: int) -> None:
        super().__init__()
        self.mixup = mixup
        self.stages = nn.ModuleList(stages)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; those of a mixed batch while the mixer is in training mode."""
        if not self.mixup.training:  # in eval mode, and when only mixing is turned off
            for stage in self.stages:
                x = stage(x)
            return x
        mix = self.mixup.sample(x)
        chosen = torch.randint(self.depth, (), device=x.device)
        for place, stage in enumerate(self.stages):
            if place < self.depth:
                x = mix_inputs(x, Mix(torch.where(chosen == place, mix.lam, 1), mix.index))
            x = stage(x)
        self.mixup.last_mix = mix  # for the criterion
        return x


def main() -> None:
    """Train each of the three ways, then print the results."""
    parser = example_parser(__doc__, alpha=8.0, epochs=40, batch_size=100)
    parser.add_argument("--noise", type=float, default=0.5, help="share of training labels redrawn")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, test = load_digits(args.device)

    ways = {"without MixUp": (0.0, 1), "MixUp of the input": (args.alpha, 1), "manifold mixup": (args.alpha, 3)}
    setting = f"{args.noise:.0%} random labels" if args.noise else "clean labels"
    runs: Runs = {setting: {name: [] for name in ways}}
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}
    for seed, (name, (alpha, depth)) in tqdm(list(product(range(args.seeds), ways.items())), unit="run"):
        noisy = train._replace(target=redraw(train.target, args.noise, seed))
        torch.manual_seed(seed)
        mixup, net = MixUp(alpha), small_cnn()
        model = ManifoldMixUp(mixup, [net[:2], net[2:5], net[5:]], depth).to(args.device)
        criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
        fit(model, criterion, noisy, lr=5e-3, seed=seed, **options)
        runs[setting][name].append([evaluate(model, test)])
    print(report(runs))


if __name__ == "__main__":
    main()
