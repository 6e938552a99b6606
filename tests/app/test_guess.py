"""The style of a picture, by the loss of the network under each label."""

import pytest
import torch

from isonext.app.guess import MOST_STYLES, style_losses
from isonext.flow.base import Base


class Means:
    """A network that knows each style's pictures to be flat, of the value (-1, 1, 3, ...)[style]: its velocity is
    exact for them, (value - x) / (1 - t), by x_t = (1 - t) x0 + t x1."""

    device = torch.device("cpu")

    def __init__(self, styles: int) -> None:
        self.spec = type("Spec", (), {"styles": [str(number) for number in range(styles)]})
        self.base = Base()

    def x0(self, noise, x1, style):
        return noise

    def __call__(self, x, t, style):
        value = (2.0 * style - 1).view(-1, 1, 1, 1)
        return (value - x) / (1 - t).view(-1, 1, 1, 1)


@pytest.mark.parametrize("style", [0, 1, 2])
def test_the_loss_is_nothing_under_the_pictures_own_style_and_as_computed_by_hand_under_the_others(style):
    losses = style_losses(Means(3), torch.full((1, 2, 4, 4), 2.0 * style - 1))
    # Under another style the velocity is off by (difference of the values) / (1 - t), at t of 0.3, 0.5, 0.7, 0.9.
    mean = sum(1 / (1 - t) ** 2 for t in (0.3, 0.5, 0.7, 0.9)) / 4
    assert losses == pytest.approx([(2 * (other - style)) ** 2 * mean for other in range(3)], rel=1e-4, abs=1e-8)


def test_the_noise_of_a_style_is_that_of_its_base():
    class Still(Means):
        """x0 is 5 times the style and the velocity nothing, so that the loss is (x1 - x0)^2."""

        def x0(self, noise, x1, style):
            return 5.0 * style.view(-1, 1, 1, 1).expand_as(x1)

        def __call__(self, x, t, style):
            return torch.zeros_like(x)

    assert style_losses(Still(3), torch.full((1, 2, 4, 4), 5.0)) == [25.0, 0.0, 25.0]


def test_too_many_styles_are_not_tried():
    assert style_losses(Means(MOST_STYLES + 1), torch.zeros(1, 2, 4, 4)) == []
