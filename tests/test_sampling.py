"""The draw: exact distributions at a fixed false-alarm rate, reproducibility, errors.

Seeds are fixed, so a statistical test passes or fails for good; its level says how likely a right sampler would have
failed on the seed that happened to be chosen.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mixup_nn import Mix
from mixup_nn.sampling import sample_beta, sample_mix

LEVEL = 1e-4
DRAWS = 200_000
ALPHAS = (0.001, 0.01, 0.1, 0.2, 1.0, 8.0, 100.0, 1000.0)


def assert_beta(lam: torch.Tensor, alpha: float) -> None:
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


def test_successive_draws_and_samples_of_a_batch_are_independent() -> None:
    lam = torch.stack([sample_mix(4, 1.0, per_sample=True).lam for _ in range(5000)]).double()
    columns = torch.cat((lam[:-1], lam[1:]), 1).T  # four samples of one draw, four of the next
    correlation = torch.corrcoef(columns).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(len(lam))


def test_the_partners_of_successive_draws_are_independent() -> None:
    counts = np.zeros((3, 3))
    for _ in range(3000):
        first, second = (int(sample_mix(4).index[0]) for _ in range(2))
        counts[first - 1, second - 1] += 1
    assert_uniform(counts)


@pytest.mark.parametrize("per_sample", (False, True))
def test_lam_is_independent_of_the_partners(per_sample: bool) -> None:
    draws = [sample_mix(3, 1.0, per_sample=per_sample) for _ in range(5000)]
    forward = np.array([int(index[0]) == 1 for _, index in draws])
    lam = np.array([lam.view(-1).tolist() for lam, _ in draws])
    for column in lam.T:
        assert stats.ks_2samp(column[forward], column[~forward]).pvalue > LEVEL


@pytest.mark.parametrize("batch_size", (3, 4, 5))
def test_every_cycle_is_equally_likely(batch_size: int) -> None:
    cycles = {
        tuple(following[walk.index(i)] for i in range(batch_size))
        for rest in itertools.permutations(range(1, batch_size))
        for walk, following in [((0, *rest), (*rest, 0))]
    }
    counts = dict.fromkeys(cycles, 0)
    for _ in range(200 * len(cycles)):
        counts[tuple(sample_mix(batch_size).index.tolist())] += 1
    assert len(counts) == math.factorial(batch_size - 1)
    assert_uniform(np.array(list(counts.values())))


def test_every_other_sample_is_an_equally_likely_partner_and_itself_never() -> None:
    counts = torch.zeros(8, 8)
    for _ in range(3000):
        counts[torch.arange(8), sample_mix(8).index] += 1
    assert (counts.diagonal() == 0).all()
    off_diagonal = counts[~torch.eye(8, dtype=torch.bool)]
    assert_uniform(off_diagonal.numpy())


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
def test_p_gates_once(p: float, per_sample: bool) -> None:
    if per_sample:
        lam = sample_mix(20_000, 8.0, p=p, per_sample=True).lam
    else:
        lam = torch.stack([sample_mix(2, 8.0, p=p).lam for _ in range(4000)])
    mixed = lam[lam != 1]
    assert stats.binomtest(len(mixed), len(lam), p).pvalue > LEVEL
    if p > 0:
        assert_beta(mixed, 8.0)


@pytest.mark.parametrize("per_sample", (False, True))
def test_alpha_zero_is_plain_training(per_sample: bool) -> None:
    lam, index = sample_mix(1000, 0, per_sample=per_sample)
    assert lam.shape == ((1000,) if per_sample else ())
    assert (lam == 1).all()
    assert (index != torch.arange(1000)).all()


def test_alpha_is_two_tenths_by_default() -> None:
    lam = torch.stack([sample_mix(2).lam for _ in range(3000)])
    assert_beta(lam, 0.2)


def test_one_lam_per_batch_by_default_and_one_per_sample_on_request() -> None:
    assert sample_mix(64).lam.shape == ()
    assert len(set(sample_mix(64, 1.0, per_sample=True).lam.tolist())) == 64


@pytest.mark.parametrize("batch_size", (0, 1, 2, 3))
def test_small_batches(batch_size: int) -> None:
    mix = sample_mix(batch_size)
    assert mix.index.tolist() in ([[]], [[0]], [[1, 0]], [[1, 2, 0], [2, 0, 1]])[batch_size]


def equal(first: Mix, second: Mix) -> bool:
    return torch.equal(first.lam, second.lam) and torch.equal(first.index, second.index)


def test_a_seed_reproduces_and_other_seeds_and_successive_draws_differ() -> None:
    draws = []
    for seed in (1, 1, 2):  # as ranks seeded alike, and one seeded otherwise
        torch.manual_seed(seed)
        draws.append((sample_mix(16, 1.0), sample_mix(16, 1.0)))
    assert equal(draws[0][0], draws[1][0])
    assert equal(draws[0][1], draws[1][1])
    assert not equal(draws[0][0], draws[0][1])
    assert draws[0][0].lam != draws[2][0].lam
    assert not torch.equal(draws[0][0].index, draws[2][0].index)


def test_a_generator_is_the_only_randomness_used() -> None:
    def draw() -> Mix:
        generator = torch.Generator().manual_seed(3)
        return sample_mix(16, 1.0, per_sample=True, p=0.5, generator=generator)

    state = torch.get_rng_state()
    first, lam = draw(), sample_beta(1.0, (4,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert equal(first, draw())
    assert torch.equal(lam, sample_beta(1.0, (4,), generator=torch.Generator().manual_seed(3)))


def test_draws_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert sample_mix(4, p=0.5).lam.dtype == torch.float32
        assert sample_beta(1.0, (2,)).dtype == torch.float32
        assert sample_beta(1.0, (2,), generator=torch.Generator()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_draws_are_made_on_the_device_asked_for(device: str) -> None:
    mix = sample_mix(4, p=0.5, device=device)
    assert mix.lam.device.type == mix.index.device.type == device
    generator = torch.Generator(device).manual_seed(0)
    assert sample_mix(4, p=0.5, device=device, generator=generator).index.device.type == device


def test_nothing_is_drawn_on_another_device() -> None:
    for per_sample in (False, True):
        mix = sample_mix(4, p=0.5, per_sample=per_sample, device="meta")
        assert mix.lam.device.type == mix.index.device.type == "meta"
    assert sample_beta(1.0, (2,), device="meta").device.type == "meta"


@pytest.mark.parametrize("alpha", (-1.0, math.nan, math.inf))
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"^sample_mix: expected alpha to be a finite number >= 0, got {alpha}$"):
        sample_mix(4, alpha)
    with pytest.raises(ValueError, match=f"^sample_beta: expected alpha to be a finite number > 0, got {alpha}$"):
        sample_beta(alpha)


def test_sample_beta_needs_a_positive_alpha() -> None:
    with pytest.raises(ValueError, match="^sample_beta: expected alpha to be a finite number > 0, got 0$"):
        sample_beta(0)


@pytest.mark.parametrize("batch_size", (torch.randn(4, 3), (4, 3), 4.0))
def test_batch_size_must_be_an_integer(batch_size: Any) -> None:
    got = type(batch_size).__name__
    with pytest.raises(TypeError, match=f"^sample_mix: expected batch_size to be an integer, got {got}; "):
        sample_mix(batch_size)


@pytest.mark.parametrize("p", (-0.1, 1.1, math.nan))
def test_p_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match=rf"^sample_mix: expected p to be a probability in \[0, 1\], got {p}$"):
        sample_mix(4, p=p)


def test_alpha_and_p_must_be_numbers() -> None:
    with pytest.raises(TypeError, match="^sample_mix: expected alpha to be a number, got str$"):
        sample_mix(4, "0.2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^sample_mix: expected p to be a number, got NoneType$"):
        sample_mix(4, p=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^sample_beta: expected alpha to be a number, got Tensor$"):
        sample_beta(torch.tensor(0.2))  # type: ignore[arg-type]
