"""Manifold mixup: the digits without MixUp, with MixUp of the input, and with MixUp at a layer drawn for each batch.

    python examples/train_manifold.py             # about half a minute on two CPU cores
    python examples/train_manifold.py --noise 0   # on clean labels
    python examples/train_manifold.py --compile   # the draw of the layer breaks no graph

The layer is drawn on the device, and nothing waits for it: the one mix of a batch is applied before every stage, with
``lam = 1``, which leaves its input as it is, before all but the stage that was drawn. The data, the network and the
noisy labels are those of train_digits.py, the method that of https://arxiv.org/abs/1806.05236.

Prints the test scores after the last epoch.
"""

from __future__ import annotations

from itertools import product

import torch
from common import Runs, evaluate, example_parser, fit, load_digits, number, report
from torch import Tensor, nn
from tqdm import tqdm
from train_digits import redraw, small_cnn

from mixup_nn import Mix, MixUp, MixUpCriterion


class ManifoldMixUp(nn.Module):
    """A network that mixes before one of its first ``depth`` stages, drawn for each training batch."""

    def __init__(self, mixup: MixUp, stages: list[nn.Module], depth: int) -> None:
        super().__init__()
        self.mixup = mixup
        self.stages = nn.ModuleList(stages)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; in training those of a mixed batch, whose mix is left in ``mixup.last_mix``."""
        if self.training:
            mix = self.mixup.sample(x)
            chosen = torch.randint(self.depth, (), device=x.device)
            self.mixup.last_mix = mix  # for the criterion
        for place, stage in enumerate(self.stages):
            if self.training and place < self.depth:
                x = self.mixup(x, Mix(torch.where(chosen == place, mix.lam, 1), mix.index))
            x = stage(x)
        return x


def main() -> None:
    """Train each of the three ways, then print what came of them."""
    parser = example_parser(__doc__, alpha=8.0, epochs=40, batch_size=100)
    parser.add_argument(
        "--noise", type=number(float, 0, 1), default=0.5, help="share of training labels redrawn (default: 0.5)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, test = load_digits(args.device)

    ways = {"without MixUp": (0.0, 1), "MixUp of the input": (args.alpha, 1), "manifold mixup": (args.alpha, 3)}
    setting = f"{args.noise:.0%} random labels" if args.noise else "clean labels"
    runs: Runs = {setting: {name: [] for name in ways}}
    for seed, (name, (alpha, depth)) in tqdm(list(product(range(args.seeds), ways.items())), unit="run"):
        noisy = train._replace(target=redraw(train.target, args.noise, seed))
        torch.manual_seed(seed)
        mixup, net = MixUp(alpha), small_cnn()
        model = ManifoldMixUp(mixup, [net[:2], net[2:5], net[5:]], depth).to(args.device)
        criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
        for _ in fit(model, criterion, noisy, args.epochs, args.batch_size, lr=5e-3, seed=seed, compile=args.compile):
            pass
        runs[setting][name].append([evaluate(model, test)])
    print(report(runs))


if __name__ == "__main__":
    main()
