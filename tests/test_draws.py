"""The laws of the draw, the same for eager, compiled and exported programs.

Counts are compared with the probabilities of the papers. Seeds are fixed, so a test passes or fails for good; ``LEVEL``
says how likely a right sampler would have failed on the seed that happened to be chosen.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mixup_nn import CutMix, Mix, Mixer, MixUp, RandomChoice
from mixup_nn.sampling import sample_beta, sample_cutmix, sample_mixup

from .cases import MIXERS

LEVEL = 1e-4
ALPHAS = (0.001, 0.01, 0.1, 0.2, 0.5, 1.0, 8.0, 100.0, 1000.0, 1e5, 1e7)
Array = np.ndarray[Any, Any]
Draw = Callable[..., Mix]


# The two tests of statistics


def assert_law(counts: Sequence[float] | Array, probabilities: Sequence[float] | Array) -> None:
    """Chi-squared where five or more are expected; what is rarer is counted together; nothing impossible came."""
    counts, expected = np.asarray(counts, float), np.asarray(probabilities, float)
    total, rare = counts.sum(), expected * counts.sum() < 5
    assert expected.sum() == pytest.approx(1)
    assert (counts[expected == 0] == 0).all()
    assert stats.binomtest(int(counts[rare].sum()), int(total), min(expected[rare].sum(), 1)).pvalue > LEVEL
    if (~rare).sum() > 1:
        common = expected[~rare] / expected[~rare].sum() * counts[~rare].sum()
        assert stats.chisquare(counts[~rare], common).pvalue > LEVEL


def assert_independent(first: Array, second: Array) -> None:
    """Chi-squared for two columns of codes; a code that comes seldom is one with all such."""
    columns = []
    for column in (first, second):
        _, codes, counts = np.unique(column, return_inverse=True, return_counts=True)
        columns.append(np.where(counts[codes] < len(column) / 100 + 20, -1, codes))
    places = [np.unique(column, return_inverse=True)[1] for column in columns]
    table = np.zeros([place.max() + 1 for place in places])
    np.add.at(table, tuple(places), 1)
    if min(table.shape) > 1:
        assert stats.chi2_contingency(table).pvalue > LEVEL


def assert_same_law(first: Array, second: Array) -> None:
    """Whether two samples of codes, of one number each, are of one law."""
    assert_independent(np.concatenate((first, second)), np.repeat((0, 1), (len(first), len(second))))


def assert_normal(deviation: float) -> None:
    assert 2 * stats.norm.sf(abs(deviation)) > LEVEL


# What the papers say


def assert_beta(lam: Tensor, alpha: float, p: float = 1.0) -> None:
    """Beta in the body and, far below the rounding of one, in the tails; with probability ``1 - p`` it is 1."""
    exact = stats.beta(alpha, alpha)
    edges = np.array([1e-16, 1e-12, 1e-8, 1e-5, 1 - 1e-5, *exact.ppf(np.arange(1, 32) / 32)])
    edges = np.unique(edges[(edges >= 1e-16) & (edges <= 1 - 1e-5)])
    values = lam.double().numpy()
    assert lam.dtype == torch.float32
    assert ((values >= 0) & (values <= 1)).all()
    probabilities = p * np.diff(exact.cdf(edges), prepend=0, append=1)
    probabilities[-1] += 1 - p
    assert_law(np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1), probabilities)
    if 0 < p < 1 < alpha:  # no lam is 1 of itself
        assert_law([(values == 1).sum(), (values != 1).sum()], [1 - p, p])


def paper_boxes(spatial: Sequence[int], alpha: float, p: float, count: int = 200_000) -> Array:
    """First and last pixel of boxes along each axis, those of no pixel as zeros, by numpy's random numbers."""
    random, sizes = np.random.default_rng(0), np.array(spatial)[:, None]
    half = (1 - random.beta(alpha, alpha, count)) ** (1 / len(spatial)) / 2
    center = random.random((len(spatial), count))
    low, high = (np.ceil(sizes * (center + side) - 0.5).clip(0, sizes) for side in (-half, half))
    empty = (high <= low).any(0) | (random.random(count) >= p)
    return np.where(empty, 0, np.stack((low, high))).astype(int)


def boxes_of(lam: Tensor) -> Array:
    """The same of masks ``(N, 1, *spatial)``, which must be boxes."""
    inside = (lam[:, 0] == 0).numpy()
    assert (inside | (lam[:, 0] == 1).numpy()).all()
    ends, box = [], np.ones_like(inside)
    for axis, size in enumerate(inside.shape[1:], 1):
        others = tuple(other for other in range(1, inside.ndim) if other != axis)
        along = np.asarray(inside.any(axis=others))
        ends.append((along.argmax(1), np.where(along.any(1), size - along[:, ::-1].argmax(1), 0)))
        box &= along.reshape(-1, *(size if other == axis else 1 for other in range(1, inside.ndim)))
    assert (box == inside).all()
    return np.array(ends).swapaxes(0, 1)


def assert_boxes(lam: Tensor, alpha: float, p: float = 1.0) -> None:
    """Places, sides and shares of boxes, clipped at the border, pixel by pixel."""
    spatial = lam.shape[2:]
    ours, theirs = boxes_of(lam), paper_boxes(spatial, alpha, p)
    sides = [ends[1] - ends[0] for ends in (ours, theirs)]
    assert_same_law(sides[0].prod(0), sides[1].prod(0))
    for axis, size in enumerate(spatial):
        assert_same_law(*(ends[0, axis] * (size + 1) + ends[1, axis] for ends in (ours, theirs)))
        assert_same_law(*(side[axis] * 100 + side[axis - 1] for side in sides))


# Programs that draw


class Program(nn.Module):
    """Many draws for the same inputs, so that one compilation or export does for all of them."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        super().__init__()
        self.draws = list(draws)

    def forward(self, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(mix.lam, mix.index) for mix in (draw(*inputs) for draw in self.draws)]


def program(source: str, draws: Sequence[Draw], *inputs: Tensor, dynamic: bool = False) -> Callable[..., Any]:
    """What draws them all: in eager mode, compiled, or exported."""
    torch.manual_seed(0)
    module = Program(draws)
    if source == "inductor":
        torch._dynamo.reset()
        return torch.compile(module, fullgraph=True, dynamic=dynamic)
    if source == "exported":
        shapes = {"inputs": ({0: torch.export.Dim.DYNAMIC},)} if dynamic else None
        return torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    return module


def repeated(source: str, drawer: Callable[..., Any], times: int, input: Tensor) -> list[Mix]:
    """That many draws, stacked: vmap makes them at once where it can, as eager operations are slow."""
    if source == "inductor" or (source == "exported" and input.ndim == 2):  # sizes that are not known
        calls = [drawer(input) for _ in range(times)]
        return [Mix(*map(torch.stack, zip(*draws, strict=True))) for draws in zip(*calls, strict=True)]
    with warnings.catch_warnings(action="ignore"):  # index_copy_ has no rule of its own
        stacked = torch.vmap(drawer, randomness="different")(input.expand(times, *input.shape))
    return [Mix(*mix) for mix in stacked]


IN_ONE_PROCESS = pytest.mark.xdist_group("inductor")  # whose first compilation takes as long as several more


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def each_source(names: Iterable[Any], inductor: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise over programs and their draws; Inductor, which takes long to compile, has few of them."""
    cases: list[Any] = [("eager", name) for name in names]
    cases += [("exported", name) for name in names if "generator" not in str(name)]  # cannot enter a graph
    cases += [pytest.param("inductor", name, marks=IN_ONE_PROCESS) for name in inductor]
    return pytest.mark.parametrize("source, name", cases)


MANY = 20_000
INPUTS = VIDEO, IMAGE, SOUND, ROW = (MANY, 1, 3, 4, 5), (MANY, 2, 6, 9), (MANY, 1, 7), (MANY, 1, 1, 9)
BETAS: dict[str, tuple[float, float, Callable[[Tensor], Mix]]] = {
    **{f"alpha {a}": (a, 1.0, MixUp(a, per_sample=True).sample) for a in (0.001, 0.5, 1.0, 1000.0)},
    "beta": (0.2, 1.0, MixUp(per_sample=True).sample),
    "gated beta": (8.0, 0.3, MixUp(8.0, p=0.3, per_sample=True).sample),
    "beta of the function": (0.2, 0.6, lambda x: sample_mixup(x.shape[0], 0.2, p=0.6, per_sample=True)),
    "generator": (0.2, 0.3, lambda x: sample_mixup(len(x), p=0.3, per_sample=True, generator=seeded())),
    "sample_beta": (0.1, 1.0, lambda x: Mix(sample_beta(0.1, (len(x) // 4, 4)).flatten(), sample_mixup(len(x)).index)),
    "beta of a choice": (8.0, 0.5, RandomChoice([MixUp(8.0, per_sample=True)], p=0.5, per_sample=True).sample),
    "beta of two": (2.0, 0.7, RandomChoice([MixUp(2.0, p=0.7, per_sample=True)] * 2, (1, 3), per_sample=True).sample),
}
# The alpha, the p, which of the inputs, and the draw.
BOXES: dict[str, tuple[float, float, int, Callable[[Tensor], Mix]]] = {
    "image": (1.0, 1.0, 1, CutMix(per_sample=True).sample),
    "gated image": (8.0, 0.3, 1, CutMix(8.0, p=0.3, per_sample=True).sample),
    "image of the function": (0.2, 0.8, 1, lambda x: sample_cutmix(x.shape, 0.2, p=0.8, per_sample=True)),
    "generator": (1.0, 0.3, 1, lambda x: sample_cutmix(x.shape, p=0.3, per_sample=True, generator=seeded())),
    "sound": (1.0, 0.6, 2, CutMix(p=0.6, per_sample=True).sample),
    "row of pixels": (1.0, 1.0, 3, CutMix(per_sample=True).sample),
    "volume": (1.0, 0.6, 0, CutMix(p=0.6, per_sample=True, spatial_dims=3).sample),
    "frames": (1.0, 1.0, 0, CutMix(per_sample=True, spatial_dims=2).sample),
    "columns": (0.5, 1.0, 1, CutMix(0.5, per_sample=True, spatial_dims=1).sample),
    "image of a choice": (1.0, 0.5, 1, RandomChoice([CutMix(per_sample=True)] * 2, p=0.5, per_sample=True).sample),
}


@cache
def large(source: str) -> dict[Any, Any]:
    """One draw for a large batch of each of ``BETAS`` and ``BOXES``."""
    if source == "inductor":
        drawer = fused()
        torch.manual_seed(0)
        return dict(zip(FUSED, drawer(torch.empty(IMAGE)), strict=True))
    inputs = [torch.empty(shape) for shape in INPUTS]
    draws = {("beta", name): (1, draw) for name, (*_, draw) in BETAS.items()}
    draws |= {("box", name): (which, draw) for name, (*_, which, draw) in BOXES.items()}
    draws = {key: draw for key, draw in draws.items() if source == "eager" or "generator" not in key}

    def of(which: int, draw: Draw) -> Draw:
        return lambda *inputs: draw(inputs[which])

    drawn = program(source, [of(*item) for item in draws.values()], *inputs)(*inputs)
    return dict(zip(draws, drawn, strict=True))


@each_source(BETAS, ["alpha 0.001"])
def test_weights_follow_beta_behind_their_gate(source: str, name: str) -> None:
    alpha, p, _ = BETAS[name]
    lam, index = large(source)["beta", name]
    assert lam.shape == index.shape == (MANY,)
    assert_beta(lam, alpha, p)
    codes = (lam * 8).floor().numpy()
    assert_independent(codes[1:], codes[:-1])
    assert_independent(codes, index.numpy() * 8 // MANY)


@each_source(BOXES, ["gated image"])
def test_boxes_follow_the_law_of_the_paper(source: str, name: str) -> None:
    alpha, p, which, _ = BOXES[name]
    lam, index = large(source)["box", name]
    shape = INPUTS[which]
    uncut = {"frames": 1, "columns": 1}.get(name, 0)
    assert (lam.shape, lam.dtype) == ((MANY, 1, *(1,) * uncut, *shape[2 + uncut :]), torch.float32)
    lam = lam.reshape(MANY, 1, *shape[2 + uncut :])
    assert_boxes(lam, alpha, p)
    codes = (lam.flatten(1).mean(1) * 4).floor().numpy()
    assert_independent(codes[1:], codes[:-1])
    assert_independent(codes, index.numpy() * 8 // MANY)


# One cycle through the whole batch

SIZES = 2, 3, 4, 5, 17, 100, 257, 1000


@cache
def partners(source: str) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """What draws partners for batches of any size, and the other sizes of such a batch."""
    if source == "inductor":
        return fused(), IMAGE[1:]
    mixers = MixUp(), RandomChoice([MixUp(), MixUp(per_sample=True)])
    return program(source, [mixer.sample for mixer in mixers], torch.empty(5, 1), dynamic=True), (1,)


@cache
def cycles(source: str) -> dict[int, list[Tensor]]:
    """Partners in batches from 2 to 1000, in eager mode of every size: two draws or more, a thousand of ``SIZES``."""
    (draw, rest), step = partners(source), 1 if source == "eager" else 6
    each = len(draw(torch.empty(2, *rest)))
    drawn = {}
    torch.manual_seed(0)
    for size in {*range(2, 1001, step), *SIZES}:
        mixes = repeated(source, draw, 1000 // each if size in SIZES else 1, torch.empty(size, *rest))
        drawn[size] = [index for mix in mixes for index in mix.index]
    return drawn


def assert_uniform_cycles(drawn: Sequence[Tensor]) -> None:
    """Statistics of each cycle that are uniform, whatever its size, with a random number between two whole ones."""
    random, after, variance = np.random.default_rng(0), 0.0, 0.0
    ranks: dict[str, list[float]] = {}
    for index in drawn:
        size, partners = len(index), index.tolist()
        for name, i in (("first", 0), ("middle", size // 2), ("last", size - 1)):
            partner = partners[i]
            places = {"partner": partner - (partner > i), "distance": (partner - i) % size - 1}
            if size > 2:
                places["partner of the partner"] = (partners[partner] - i) % size - 1
            for kind, place in places.items():
                ranks.setdefault(f"{name} {kind}", []).append((place + random.random()) / (size - 1))
        if size > 2:  # ascents of a cycle: as many as descents on average, with the variance of Eulerian numbers
            after += int((index > torch.arange(size)).sum()) - size / 2
            variance += size / 12
    for values in ranks.values():
        assert_law(np.histogram(values, 16, (0, 1))[0], [1 / 16] * 16)
    assert_normal(after / math.sqrt(variance or 1))


def is_a_cycle(index: Tensor) -> bool:
    """Whether one walks through all before the first comes again."""
    partners, i = index.tolist(), 0
    seen = set()
    while i not in seen:
        seen.add(i)
        i = partners[i]
    return i == 0 and len(seen) == len(partners)


every_source = pytest.mark.parametrize("source", ("eager", "exported", pytest.param("inductor", marks=IN_ONE_PROCESS)))


@every_source
def test_partners_are_one_cycle_at_any_size(source: str) -> None:
    drawn = cycles(source)
    assert all(is_a_cycle(index) for several in drawn.values() for index in several)
    assert_uniform_cycles([index for several in drawn.values() for index in several[:2]])


@each_source(SIZES, SIZES)
def test_every_cycle_of_a_size_is_equally_likely(source: str, name: int) -> None:
    size, drawn = name, cycles(source)[name]
    assert_uniform_cycles(drawn)
    if size in (3, 4, 5):
        counts = Counter(tuple(index.tolist()) for index in drawn)
        number = math.factorial(size - 1)
        assert len(counts) == number
        assert_law(list(counts.values()), [1 / number] * number)


@every_source
def test_neighbours_are_no_likelier_partners_in_a_huge_batch(source: str) -> None:
    """Ties among keys of half precision would keep neighbours together."""
    draw, rest = partners(source)
    size, reach, near, count = 2**15, 16, 0, 0
    while count < 10:
        for _, index in draw(torch.empty(size, *rest)):
            distance = (index - torch.arange(size)).abs()
            near, count = near + int(((distance <= reach) | (distance >= size - reach)).sum()), count + 1
    assert_law([near, count * size - near], [2 * reach / (size - 1), 1 - 2 * reach / (size - 1)])


# Gates and choices


class Coin(Mixer):
    """Draws one of two numbers, by which one sees who was chosen; also as maps."""

    def __init__(self, *values: float, p: float = 1.0, per_sample: bool = False, maps: bool = False) -> None:
        super().__init__(p=p)
        self.values, self.per_sample, self.maps = values, per_sample, maps

    def sample_lam(self, input: Tensor) -> Tensor:
        drawn = torch.rand(input.shape[0] if self.per_sample else 1, 1, 1, 1, device=input.device)
        lam = torch.where(drawn < 0.5, self.values[0], self.values[-1])
        if self.maps:
            return lam.expand(-1, 1, 2, 2)
        return lam.flatten() if self.per_sample else lam.view(())


Law = dict[tuple[float, float], float]


def law(mixer: Mixer) -> Law:
    """The probability of each pair of weights of two samples, by recursion over what is chosen."""
    drawn: defaultdict[tuple[float, float], float] = defaultdict(float)
    if isinstance(mixer, RandomChoice):
        rests = [mixer.training and not entry.training for entry in mixer.mixers]
        laws = [{(1.0, 1.0): 1.0} if rest else law(entry) for rest, entry in zip(rests, mixer.mixers, strict=True)]
        own = mixer.per_sample
        weights = [weight / sum(each) for each in [mixer.weights or [1] * len(laws)] for weight in each]
        for j, k in itertools.product(range(len(laws)), repeat=2):
            if j == k:
                for pair, q in laws[j].items():
                    drawn[pair] += q * weights[j] * (weights[j] if own else 1)
            elif own:
                for (a, _), q in laws[j].items():
                    for (_, b), r in laws[k].items():
                        drawn[a, b] += q * r * weights[j] * weights[k]
    else:
        assert isinstance(mixer, Coin)
        own = mixer.per_sample
        for a, b in itertools.product((mixer.values[0], mixer.values[-1]), repeat=2) if own else ():
            drawn[a, b] += 1 / 4
        for a in () if own else (mixer.values[0], mixer.values[-1]):
            drawn[a, a] += 1 / 2
    gated: defaultdict[tuple[float, float], float] = defaultdict(float)
    for (a, b), q in drawn.items():
        gated[a, b] += q * mixer.p * (mixer.p if own else 1)
        gated[1, 1] += q * (1 - mixer.p) * ((1 - mixer.p) if own else 1)
        if own:
            gated[a, 1] += q * mixer.p * (1 - mixer.p)
            gated[1, b] += q * (1 - mixer.p) * mixer.p
    return dict(gated)


def random_tree(seed: int, depth: int = 2) -> Mixer:
    """A tree of choices: one to five entries, with weights, gates and decisions at random."""
    random, numbers = np.random.default_rng(seed), itertools.count()

    def grow(depth: int) -> Mixer:
        options: dict[str, Any] = {"p": float(random.choice((1.0, 0.6))), "per_sample": bool(random.integers(2))}
        if depth == 0 or random.random() < 0.3:
            return Coin(*(next(numbers) / 64 for _ in range(2)), maps=bool(random.integers(2)), **options)
        entries = [grow(depth - 1) for _ in range(random.integers(1, 6 if depth == 2 else 4))]
        weights = None if random.random() < 0.3 else [1, *random.integers(0, 4, len(entries) - 1).tolist()]
        return RandomChoice(entries, weights, **options)

    return RandomChoice([grow(depth - 1) for _ in range(1 + seed % 3)], p=0.7, per_sample=seed % 2 == 0)


def resting(choice: RandomChoice, entry: int) -> RandomChoice:
    """The choice, with an entry in eval mode."""
    choice.mixers[entry].eval()
    return choice


A, B, C = 0.25, 0.5, 0.75
TREES: dict[str, Mixer] = {
    "five with weights": RandomChoice([Coin(k / 8) for k in range(5)], (1, 0, 3, 0.5, 2)),
    "five for each sample": RandomChoice([Coin(k / 8) for k in range(5)], (1, 0, 3, 0.5, 2), per_sample=True),
    "tiny weights": RandomChoice([Coin(A), Coin(B)], (1e-300, 3e-300)),
    "gates of entries": RandomChoice([Coin(A, p=0.5), Coin(B, B, p=0.2, per_sample=True, maps=True)], (2, 1)),
    "number and map": RandomChoice([Coin(A), Coin(B, maps=True)], p=0.5),
    "number and map of each": RandomChoice([Coin(A), Coin(B, maps=True)], p=0.5, per_sample=True),
    "of each, gate of the batch": RandomChoice([Coin(A, per_sample=True), Coin(B)], p=0.5),
    "maps, gate of the batch": RandomChoice([Coin(A, B, per_sample=True, maps=True), Coin(C)], p=0.5),
    "one, gate of the batch": RandomChoice([Coin(A, B, per_sample=True)], p=0.5),
    "one, gate of each": RandomChoice([Coin(A)], p=0.5, per_sample=True),
    "one map, gate of each": RandomChoice([Coin(A, maps=True)], p=0.5, per_sample=True),
    "choices of each": RandomChoice([RandomChoice([Coin(A), Coin(B)], per_sample=True), Coin(C)], (2, 1)),
    "each of choices": RandomChoice([RandomChoice([Coin(A), Coin(B)], p=0.5), Coin(C)], (2, 1), per_sample=True),
    "gates of entries, chosen by each": RandomChoice(
        [Coin(A, p=0.5), Coin(B, p=0.2, maps=True)], (2, 1), per_sample=True
    ),
    "one at rest": resting(RandomChoice([Coin(A), Coin(B), Coin(C)], (2, 1, 1), per_sample=True), 0),
    "a choice at rest": resting(RandomChoice([RandomChoice([Coin(A), Coin(B)]), Coin(C)], (2, 1)), 0),
    "in eval mode": RandomChoice([RandomChoice([Coin(A), Coin(B, p=0.5)]), Coin(C)], p=0.7).eval(),
    **{f"random {seed}": random_tree(seed) for seed in range(6)},
}
FEW: dict[str, tuple[Mixer, bool]] = {  # whether two samples are independent
    "batch": (MixUp(1.0, p=0.7), False),
    "sample": (MixUp(1.0, p=0.7, per_sample=True), True),
    "box": (CutMix(p=0.7), False),
    "boxes": (CutMix(1.0, p=0.7, per_sample=True), True),
    "choice": (RandomChoice([MixUp(8.0), CutMix()]), False),
    "choices": (RandomChoice([MixUp(8.0, per_sample=True), CutMix(per_sample=True)], per_sample=True), True),
}
SHARED = RandomChoice([MixUp(8.0), CutMix()], (1, 2), per_sample=True)
CALLS = 1500
FUSED: dict[Any, Draw] = {  # what Inductor draws, in one graph for all sizes
    ("beta", "alpha 0.001"): BETAS["alpha 0.001"][-1],
    ("box", "gated image"): BOXES["gated image"][-1],
    "number and map of each": TREES["number and map of each"].sample,
    "choices": FEW["choices"][0].sample,
    "shared": SHARED.sample,
}


@cache
def fused() -> Callable[..., Any]:
    return program("inductor", list(FUSED.values()), torch.empty(5, *IMAGE[1:]), dynamic=True)


@cache
def small(source: str) -> dict[str, Any]:
    """Many draws for a batch of four, stacked, of each of ``TREES`` and ``FEW``."""
    if source == "inductor":
        drawer = fused()
        torch.manual_seed(0)
        return dict(zip(FUSED, repeated(source, drawer, CALLS, torch.empty(4, *IMAGE[1:])), strict=True))
    mixers = {**TREES, **{name: mixer for name, (mixer, _) in FEW.items()}, "shared": SHARED}
    input = torch.empty(4, 1, 2, 2)
    drawer = program(source, [mixer.sample for mixer in mixers.values()], input)
    return dict(zip(mixers, repeated(source, drawer, CALLS, input), strict=True))


def of_samples(lam: Tensor) -> Tensor:
    """Stacked draws, each as rows of its four samples."""
    if lam.ndim == 1:
        lam = lam[:, None]
    return lam.reshape(*lam.shape[:2], -1).expand(-1, 4, -1)


@each_source(TREES, ["number and map of each"])
def test_a_tree_of_choices_draws_by_its_probabilities(source: str, name: str) -> None:
    lam, expected = of_samples(small(source)[name].lam), law(TREES[name])
    assert lam.dtype == torch.float32
    assert (lam == lam[..., :1]).all()
    for i, j in ((0, 3), (1, 2)):
        counts = Counter((float(a), float(b)) for a, b in lam[:, (i, j), 0].tolist())
        assert counts.keys() <= expected.keys()
        assert_law([counts[pair] for pair in expected], list(expected.values()))


@each_source(FEW, ["choices"])
def test_draws_samples_and_partners_are_independent(source: str, name: str) -> None:
    lam, index = small(source)[name]
    weights = of_samples(lam)
    codes = (weights.mean(2) * 3).ceil().numpy() * 10 + (weights[..., 0] * 3).ceil().numpy()
    walks = index[:, 0].numpy() * 4 + index[:, 1].numpy()
    for first, second in ((codes[:, 0], walks), (codes[1:, 0], codes[:-1, 0]), (walks[1:], walks[:-1])):
        assert_independent(first, second)
    if FEW[name][1]:
        assert_independent(codes[:, 0], codes[:, 3])
    else:
        assert (codes[:, :1] == codes).all()
    if name in ("batch", "sample"):
        assert_beta(lam.flatten()[::4] if name == "sample" else lam, 1.0, 0.7)
    if name in ("box", "boxes"):
        assert_boxes(lam[:, 0], 1.0, 0.7)


@every_source
def test_all_that_choose_a_mixer_without_per_sample_share_its_draw(source: str) -> None:
    lam = small(source)["shared"].lam
    rows = of_samples(lam)
    boxed = ((rows == 0) | (rows == 1)).all(2)
    assert_law(torch.bincount(boxed.sum(1), minlength=5).numpy(), stats.binom(4, 2 / 3).pmf(range(5)))
    for chosen in (boxed, ~boxed):
        ends = [rows.where(chosen[..., None], out).aminmax(dim=1)[end] for end, out in enumerate((2.0, -1.0))]
        some = chosen.any(1)
        assert torch.equal(ends[0][some], ends[1][some])
        if chosen is boxed:
            assert_boxes(ends[0][some].reshape(-1, 1, *lam.shape[3:]), 1.0)
        else:
            assert_beta(ends[0][some, 0], 8.0)


# In eager mode


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sample_beta_follows_the_exact_distribution(alpha: float) -> None:
    lam = sample_beta(alpha, (200_000,)).double()
    assert_beta(lam.float(), alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = float(stats.beta(alpha, alpha).stats("k")) + 3
    assert_normal((lam.mean().item() - 0.5) / math.sqrt(variance / len(lam)))
    assert_normal((lam.var().item() / variance - 1) / math.sqrt((fourth - 1) / len(lam)))


def test_extreme_alphas_are_the_limits_of_the_distribution() -> None:
    assert (sample_beta(1e30, (1000,)) == 0.5).all()
    assert set(sample_beta(1e-30, (1000,)).tolist()) == {0.0, 1.0}


def test_the_lowest_number_opens_no_gate_of_0_and_picks_no_weight_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixup_nn.sampling._uniform", lambda shape, *_: torch.zeros(shape))
    assert Coin(A, p=0).sample(torch.empty(2)).lam == 1
    assert RandomChoice([Coin(A), Coin(B)], (0, 1)).sample(torch.empty(2)).lam == B


def after_seed(seed: int, draw: Draw, *args: Any, **options: Any) -> Mix:
    torch.manual_seed(seed)
    return draw(*args, **options)


def equal(first: Mix, second: Mix) -> bool:
    return torch.equal(first.lam, second.lam) and torch.equal(first.index, second.index)


def cutmix(batch_size: int, *args: Any, **options: Any) -> Mix:
    """``sample_cutmix`` with the arguments of ``sample_mixup``."""
    return sample_cutmix((batch_size, 2, 6, 9), *args, **options)


@pytest.mark.parametrize("sample, kind", ((sample_mixup, MixUp), (cutmix, CutMix)))
@pytest.mark.parametrize("per_sample", (False, True))
def test_a_mixer_draws_as_the_function_of_its_options(sample: Draw, kind: type[MixUp], per_sample: bool) -> None:
    input, per = torch.empty(16, 2, 6, 9), {"per_sample": per_sample}
    half = {"p": np.float32(0.5), **per}
    for args, options in (((), {}), ((), per), ((0,), per), ((8.0,), {"p": 0, **per}), ((Fraction(1, 2),), half)):
        drawn = after_seed(1, sample, 16, *args, **options)
        assert equal(drawn, after_seed(1, kind(*args, **options).sample, input))
        assert (drawn.lam == 1).all() or ((args or (9,))[0] and options.get("p", 1))
    for size in (0, 1):
        assert sample(size, **per).index.tolist() == [0] * size


@pytest.mark.parametrize("sample", (sample_mixup, cutmix))
@pytest.mark.parametrize("per_sample", (False, True))
def test_a_generator_is_the_only_randomness_used(sample: Draw, per_sample: bool) -> None:
    def draw(seed: int) -> Mix:
        generator = torch.Generator().manual_seed(seed)
        beta = sample_beta(1.0, (4,), generator=generator)
        mix = sample(16, 1.0, per_sample=per_sample, p=0.9, generator=generator)
        return Mix(torch.cat((mix.lam.flatten(), beta)), mix.index)

    state = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert equal(first, draw(3))
    assert not torch.equal(first.lam, draw(4).lam)
    assert not torch.equal(first.index, draw(4).index)
    many, generator = [], torch.Generator().manual_seed(0)
    for _ in range(2000):
        lam, index = sample(4, 2.0, p=0.7, per_sample=per_sample, generator=generator)
        many.append((lam if lam.ndim == 0 else lam[0], index[0]))
    lam, partner = map(torch.stack, zip(*many, strict=True))
    (assert_beta if sample is sample_mixup else assert_boxes)(lam, 2.0, 0.7)
    closed = (lam.flatten(1) == 1).all(1) if lam.ndim > 1 else lam == 1
    assert_independent(closed.numpy(), partner.numpy())
    assert_independent(closed[1:].numpy(), closed[:-1].numpy())


@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
def test_draws_are_the_same_float32_numbers_in_every_dtype(default: torch.dtype, autocast: bool) -> None:
    def draws(**options: Any) -> list[Mix]:
        return [after_seed(1, make().sample, torch.empty(500, 1, 6, 9, **options)) for make in MIXERS.values()]

    expected = draws()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            drawn = [draws(dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16)]
            assert sample_beta(1.0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for mixes in drawn:
        assert all(map(equal, mixes, expected))
        assert {mix.lam.dtype for mix in mixes} == {torch.float32}


@pytest.mark.parametrize("here, elsewhere", (("meta", "cpu"), ("cpu", "meta")))
def test_draws_are_made_on_the_device_of_the_input(here: str, elsewhere: str) -> None:
    input = torch.empty(4, 2, 6, 9, device=here)
    with torch.device(elsewhere):
        mixes = [make().sample(input) for make in MIXERS.values()]
        mixes += [sample(4, p=0.5, device=here) for sample in (sample_mixup, cutmix)]
        default = sample_mixup(4, p=0.5), cutmix(4, p=0.5), Mix(sample_beta(1.0), sample_mixup(3).index)
    assert {value.device.type for mix in mixes for value in mix} == {here}
    assert {value.device.type for mix in default for value in mix} == {elsewhere}


@pytest.mark.parametrize("spatial_dims", (1, 2, 3))
@pytest.mark.parametrize("per_sample", (False, True))
def test_the_function_cuts_as_many_dimensions_as_the_mixer(spatial_dims: int, per_sample: bool) -> None:
    input = torch.empty(16, 2, 4, 6, 9)
    drawn = after_seed(1, sample_cutmix, input.shape, per_sample=per_sample, spatial_dims=spatial_dims)
    assert equal(drawn, after_seed(1, CutMix(per_sample=per_sample, spatial_dims=spatial_dims).sample, input))
    assert drawn.lam.shape == (16 if per_sample else 1, 1, *[1] * (3 - spatial_dims), *input.shape[5 - spatial_dims :])


def test_a_box_may_be_anywhere_in_a_long_sound() -> None:
    """Half precision counts no odd numbers beyond 2048, and nothing beyond 65504."""
    size = 2**17
    inside = sample_cutmix((200, 1, size), per_sample=True).lam[:, 0] == 0
    for place in (0, size // 2, size - 1):
        assert 20 < int(inside[:, place].sum()) < 180
    assert len((inside.int().diff(dim=1).nonzero()[:, 1] % 64).unique()) > 50  # and ends at any position
