"""Transfers of another program beside ours: which of our rows stands against one, and by how much."""

import pytest
import torch

from isonext.evaluation.comparison import Row, judge, margins, plot_fronts, table
from isonext.evaluation.evaluator import Direction

WAY = ("photo", "ink")


def row(name: str, hits: list[int], ssim: list[float], ours: bool = True) -> Row:
    values = {"style_success": torch.tensor(hits, dtype=torch.bool), "ssim_to_source": torch.tensor(ssim)}
    direction = Direction(*WAY, [str(number) for number in range(len(hits))], values, [])
    return Row(name, 90.0, 7, ours, {WAY: direction})


OURS = [
    row("gentle", [1, 0, 0, 0, 0], [0.9, 0.9, 0.9, 0.9, 0.9]),
    row("middling", [1, 1, 0, 0, 0], [0.7, 0.6, 0.5, 0.6, 0.6]),
    row("middling, blurred", [1, 1, 1, 0, 0], [0.3, 0.2, 0.1, 0.2, 0.2]),
    row("strong", [1, 1, 1, 1, 0], [0.5, 0.4, 0.3, 0.4, 0.4]),
]


def test_the_row_of_most_structure_among_those_of_no_less_style_stands_against_the_peers():
    (margin,) = margins([*OURS, row("peer", [0, 0, 0, 1, 1], [0.2, 0.3, 0.5, 0.0, 0.0], ours=False)])
    assert (margin.peer, margin.way, margin.ours) == ("peer", WAY, "middling")
    # 0.5, 0.3, 0, 0.6, 0.6 picture by picture
    assert margin.difference.mean == pytest.approx(0.4)
    assert margin.difference.low < 0.4 < margin.difference.high
    assert margin.tree()["ssim_difference"]["mean"] == pytest.approx(0.4)


def test_a_peer_of_more_style_than_ours_is_said_to_be_one():
    (margin,) = margins([*OURS, row("peer", [1, 1, 1, 1, 1], [0.2] * 5, ours=False)])
    assert margin.ours is None and margin.difference is None and margin.tree()["ssim_difference"] is None
    assert str(margin) == "peer, photo -> ink: ours reaches no such style success"


def test_the_table_has_time_steps_and_both_figures():
    untimed = row("ours", [1, 1, 0, 0, 0], [0.5] * 5)
    untimed.seconds = untimed.steps = None
    lines = table([untimed, row("peer", [0, 0, 0, 0, 0], [0.25] * 5, ours=False)]).splitlines()
    assert lines[2].startswith("| ours | - | - | 0.400 [") and "| 0.500 [0.500, 0.500] |" in lines[2]
    assert lines[3].startswith("| peer | 1.5 | 7 | 0.000 [")
    assert lines[-1] == "- peer, photo -> ink: 0.250 [0.250, 0.250] (ours)"


def test_the_plot_has_a_panel_a_direction(tmp_path):
    there_and_back = [row("ours", [1, 0], [0.5, 0.5]), row("peer", [0, 0], [0.2, 0.2], ours=False)]
    for one in there_and_back:
        one.directions["ink", "photo"] = one.directions[WAY]
    plot_fronts(there_and_back, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_pictures_are_judged_by_the_evaluators_classifier_against_their_sources():
    class Darkness:
        def predict(self, pixels: torch.Tensor) -> torch.Tensor:
            return (pixels.mean((1, 2, 3)) < 0).long()

    class Evaluator:
        styles, classifier = ["light", "dark"], Darkness()
        noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        test = {"light": {"a": noise[0], "b": noise[1]}}  # noqa: RUF012

    same_and_dark = torch.stack([Evaluator.noise[0], -torch.ones(3, 16, 16)])
    found = judge(Evaluator, "light", "dark", same_and_dark)
    assert found.names == ["a", "b"]
    assert found.by_picture("style_success").tolist() == [False, True]
    assert found.by_picture("ssim_to_source")[0] == pytest.approx(1) and found.by_picture("ssim_to_source")[1] < 0.1
    assert torch.equal(found.rows[1][0], Evaluator.noise[1]) and torch.equal(found.rows[1][1], same_and_dark[1])
