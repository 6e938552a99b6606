"""The base: what its low band is, that nothing else moves, and that it does not know the style."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isonext.flow import base as base_module
from isonext.flow.base import Base, choose_strength, fit_base, low_band, spread_out, tone_share
from isonext.flow.loss import pair_noise

STYLES = torch.tensor([0, 1, 0])


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_base(channels: int, strength: float, cells: int) -> Base:
    """A base of two styles with made-up statistics."""
    return Base(strength, cells, white(2, channels, seed=8), 1 + white(2, channels, seed=9).abs())


def test_the_low_band_by_hand():
    x = torch.tensor([[[[1.0, 2, 0], [3, 4, 0], [9, 9, 9]]]])  # the third row and column are a border
    assert low_band(x, 2).tolist() == [[[[5.0]]]]  # 2 x (1 + 2 + 3 + 4) / 4
    assert torch.equal(low_band(x, 1), x)


def test_structure_by_hand():
    base = Base(0.5, 2, mean=torch.tensor([[1.0, 0], [0, 2]]), deviation=torch.tensor([[0.5, 1.0], [2, 4]]))
    x1 = torch.tensor([[[3.0]], [[5.0]]]).expand(2, 2, 2, 2)  # low bands 6 and 10
    s = base.structure(x1, torch.tensor([0, 1]))
    assert s.flatten(1).tolist() == [[10.0, 10.0], [3.0, 2.0]]  # (6 - 1) / 0.5, 10 / 1; 6 / 2, (10 - 2) / 4


@settings(max_examples=60, deadline=None)
@given(
    strength=st.floats(0.01, 1), cells=st.integers(1, 3), height=st.integers(3, 8), width=st.integers(3, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_only_the_low_band_moves_and_it_is_the_mix_of_structure_and_noise(strength, cells, height, width, seed):
    base, noise, x1 = some_base(2, strength, cells), white(3, 2, height, width, seed=seed), white(3, 2, height, width)
    x0 = base.x0(noise, x1, STYLES)
    mixed = strength * base.structure(x1, STYLES) + math.sqrt(1 - strength**2) * low_band(noise, cells)
    torch.testing.assert_close(low_band(x0, cells), mixed, atol=1e-4, rtol=1e-4)
    moved, (rows, columns) = x0 - noise, (height // cells * cells, width // cells * cells)
    assert not moved[..., rows:, :].any() and not moved[..., columns:].any()  # the border is noise
    squares = moved[..., :rows, :columns].unfold(2, cells, cells).unfold(3, cells, cells).flatten(4)
    torch.testing.assert_close(squares, squares[..., :1].expand_as(squares), atol=1e-5, rtol=0)  # no other band


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (6, 2)])
def test_a_picture_smaller_than_a_square_has_no_layout_and_goes_with_any_noise(height, width):
    base, x1, noise = some_base(2, 0.8, 3), white(3, 2, height, width), white(3, 2, height, width, seed=1)
    assert torch.equal(base.x0(noise, x1, STYLES), noise)


def test_without_strength_the_base_is_the_noise_itself():
    noise = white(3, 2, 4, 4)
    assert Base().x0(noise, white(3, 2, 4, 4, seed=1), STYLES) is noise
    assert Base().sample(noise, noise, STYLES) is noise
    assert Base().above(noise) is noise
    assert fit_base(lambda style: noise, 2, 0.0, 2).x0(noise, noise, STYLES) is noise


#################################################################################
#                                    Fitted                                     #
#################################################################################


def pictures(style: int, count: int = 400) -> torch.Tensor:
    """Smooth latents (400, 3, 8, 8); style 1 is style 0 with other means and deviations of its channels."""
    rough = white(count, 3, 12, 12, seed=3)
    smooth = torch.nn.functional.avg_pool2d(rough, 5, 1) * 5
    mixing = torch.tensor([[1.0, 0.5, 0], [0, 1, 0.3], [0.2, 0, 1]])
    x1 = torch.einsum("kc,bchw->bkhw", mixing, smooth)
    scale, shift = torch.tensor([[1.0, 1, 1], [3, 0.2, 0.5]])[style], torch.tensor([[0.0, 0, 0], [2, -1, 5]])[style]
    return x1 * scale.view(3, 1, 1) + shift.view(3, 1, 1)


@pytest.fixture(scope="module")
def fitted() -> Base:
    return fit_base(pictures, 2, 0.8, 2)


@pytest.mark.parametrize("style", [0, 1])
def test_structure_has_mean_zero_and_deviation_one_in_every_style(fitted, style):
    s = fitted.structure(pictures(style), torch.full((400,), style))
    each = s.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(each.mean(1), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(each.var(1, correction=0), torch.ones(3).double(), atol=1e-3, rtol=0)


def test_a_style_that_only_rescales_its_channels_has_the_same_structure(fitted):
    one, other = (fitted.structure(pictures(style), torch.full((400,), style)) for style in (0, 1))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_x0_has_the_power_of_white_noise_and_holds_on_to_the_layout(fitted):
    x1, style = pictures(0), torch.zeros(400, dtype=torch.int64)
    x0 = fitted.x0(white(400, 3, 8, 8, seed=5), x1, style)
    assert x0.var((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    held = (low_band(x0, 2) * fitted.structure(x1, style)).mean()
    assert held == pytest.approx(0.8, abs=0.02)  # their correlation is the strength


def test_a_channel_without_spread_leaves_numbers():
    flat = torch.cat([white(50, 2, 4, 4), torch.full((50, 1, 4, 4), 3.0)], 1)
    base = fit_base(lambda style: flat, 1, 0.8, 2)
    x0 = base.x0(white(50, 3, 4, 4, seed=1), flat, torch.zeros(50, dtype=torch.int64))
    assert torch.isfinite(x0).all() and x0.abs().max() < 10


def laid_out(style: int, count: int = 2000, seed: int = 3) -> torch.Tensor:
    """Latents (n, 2, 8, 8) with a layout, light above in style 0, a bright middle in style 1, more or less strongly."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    layout = torch.stack([[-y, x], [1 - x**2 - y**2, y]][style])
    strength = white(count, 1, 1, 1, seed=seed + style) + 2
    return strength * layout + 0.5 * white(count, 2, 8, 8, seed=seed + 10 + style)


def places(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(7))


def drawn_and_real(style: int, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Low bands (n, 2, 4, 4) of x0 that are drawn, and of those of pictures that the base was not fitted to."""
    base, styles = fit_base(laid_out, 2, 0.8, 2), torch.full((count,), style)
    drawn = base.sample(white(count, 2, 8, 8, seed=6), places(count), styles)
    real = base.x0(white(count, 2, 8, 8, seed=8), laid_out(style, count, seed=50), styles)
    return low_band(drawn, 2), low_band(real, 2)


@pytest.mark.parametrize("style", [0, 1])
def test_samples_have_the_mean_and_the_covariance_of_the_structures_they_stand_for(style):
    drawn, real = (x.flatten(1).double() for x in drawn_and_real(style))
    # 2000 pictures: a mean is known to 1 / sqrt(2000), a covariance too; four times that
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.13, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(real.T), atol=0.13, rtol=0)
    mixed = torch.cov(real.T).fill_diagonal_(0)
    assert real.mean(0).abs().max() > 0.5 and mixed.abs().max() > 0.15  # there is something to get wrong


@pytest.mark.parametrize("style", [0, 1])
def test_a_linear_probe_cannot_tell_samples_from_the_base_of_training(style):
    x = torch.cat([low.flatten(1) for low in drawn_and_real(style)])
    x = torch.cat([x, x.square(), torch.ones(len(x), 1)], 1).double()
    label = torch.cat([torch.ones(2000), -torch.ones(2000)]).double()
    fit, held = torch.arange(4000) % 2 == 0, torch.arange(4000) % 2 == 1
    weights = torch.linalg.lstsq(x[fit], label[fit]).solution
    hits = ((x[held] @ weights).sign() == label[held]).double().mean()
    assert hits < 0.54  # chance 0.5, of 2000 known to 0.011; power spectra alone gave 0.9 and more


def test_samples_of_a_style_have_its_layout():
    means = [drawn_and_real(style)[0].mean(0)[0] for style in (0, 1)]
    assert means[0][0].mean() - means[0][-1].mean() > 1  # light above
    assert means[1][1:3, 1:3].mean() - means[1][0].mean() > 0.5  # a bright middle


def test_a_sample_has_nothing_but_its_low_band_changed(fitted):
    noise, style = white(50, 3, 8, 8, seed=6), torch.zeros(50, dtype=torch.int64)
    moved = fitted.sample(noise, places(50), style) - noise
    assert moved[..., 0, 0].allclose(moved[..., 1, 1], atol=1e-5) and moved.abs().max() > 0.1


def test_a_sample_has_the_layout_at_its_place_and_noise_beside_it():
    base, noise, style = (
        fit_base(lambda style: laid_out(style, 4), 2, 0.8, 2),
        white(3, 2, 8, 8),
        torch.tensor([0, 1, 1]),
    )
    made = low_band(base.sample(noise, torch.tensor([0.0, 0.74, 0.999]), style), 2)
    chosen = torch.stack([base.structure(laid_out(s, 4), torch.full((4,), s))[n] for s, n in ((0, 0), (1, 2), (1, 3))])
    expected = 0.8 * chosen + 0.6 * low_band(noise, 2)
    torch.testing.assert_close(made, expected, atol=2e-3, rtol=0)  # layouts are float16: 3 of 2^-11


def test_of_a_small_style_each_layout_is_there_as_often_as_any_other():
    counts = spread_out(torch.arange(3), 8).bincount()
    assert counts.tolist() == [3, 3, 2] and spread_out(torch.arange(9), 3).tolist() == [0, 3, 6]


def test_layouts_are_as_many_as_pictures_and_never_too_many_numbers(monkeypatch):
    assert fit_base(lambda style: white(3 + style, 2, 4, 4), 2, 0.8, 2).layouts.shape == (2, 4, 2, 2, 2)
    monkeypatch.setattr(base_module, "LAYOUT_NUMBERS", 2 * 3 * 8)  # of two styles, 8 numbers each
    assert fit_base(lambda style: white(9, 2, 4, 4), 2, 0.8, 2).layouts.shape == (2, 3, 2, 2, 2)


#################################################################################
#                              Pairing noise beside it                          #
#################################################################################


def test_above_is_the_picture_less_its_low_band_by_hand():
    x1 = torch.tensor([[[[1.0, 2, 7], [3, 4, 8], [9, 9, 9]]]])  # the third row and column are a border
    assert Base(0.5, 2).above(x1).tolist() == [[[[-1.5, -0.5, 7], [0.5, 1.5, 8], [9, 9, 9]]]]


def test_pairing_noise_leaves_the_low_band_of_x0_as_white_as_it_was(fitted):
    """Paired with whole pictures, the noise of the low band would come to agree with S, and their sum to have more
    power."""
    low, whole = [], []
    for seed in range(40):
        x1, style = pictures(0)[10 * seed : 10 * seed + 10].repeat(4, 1, 1, 1), torch.zeros(40, dtype=torch.int64)
        x1 = x1 + 0.3 * white(*x1.shape, seed=seed)
        noise = white(*x1.shape, seed=100 + seed)
        for others, partner in ((low, fitted.above(x1)), (whole, x1)):
            others.append(low_band(fitted.x0(pair_noise(noise, partner, style), x1, style), 2))
    structure = fitted.structure(pictures(0), torch.zeros(400, dtype=torch.int64))
    expected = (0.8**2 * structure.square().mean() + 0.6**2).item()
    assert torch.cat(low).square().mean().item() == pytest.approx(expected, rel=0.05)
    assert torch.cat(whole).square().mean() > 1.1 * expected  # what there is to get wrong


#################################################################################
#                              The strength "auto"                              #
#################################################################################


def test_the_share_of_tone_by_hand():
    """Channel 0: the pictures are flat, at 0 and 2; channel 1: both are the same -1 and 1."""
    flat = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
    layout = torch.tensor([-1.0, 1.0]).expand(2, 1, 1, 2)
    assert tone_share([torch.cat([flat, layout], 1)]) == pytest.approx(0.5)  # (1 + 0) / 2
    assert tone_share([flat, layout, layout, layout]) == pytest.approx(0.25)  # of styles
    # means at 1 and -1, each with cells at 3 either side: 1 of 1 + 9
    assert tone_share([torch.tensor([[4.0, -2], [2, -4]]).view(2, 1, 1, 2) + 7]) == pytest.approx(0.1)
    assert tone_share([torch.zeros(3, 2, 2, 2)]) == 0  # no spread at all


def toned(share: float) -> Callable[[int], torch.Tensor]:
    """Latents whose low band's variance lies between pictures to this share."""

    def latents(style: int) -> torch.Tensor:
        tone, layout = white(2000, 2, 1, 1, seed=style), white(2000, 2, 16, 16, seed=10 + style)
        return style + (1 + style) * (math.sqrt(share) * tone + math.sqrt(1 - share) * 2 * layout)

    return latents


@pytest.mark.parametrize(("share", "strength"), [(0.05, 0.8), (0.6, 0.0)])
def test_auto_anchors_to_layout_and_not_to_light_and_colour(share, strength):
    chosen, why = choose_strength(toned(share), 2, 2)
    measured = tone_share([low_band(toned(share)(style), 2) for style in range(2)])
    side = "below" if strength else "not below"
    assert chosen == strength
    assert why == (
        f"training.anchor_strength auto is {strength:g}: {measured:.2f} of the low band's variance is whole pictures' "
        f"light and colour, {side} 0.2"
    )
