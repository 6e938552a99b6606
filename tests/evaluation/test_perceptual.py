"""FID, KID and LPIPS with networks of random weights: enough to check what is computed from their features."""

import math

import pytest
import torch

from isonext.evaluation import perceptual
from isonext.evaluation.metrics import frechet_distance, kernel_distance, kernel_estimate
from isonext.evaluation.perceptual import ALEXNET, INCEPTION, Perceptual


def pictures(seed: int, count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A torch hub folder with networks of random weights under the names of the real ones."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    network = extractor.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        weights = network("inception-v3-compat", ["2048"]).state_dict()
    for weight in weights.values():  # or the features of 94 layers would vanish
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight)
    torch.save(weights, folder / "checkpoints" / INCEPTION)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), folder / "checkpoints" / ALEXNET)
    return folder


@pytest.fixture(scope="module")
def measured(hub):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(hub))
        # torchvision checks the hash of a download in its name, not of a file that is there
        yield Perceptual(64)


@pytest.fixture(scope="module")
def figures(measured):
    """The figures of some pictures, which take seconds, and what the global generator of seed 3 draws after them."""
    torch.manual_seed(3)
    return measured.figures(pictures(0), pictures(1), pictures(2) / 4), torch.rand(1)


def test_without_the_weights_each_figure_has_a_line_that_says_where_they_belong(monkeypatch, tmp_path):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    absent = Perceptual(64)
    assert [line.split(" w")[0] for line in absent.missing] == ["FID and KID", "LPIPS"]
    assert str(tmp_path / "checkpoints" / INCEPTION) in absent.missing[0]
    assert str(tmp_path / "checkpoints" / ALEXNET) in absent.missing[1]
    assert absent.figures(pictures(0), pictures(1), pictures(2)) == {}


def test_without_the_packages_the_line_names_the_file_that_installs_them(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    lines = Perceptual(64).missing
    assert all("requirements/eval.txt" in line for line in lines) and "torch_fidelity" in lines[0]


def test_pictures_too_small_for_lpips_are_said_to_be(measured):
    assert measured.missing == []
    assert "64 px" in Perceptual(32).missing[0]


@pytest.mark.slow
def test_equal_pictures_are_at_no_distance_and_others_are(measured, figures):
    same = measured.figures(pictures(0), pictures(0), pictures(0))
    assert same["fid"] == pytest.approx(0, abs=1e-3) and same["lpips_to_source"].tolist() == [0] * 2
    other, _ = figures
    assert other["fid"] > 0.01 and other["kid"].mean > same["kid"].mean
    assert other["lpips_to_source"].shape == (2,) and (other["lpips_to_source"] > 0).all()
    assert measured.figures(pictures(0), pictures(1), pictures(2) / 4)["fid"] == other["fid"]  # nothing is left over


@pytest.mark.slow
def test_fid_and_kid_are_the_distances_of_the_networks_features_by_our_own_formulas(measured, figures):
    figures, _ = figures
    sides = (pictures(0), pictures(2) / 4)
    a, b = (measured.fid.inception(perceptual._bytes(side)).double() for side in sides)
    assert figures["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    assert figures["kid"].mean == pytest.approx(kernel_distance(a, b), rel=1e-3)  # every subset is the whole set


class Corner(torch.nn.Module):
    """In Inception's place, three features a picture: the colour of its first pixel."""

    num_features = 3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :, 0, 0].float() / 255


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """FID and KID of `Corner`'s features."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    measured = Perceptual(16)
    measured.fid = fid.FrechetInceptionDistance(feature=Corner())
    return measured


def corners(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    return 0.5 * pictures(seed, count, 1) + shift


def test_the_interval_of_kid_is_the_jackknifes_where_every_subset_is_the_whole_set(quick):
    a, b = corners(0, 40), corners(1, 40, 0.3)
    kid = quick.figures(a, a, b)["kid"]
    expected = kernel_estimate(*(Corner()(perceptual._bytes(side)) for side in (a, b)))
    assert (kid.mean, kid.low, kid.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-6)


def test_kid_of_more_pictures_than_a_subset_is_torchmetrics_with_what_the_choice_of_subsets_adds(quick):
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    a, b = corners(0, 150), corners(1, 130, 0.3)
    theirs = kid_module.KernelInceptionDistance(Corner(), subset_size=100)
    theirs.update(perceptual._bytes(a), real=False)
    theirs.update(perceptual._bytes(b), real=True)
    torch.manual_seed(0)
    mean, deviation = (value.item() for value in theirs.compute())
    whole = kernel_estimate(*(Corner()(perceptual._bytes(side)) for side in (a, b)))
    reach = ((whole.high - whole.mean) ** 2 + (1.96 * deviation / 10) ** 2) ** 0.5
    kid = quick.figures(a, a, b)["kid"]
    assert (kid.mean, kid.low, kid.high) == pytest.approx((mean, mean - reach, mean + reach), abs=1e-6)


@pytest.mark.parametrize("count", [30, 120])
def test_the_interval_of_kid_holds_the_truth_about_95_times_in_100(quick, count):
    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return ((x * y).sum(1) / 3 + 1).pow(3).mean().item()

    sides = ((8, 0.0), (9, 0.0), (10, 0.3), (11, 0.3))
    x, x2, y, y2 = (Corner()(perceptual._bytes(corners(seed, 200_000, shift))).double() for seed, shift in sides)
    exact = kernel(x, x2) + kernel(y, y2) - 2 * kernel(x, y)
    draws = []
    for seed in range(100, 150):
        a = corners(seed, count)
        draws.append(quick.figures(a, a, corners(seed + 500, count, 0.3))["kid"])
    assert sum(draw.low <= exact <= draw.high for draw in draws) / 50 > 0.95 - 4 * (0.95 * 0.05 / 50) ** 0.5


def test_kid_of_two_pictures_has_no_interval(quick):
    kid = quick.figures(corners(0, 2), corners(0, 2), corners(1, 2))["kid"]
    assert math.isfinite(kid.mean) and math.isnan(kid.low) and math.isnan(kid.high)


@pytest.mark.slow
def test_the_global_generator_is_left_as_it_was(figures):
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), figures[1])
