"""The measures against closed forms and a second implementation; the classifier on textures with known answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from metrics import StyleClassifier, luminance, psnr, ssim, train_style_classifier

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
