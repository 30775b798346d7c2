"""Segmentation: a label for each pixel, some of them ignored, without mixing, with MixUp and with CutMix.

    python examples/train_segmentation.py

The pictures are drawn here: a disc and a square of random size, place and brightness on noise. The labels, of shape
``(B, H, W)``, are background, disc or square, and IGNORE along each outline, as in data sets whose outlines are
uncertain. The criterion handles both: MixUp gives each pixel two labels and their weights, CutMix the label of the
picture that the pixel comes from, and an ignored label adds nothing to the loss or its denominator.

With 50 pictures to train on there is no clear difference in accuracy. CutMix has the lower loss (0.206 against 0.224),
and both are better calibrated.

Prints the test scores after the last epoch, over the pixels that are not ignored.
"""

from __future__ import annotations

from itertools import product

import torch
from common import Runs, Samples, evaluate, example_parser, fit, report
from torch import nn
from tqdm import tqdm

from mixup_nn import CutMix, Mixer, MixUp, MixUpCriterion

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
    """Train every way on every seed, then print the results."""
    args = example_parser(__doc__, alpha=0.4, epochs=100, batch_size=10).parse_args()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    train, test = draw_shapes(50, 0, args.device), draw_shapes(200, 1, args.device)

    mixers: dict[str, Mixer] = {"no mixing": MixUp(0), "MixUp": MixUp(args.alpha), "CutMix": CutMix(1.0)}
    runs: Runs = {"shapes": {name: [] for name in mixers}}
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}
    for seed, (name, mixer) in tqdm(list(product(range(args.seeds), mixers.items())), unit="run"):
        torch.manual_seed(seed)
        model = nn.Sequential(mixer, small_segmenter()).to(args.device)
        criterion = MixUpCriterion(nn.CrossEntropyLoss(ignore_index=IGNORE), mixer)
        fit(model, criterion, train, lr=3e-3, seed=seed, **options)
        runs["shapes"][name].append([evaluate(model, test, ignore_index=IGNORE)])
    print(report(runs))


if __name__ == "__main__":
    main()
