"""What a folder holds, before it is trained on."""

from pathlib import Path

import pytest
import torch

from isonext.app import survey
from isonext.app.recipes import Recipe, plan_training
from isonext.app.survey import spoken, survey_folder
from isonext.errors import UserError
from isonext.models.cost import step_flops


@pytest.fixture
def place(studio, tmp_path, monkeypatch) -> Path:
    """A working directory with the trained folder's pictures and config, and nothing made of them."""
    import shutil

    shutil.copytree(studio / "raw_data", tmp_path / "raw_data")
    shutil.copy(studio / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(device: torch.device) -> list[str]:
    training = plan_training(Recipe(".", "config.json"), Path("raw_data"), Path("checkpoints"))
    return survey_folder(training, device).splitlines()


def test_counts_odd_files_the_plan_and_the_time(place, cpu, monkeypatch):
    (place / "raw_data/cold/notes.txt").write_text("")
    (place / "raw_data/warm/broken.png").write_text("no picture")
    flops = {}
    monkeypatch.setattr(survey, "step_flops", lambda *args: flops.setdefault(len(flops), step_flops(*args)))
    monkeypatch.setattr(survey, "measure_rate", lambda config, spec, device: flops[0] / 4.9)  # a step takes 4.9 s
    lines = look(cpu)
    assert lines[:4] == [
        "style 0 cold: 16 pictures",
        "style 1 warm: 17 pictures",
        "left out by suffix: 1 .txt",
        "no pictures, by their headers: warm/broken.png; they will be skipped",
    ]
    assert any(line.startswith("isonext, D 16, N 2") for line in lines) and any("for 8 GiB:" in line for line in lines)
    # 33 pictures less a fifth, in batches of 8: 3 steps, 4 epochs
    assert lines[-1] == "12 steps, about 59 s on this cpu (a rough reckoning)"
    assert not (place / "latents").exists() and not (place / "checkpoints").exists()


def test_the_rate_is_measured_and_a_network_that_does_not_fit_is_not(place, cpu, monkeypatch):
    assert look(cpu)[-1].startswith("12 steps, about ")
    monkeypatch.setattr(survey, "free_bytes", lambda device: 1000)
    assert look(cpu)[-1] == "12 steps; no estimate: the network does not fit the memory that is free"


def test_fewer_pictures_than_a_batch(place, cpu):
    for path in sorted((place / "raw_data").glob("*/*.png")):
        if path.stem > "003":
            path.unlink()
    assert look(cpu)[-1] == "6 training pictures are fewer than one batch of 8: lower the batch"


def test_a_folder_without_pictures_is_one_sentence(place, cpu):
    (place / "raw_data/empty").mkdir()
    with pytest.raises(UserError, match="raw_data/empty: holds no pictures"):
        look(cpu)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (7200, "2 h"), (200_000, "3 days")]
)
def test_times_for_people(seconds, words):
    assert spoken(seconds) == words
