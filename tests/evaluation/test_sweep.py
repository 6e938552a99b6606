"""evaluate.py as a command: sweeps, their report, and the figures of each setting by other means."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT, refused, second_stage
from isonext.evaluation import evaluator, sweep
from isonext.evaluation.evaluator import Direction, Evaluation, base_figures
from isonext.evaluation.intervals import bootstrap, share, share_difference
from isonext.evaluation.metrics import train_style_classifier
from isonext.evaluation.report import front
from isonext.flow.transfer import TransferSettings

DIRECTIONS = [("cold", "warm"), ("warm", "cold")]
ELEMENTS = 2 * 12 * 8 * 8  # two pictures of 32 px a direction


@pytest.fixture
def report(within, monkeypatch, tmp_path):
    """Evaluate two pictures a style with two steps a leg: returns (metrics.json, stdout, the report's folder)."""
    # None of these tests is about how sure the classifier is.
    monkeypatch.setattr(evaluator, "train_style_classifier", functools.partial(train_style_classifier, steps=12))
    numbers = iter(range(100))

    def run(*flags: str, raw: bool = False):
        folder = tmp_path / f"report{next(numbers)}"
        base = ("--checkpoint", CHECKPOINT, "--data", "raw_data", "--limit", "2", "--set", "inference.num_steps=2")
        result = within("evaluate", *base, "--output", folder, *flags)
        if raw:
            assert not folder.exists()
            return result
        assert result[0] == 0, result
        return json.loads((folder / "metrics.json").read_text()), result[1], folder

    return run


def chosen(figures: dict, *names: str) -> list[tuple]:
    """The settings of each result, as far as named."""
    return [tuple(result["settings"][name] for name in names) for result in figures["results"]]


def swept(out: str) -> list[list[str]]:
    """The cells of the body of a sweep's table: star, setting, figures, round trip."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return lines[2:]


#################################################################################
#                                  One setting                                  #
#################################################################################


def test_one_setting_is_a_list_of_one_with_sheets_and_without_a_column_for_it(report):
    figures, out, folder = report("--set", "inference.cfg_scale=2", "--strength", "0.5")
    assert figures.keys() == {"classifier_accuracy", "reconstruction_psnr", "not_measured", "results"}
    assert all(line in out for line in figures["not_measured"])
    assert chosen(figures, "method", "num_steps", "cfg_scale", "strength") == [("alf", 2, 2.0, 0.5)]
    (result,) = figures["results"]
    assert [(each["source"], each["target"]) for each in result["directions"]] == DIRECTIONS
    for each in result["directions"]:
        assert (each["pictures"], each["round_trip_differing"], each["round_trip_elements"]) == (2, 0, ELEMENTS)
        assert "ssim_to_pair" not in each and "psnr_to_pair" not in each
    assert "| cold -> warm (2) |" in out and "| warm -> cold (2) |" in out and "true pair" not in out
    names = ["cold_to_warm.png", "metrics.json", "report.md", "warm_to_cold.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "report.md").read_text().splitlines()[-4:] == out.splitlines()[-5:-1]


def test_strength_zero_leaves_the_pictures_to_the_autoencoder_alone(report, studio):
    figures, _, _ = report("--strength", "0", "--pairs")
    assert 20 < figures["reconstruction_psnr"]["mean"] < 60
    for pair in figures["results"][0]["directions"]:
        # what the codec costs: the structure stays as it is, and so does the style
        assert pair["ssim_to_source"]["mean"] > 0.7
        assert pair["psnr_to_pair"]["mean"] == pytest.approx(pair["psnr_to_pair_before"]["mean"], abs=0.5)
        names = ("000", "001")
        pictures = {
            style: np.stack([np.asarray(Image.open(studio / "raw_data" / style / f"{name}.png")) for name in names])
            for style in ("cold", "warm")
        }
        gap = (pictures["cold"].astype(float) - pictures["warm"]) / 255
        by_hand = np.mean([-10 * np.log10(np.mean(each**2)) for each in gap])
        assert pair["psnr_to_pair_before"]["mean"] == pytest.approx(by_hand, abs=1e-3)


def test_a_method_without_a_way_back_has_no_round_trip_and_an_inexact_one_says_how_far_it_is_off(report):
    figures, out, _ = report("--sweep", "method=flowedit,euler,alf")
    assert chosen(figures, "method") == [("flowedit",), ("euler",), ("alf",)]
    flowedit, euler, alf = (result["directions"][0] for result in figures["results"])
    assert "round_trip_differing" not in flowedit and "round_trip_differing" in euler
    assert 0 < euler["round_trip_differing"] <= ELEMENTS and euler["round_trip_max"] > 1e-4
    assert (alf["round_trip_differing"], alf["round_trip_max"]) == (0, 0)
    off = sum(pair["round_trip_differing"] for pair in figures["results"][1]["directions"])
    expected = [["method flowedit", "-"], ["method euler", f"{off} differ"], ["method alf", "0 differ"]]
    assert [[row[1], row[-1]] for row in swept(out)] == expected
    _, out, _ = report("--set", "inference.method=flowedit")
    assert "the way back changes" not in out


#################################################################################
#                                     Sweeps                                    #
#################################################################################


def test_a_sweep_measures_every_combination_in_order_and_its_brackets_hold_together(report):
    figures, out, folder = report("--sweep", "cfg_scale=1,2", "cfg_interval=[0,1],[0,0.5]")
    expected = [(1.0, [0, 1]), (1.0, [0, 0.5]), (2.0, [0, 1]), (2.0, [0, 0.5])]
    assert chosen(figures, "cfg_scale", "cfg_interval") == expected
    pairs = [result["directions"] for result in figures["results"]]
    assert all([(pair["source"], pair["target"]) for pair in each] == DIRECTIONS for each in pairs)
    assert pairs[0] == pairs[1], "without guidance its interval means nothing"
    ssims = [each[0]["ssim_to_source"]["mean"] for each in pairs]
    assert ssims[2] < ssims[3] < ssims[0], "the more guidance, the less is left of the picture"
    table = swept(out)
    labels = [f"cfg_scale {scale}, cfg_interval {(0.0, float(b))}" for scale, (_, b) in expected]
    assert [row[1] for row in table] == labels
    points = []
    for row, each in zip(table, pairs, strict=True):  # the mean of both directions
        means = [sum(pair[name]["mean"] for pair in each) / 2 for name in ("style_success", "ssim_to_source")]
        assert [cell.split(" [")[0] for cell in row[2:4]] == [f"{mean:.3f}" for mean in means]
        points.append(tuple(means))
    assert [row[0] == "*" for row in table] == [number in front(points) for number in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["front.png", "metrics.json", "report.md"]
    assert Image.open(folder / "front.png").width > 600


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)], {0, 1, 2}),
        ([(0.5, 0.5), (0.6, 0.5), (0.5, 0.6)], {1, 2}),
        ([(0.5, 0.5), (0.5, 0.5), (0.4, 0.4)], {0, 1}),  # equals do not dominate each other
        ([(0.9, 0.9), (0.1, 0.2), (0.9, 0.1)], {0}),
    ],
)
def test_the_front_is_what_no_other_dominates(points, expected):
    assert front(points) == expected


def test_means_over_directions_have_the_interval_of_resampled_pictures(report):
    figures, out, _ = report("--sweep", "cfg_scale=1,2", "--limit", "6", "--quick")
    for row, result in zip(swept(out), figures["results"], strict=True):
        mean = result["means"]["ssim_to_source"]
        assert row[3] == f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
        each = [pair["ssim_to_source"] for pair in result["directions"]]
        assert mean["mean"] == pytest.approx(sum(one["mean"] for one in each) / 2)
        # 12 pictures instead of 6: the interval is narrower than the wider one, and holds the mean
        assert mean["low"] < mean["mean"] < mean["high"]
        assert mean["high"] - mean["low"] < max(one["high"] - one["low"] for one in each)


def test_quick_leaves_out_the_ways_back_and_changes_no_other_figure(report):
    quick, whole = (report("--pairs", *flags)[0]["results"][0] for flags in (["--quick"], []))
    assert quick["base"] == whole["base"] and quick["means"] == whole["means"]
    ways_back = {"cycle", "round_trip_differing", "round_trip_elements", "round_trip_max"}
    for short, long in zip(quick["directions"], whole["directions"], strict=True):
        assert long.keys() - short.keys() == ways_back
        assert all(short[name] == long[name] for name in short)


def test_pairs_without_a_partner_are_left_out_of_a_direction_only(report, studio, tmp_path):
    for style, names in (("cold", ("000", "001", "002")), ("warm", ("001", "002", "003", "004"))):
        (tmp_path / "some" / style).mkdir(parents=True)
        for name in names:
            (tmp_path / f"some/{style}/{name}.png").write_bytes((studio / f"raw_data/{style}/{name}.png").read_bytes())
    flags = ("--data", tmp_path / "some", "--limit", "9", "--quick")
    every, paired = (report(*flags, *more)[0]["results"][0]["directions"] for more in ([], ["--pairs"]))
    assert [pair["pictures"] for pair in every] == [3, 4] and [pair["pictures"] for pair in paired] == [2, 2]
    (tmp_path / "some/cold/001.png").unlink()
    (tmp_path / "some/cold/002.png").unlink()
    refused(report(*flags, "--pairs", raw=True), "--pairs", "cold", "warm")


def test_the_same_command_twice_gives_the_same_figures(report):
    assert report("--pairs")[0] == report("--pairs")[0]


def test_baselines_are_measured_with_the_same_ruler_and_named(report):
    baseline = CHECKPOINT.replace("epoch4", "epoch2")
    figures, out, _ = report("--baseline", baseline)
    assert [result["name"] for result in figures["results"]] == [CHECKPOINT, baseline]
    assert [row[1] for row in swept(out)] == [CHECKPOINT, baseline]
    (alone,) = report()[0]["results"]
    assert figures["results"][0] == alone


def test_without_data_the_validation_split_is_measured(within, studio, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "train_style_classifier", functools.partial(train_style_classifier, steps=12))
    flags = ("--checkpoint", CHECKPOINT, "--output", tmp_path / "r", "--set", "inference.num_steps=1")
    status, _, err = within("evaluate", *flags)
    assert status == 0, err
    counts = json.loads((studio / "latents/meta.json").read_text())["counts"]
    (result,) = json.loads((tmp_path / "r/metrics.json").read_text())["results"]
    for each in result["directions"]:
        assert each["pictures"] == counts[each["source"]]["val"]


def test_a_swept_setting_has_the_figures_of_the_same_setting_alone(report):
    figures, _, _ = report("--sweep", "strength=0.5,1", "time_grid=uniform,cosine", "--set", "inference.cfg_scale=2")
    settings = [(0.5, "uniform"), (0.5, "cosine"), (1.0, "uniform"), (1.0, "cosine")]
    assert chosen(figures, "strength", "time_grid") == settings
    assert chosen(figures, "cfg_scale") == [(2.0,)] * 4
    flags = ("--set", "inference.cfg_scale=2", "--set", "inference.time_grid=cosine", "--strength", "0.5")
    assert report(*flags)[0]["results"][0] == figures["results"][1]


def test_a_swept_value_goes_before_strength_and_set(report):
    flags = ("--strength", "0.25", "--set", "inference.cfg_scale=3")
    figures, out, _ = report("--sweep", "strength=0.5", "cfg_scale=1", *flags)
    assert chosen(figures, "strength", "cfg_scale", "num_steps") == [(0.5, 1.0, 2)]
    assert "| cold -> warm (2) |" in out, "one combination is one setting"


def test_null_is_a_value_like_any_other(report):
    figures, out, _ = report("--sweep", "latent_clamp=null,0.5")
    assert chosen(figures, "latent_clamp") == [(None,), (0.5,)]
    assert [row[1] for row in swept(out)] == ["latent_clamp None", "latent_clamp 0.5"]
    assert figures["results"][0]["directions"] != figures["results"][1]["directions"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sweep", "cfg_scale"], ["--sweep cfg_scale", "KEY=VALUE"]),
        (["--sweep", "cfg_scale="], ["--sweep cfg_scale=", "KEY=VALUE"]),
        (["--sweep", "cfg_scale=1,"], ["cfg_scale", "a number"]),
        (["--sweep", "cfg_scale=1,x"], ["cfg_scale", '"x"']),
        (["--sweep", "cfg_scale=1,200"], ["cfg_scale", "200", "100"]),
        (["--sweep", "cfg_scal=1,2"], ["cfg_scal", "cfg_scale"]),
        (["--sweep", "cfg_interval=[0,1],[0.5,0.2]"], ["cfg_interval", "behind"]),
        (["--sweep", "cfg_interval=[0,1,2]"], ["cfg_interval", "list of 2"]),
        (["--sweep", "cfg_interval=[0,1"], ["cfg_interval"]),
        (["--sweep", "num_steps=2,0"], ["num_steps", "from 1 to 10000"]),
        (["--sweep", "method=alf,rk5"], ["rk5", "heun"]),
        (["--sweep", "strength=0.5,2"], ["strength", "0 to 1"]),
        (["--sweep", "strength=all"], ["strength", "0 to 1"]),
        (["--sweep", "strength=nan"], ["strength", "0 to 1"]),
        (["--strength", "-1"], ["strength", "0 to 1"]),
        (["--sweep", "inversion=explicit,fixed_point"], ["fixed_point", "alf"]),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_is_measured(report, flags, words):
    refused(report(*flags, raw=True), *words)


def test_sweep_given_twice_is_both_like_set(report):
    figures, _, _ = report("--sweep", "strength=0.5,1", "--sweep", "cfg_scale=1,2")
    assert len(figures["results"]) == 4


def test_a_sweep_without_a_key_is_refused_as_a_sweep(report):
    refused(report("--sweep", "=1,2", raw=True), "--sweep =1,2")


def test_a_negative_limit_is_refused(report):
    assert report("--limit", "-1", raw=True)[0] == 2


def test_metrics_json_is_json_even_where_pictures_are_equal(report, studio, tmp_path):
    for style in ("cold", "warm"):
        (tmp_path / "same" / style).mkdir(parents=True)
        (tmp_path / "same" / style / "a.png").write_bytes((studio / "raw_data/cold/000.png").read_bytes())
    _, _, folder = report("--pairs", "--data", tmp_path / "same")

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def test_fixed_points_are_solved_for_in_float32_as_by_inference(report):
    flags = ("--set", "inference.method=euler", "--set", "inference.inversion=fixed_point")
    figures, _, _ = report(*flags, "--set", "inference.num_steps=8")
    # By inference.py --certify, at the tolerance of 1e-5: below 1e-4. BF16 stops at some 3e-3.
    assert all(pair["round_trip_max"] < 3e-4 for pair in figures["results"][0]["directions"])


def test_pictures_that_share_all_but_the_suffix_are_all_measured(report, tmp_path):
    shades = {"a.png": 40, "a.bmp": 80, "a.webp": 120, "b.png": 160, "deep/a.png": 200}
    for style, names in (("cold", shades), ("warm", ("a.png", "b.bmp"))):
        for name in names:
            (tmp_path / "some" / style / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (shades.get(name, 0),) * 3).save(tmp_path / "some" / style / name, lossless=True)
    styles = evaluator.load_styles(tmp_path / "some", ["cold", "warm"], 32)
    assert sorted(styles["cold"]) == ["a.bmp", "a.png", "a.webp", "b", "deep/a"]
    for name, pixels in styles["cold"].items():
        shade = shades.get(name, shades.get(f"{name}.png"))
        assert pixels[0, 0, 0].item() == pytest.approx(shade / 127.5 - 1, abs=1e-6)
    figures, _, _ = report("--data", tmp_path / "some", "--limit", "9")
    assert [pair["pictures"] for pair in figures["results"][0]["directions"]] == [5, 2]
    figures, _, _ = report("--data", tmp_path / "some", "--limit", "9", "--pairs")
    assert [pair["pictures"] for pair in figures["results"][0]["directions"]] == [2, 2], "a.png, and b of two suffixes"


def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(within, monkeypatch, tmp_path):
    (tmp_path / "report").write_bytes(b"mine")
    monkeypatch.setattr(sweep, "load_runs", lambda options: pytest.fail("loaded"))
    result = within("evaluate", "--checkpoint", CHECKPOINT, "--data", "raw_data", "--output", tmp_path / "report")
    refused(result, "report is a file; give a folder for the output")
    assert (tmp_path / "report").read_bytes() == b"mine"


#################################################################################
#                              What an interval is over                         #
#################################################################################


def test_recipes_of_equal_success_differ_by_nothing_within_an_interval_that_is_one():
    def success(hits: int) -> Evaluation:
        values = {"style_success": torch.arange(20) < hits, "ssim_to_source": torch.linspace(0, hits, 20)}
        direction = Direction("a", "b", [str(number) for number in range(20)], values, [])
        return Evaluation("", TransferSettings(), paired=False, directions=[direction])

    equal = success(20).difference(success(20), "style_success")
    assert (equal.mean, equal.high) == (0, pytest.approx(1.96 / 22)) and equal.low == -equal.high
    less = success(15).difference(success(20), "style_success")
    assert (less.mean, less.low) == (-0.25, share_difference(torch.tensor([-1.0] * 5 + [0.0] * 15)).low)
    of_values = success(15).difference(success(20), "ssim_to_source")
    assert of_values == bootstrap(torch.linspace(0, 15, 20).double() - torch.linspace(0, 20, 20).double())


def test_leakage_of_paired_pictures_has_the_interval_of_pictures_and_not_of_their_versions():
    noise = torch.randn(2, 30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    structures = {"a": noise[0] + 9, "b": noise[1] - 9}  # the probe is always right
    each, paired = (base_figures(structures, pictures)["leakage"] for pictures in (None, torch.arange(30).repeat(2)))
    assert each == share(torch.ones(60, dtype=torch.bool)) and paired == share(torch.ones(30, dtype=torch.bool))


def test_stage_2_is_measured_by_its_map_which_has_no_structure_and_beside_its_teacher(report, studio):
    second = second_stage(studio / CHECKPOINT, studio / "stage2_measured.pt")
    flags = ("--checkpoint", second, "--set", "inference.cfg_scale=3")
    by_map, by_alf = report(*flags, "--limit", "5", "--sweep", "method=map,alf", "--quick")[0]["results"]
    assert [result["settings"]["method"] for result in (by_map, by_alf)] == ["map", "alf"]
    assert not by_map["base"] and by_alf["base"]
    for each in report(*flags)[0]["results"][0]["directions"]:
        assert (each["round_trip_differing"], each["round_trip_elements"]) == (0, ELEMENTS)
    refused(report(*flags, "--sweep", "cfg_scale=3,5", raw=True), "cfg_scale 5", "from 1 to 4")
    refused(report("--set", "inference.method=map", raw=True), "method map", "stage 1")
