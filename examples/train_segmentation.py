"""Segmentation: a label for each pixel, some of which are to be ignored, without and with MixUp.

    python examples/train_segmentation.py   # about half a minute on two CPU cores

The pictures are drawn here: a disc and a square of random size, place and brightness on noise. The labels, of shape
``(B, H, W)``, are background, disc or square, and IGNORE along each outline, as in data sets whose outlines nobody can
draw to the pixel. ``nn.CrossEntropyLoss(ignore_index=IGNORE)`` is all that MixUp needs to know: where one picture of a
mixture is ignored the other one counts, and the mean is over what counts.

So small a network on so simple shapes learns nothing by heart, and MixUp gains nothing here: what this shows is how.

Prints the test scores of the pixels that are not ignored, after the last epoch.
"""

from __future__ import annotations

from itertools import product

import torch
from common import Runs, Samples, evaluate, example_parser, fitted, report
from torch import nn
from tqdm import tqdm

IGNORE = 255


def draw_shapes(count: int, seed: int, device: torch.device, size: int = 24) -> Samples:
    """``(count, 1, size, size)`` pictures and their labels: 0 is background, 1 the disc, 2 the square."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(size).float()
    input = torch.randn((count, 1, size, size), generator=generator)
    target = torch.zeros((count, size, size), dtype=torch.long)
    for label in (1, 2):
        radius, y, x, brightness = torch.rand((4, count, 1, 1), generator=generator)
        radius = 3 + 3 * radius
        dy, dx = places[:, None] - size * y, places - size * x
        distance = (torch.hypot(dy, dx) if label == 1 else torch.maximum(dy.abs(), dx.abs())) - radius
        input += ((0.5 + brightness) * (distance < 0))[:, None]
        target[distance < 0] = label
        target[distance.abs() < 0.7] = IGNORE
    return Samples(input.to(device), target.to(device))


def small_segmenter(width: int = 24) -> nn.Module:
    """Four convolutions at full size, the middle ones dilated to see a whole shape."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=4, dilation=4),
        nn.ReLU(),
        nn.Conv2d(width, 3, 3, padding=1),
    )


def main() -> None:
    """Train every pair of runs, then print what came of them."""
    args = example_parser(__doc__, alpha=0.4, epochs=30, batch_size=10).parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, test = draw_shapes(50, 0, args.device), draw_shapes(200, 1, args.device)

    alphas = {"without MixUp": 0.0, "with MixUp": args.alpha}
    runs: Runs = {"shapes": {name: [] for name in alphas}}
    for seed, (name, alpha) in tqdm(list(product(range(args.seeds), alphas.items())), unit="run"):
        torch.manual_seed(seed)
        loss = nn.CrossEntropyLoss(ignore_index=IGNORE)
        model = fitted(small_segmenter(), loss, train, alpha, lr=3e-3, seed=seed, args=args)
        runs["shapes"][name].append([evaluate(model, test, ignore_index=IGNORE)])
    print(report(runs))


if __name__ == "__main__":
    main()
