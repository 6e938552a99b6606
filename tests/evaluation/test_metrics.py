"""The measures against closed forms and a second implementation; the classifier on textures with known answers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from isonext.evaluation import metrics
from isonext.evaluation.metrics import (
    StyleClassifier,
    edge_f1,
    edges,
    frechet_distance,
    kernel_distance,
    kernel_estimate,
    lab_distance,
    latent_features,
    luminance,
    nearest_distance,
    probe_accuracy,
    psnr,
    retrieval,
    self_similarity,
    self_similarity_distance,
    sliced_wasserstein,
    ssim,
    to_lab,
    train_style_classifier,
)

quick = settings(deadline=None, max_examples=25)


def pictures(seed, count=2, side=16, dtype=torch.float32):
    """Uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator, dtype=dtype) * 2 - 1


#################################################################################
#                               PSNR and luminance                              #
#################################################################################


@pytest.mark.parametrize(("difference", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (1.0, 6.020599913279624)])
def test_psnr_of_a_constant_difference_is_minus_20_log10_of_its_share_of_the_range(difference, decibels):
    black = torch.full((1, 3, 4, 4), -1.0, dtype=torch.float64)
    assert psnr(black, black + difference).item() == pytest.approx(decibels, abs=1e-9)


def test_psnr_is_of_each_picture_over_all_its_pixels():
    a = torch.zeros(2, 3, 2, 2)
    b = a.clone()
    b[0, 0, 0, 0] = 2.0  # error 1 in one of 12 values
    b[1] = 0.2
    torch.testing.assert_close(psnr(a, b), torch.tensor([10 * math.log10(12), 20.0]))


def test_psnr_of_equal_pictures_is_infinite():
    assert psnr(pictures(0), pictures(0)).tolist() == [math.inf, math.inf]


@quick
@given(seed=st.integers(0, 1000), shrink=st.floats(0.01, 0.99))
def test_psnr_is_symmetric_and_gains_20_log10_where_the_error_shrinks(seed, shrink):
    a, error = pictures(seed, dtype=torch.float64), pictures(seed + 1, dtype=torch.float64)
    torch.testing.assert_close(psnr(a, a + error), psnr(a + error, a))
    gain = psnr(a, a + shrink * error) - psnr(a, a + error)
    torch.testing.assert_close(gain, torch.full_like(gain, -20 * math.log10(shrink)))


@pytest.mark.parametrize(
    ("colour", "value"),
    [((1, 1, 1), 1.0), ((-1, -1, -1), 0.0), ((1, -1, -1), 0.299), ((-1, 1, -1), 0.587), ((-1, -1, 1), 0.114)],
)
def test_luminance_of_the_primaries_is_their_bt_601_weight(colour, value):
    pixel = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1)
    assert luminance(pixel).item() == pytest.approx(value, abs=1e-6)


#################################################################################
#                                      SSIM                                     #
#################################################################################


def ssim_by_windows(a, b):
    """Wang et al. 2004, eq. 13, of one picture (3, H, W): every 11 x 11 window in turn, moments about its mean."""
    x, y = (np.tensordot([0.299, 0.587, 0.114], (p.double().numpy() + 1) / 2, 1) for p in (a, b))
    weight = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)])
    weight /= weight.sum()
    scores = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            u, v = (image[top : top + 11, left : left + 11] for image in (x, y))
            mean_u, mean_v = (weight * u).sum(), (weight * v).sum()
            var_u, var_v = (weight * (u - mean_u) ** 2).sum(), (weight * (v - mean_v) ** 2).sum()
            covariance = (weight * (u - mean_u) * (v - mean_v)).sum()
            similar = (2 * mean_u * mean_v + 1e-4) * (2 * covariance + 9e-4)
            scores.append(similar / ((mean_u**2 + mean_v**2 + 1e-4) * (var_u + var_v + 9e-4)))
    return np.mean(scores)


# E x^2 - (E x)^2 in float32 is off by some 1e-7, beside a C2 of 9e-4; in float64 what is left is that the luminance
# weights are float32 numbers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-6)], ids=str)
@pytest.mark.parametrize("mix", [0.0, 0.5, 0.9])
def test_ssim_is_that_of_the_paper_window_by_window(mix, dtype, tolerance):
    a, other = pictures(1, side=17, dtype=dtype)[:, :, :, :14], pictures(2, side=17, dtype=dtype)[:, :, :, :14]
    b = mix * a + (1 - mix) * other
    expected = [ssim_by_windows(*pair) for pair in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=tolerance)


@quick
@given(seed=st.integers(0, 1000))
def test_ssim_is_one_for_equal_pictures_symmetric_and_at_most_one(seed):
    a, b = pictures(seed, dtype=torch.float64), pictures(seed + 1, dtype=torch.float64)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    assert (ssim(a, b) < 1).all()


@pytest.mark.parametrize(("x", "y"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.1, 0.9)])
def test_ssim_of_constant_pictures_is_the_luminance_term_alone(x, y):
    a, b = (torch.full((1, 3, 12, 12), 2 * value - 1, dtype=torch.float64) for value in (x, y))
    assert ssim(a, b).item() == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), abs=1e-6)


def test_ssim_falls_as_noise_grows():
    ramp = torch.linspace(-0.8, 0.8, 24).expand(1, 3, 24, 24)
    noise = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    scores = [ssim(ramp, ramp + level * noise).item() for level in (0.0, 0.05, 0.1, 0.2, 0.4)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 5


#################################################################################
#                              The style classifier                             #
#################################################################################


def stripes(count, seed):
    """Stripes across or down, the same grey values in both: only the texture tells the styles apart."""
    generator = torch.Generator().manual_seed(seed)
    styles = torch.arange(count) % 2
    phase = torch.rand(count, 1, 1, 1, generator=generator) * 2 * math.pi
    wave = torch.sin(torch.arange(24) * 1.1 + phase).expand(count, 3, 24, 24)
    wave = torch.where(styles.view(-1, 1, 1, 1) == 0, wave, wave.transpose(2, 3))
    return 0.5 * wave + 0.1 * torch.randn(count, 3, 24, 24, generator=generator), styles


def test_the_classifier_tells_two_textures_apart_on_pictures_it_has_not_seen():
    model = train_style_classifier(*stripes(64, seed=0), num_styles=2, steps=40, batch_size=32)
    pixels, styles = stripes(200, seed=1)
    assert (model.predict(pixels) == styles).double().mean() > 0.95


def test_the_classifier_is_at_chance_where_the_styles_do_not_differ():
    pixels, styles = stripes(64, seed=0)
    coin = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(2))
    model = train_style_classifier(pixels[styles == 0].repeat(2, 1, 1, 1), coin, num_styles=2, steps=40, batch_size=32)
    # The labels of unseen pictures are tossed too, so the hits are Binomial(200, 1/2) whatever the classifier says.
    fresh, _ = stripes(400, seed=3)
    tossed = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(4))
    hits = (model.predict(fresh[::2]) == tossed).sum().item()
    low, high = stats.binom.interval(1 - 1e-6, 200, 0.5)
    assert low <= hits <= high


def test_the_classifier_follows_from_its_seed_and_leaves_the_global_randomness_alone():
    pixels, styles = stripes(16, seed=0)
    before = torch.random.get_rng_state()
    one, same, other = (train_style_classifier(pixels, styles, 2, seed, steps=4, batch_size=8) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_a_rare_style_is_drawn_as_often_as_a_common_one():
    # Of pictures that are all the same, a classifier can learn no more than how often each style was drawn: 1/2 here,
    # but 1/16 if every picture were drawn as often. It averages over at least the last ten batches of 64, so that five
    # deviations of what it sees are 0.1.
    grey, styles = torch.full((64, 3, 16, 16), 0.5), (torch.arange(64) < 4).long()
    model = train_style_classifier(grey, styles, num_styles=2, steps=120, batch_size=64)
    with torch.no_grad():
        assert model(grey[:1]).softmax(1)[0, 1].item() == pytest.approx(0.5, abs=0.1)


def test_predict_is_the_largest_logit_however_many_pictures_there_are():
    torch.manual_seed(0)
    model = StyleClassifier(3, width=4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    pixels = pictures(7, count=130, side=8)
    with torch.no_grad():
        assert torch.equal(model.predict(pixels), model(pixels).argmax(1))
    assert len(model.predict(pixels).unique()) > 1


#################################################################################
#                            Edges and self-similarity                          #
#################################################################################


def grey(luminances):
    """(H, W) luminance in [0, 1] -> (1, 3, H, W) pixels."""
    return (torch.as_tensor(luminances, dtype=torch.float32) * 2 - 1).expand(1, 3, -1, -1).contiguous()


def step(column, height=1.0, side=16):
    """Black left of `column`, luminance `height` from there on."""
    return grey(((torch.arange(side) >= column) * height).expand(side, side))


def smooth(seed, count=2, side=32):
    """Colour clouds: random colours at 4 x 4 points and straight lines between them, so that layout is large."""
    return torch.nn.functional.interpolate(pictures(seed, count, 4), (side, side), mode="bilinear", align_corners=False)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Sobel over 8 is a central difference: a step of height h is h / 2 a pixel at the two columns that meet there.
@pytest.mark.parametrize(("height", "columns"), [(1.0, {7, 8}), (0.21, {7, 8}), (0.19, set()), (0.0, set())])
def test_a_step_is_an_edge_on_both_its_sides_where_half_of_it_exceeds_the_threshold(height, columns):
    expected = torch.tensor([each in columns for each in range(16)]).expand(1, 1, 16, 16)
    assert torch.equal(edges(step(8, height)), expected)
    assert torch.equal(edges(step(8, height).mT), expected.mT)


@pytest.mark.parametrize(
    ("down", "across", "found"),
    [(0.11, 0.0, True), (0.09, 0.0, False), (0.08, 0.08, True), (0.06, -0.06, False), (0.08, -0.08, True)],
)
def test_a_slope_is_an_edge_where_the_length_of_its_gradient_exceeds_the_threshold(down, across, found):
    row, column = torch.arange(6.0)[:, None], torch.arange(6.0)
    inside = edges(grey(0.5 + down * (row - 2.5) + across * (column - 2.5)))[..., 1:-1, 1:-1]
    assert inside.all() if found else not inside.any()


# The edge columns are {7, 8} and {7 + shift, 8 + shift}: the nearer one is met from shift - 1 on, the other from shift.
@pytest.mark.parametrize("reach", [0, 1, 2, 3])
def test_edge_f1_of_a_moved_step_is_the_share_of_columns_within_reach(reach):
    scores = [edge_f1(step(8), step(8 + shift), reach).item() for shift in range(6)]
    assert scores == [(1.0, 0.5, 0.0)[(shift > reach) + (shift - 1 > reach)] for shift in range(6)]


def test_edge_f1_is_the_harmonic_mean_of_precision_and_recall():
    two = grey(((torch.arange(32) >= 8) & (torch.arange(32) < 20)).float().expand(32, 32))
    one = step(8, side=32)  # all its edges are met, but only half of those of `two`
    assert edge_f1(one, two).item() == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert edge_f1(two, one).item() == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_edge_f1_is_one_where_neither_has_edges_and_zero_where_only_one_has():
    flat = torch.full((1, 3, 16, 16), 0.3)
    a, b = torch.cat([flat, flat, step(8), step(8)]), torch.cat([-flat, step(8), flat, step(8)])
    assert edge_f1(a, b).tolist() == [1.0, 0.0, 0.0, 1.0]


@quick
@given(seed=st.integers(0, 1000), reach=st.integers(0, 2))
def test_edge_f1_is_that_of_counting_pixel_by_pixel(seed, reach):
    a, b = 0.4 * pictures(seed, count=1, side=10), 0.4 * pictures(seed + 1, count=1, side=10)
    here, there = ([tuple(place) for place in edges(each)[0, 0].nonzero().tolist()] for each in (a, b))

    def met(some, others):
        near = [any(max(abs(x - u), abs(y - v)) <= reach for u, v in others) for x, y in some]
        return sum(near) / len(near) if near else 0.0

    precision, recall = met(here, there), met(there, here)
    expected = 2 * precision * recall / (precision + recall) if precision + recall else float(not here and not there)
    assert edge_f1(a, b, reach).item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(edge_f1(b, a, reach), edge_f1(a, b, reach))


def halves(one, other):
    """16 x 16 pixels, the left half of one colour and the right half of another: 2 x 2 cells of two kinds."""
    one, other = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (one, other))
    return torch.where(torch.arange(16) < 8, one, other).expand(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("one", "other"), [((-1, -1, -1), (1, 1, 1)), ((1, 1, 1), (-1, -1, -1)), ((0.9, -0.3, 0.1), (0.2, 0.4, -0.8))]
)
def test_self_similarity_of_two_equally_common_kinds_is_one_within_and_minus_one_between(one, other):
    # Two kinds, half of the cells each, lie on opposite sides of their mean whatever a cell is described by.
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    upright, lying = halves(one, other), halves(one, other).mT
    torch.testing.assert_close(self_similarity(upright)[0], torch.outer(sign, sign))
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(self_similarity(lying)[0], torch.outer(sign, sign))
    # Half of the 16 pairs of cells are alike in one and opposite in the other, a difference of 2.
    assert self_similarity_distance(upright, lying).item() == pytest.approx(1.0)
    assert self_similarity_distance(upright, halves((-1, 0, 0), (1, 0, 1))).item() == pytest.approx(0.0, abs=1e-9)


def self_similarity_by_cells(picture):
    """Of one picture (3, H, W), cell by cell."""
    colour = picture.double().numpy()
    y = np.tensordot([0.299, 0.587, 0.114], (colour + 1) / 2, 1)
    height, width = y.shape
    described = []
    for top in range(0, height - 7, 8):
        for left in range(0, width - 7, 8):
            places = [(i, j) for i in range(top, top + 8) for j in range(left, left + 8)]
            described.append([np.mean([colour[c][place] for place in places]) for c in range(3)])
            for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
                change = [abs(y[i, j] - y[(i - down) % height, (j - across) % width]) for i, j in places]
                described[-1].append(np.mean(change))
    cells = np.array(described)
    cells = (cells - cells.mean(0)) / (cells.std(0) + 1e-3)
    lengths = np.linalg.norm(cells, axis=1)
    return cells @ cells.T / np.outer(lengths, lengths)


@pytest.mark.parametrize("seed", [0, 1])
def test_self_similarity_is_that_of_describing_cell_by_cell(seed):
    a = smooth(seed, side=24).double()[:, :, :, :20]  # 20 columns: a cell that does not fit counts for nothing
    for made, picture in zip(self_similarity(a), a, strict=True):
        # The luminance weights are float32 numbers, deviations of some 1e-2 divide their error of 1e-8.
        np.testing.assert_allclose(made.numpy(), self_similarity_by_cells(picture), atol=1e-5)


@quick
@given(seed=st.integers(0, 10_000), contrast=st.floats(0.5, 1.0), brightness=st.floats(-0.5, 0.5))
def test_self_similarity_is_of_the_layout_and_not_of_the_colours(seed, contrast, brightness):
    a = smooth(seed).double()
    # An inversion turns the sign of three of seven measures in all cells, so products of two cells stay.
    assert self_similarity_distance(a, -a).max() < 1e-9
    assert self_similarity_distance(a, a + brightness).max() < 1e-9
    # A contrast is taken out but for the 1e-3 added to deviations: those of clouds are from 5e-3 (changes) to 0.3.
    assert self_similarity_distance(a, contrast * a).max() < 0.05
    for other in (a.flip(3), a.flip(2), a.roll(16, 3), smooth(seed + 1).double()):
        assert self_similarity_distance(a, other).min() > 0.1


#################################################################################
#                                   Retrieval                                   #
#################################################################################


@quick
@given(order=st.permutations(range(12)), gain=st.floats(0.2, 1.0))
def test_retrieval_hits_where_a_picture_is_at_its_place_whatever_its_contrast(order, gain):
    truth = smooth(0, count=12)
    assert retrieval(gain * truth[list(order)] - 0.1, truth).tolist() == [at == of for at, of in enumerate(order)]


def test_retrieval_of_unrelated_pictures_is_at_chance():
    # Each of 300 has the chance of 1/300 to be a hit: the count is about Poisson(1).
    hits = retrieval(pictures(1, count=300), pictures(2, count=300)).sum().item()
    assert hits <= stats.poisson.ppf(1 - 1e-6, 1)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    truth = pictures(2, count=300)
    assert retrieval(truth, truth).all()
    assert retrieval(truth[shuffled], truth).sum().item() == (shuffled == torch.arange(300)).sum().item()


@pytest.mark.parametrize("mix", [0.1, 0.2, 0.4])
def test_retrieval_is_that_of_the_highest_correlation_of_small_luminances(mix):
    truth = pictures(4, count=40, side=32).double()
    made = mix * truth + (1 - mix) * pictures(5, count=40, side=32).double()
    small = [luminance(each).reshape(40, 16, 2, 16, 2).mean((2, 4)).flatten(1).numpy() for each in (made, truth)]
    likeness = np.corrcoef(*small)[:40, 40:]
    expected = (likeness.argmax(1) == np.arange(40)).tolist()
    assert retrieval(made, truth).tolist() == expected
    assert sum(expected) > 0


def test_retrieval_of_an_inverted_picture_or_a_tie_is_no_hit():
    truth = smooth(0, count=6)
    assert not retrieval(-truth, truth).any()
    twins = truth.clone()
    twins[1] = twins[0]
    found = retrieval(truth, twins)
    assert not found[0] and not found[1] and found[2:].all()


#################################################################################
#                       Sliced Wasserstein, Lab and colours                     #
#################################################################################


def test_sliced_wasserstein_does_not_find_pairs_closer_than_sets():
    # Two sets of one distribution are as far apart as they are, whether or not their pictures are the same ones.
    a, b = pictures(0, count=16, side=40), pictures(1, count=16, side=40)  # 16 * 34^2 places: more than are drawn
    same, other = sliced_wasserstein(a, a.clone()), sliced_wasserstein(a, b)
    assert 0 < same < 0.05 and other < 0.1
    assert sliced_wasserstein(a, a + 0.3) > 0.25  # of a shift by 0.3, whose distance is 0.3


# Every patch moves by c in the 147 (or 49) values of the shifted channels, so along a direction t of length 1 by
# c sum(t). E sum(t)^2 is the share of the values: the distance is c sqrt(share). Of 4000 directions, the relative
# deviation of the mean square is sqrt(2 / 4000), of the root half of that: 1.1 %; five of those are 6 %.
@pytest.mark.parametrize(("channels", "share"), [([0, 1, 2], 1.0), ([1], 1 / 3), ([0, 2], 2 / 3)])
def test_sliced_wasserstein_of_a_constant_shift_is_the_shift_times_the_root_of_its_share(channels, share):
    a = pictures(0, count=1, side=28)
    for shift in (0.05, 0.7):
        b = a.clone()
        b[:, channels] += shift
        made = sliced_wasserstein(a, b, projections=4000)
        assert made == pytest.approx(shift * math.sqrt(share), rel=0.06)
        assert made == pytest.approx(sliced_wasserstein(b, a, projections=4000))


@quick
@given(
    levels=st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)), min_size=1, max_size=5),
    seed=st.integers(0, 100),
)
def test_sliced_wasserstein_of_flat_pictures_is_the_2_wasserstein_distance_of_their_levels(levels, seed):
    # A flat patch of level g lies at g sum(t) along t: the distance is that of the levels times one of 0 and 1.
    a, b = (torch.tensor(each).view(-1, 1, 1, 1).expand(-1, 3, 28, 28) for each in zip(*levels, strict=True))
    unit = sliced_wasserstein(torch.zeros_like(a), torch.ones_like(a), projections=8, seed=seed)
    expected = np.sqrt(np.mean(np.square(np.subtract(*(np.sort(each) for each in zip(*levels, strict=True))))))
    made = sliced_wasserstein(a, b, projections=8, seed=seed)
    assert made == pytest.approx(unit * expected, rel=1e-4, abs=1e-5)  # sums of 147 float32 products


def test_sliced_wasserstein_is_of_texture_and_lab_distance_of_colour_alone():
    upright = (torch.arange(32) % 16 < 8).float().expand(4, 3, 32, 32) * 2 - 1
    shuffled = upright.flatten(2)[:, :, torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    for other in (upright.mT, shuffled.view(4, 3, 32, 32)):
        assert lab_distance(upright, other) == 0.0
        assert sliced_wasserstein(upright, other) > 0.1
    # Stripes moved by half a period are the same set of patches, but for a part of a period in 10 of them.
    upright = (torch.arange(88) % 8 < 4).float().expand(1, 3, 88, 88) * 2 - 1
    assert sliced_wasserstein(upright, -upright) < 0.3 * sliced_wasserstein(upright, upright.mT)


def test_sliced_wasserstein_follows_from_its_seed_and_leaves_the_global_randomness_alone():
    a, b, before = pictures(0, side=32), pictures(1, side=32), torch.random.get_rng_state()
    one, same, other = (sliced_wasserstein(a, b, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one == same != other


# The CIE values of sRGB colours as published (D65, 2 degrees); they vary in the second digit with the digits of the
# matrix that each table took.
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((128, 128, 128), (53.585, 0.0, 0.0)),
        ((1, 1, 1), (0.2742, 0.0, 0.0)),  # on the straight part of both curves: 903.3 * (1 / 255) / 12.92
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 0), (97.14, -21.55, 94.48)),
        ((0, 255, 255), (91.11, -48.09, -14.13)),
        ((255, 0, 255), (60.32, 98.23, -60.82)),
    ],
)
def test_lab_of_known_colours_is_as_published(rgb, lab):
    pixel = torch.tensor(rgb).view(1, 3, 1, 1) / 127.5 - 1
    assert to_lab(pixel).flatten().tolist() == pytest.approx(lab, abs=0.03)
    if len(set(rgb)) == 1:
        assert to_lab(pixel).flatten().tolist() == pytest.approx(lab, abs=2e-3)


def test_lab_keeps_the_places_of_pixels_and_clamps_what_is_out_of_range():
    a = torch.zeros(2, 3, 2, 3)
    a[1, :, 0, 2], a[0, :, 1, 0] = 1.7, -3.0
    lightness = to_lab(a)[:, 0]
    assert lightness[1, 0, 2].item() == pytest.approx(100, abs=1e-3)
    assert lightness[0, 1, 0].item() == pytest.approx(0, abs=1e-3)
    assert ((lightness > 53) & (lightness < 54)).sum() == 10


def test_lab_distance_from_black_to_white_is_a_third_of_100():
    black, white = -torch.ones(1, 3, 4, 4), torch.ones(3, 3, 5, 7)
    assert lab_distance(black, white) == pytest.approx(100 / 3, abs=1e-3)
    assert lab_distance(black, torch.cat([-white, white])) == pytest.approx(50 / 3, abs=1e-3)  # half of them move
    assert lab_distance(white, white) == 0.0
    # One level is the median.
    mostly_black, mostly_white = (grey(torch.tensor([[0.0, value, 1.0]])) for value in (0.0, 1.0))
    assert lab_distance(mostly_black, black, points=1) == 0.0
    assert lab_distance(mostly_white, black, points=1) == pytest.approx(100 / 3, abs=1e-3)


# 1024 pixels and 1024 levels: every pixel once, off by float32 alone. Otherwise a level may take a neighbour of the
# pixel it should, which over a range of at most 250 is less than 250 / 1024 in all.
@pytest.mark.parametrize(("side", "tolerance"), [(32, 1e-3), (23, 0.25), (70, 0.25)])
@pytest.mark.parametrize("seed", range(3))
def test_lab_distance_is_the_1_wasserstein_distance_of_each_channel(seed, side, tolerance):
    a, b = pictures(seed, count=1, side=32), pictures(seed + 9, count=1, side=side) * 0.6 + 0.2
    of_a, of_b = (to_lab(each)[0].flatten(1).double().numpy() for each in (a, b))
    expected = np.mean([stats.wasserstein_distance(x, y) for x, y in zip(of_a, of_b, strict=True)])
    assert lab_distance(a, b) == pytest.approx(expected, abs=tolerance)
    assert lab_distance(b, a) == pytest.approx(lab_distance(a, b))
    assert expected > 5


#################################################################################
#                            Distances of distributions                         #
#################################################################################


def test_latent_features_are_the_means_and_then_the_deviations_of_the_channels():
    checkers = (torch.arange(16).view(4, 4) % 2 * 2 - 1).float()
    latents = torch.stack([torch.full((4, 4), 3.0), 2 * checkers + 5])[None]
    made = latent_features(torch.cat([latents, -latents]))
    assert made.dtype == torch.float64
    assert made.tolist() == [[3.0, 5.0, 0.0, 2.0], [-3.0, -5.0, 0.0, 2.0]]


def drawn(mean, covariance, count=64, seed=0):
    """`count` points whose mean and (unbiased) covariance are exactly these."""
    points = noise(seed, (count, len(mean))).double()
    points -= points.mean(0)
    points = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(points.T)), points.T, upper=False)
    mean, covariance = (torch.as_tensor(each, dtype=torch.float64) for each in (mean, covariance))
    return (torch.linalg.cholesky(covariance) @ points).T + mean


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([3.0, -4.0], [[1.0, 0.0], [0.0, 1.0]], 25.0),
        ([0.0, 0.0], [[9.0, 0.0], [0.0, 9.0]], 2 * (3 - 1) ** 2),
        ([1.0, 0.0], [[4.0, 0.0], [0.0, 0.25]], 1 + (2 - 1) ** 2 + (1 - 0.5) ** 2),
        # Deviations 3 and 1 along the diagonals
        ([0.0, 0.0], [[5.0, 4.0], [4.0, 5.0]], (3 - 1) ** 2 + (1 - 1) ** 2),
    ],
)
def test_frechet_distance_from_the_standard_normal_is_of_means_and_deviations(mean, covariance, expected):
    a, b = drawn([0.0, 0.0], torch.eye(2)), drawn(mean, covariance, count=90, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)  # the root of an error of 1e-13
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_drawn_gaussians_is_about_the_closed_form():
    a, b = noise(0, (20_000, 3)).double(), 2 * noise(1, (20_000, 3)).double() + torch.tensor([2.0, 0, 0])
    # 2^2 + 3 (2 - 1)^2; it deviates by 2 * 2 sqrt(5 / 20000) = 0.06 by the means and half of that by the covariances.
    assert frechet_distance(a, b) == pytest.approx(7, abs=5 * 0.07)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_is_that_of_scipy_where_the_covariances_do_not_commute(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for _ in range(2))
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features_is_still_a_number():
    a = noise(0, (6, 20)).double()
    # The roots of eigenvalues that should be 0, some 1e-14, add 1e-7 each.
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    shift = torch.zeros(20, dtype=torch.float64)
    shift[3] = 2.0
    assert frechet_distance(a, a + shift) == pytest.approx(4, abs=1e-4)
    assert frechet_distance(a, 3 * a) == pytest.approx(
        4 * (a.mean(0).square().sum() + torch.cov(a.T).trace()).item(), abs=1e-3
    )


def test_kernel_distance_of_two_points_is_the_closed_form():
    # All of one set at 0 and all of the other at x: k(0, 0) + k(x, x) - 2 k(0, x) = 1 + (|x|^2 / d + 1)^3 - 2.
    zeros, x = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64).expand(4, 2)
    assert kernel_distance(zeros, x) == pytest.approx((10 / 2 + 1) ** 3 - 1)
    assert kernel_distance(x, x) == pytest.approx(0, abs=1e-9)


@quick
@given(seed=st.integers(0, 1000), n=st.integers(2, 5), m=st.integers(2, 5), d=st.integers(1, 4))
def test_kernel_distance_is_that_of_summing_pair_by_pair(seed, n, m, d):
    a, b = noise(seed, (n, d)).double(), noise(seed + 1, (m, d)).double() + 0.5

    def k(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / d + 1) ** 3

    x, y = a.tolist(), b.tolist()
    expected = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected -= 2 * sum(k(p, q) for p in x for q in y) / (n * m)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kernel_distance_of_draws_from_one_distribution_is_zero_on_average():
    draws = torch.tensor([kernel_distance(*noise(seed, (2, 6, 3)).double()) for seed in range(1500)])
    assert abs(draws.mean()) < 5 * draws.std() / 1500**0.5
    assert (draws < 0).any()


def test_kernel_estimate_is_the_kernel_distance_with_the_jackknife_by_hand():
    a, b = noise(0, (7, 4)).double(), noise(1, (5, 4)).double() + 0.3
    made = kernel_estimate(a, b)
    assert made.mean == kernel_distance(a, b)
    variance = 0.0
    for rows, distance in ((a, lambda less: kernel_distance(less, b)), (b, lambda less: kernel_distance(a, less))):
        count = len(rows)
        without = torch.tensor([distance(torch.cat([rows[:n], rows[n + 1 :]])) for n in range(count)])
        variance += (count - 1) / count * (without - without.mean()).square().sum().item()
    assert made.high - made.mean == pytest.approx(1.96 * variance**0.5, rel=1e-6)
    assert made.mean - made.low == pytest.approx(1.96 * variance**0.5, rel=1e-6)


@pytest.mark.parametrize(("count", "shift"), [(30, 0.0), (30, 0.4), (80, 0.0), (80, 0.4)])
def test_the_interval_of_a_kernel_distance_holds_the_truth_about_95_times_in_100(count, shift):
    # The truth for N(0, 1) and N(shift, 1): E k = E (x.y / d + 1)^3 over independent x, y, by many draws.
    def truth(x, y):
        return ((x * y).sum(1) / 3 + 1).pow(3).mean().item()

    x, x2, y, y2 = noise(9, (4, 400_000, 3)).double()
    y, y2 = y + shift, y2 + shift
    exact = truth(x, x2) + truth(y, y2) - 2 * truth(x, y)
    draws = [kernel_estimate(noise(s, (count, 3)), noise(s + 500, (count, 3)) + shift) for s in range(300)]
    held = sum(draw.low <= exact <= draw.high for draw in draws) / 300
    assert held > 0.9  # the subsets of before were all the same set up to 100 pictures: width 0, held 0
    assert all(draw.low < draw.mean < draw.high for draw in draws)


def test_two_rows_have_a_kernel_distance_without_an_interval():
    made = kernel_estimate(noise(0, (2, 4)), noise(1, (9, 4)))
    assert math.isfinite(made.mean) and math.isnan(made.low) and str(made).endswith("[no interval]")


def test_of_many_rows_a_kernel_distance_takes_some_evenly_spaced():
    a, b = noise(0, (300, 4)), noise(1, (300, 4)) + 0.5
    assert kernel_estimate(a, b, most=100) == kernel_estimate(a[::3], b[::3])


def test_nearest_distance_is_the_root_mean_square_to_the_nearest():
    among = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 5.0, -5.0)])
    queries = torch.stack([among[1] + 0.5, among[0] - 0.25, among[2], among[0].clone()])
    queries[3, 1, 2, 3] = 3.0  # one of 48 values
    expected = [0.5, 0.25, 0.0, 3 / 48**0.5]
    assert nearest_distance(queries, among).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [3, 40])
def test_nearest_distance_is_that_of_trying_them_all(count):
    queries, among = noise(0, (30, 4, 3, 2)), noise(1, (count, 4, 3, 2))
    expected = [min((q - x).square().mean().sqrt().item() for x in among) for q in queries]
    assert nearest_distance(queries, among).tolist() == pytest.approx(expected, abs=1e-6)
    assert nearest_distance(among, among).max() == 0  # not the root of an error of |q|^2 + |x|^2 - 2 q x


#################################################################################
#                              Every distance grows                             #
#################################################################################

LEVELS = (0.0, 0.1, 0.3, 0.9)


def worse_and_worse(values, zero=1e-6):
    assert abs(values[0]) <= zero
    assert all(before < after for before, after in pairwise(values)), values


@quick
@given(seed=st.integers(0, 10_000))
def test_distances_of_pictures_grow_with_noise(seed):
    a, of_noise = smooth(seed, count=3), noise(seed + 1, (3, 3, 32, 32))
    worse_and_worse([self_similarity_distance(a, a + level * of_noise).mean().item() for level in LEVELS])
    worse_and_worse([sliced_wasserstein(a, a + level * of_noise, projections=32) for level in LEVELS])
    # Noise of equal patches of 8 x 8 pixels is what reaches the 16 x 16 luminances that pictures are found by.
    truth = smooth(seed, count=20)
    far = torch.nn.functional.interpolate(noise(seed + 2, (20, 3, 4, 4)), (32, 32))
    found = [retrieval(truth + level * far, truth).sum().item() for level in (0.0, 1.0, 30.0)]
    assert found[0] == 20 and found[0] >= found[1] > found[2]


@quick
@given(seed=st.integers(0, 10_000))
def test_distances_of_colours_grow_with_a_shift(seed):
    a = 0.4 * smooth(seed) - 0.3  # within [-0.7, 0.1], so that 0.9 more is hardly clamped
    worse_and_worse([lab_distance(a, a + level) for level in LEVELS])
    worse_and_worse([sliced_wasserstein(a, a + level, projections=32) for level in LEVELS])
    worse_and_worse(
        [
            lab_distance(a.mean(1, keepdim=True).expand(-1, 3, -1, -1), a.lerp(a.mean(1, True), 1 - level))
            for level in LEVELS
        ],
        zero=1e-3,
    )


@quick
@given(seed=st.integers(0, 10_000))
def test_distances_of_distributions_grow_with_a_shift_and_with_a_spread(seed):
    a, towards = drawn([0.0] * 4, torch.eye(4), seed=seed), noise(seed + 1, (4,)).double()
    towards /= towards.norm()
    both = torch.cat([a, -a])  # no odd moments: shifts and spreads then only add to those of the other set
    for distance in (frechet_distance, kernel_distance):
        base = distance(both, both)  # the unbiased one is below 0 for equal sets
        worse_and_worse([distance(both, both + level * towards) - base for level in (0.0, 0.5, 1.0, 2.0)])
    # Not the unbiased kernel distance: it counts the pairs (x, 3 x) of the two sets but no pair (x, x) within one.
    worse_and_worse([frechet_distance(both, both * (1 + level)) for level in (0.0, 0.5, 1.0, 2.0)])
    queries = 0.01 * noise(seed, (5, 3, 4, 4)) + 10 * torch.arange(5.0).view(5, 1, 1, 1)
    worse_and_worse([nearest_distance(queries + level, queries).mean().item() for level in LEVELS])


@pytest.mark.parametrize("value", [-1.0, -0.7, 0.0, 0.1, 0.3, 1.0])
def test_flat_pictures_have_no_edges_and_make_no_measure_undefined(value):
    flat, others = torch.full((3, 3, 32, 32), value), smooth(0, count=3)
    assert not edges(flat).any()
    assert edge_f1(flat, -flat).tolist() == [1.0] * 3
    assert lab_distance(flat, flat) == sliced_wasserstein(flat, flat) == 0.0
    assert self_similarity_distance(flat, flat).tolist() == [0.0] * 3
    features = latent_features(flat)
    assert features.tolist() == [pytest.approx([value] * 3 + [0.0] * 3, abs=1e-6)] * 3
    # Every entry of x.y / d is about value^2; both distances are of equal sets without any deviation.
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert kernel_distance(features, features) == pytest.approx(0, abs=1e-6)
    for a, b in ((flat, others), (others, flat)):
        assert self_similarity(a).isfinite().all()
        assert self_similarity(a).abs().max() < 1 + 1e-5
        assert all(0 <= each <= 2 for each in self_similarity_distance(a, b).tolist())
        assert math.isfinite(lab_distance(a, b)) and lab_distance(a, b) > 1
        assert math.isfinite(sliced_wasserstein(a, b)) and sliced_wasserstein(a, b) > 0.05
        assert retrieval(a, b).sum() <= 1
        assert math.isfinite(frechet_distance(latent_features(a), latent_features(b)))


#################################################################################
#                                   The probe                                   #
#################################################################################


def tossed(count, seed, kinds=2):
    return torch.randint(0, kinds, (count,), generator=torch.Generator().manual_seed(seed))


# Labels tossed apart from the features are hit with the chance of 1 / kinds each, whatever the probe has learned.
@pytest.mark.parametrize(("count", "features", "kinds"), [(300, 6, 2), (120, 300, 2), (240, 10, 4)])
def test_the_probe_is_at_chance_where_features_tell_nothing(count, features, kinds):
    hits = probe_accuracy(noise(0, (count, features)), tossed(count, 1, kinds), folds=5)
    low, high = stats.binom.interval(1 - 1e-6, count, 1 / kinds)
    assert low <= hits.sum().item() <= high


@pytest.mark.parametrize(("count", "features"), [(100, 3), (60, 200)])
def test_the_probe_is_always_right_where_kinds_are_far_apart_and_at_chance_once_labels_are_shuffled(count, features):
    labels = torch.arange(count) % 3
    x = 10.0 * (torch.arange(features) % 3 == labels[:, None]) + noise(8, (count, features))
    assert probe_accuracy(x, labels).all()
    shuffled = labels[torch.randperm(count, generator=torch.Generator().manual_seed(9))]
    low, high = stats.binom.interval(1 - 1e-6, count, 1 / 3)
    assert low <= probe_accuracy(x, shuffled).sum().item() <= high


def test_the_probe_does_not_see_the_label_it_is_asked_for():
    # Each sample has a feature of its own that no other has: who saw its label knows it, who did not knows nothing.
    hits = probe_accuracy(torch.eye(200), tossed(200, 3))
    assert hits.sum().item() <= stats.binom.ppf(1 - 1e-6, 200, 0.5)
    # Twins in opposite corners of the labels: of each pair the other one says the opposite.
    labels = torch.arange(60) % 2
    twins = 5 * noise(4, (30, 100)).repeat_interleave(2, 0)
    assert probe_accuracy(twins, labels, folds=60).sum().item() <= 3


def test_the_probe_of_paired_pictures_does_not_know_them_from_their_other_style():
    # Content without any style: a picture's two samples are equal. A probe that has trained on the one says its label
    # of the other, and is wrong: well below chance.
    content, labels = 5 * noise(4, (60, 100)).repeat(2, 1), torch.arange(120) // 60
    pictures = torch.arange(60).repeat(2)
    low, high = stats.binom.interval(1 - 1e-6, 120, 0.5)
    assert low <= probe_accuracy(content, labels, pictures).sum().item() <= high
    assert probe_accuracy(content, labels).double().mean() < 0.2  # what there is to get wrong
    styled = content + 8.0 * labels[:, None] * (torch.arange(100) < 10)  # and a style is still found
    assert probe_accuracy(styled, labels, pictures).double().mean() > 0.95


@pytest.mark.parametrize(("features", "signal"), [(4, 0.6), (9, 0.8)])
def test_the_probe_is_ridge_regression_sample_by_sample(features, signal):
    # As many folds as samples: every one is its own test part, and the order drawn decides the inner split alone.
    count = 27
    labels = tossed(count, 5, kinds=3)
    x = (noise(6, (count, features)) + signal * noise(7, (3, features))[labels]).double()

    def hits(train, test, penalty):
        mean, deviation = x[train].mean(0), x[train].std(0) + 1e-8
        inside, asked = (((x[part] - mean) / deviation).numpy() for part in (train, test))
        targets = np.eye(3)[labels[train].numpy()]
        left = inside.T @ inside + penalty * np.eye(features)  # the primal form
        weights = np.linalg.solve(left, inside.T @ (targets - targets.mean(0)))
        return (asked @ weights + targets.mean(0)).argmax(1) == labels[test].numpy()

    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)].tolist()  # label by label, so that folds are stratified
    expected = []
    for sample in range(count):
        train = [each for each in order if each != sample]
        kept, rest = train[::4], [each for at, each in enumerate(train) if at % 4]
        best = max((0.1, 1.0, 10.0, 100.0, 1000.0), key=lambda penalty: hits(rest, kept, penalty).mean())
        expected.append(bool(hits(train, [sample], best)[0]))
    assert probe_accuracy(x, labels, folds=count).tolist() == expected
    assert 9 < sum(expected) < 27


def test_the_probe_standardises_by_its_training_part_alone():
    # Trained on -1 and 1, it knows 0.5 for the upper kind. Standardised together with the 100 that is asked for too,
    # all of the training part would lie on one side of zero, and 0.5 with it.
    x, labels = torch.tensor([[-1.0], [-1], [1], [1], [0.5], [100]]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert metrics._ridge_hits(x, labels, torch.arange(4), torch.tensor([4, 5]), 0.1).tolist() == [True, True]


def test_the_probe_does_not_mind_the_scale_of_a_feature_and_follows_from_its_seed():
    x, labels = noise(0, (80, 5)).double(), tossed(80, 1)
    x[:, 0] += labels
    scaled = x * torch.tensor([1e3, 1e-2, 1.0, 5.0, 1e2]) + torch.tensor([7.0, 0.0, -1e3, 1.0, 2.0])
    assert torch.equal(probe_accuracy(x, labels), probe_accuracy(scaled, labels))
    assert torch.equal(probe_accuracy(x, labels, seed=3), probe_accuracy(x, labels, seed=3))
    before = torch.random.get_rng_state()
    assert not torch.equal(probe_accuracy(x, labels, seed=3), probe_accuracy(x, labels, seed=4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_folds_are_stratified_so_that_equal_classes_are_guessed_at_chance():
    # Without it the minority of a training part is the majority of its test part, and guessing falls below chance.
    for count in (20, 40, 100):
        assert probe_accuracy(torch.zeros(count, 3), torch.arange(count) % 2).double().mean() == 0.5


def test_rounding_in_a_flat_picture_is_neither_a_layout_nor_a_likeness():
    flat = [torch.full((4, 3, 32, 32), value) for value in (0.1, 0.3)]
    assert self_similarity_distance(*flat).max() < 1e-2
    assert not retrieval(flat[1], torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).any()
    twins = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    assert not retrieval(twins, twins).any()
