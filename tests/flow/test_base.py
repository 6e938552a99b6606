"""The base: what its low band is, that nothing else moves, and that it does not know the style."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isonext.flow.base import Base, fit_base, low_band

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


def test_without_strength_the_base_is_the_noise_itself():
    noise = white(3, 2, 4, 4)
    assert Base().x0(noise, white(3, 2, 4, 4, seed=1), STYLES) is noise
    assert Base().sample(noise, noise) is noise
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


def test_samples_have_the_power_of_the_structures_they_stand_for(fitted):
    style = torch.zeros(400, dtype=torch.int64)
    real = low_band(fitted.x0(white(400, 3, 8, 8, seed=5), pictures(0), style), 2)
    drawn = fitted.sample(white(4000, 3, 8, 8, seed=6), white(4000, 3, 4, 4, seed=7))
    spectra = [torch.fft.fft2(each).abs().square().mean(0) / 16 for each in (real, low_band(drawn, 2))]
    torch.testing.assert_close(spectra[1], spectra[0], rtol=0.25, atol=0.05)  # 400 pictures: 1 / sqrt(400) times three
    assert spectra[0][0, 0, 0] > 1.5  # smooth, so that there is something to get wrong
    noise = white(4000, 3, 8, 8, seed=6)
    untouched = drawn - noise  # only the low band was replaced
    assert untouched[..., 0, 0].allclose(untouched[..., 1, 1], atol=1e-5)
