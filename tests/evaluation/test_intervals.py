"""The intervals by hand, and how often they hold a known answer."""

import math

import pytest
import torch
from scipy import stats

from isonext.evaluation.intervals import Estimate, bootstrap, estimate, percentiles, share, share_difference


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_of_many_values_is_the_interval_of_the_normal_distribution(seed):
    values = noise(seed, (400,)).double() * 3 + 10
    made, error = bootstrap(values), values.std(correction=0).item() / 20
    assert made.mean == pytest.approx(values.mean().item())
    # A quantile of 2000 resamples deviates by sqrt(0.025 * 0.975 / 2000) / 0.058 = 0.06 errors: five of those.
    assert made.low == pytest.approx(made.mean - 1.96 * error, abs=0.3 * error)
    assert made.high == pytest.approx(made.mean + 1.96 * error, abs=0.3 * error)


def test_bootstrap_holds_the_true_mean_about_95_times_in_100():
    # At 40 values the percentile interval holds it 93.5 to 95 % of the time; 300 of them deviate by 1.3 %.
    made = [bootstrap(noise(seed, (40,)), seed, resamples=400) for seed in range(300)]
    assert 0.94 - 5 * 0.014 < sum(each.low <= 0 <= each.high for each in made) / 300 <= 0.99


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([0.25]), (0.25, math.nan, math.nan)),
        (torch.tensor([True, False]), (0.5, math.nan, math.nan)),
        (torch.tensor([[1, 1], [1, 2]]), (1.25, math.nan, math.nan)),
        (torch.full((7,), 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_bootstrap_of_few_or_equal_values_is_known(values, expected):
    made = bootstrap(values)
    assert (made.mean, made.low, made.high) == pytest.approx(expected, nan_ok=True)


def test_the_percentiles_of_a_few_values_are_expanded_by_students_t_and_those_of_many_are_not():
    # t of 4 degrees: 2.7764, times sqrt(5 / 4): 3.1041 deviations; of 9: 2.2622 sqrt(10 / 9) = 2.3845
    assert percentiles(5)[0] == pytest.approx(stats.norm.cdf(-3.1041), rel=1e-3)
    assert percentiles(10) == pytest.approx((stats.norm.cdf(-2.3845), 1 - stats.norm.cdf(-2.3845)), rel=1e-3)
    assert percentiles(10**6) == pytest.approx((0.025, 0.975), rel=1e-4)


@pytest.mark.parametrize("count", [5, 8, 20])
def test_the_interval_of_few_values_holds_the_mean_about_as_often(count):
    # Percentiles of 2.5 and 97.5 % hold it 0.82, 0.88 and 0.93 of the time.
    made = [bootstrap(noise(seed, (count,)), seed, resamples=1000) for seed in range(600)]
    assert sum(each.low <= 0 <= each.high for each in made) / 600 > 0.905


def test_bootstrap_follows_from_its_seed_and_leaves_the_global_randomness_alone():
    values, before = noise(0, (30,)), torch.random.get_rng_state()
    assert bootstrap(values) == bootstrap(values) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_estimate_reads_as_its_mean_and_interval():
    assert str(Estimate(0.5, 0.25, 0.7504)) == "0.500 [0.250, 0.750]"


def test_wilsons_interval_by_hand():
    # 9 of 10: centre (0.9 + 1.96^2 / 20) / (1 + 1.96^2 / 10), reach 1.96 sqrt(0.9 0.1 / 10 + 1.96^2 / 400) / (...)
    made = share(torch.tensor([True] * 9 + [False]))
    assert made.mean == pytest.approx(0.9)
    assert [made.low, made.high] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert share(torch.ones(20, dtype=torch.bool)).low == pytest.approx(20 / (20 + 1.96**2))
    assert share(torch.ones(20, dtype=torch.bool)).high == pytest.approx(1.0)


@pytest.mark.parametrize("truth", [0.9, 0.95, 0.97, 0.99])
@pytest.mark.parametrize("count", [16, 32, 64])
def test_wilsons_interval_holds_a_share_near_one_about_95_times_in_100(truth, count):
    hits = [share(torch.arange(count) < right) for right in range(count + 1)]
    chances = stats.binom.pmf(range(count + 1), count, truth)
    held = sum(chance for chance, made in zip(chances, hits, strict=True) if made.low <= truth <= made.high)
    assert held > 0.85  # at the worst; the bootstrap's: 0.15 to 0.80 at 16 pictures, of width 0 where all are right


def test_an_estimate_of_yes_and_no_is_a_share_and_of_measures_a_bootstrap():
    hits = torch.tensor([True, True, False])
    assert estimate(hits) == share(hits) and estimate(hits.double()) == bootstrap(hits)


@pytest.mark.parametrize("wins", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("losses", [0.0, 0.05, 0.3])
def test_the_interval_of_a_difference_of_shares_holds_it_about_95_times_in_100(wins, losses):
    draws = torch.rand(1000, 30, generator=torch.Generator().manual_seed(0))
    made = [share_difference((row < wins).double() - (row > 1 - losses).double()) for row in draws]
    assert sum(each.low <= wins - losses <= each.high for each in made) / 1000 > 0.91  # resampling: down to 0
    assert all(-1 <= each.low <= each.mean <= each.high <= 1 and each.low < each.high for each in made)


def test_a_difference_of_shares_by_hand():
    # 3 won, 1 lost of 8: centre 2 / 10, mean square (4 + 1) / 10
    made = share_difference(torch.tensor([1.0, 1, 1, -1, 0, 0, 0, 0]))
    reach = 1.96 * ((0.5 - 0.2**2) / 10) ** 0.5
    assert (made.mean, made.low, made.high) == pytest.approx((0.25, 0.2 - reach, 0.2 + reach))


def test_values_that_belong_together_are_one_and_the_interval_is_over_groups():
    groups = torch.tensor([4, 4, 1, 1, 1, 2, 3, 9])
    values = torch.tensor([1.0, 3.0, 0.0, 0.0, 6.0, 5.0, 1.0, 4.0])
    assert estimate(values, groups) == bootstrap(torch.tensor([2.0, 5.0, 1.0, 2.0, 4.0]))  # of groups 1, 2, 3, 4, 9
    assert estimate(values > 2, groups).mean == pytest.approx((1 / 3 + 1 + 0 + 1 / 2 + 1) / 5)
    copied = torch.arange(20) % 5
    assert estimate(torch.ones(20, dtype=torch.bool), copied) == share(torch.ones(5, dtype=torch.bool))
