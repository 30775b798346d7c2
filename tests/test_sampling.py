"""The draw: exact distributions at a fixed false-alarm rate, boxes pixel by pixel, reproducibility, errors.

Seeds are fixed, so a statistical test passes or fails for good; its level says how likely a right sampler would have
failed on the seed that happened to be chosen.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixup_nn import CutMix, Mix, Mixer, MixUp, RandomChoice
from mixup_nn.sampling import sample_beta, sample_cutmix, sample_mixup

from . import reference
from .cases import Operations, each_mixer

LEVEL = 1e-4
DRAWS = 200_000
ALPHAS = (0.001, 0.01, 0.1, 0.2, 1.0, 8.0, 100.0, 1000.0, 1e5, 1e7)
SIZES = (6, 9)

Sampler = Callable[..., Mix]


def cutmix(batch_size: int, *args: Any, **options: Any) -> Mix:
    """``sample_cutmix`` with the arguments of ``sample_mixup``."""
    return sample_cutmix((batch_size, 2, *SIZES), *args, **options)


def module(batch_size: int) -> Mix:
    """The draw of a module, with partners of its own for whatever it chose."""
    return RandomChoice([MixUp(1.0), CutMix()], per_sample=True).sample(torch.empty(batch_size, 2, *SIZES))


each_sampler = pytest.mark.parametrize("sample", (sample_mixup, cutmix))
each_source = pytest.mark.parametrize("sample", (sample_mixup, cutmix, module))
per_batch_and_sample = pytest.mark.parametrize("per_sample", (False, True), ids=("per_batch", "per_sample"))


def assert_beta(lam: Tensor, alpha: float) -> None:
    """Kolmogorov-Smirnov in the body; exact binomial for the mass of the tails, where float32 rounds."""
    values, exact = lam.double().numpy(), stats.beta(alpha, alpha)
    assert np.isfinite(values).all()
    cut = 1e-5
    body = values[(values > cut) & (values < 1 - cut)]
    low, high = exact.cdf(cut), exact.cdf(1 - cut)
    assert stats.binomtest(int((values <= cut).sum()), len(values), low).pvalue > LEVEL
    assert stats.binomtest(int((values >= 1 - cut).sum()), len(values), 1 - high).pvalue > LEVEL
    assert stats.kstest((exact.cdf(body) - low) / (high - low), "uniform").pvalue > LEVEL


def assert_uniform(counts: np.ndarray) -> None:
    assert stats.chisquare(counts.ravel()).pvalue > LEVEL


def assert_independent(first: np.ndarray, second: np.ndarray) -> None:
    """Two columns of booleans."""
    table = [[(mine & others).sum() for others in (second, ~second)] for mine in (first, ~first)]
    assert stats.chi2_contingency(table).pvalue > LEVEL


def assert_same_law(first: np.ndarray, second: np.ndarray, *, rounding: float = 0.0) -> None:
    """Kolmogorov-Smirnov for samples of one law, of which one is off by no more than ``rounding``.

    Shifted up by it the first is nowhere likelier to be small than the second, and shifted down nowhere less likely.
    """
    assert stats.ks_2samp(first + rounding, second, alternative="greater", method="asymp").pvalue > LEVEL
    assert stats.ks_2samp(first - rounding, second, alternative="less", method="asymp").pvalue > LEVEL


def features(lam: Tensor) -> Tensor:
    """A row for each ``lam``: the number; of a map its mean, that of its left half and that of its upper half."""
    if lam.ndim < 2:
        return lam.reshape(-1, 1).double()
    height, width = lam.shape[2:]
    parts = lam, lam[..., : width // 2], lam[..., : height // 2, :]
    return torch.stack([part.double().mean((1, 2, 3)) for part in parts], 1)


# The weights


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sample_beta_follows_the_exact_distribution(alpha: float) -> None:
    assert_beta(sample_beta(alpha, (DRAWS,)), alpha)


@pytest.mark.parametrize("alpha", (0.1, 0.2))
def test_the_lower_tail_is_exact_far_below_the_rounding_of_one(alpha: float) -> None:
    lam = sample_beta(alpha, (DRAWS,)).double().numpy()
    for cut in (1e-8, 1e-12, 1e-16):
        expected = stats.beta(alpha, alpha).cdf(cut)
        assert stats.binomtest(int((lam <= cut).sum()), DRAWS, expected).pvalue > LEVEL


@pytest.mark.parametrize("alpha", ALPHAS)
def test_moments_are_those_of_the_beta_distribution(alpha: float) -> None:
    lam = sample_beta(alpha, (DRAWS,)).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 4.5 * math.sqrt(variance / DRAWS)
    fourth = float(stats.beta(alpha, alpha).stats("k")) + 3
    assert abs(lam.var() / variance - 1) < 4.5 * math.sqrt((fourth - 1) / DRAWS)


@pytest.mark.parametrize("alpha", (1e-30, 1e30))
def test_extreme_alphas_give_the_limits_of_the_distribution(alpha: float) -> None:
    lam = sample_beta(alpha, (1000,))
    if alpha > 1:
        assert (lam == 0.5).all()
    else:
        assert set(lam.tolist()) == {0.0, 1.0}


@each_sampler
def test_successive_draws_and_samples_of_a_batch_are_independent(sample: Sampler) -> None:
    draws = torch.stack([features(sample(4, 1.0, per_sample=True, p=0.9).lam) for _ in range(5000)])
    for lam in draws.unbind(2):
        columns = torch.cat((lam[:-1], lam[1:]), 1).T  # four samples of one draw, four of the next
        correlation = torch.corrcoef(columns).fill_diagonal_(0)
        assert correlation.abs().max() < 4.5 / math.sqrt(len(lam))


@each_sampler
@per_batch_and_sample
def test_lam_is_independent_of_the_partners(sample: Sampler, per_sample: bool) -> None:
    draws = [sample(3, 1.0, per_sample=per_sample, p=0.9) for _ in range(3000)]
    forward = np.array([int(index[0]) == 1 for _, index in draws])
    lam = torch.stack([features(lam).flatten() for lam, _ in draws]).numpy()
    for column in lam.T:
        assert_same_law(column[forward], column[~forward])


@each_sampler
@per_batch_and_sample
@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
def test_p_gates_once_and_whatever_was_drawn(sample: Sampler, p: float, per_sample: bool) -> None:
    if per_sample:
        lam = sample(20_000, 8.0, p=p, per_sample=True).lam
    else:
        lam = torch.stack([sample(2, 8.0, p=p).lam.squeeze(0) for _ in range(4000)])
    drawn = features(lam)  # at this alpha no weight is 1, and no box so small that it holds no pixel
    mixed = drawn[drawn[:, 0] != 1]
    assert stats.binomtest(len(mixed), len(drawn), p).pvalue > LEVEL
    if p > 0:
        always = features(sample(20_000, 8.0, per_sample=True).lam)
        for column, expected in zip(mixed.numpy().T, always.numpy().T, strict=True):
            assert_same_law(column, expected)


@each_sampler
@per_batch_and_sample
def test_alpha_zero_is_plain_training(sample: Sampler, per_sample: bool) -> None:
    lam, index = sample(1000, 0, per_sample=per_sample)
    assert lam.shape == sample(1000, 1.0, per_sample=per_sample).lam.shape
    assert (lam == 1).all()
    assert (index != torch.arange(1000)).all()


def test_alpha_is_two_tenths_for_mixup_and_one_for_cutmix_by_default() -> None:
    for sample, alpha in ((sample_mixup, 0.2), (cutmix, 1.0)):
        assert equal(*(after_seed(1, sample, 16, *given, per_sample=True) for given in ((), (alpha,))))


def test_one_lam_per_batch_by_default_and_one_per_sample_on_request() -> None:
    assert sample_mixup(64).lam.shape == ()
    assert len(set(sample_mixup(64, 1.0, per_sample=True).lam.tolist())) == 64


# The partners


@each_source
def test_the_partners_of_successive_draws_are_independent(sample: Sampler) -> None:
    counts = np.zeros((3, 3))
    for _ in range(3000):
        first, second = (int(sample(4).index[0]) for _ in range(2))
        counts[first - 1, second - 1] += 1
    assert_uniform(counts)


@each_source
@pytest.mark.parametrize("batch_size", (3, 4, 5))
def test_every_cycle_is_equally_likely(sample: Sampler, batch_size: int) -> None:
    cycles = {
        tuple(following[walk.index(i)] for i in range(batch_size))
        for rest in itertools.permutations(range(1, batch_size))
        for walk, following in [((0, *rest), (*rest, 0))]
    }
    counts = dict.fromkeys(cycles, 0)
    for _ in range(100 * len(cycles)):
        counts[tuple(sample(batch_size).index.tolist())] += 1
    assert len(counts) == math.factorial(batch_size - 1)
    assert_uniform(np.array(list(counts.values())))


@each_source
def test_every_other_sample_is_an_equally_likely_partner_and_itself_never(sample: Sampler) -> None:
    counts = torch.zeros(8, 8)
    for _ in range(3000):
        counts[torch.arange(8), sample(8).index] += 1
    assert (counts.diagonal() == 0).all()
    off_diagonal = counts[~torch.eye(8, dtype=torch.bool)]
    assert_uniform(off_diagonal.numpy())


@pytest.mark.parametrize("batch_size", (65, 4097))
def test_in_a_large_batch_partners_are_as_likely_near_as_far(batch_size: int) -> None:
    counts, width = np.zeros(64), (batch_size - 1) // 64
    for _ in range(1500):
        counts[(int(sample_mixup(batch_size).index[7]) - 7) % batch_size // width % 64] += 1
    assert_uniform(counts)


def test_in_a_very_large_batch_neighbours_are_no_likelier_partners(device: str) -> None:
    """Ties among the keys that are sorted, as in half precision, would keep neighbours together."""
    batch_size, reach, draws, near = 2**16, 16, 10, 0
    for _ in range(draws):
        distance = sample_mixup(batch_size, device=device).index - torch.arange(batch_size, device=device)
        near += int(((distance.abs() <= reach) | (distance.abs() >= batch_size - reach)).sum())
    expected = stats.poisson(draws * batch_size * 2 * reach / (batch_size - 1))
    assert 2 * min(expected.cdf(near), expected.sf(near - 1)) > LEVEL


@pytest.mark.parametrize("batch_size", (64, 4096))
def test_in_a_large_batch_partners_stand_before_and_after_alike(batch_size: int, device: str) -> None:
    """A stable sort, as on a GPU, would leave ties among its keys in order."""
    draws, after = 2**18 // batch_size, 0
    for _ in range(draws):
        after += int((sample_mixup(batch_size, device=device).index > torch.arange(batch_size, device=device)).sum())
    # Ascents of a random cycle: half of its steps, with the variance of the Eulerian numbers.
    deviation = (after - draws * batch_size / 2) / math.sqrt(draws * batch_size / 12)
    assert 2 * stats.norm.sf(abs(deviation)) > LEVEL


@each_sampler
@pytest.mark.parametrize("batch_size", (0, 1, 2, 3))
def test_small_batches(sample: Sampler, batch_size: int) -> None:
    for per_sample in (False, True):
        index = sample(batch_size, per_sample=per_sample).index
        assert index.tolist() in ([[]], [[0]], [[1, 0]], [[1, 2, 0], [2, 0, 1]])[batch_size]


# The box


@per_batch_and_sample
@pytest.mark.parametrize("spatial", ((7,), (5, 8), (2, 3, 4)))
def test_a_box_has_the_shape_of_the_sample(spatial: tuple[int, ...], per_sample: bool) -> None:
    seen = set()
    for shape in ((4, 3, *spatial), torch.Size((4, 3, *spatial)), [4, 3, *spatial]) * 5:
        lam, index = sample_cutmix(shape, per_sample=per_sample, spatial_dims=len(spatial))
        assert lam.shape == (4 if per_sample else 1, 1, *spatial)
        assert (lam.dtype, index.dtype, index.shape) == (torch.float32, torch.int64, (4,))
        seen |= set(lam.flatten().tolist())
    assert seen == {0.0, 1.0}


@per_batch_and_sample
@pytest.mark.parametrize("spatial", ((40,), (11, 16), (5, 7, 9)))
def test_the_box_is_that_of_the_paper_pixel_by_pixel(spatial: tuple[int, ...], per_sample: bool) -> None:
    alpha, unclear, pixels = 0.7, 0, 0
    for seed in range(3 if per_sample else 15):
        options: dict[str, Any] = {"per_sample": per_sample, "spatial_dims": len(spatial)}
        lam = after_seed(seed, sample_cutmix, (5, 2, *spatial), alpha, **options).lam
        torch.manual_seed(seed)
        u, v, *centers = torch.rand(2 + len(spatial), len(lam)).double().tolist()
        for i, mask in enumerate(lam[:, 0]):
            t = math.sqrt(u[i] ** (-1 / alpha) - 1) * math.cos(2 * math.pi * v[i])
            share, center = 0.5 + t / (2 * math.sqrt(1 + t * t)), tuple(axis[i] for axis in centers)
            # Rounding may move an edge across the middle of a pixel: a box a little larger, one a little smaller.
            more = reference.cutmix_mask(spatial, max(share - 1e-5, 0), center)
            less = reference.cutmix_mask(spatial, min(share + 1e-5, 1), center)
            assert ((more <= mask) & (mask <= less)).all()
            unclear, pixels = unclear + int((more != less).sum()), pixels + mask.numel()
    assert unclear < pixels / 100


def clipped_share(alpha: float, ndim: int, count: int) -> np.ndarray:
    """The share of the original beside boxes without pixels, by numpy's random numbers."""
    random = np.random.default_rng(0)
    side, center = (1 - random.beta(alpha, alpha, count)) ** (1 / ndim), random.random((ndim, count))
    lengths = np.minimum(center + side / 2, 1) - np.maximum(center - side / 2, 0)
    return np.asarray(1 - lengths.prod(0))


@pytest.mark.parametrize("alpha", (0.2, 1.0))
@pytest.mark.parametrize("spatial", ((4096,), (256, 128)))
def test_the_share_after_clipping_follows_the_law_of_the_paper(spatial: tuple[int, ...], alpha: float) -> None:
    # An edge takes a pixel or not, by its middle: half a pixel at each end of a side.
    rounding = sum(1 / size for size in spatial)
    assert_same_law(shares(spatial, alpha), clipped_share(alpha, len(spatial), DRAWS), rounding=rounding)


@pytest.mark.parametrize("alpha", (0.2, 1.0))
@pytest.mark.parametrize("share", (reference.torchvision_share, reference.timm_share), ids=("torchvision", "timm"))
def test_the_share_after_clipping_follows_the_law_of_other_libraries(share: Callable[..., float], alpha: float) -> None:
    random, size = np.random.default_rng(0), 224
    lams, centers = random.beta(alpha, alpha, 20_000), random.integers(size, size=(20_000, 2))
    theirs = np.array([share(size, size, lam, center) for lam, center in zip(lams, centers, strict=True)])
    # They round the centre and half the side down: up to two pixels a side, and one is ours.
    assert_same_law(shares((size, size), alpha), theirs, rounding=2 * 3 / size)


def shares(spatial: tuple[int, ...], alpha: float) -> np.ndarray:
    """The share of the original beside 2000 boxes."""
    draws = [sample_cutmix((200, 1, *spatial), alpha, per_sample=True).lam for _ in range(10)]
    return torch.cat([lam.flatten(1).mean(1) for lam in draws]).double().numpy()


@pytest.mark.parametrize("alpha", (0.2, 1.0))
@pytest.mark.parametrize("spatial", ((9,), (4, 5), (3, 2, 4)))
def test_a_place_is_in_the_box_as_often_as_uniform_centres_put_it_there(spatial: tuple[int, ...], alpha: float) -> None:
    lam = sample_cutmix((20_000, 1, *spatial), alpha, per_sample=True, spatial_dims=len(spatial)).lam
    inside = (lam == 0).sum((0, 1))
    quantiles = (np.arange(10_000) + 0.5) / 10_000
    half = (1 - stats.beta(alpha, alpha).ppf(quantiles)) ** (1 / len(spatial)) / 2
    for position in reference.positions(spatial):
        middles = [(place + 0.5) / size for place, size in zip(position, spatial, strict=True)]
        # A centre covers x from as far as half a side on either hand, but not from beyond the border.
        covered = np.prod([np.minimum(x, half) + np.minimum(1 - x, half) for x in middles], axis=0)
        test = stats.binomtest(int(inside[position]), len(lam), covered.mean())
        assert test.pvalue > LEVEL / inside.numel()


@per_batch_and_sample
@pytest.mark.parametrize("spatial_dims", (1, 2, 3))
@pytest.mark.parametrize("spatial", ((8,), (6, 9), (4, 6, 9)))
def test_a_box_cuts_the_last_dimensions_and_goes_through_the_others_whole(
    spatial: tuple[int, ...], spatial_dims: int, per_sample: bool
) -> None:
    shape, cut = (5, 2, *spatial), spatial[-spatial_dims:]
    options: dict[str, Any] = {"per_sample": per_sample, "spatial_dims": spatial_dims}
    if spatial_dims > len(spatial):
        with pytest.raises(ValueError, match=rf"^expected inputs of {spatial_dims} spatial dimensions or more, "):
            CutMix(**options).sample(torch.empty(shape))
        return
    for seed in range(5):
        lam = after_seed(seed, sample_cutmix, shape, **options).lam
        assert lam.shape == (5 if per_sample else 1, 1, *(1,) * (len(spatial) - spatial_dims), *cut)
        assert torch.equal(lam, after_seed(seed, CutMix(**options).sample, torch.empty(shape)).lam)
        alone = after_seed(seed, sample_cutmix, (5, 2, *cut), **options).lam
        assert torch.equal(lam.flatten(), alone.flatten())


# The choice


class Fixed(Mixer):
    """Draws the same ``lam`` every time, by which one sees that it was chosen."""

    def __init__(self, lam: float, *, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.lam = lam

    def sample_lam(self, input: Tensor) -> Tensor:
        return torch.full((), self.lam, device=input.device)


class Half(MixUp):
    """Draws a ``lam`` from one half of the interval, by which one sees that it was chosen."""

    def __init__(self, low: float, **options: Any) -> None:
        super().__init__(1.0, **options)
        self.low = low

    def sample_lam(self, input: Tensor) -> Tensor:
        return self.low + super().sample_lam(input) / 2


@per_batch_and_sample
@pytest.mark.parametrize("weights", (None, (1,), (1, 3), (0.2, 0.3, 0.5), (2, 0, 1), (0, 1, 1), (1e-300, 3e-300)))
def test_each_mixer_is_chosen_with_its_weight(weights: tuple[float, ...] | None, per_sample: bool) -> None:
    number = 3 if weights is None else len(weights)
    mixer = RandomChoice([Fixed(k / 4) for k in range(number)], weights, per_sample=per_sample)
    if per_sample:
        lam = mixer.sample(torch.empty(20_000)).lam.expand(20_000)
    else:
        lam = torch.stack([mixer.sample(torch.empty(2)).lam for _ in range(3000)])
    counts = np.array([int((lam == k / 4).sum()) for k in range(number)])
    expected = np.ones(number) if weights is None else np.array(weights)
    expected = expected / expected.sum() * len(lam)
    assert counts.sum() == len(lam)
    assert (counts[expected == 0] == 0).all()
    assert number == 1 or stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > LEVEL


@per_batch_and_sample
def test_the_choice_is_independent_of_the_lam_chosen_and_of_the_partners(per_sample: bool) -> None:
    mixer = RandomChoice([Half(0.0, per_sample=True), Half(0.5, per_sample=True)], per_sample=per_sample)
    draws = [mixer.sample(torch.empty(3)) for _ in range(5000)]
    lam, index = (torch.stack(parts).numpy() for parts in zip(*draws, strict=True))
    chosen = lam[:, 0] >= 0.5
    for kept, low in ((chosen, 0.5), (~chosen, 0.0)):
        assert stats.kstest(2 * (lam[kept, 0] - low), "uniform").pvalue > LEVEL
    assert_independent(chosen, index[:, 0] == 1)
    assert_independent(chosen[1:], chosen[:-1])
    if per_sample:
        assert_independent(chosen, lam[:, 1] >= 0.5)
    else:
        assert (chosen == (lam[:, 1] >= 0.5)).all()


@per_batch_and_sample
@pytest.mark.parametrize("kept", (0, 1), ids=("first", "second"))
def test_a_certain_choice_is_that_mixer_exactly(kept: int, per_sample: bool) -> None:
    mixers, input = [MixUp(1.0, per_sample=True), CutMix()], torch.empty(16, 2, *SIZES)
    choice = RandomChoice(mixers, (1 - kept, kept), per_sample=per_sample)
    for seed in range(100):
        chosen = after_seed(seed, choice.sample, input).lam
        torch.manual_seed(seed)
        lam = [mixer.sample_lam(input) for mixer in mixers][kept]
        assert torch.equal(chosen, (lam if kept else lam.view(16, 1, 1, 1)).expand_as(chosen))


@pytest.mark.parametrize("entry", (Fixed(0.25, p=0.5), RandomChoice([Fixed(0.25)], p=0.5)), ids=("mixer", "choice"))
def test_each_mixer_keeps_its_own_p(entry: Mixer) -> None:
    mixer = RandomChoice([entry, Fixed(0.75)], (2, 1))
    lam = torch.stack([mixer.sample(torch.empty(2)).lam for _ in range(3000)])
    assert_uniform(np.array([int((lam == value).sum()) for value in (0.25, 0.75, 1)]))


def test_the_p_of_a_choice_is_the_probability_of_mixing_at_all() -> None:
    choice = RandomChoice([Fixed(0.25), Fixed(0.75)], p=2 / 3)
    lam = torch.stack([choice.sample(torch.empty(2)).lam for _ in range(3000)])
    assert_uniform(np.array([int((lam == value).sum()) for value in (0.25, 0.75, 1)]))
    choice.p = 0
    assert choice.sample(torch.empty(2)).lam == 1


def test_the_lowest_uniform_number_mixes_nothing_at_p_0_and_chooses_nothing_of_weight_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mixup_nn.sampling._uniform", lambda shape, *_: torch.zeros(shape))
    assert Fixed(0.25, p=0).sample(torch.empty(2)).lam == 1
    assert RandomChoice([Fixed(0.25), Fixed(0.5)], (0, 1)).sample(torch.empty(2)).lam == 0.5


@per_batch_and_sample
def test_a_mixer_in_eval_mode_leaves_unmixed_what_chooses_it_while_the_choice_trains(per_sample: bool) -> None:
    choice = RandomChoice([Fixed(0.25), Fixed(0.5), Fixed(0.75)], per_sample=per_sample)
    choice.mixers[1].eval()
    nested = RandomChoice([choice])

    def lam(mixer: Mixer) -> list[Tensor]:
        return [value for _ in range(150) for value in mixer.sample(torch.empty(20)).lam.expand(20).unique()]

    for mixer in (choice, nested):
        assert {float(value) for value in lam(mixer)} == {0.25, 0.75, 1.0}
    assert {float(value) for value in lam(nested.eval())} == {0.25, 0.5, 0.75}  # sample draws in eval mode too


@per_batch_and_sample
def test_each_mixer_keeps_its_own_per_sample(per_sample: bool) -> None:
    """Chosen for the batch or for each sample: mixers that draw for the batch, and mixers that draw for each sample."""
    for own in (False, True):
        mixer = RandomChoice([MixUp(1.0, per_sample=own), CutMix(per_sample=own)], per_sample=per_sample)
        seen = set()
        for _ in range(20):
            maps = mixer.sample(torch.empty(32, 2, *SIZES)).lam.expand(32, 1, *SIZES).flatten(1)
            of_mixup = ((maps > 0) & (maps < 1)).all(1)
            for of_mixer in (of_mixup, ~of_mixup):
                different = len(maps[of_mixer].unique(dim=0))
                assert different > of_mixer.sum() / 2 if own and of_mixer.any() else different <= 1
            seen.add(float(of_mixup.float().mean()))
        assert (seen == {0.0, 1.0}) is not per_sample


@pytest.mark.parametrize("outer", (False, True), ids=("per_batch", "per_sample"))
@pytest.mark.parametrize("inner", (False, True), ids=("of_per_batch", "of_per_sample"))
def test_a_choice_of_choices_is_made_at_both_levels(inner: bool, outer: bool) -> None:
    nested = RandomChoice([Fixed(0.0), Fixed(0.25)], per_sample=inner)
    mixer = RandomChoice([nested, Fixed(0.5)], (2, 1), per_sample=outer)
    lam = torch.stack([mixer.sample(torch.empty(2)).lam.expand(2) for _ in range(3000)])
    assert_uniform(np.array([int((lam[:, 0] == value).sum()) for value in (0.0, 0.25, 0.5)]))
    assert (lam[:, 0] != lam[:, 1]).any() == (inner or outer)


@pytest.mark.parametrize(
    "mixer, shape",
    (
        (RandomChoice([MixUp(), MixUp()]), ()),
        (RandomChoice([MixUp(), MixUp()], per_sample=True), (5,)),
        (RandomChoice([MixUp(), MixUp(per_sample=True)]), (5,)),
        (RandomChoice([MixUp(), CutMix()]), (1, 1, *SIZES)),
        (RandomChoice([CutMix(), MixUp(per_sample=True)]), (5, 1, *SIZES)),
        (RandomChoice([CutMix(), MixUp()], per_sample=True), (5, 1, *SIZES)),
        (RandomChoice([RandomChoice([MixUp(), MixUp()], per_sample=True), CutMix()]), (5, 1, *SIZES)),
    ),
)
def test_a_choice_is_as_fine_as_the_finest_lam_and_has_one_partner_for_all(
    mixer: Mixer, shape: tuple[int, ...]
) -> None:
    with Operations() as operations:
        lam, index = mixer.sample(torch.empty(5, 2, *SIZES))
    assert (lam.shape, lam.dtype) == (shape, torch.float32)
    assert sorted(index.tolist()) == list(range(5))
    assert operations.launched.count("sort") == 1


# Randomness, devices, dtypes, cost


def equal(first: Mix, second: Mix) -> bool:
    return torch.equal(first.lam, second.lam) and torch.equal(first.index, second.index)


def after_seed(seed: int, draw: Callable[..., Mix], *args: Any, **options: Any) -> Mix:
    torch.manual_seed(seed)
    return draw(*args, **options)


@each_sampler
@per_batch_and_sample
def test_a_seed_reproduces_and_other_seeds_and_successive_draws_differ(sample: Sampler, per_sample: bool) -> None:
    draws = []
    for seed in (1, 1, 2):  # as ranks seeded alike, and one seeded otherwise
        first = after_seed(seed, sample, 16, 1.0, per_sample=per_sample, p=0.9)
        draws.append((first, sample(16, 1.0, per_sample=per_sample, p=0.9)))
    assert equal(draws[0][0], draws[1][0])
    assert equal(draws[0][1], draws[1][1])
    for other in (draws[0][1], draws[2][0]):
        assert not torch.equal(draws[0][0].lam, other.lam)
        assert not torch.equal(draws[0][0].index, other.index)


@each_mixer
def test_a_seed_reproduces_the_draws_of_a_module(make: Callable[[], Mixer]) -> None:
    input = torch.empty(16, 2, *SIZES)
    draws = [after_seed(seed, make().sample, input) for seed in (1, 1, 2)]
    assert equal(draws[0], draws[1])
    assert not equal(draws[0], draws[2])


@each_sampler
@per_batch_and_sample
def test_a_generator_is_the_only_randomness_used(sample: Sampler, per_sample: bool) -> None:
    def draw(seed: int = 3) -> Mix:
        generator = torch.Generator().manual_seed(seed)
        return sample(16, 1.0, per_sample=per_sample, p=0.9, generator=generator)

    state = torch.get_rng_state()
    first, lam = draw(), sample_beta(1.0, (4,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert equal(first, draw())
    assert not equal(first, draw(4))
    assert torch.equal(lam, sample_beta(1.0, (4,), generator=torch.Generator().manual_seed(3)))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@each_source
@per_batch_and_sample
@pytest.mark.parametrize(
    "context",
    (
        partial(default_dtype, torch.float64),
        partial(default_dtype, torch.bfloat16),
        partial(torch.autocast, "cpu", torch.bfloat16),
    ),
    ids=("float64", "bfloat16", "autocast"),
)
def test_draws_are_the_same_float32_numbers_whatever_dtype_is_in_force(
    sample: Sampler, context: Callable[[], AbstractContextManager[Any]], per_sample: bool
) -> None:
    options: dict[str, Any] = {} if sample is module else {"per_sample": per_sample, "p": 0.5}

    def draws() -> list[Mix]:
        drawn = [after_seed(1, sample, 2000, **options)]
        if sample is not module:
            drawn.append(sample(2000, **options, generator=torch.Generator().manual_seed(1)))
        return [*drawn, Mix(sample_beta(1.0, (2,)), torch.arange(2))]

    expected = draws()
    with context():
        drawn = draws()
    for mix, same in zip(drawn, expected, strict=True):
        assert mix.lam.dtype == torch.float32
        assert equal(mix, same)


class Devices(TorchDispatchMode):
    """Notes the device of each tensor that an operation of torch takes or makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, output))
        self.seen |= {value.device.type for value in values if isinstance(value, Tensor)}
        return output


on_either_device = pytest.mark.parametrize("here, elsewhere", (("meta", "cpu"), ("cpu", "meta")))


@each_sampler
@per_batch_and_sample
@on_either_device
def test_everything_is_drawn_on_the_device_asked_for_and_nothing_moved_there(
    sample: Sampler, per_sample: bool, here: str, elsewhere: str
) -> None:
    with torch.device(elsewhere), Devices() as devices:
        mix = sample(4, p=0.5, per_sample=per_sample, device=here)
        beta = sample_beta(1.0, (2,), device=here)
    assert devices.seen == {here}
    assert {value.device.type for value in (*mix, beta)} == {here}


@each_sampler
def test_the_default_device_is_that_of_torch(sample: Sampler) -> None:
    with torch.device("meta"), Devices() as devices:
        sample(4, p=0.5)
        sample_beta(1.0)
    assert devices.seen == {"meta"}


@each_mixer
@on_either_device
def test_a_module_draws_on_the_device_of_its_input_and_moves_nothing(
    make: Callable[[], Mixer], here: str, elsewhere: str
) -> None:
    input = torch.empty(4, 2, *SIZES, device=here)
    with torch.device(elsewhere), Devices() as devices:
        make().sample(input)
    assert devices.seen == {here}


@each_sampler
def test_draws_are_made_on_the_device_asked_for(sample: Sampler, device: str) -> None:
    mix = sample(4, p=0.5, device=device)
    assert mix.lam.device.type == mix.index.device.type == device
    generator = torch.Generator(device).manual_seed(0)
    assert sample(4, p=0.5, device=device, generator=generator).index.device.type == device


@pytest.mark.parametrize(
    "mixer, most",
    ((MixUp(1.0), 17), (MixUp(1.0, per_sample=True), 17), (CutMix(), 33), (RandomChoice([MixUp(1.0), CutMix()]), 47)),
    ids=("mixup", "mixup_per_sample", "cutmix", "choice"),
)
def test_draw_and_mix_launch_no_more_than_they_did(mixer: Mixer, most: int) -> None:
    """Each operation is a kernel in eager mode; and the largest is one map, not one for each sample or channel."""
    batch_size = 32
    input = torch.empty(batch_size, 2, *SIZES)
    with Operations() as operations:
        mix = mixer.sample(input)
    assert max(size for _, size in operations.made) <= 2 * batch_size
    with operations:
        mixer(input, mix)
    assert len(operations.launched) <= most, operations.launched


# Errors


@each_sampler
@pytest.mark.parametrize("alpha", (-1.0, math.nan, math.inf))
def test_alpha_out_of_range(sample: Sampler, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"^expected alpha to be a finite number >= 0, got {alpha}$"):
        sample(4, alpha)
    with pytest.raises(ValueError, match=f"^expected alpha to be a finite number > 0, got {alpha}$"):
        sample_beta(alpha)


def test_sample_beta_needs_a_positive_alpha() -> None:
    with pytest.raises(ValueError, match="^expected alpha to be a finite number > 0, got 0$"):
        sample_beta(0)


@pytest.mark.parametrize("batch_size", (torch.randn(4, 3), (4, 3), 4.0))
def test_batch_size_must_be_an_integer(batch_size: Any) -> None:
    got = type(batch_size).__name__
    with pytest.raises(TypeError, match=f"^expected batch_size to be an integer, got {got}; "):
        sample_mixup(batch_size)


@pytest.mark.parametrize("shape", ((), (4,), (4, 3), (4, 3, 2, 2, 2, 2)))
def test_cutmix_needs_one_to_three_spatial_dimensions(shape: tuple[int, ...]) -> None:
    message = r"^expected inputs of shape \(B, C, \*spatial\) with one to three spatial dimensions, got "
    with pytest.raises(ValueError, match=message + re.escape(f"{shape}; ")):
        sample_cutmix(shape)


def test_three_spatial_dimensions_need_a_word_on_what_is_cut() -> None:
    """The frames of a clip (B, T, C, H, W) stand where the channels of a volume do."""
    for draw in (sample_cutmix, lambda shape: CutMix()(torch.empty(shape))):
        with pytest.raises(
            ValueError, match=r"^expected spatial_dims for inputs of five dimensions, got None with "
        ) as e:
            draw((2, 3, 4, 5, 6))
        assert "3 cuts a box out of a volume" in str(e.value)
        assert "2 one box through all frames of a clip" in str(e.value)


@pytest.mark.parametrize("shape", ((4, 3, 0), (4, 3, 0, 5), (4, 3, 5, 0)))
def test_nothing_is_cut_from_an_empty_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf", none of size 0, got {re.escape(str(shape))}$"):
        sample_cutmix(shape)


@pytest.mark.parametrize("spatial_dims", (0, 4, -1, 2.5, "2"))
def test_spatial_dims_out_of_range(spatial_dims: Any) -> None:
    makers: tuple[Callable[..., Any], ...] = (partial(sample_cutmix, (4, 3, 5, 5)), CutMix)
    for make in makers:
        with pytest.raises(ValueError, match=f"^expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}$"):
            make(spatial_dims=spatial_dims)


@pytest.mark.parametrize("shape", (torch.randn(4, 3, 2, 2), 4))
def test_the_shape_of_cutmix_must_be_one(shape: Any) -> None:
    got = type(shape).__name__
    with pytest.raises(TypeError, match=f"^expected shape to be a sequence of sizes, got {got}; as in x.shape$"):
        sample_cutmix(shape)


@each_sampler
@pytest.mark.parametrize("p", (-0.1, 1.1, math.nan))
def test_p_out_of_range(sample: Sampler, p: float) -> None:
    with pytest.raises(ValueError, match=rf"^expected p to be a probability in \[0, 1\], got {p}$"):
        sample(4, p=p)


@each_sampler
def test_alpha_and_p_must_be_numbers(sample: Sampler) -> None:
    with pytest.raises(TypeError, match="^expected alpha to be a number, got str$"):
        sample(4, "0.2")
    with pytest.raises(TypeError, match="^expected p to be a number, got NoneType$"):
        sample(4, p=None)
    with pytest.raises(TypeError, match="^expected alpha to be a number, got Tensor$"):
        sample_beta(torch.tensor(0.2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "half", (Fraction(1, 2), np.float64(0.5), np.float32(0.5)), ids=lambda half: type(half).__name__
)
def test_alpha_and_p_may_be_any_real_number(half: Any) -> None:
    for sample in (sample_mixup, cutmix):
        assert equal(*(after_seed(1, sample, 8, number, p=number, per_sample=True) for number in (half, 0.5)))
    same = [sample_beta(number, (8,), generator=torch.Generator().manual_seed(1)) for number in (half, 0.5)]
    assert torch.equal(*same)
    mixers = MixUp(half, p=half), CutMix(half, p=half)
    assert all((type(mixer.alpha), mixer.alpha, mixer.p) == (float, 0.5, 0.5) for mixer in mixers)
    assert RandomChoice(mixers, (half, half), p=half).weights == (0.5, 0.5)
