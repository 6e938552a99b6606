"""The demo: its pictures are true pairs, and all of it runs."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, call
from isonext.data.demo_pictures import STYLES, draw_folders, draw_scene
from isonext.data.images import to_bytes, to_pixels
from isonext.evaluation.metrics import ssim


def drawn(seed: int, style: str) -> torch.Tensor:
    return to_pixels(to_bytes(draw_scene(seed, style)))[None]


def test_a_scene_is_a_function_of_its_seed():
    first = [np.array(draw_scene(seed, style)) for seed in (3, 4) for style in STYLES]
    again = [np.array(draw_scene(seed, style)) for seed in (4, 3) for style in reversed(STYLES)]
    for a, b in zip(first, reversed(again), strict=True):
        assert np.array_equal(a, b)


def test_the_two_styles_of_a_seed_show_the_same_scene():
    paired = [ssim(drawn(seed, "shaded"), drawn(seed, "ink")).item() for seed in range(12)]
    shuffled = [ssim(drawn(seed, "shaded"), drawn(seed + 100, "ink")).item() for seed in range(12)]
    assert np.mean(paired) > np.mean(shuffled) + 0.1
    assert sum(a > b for a, b in zip(paired, shuffled, strict=True)) >= 10


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match=r"oil.*shaded, ink"):
        draw_scene(0, "oil")


def test_folders_are_unpaired_to_train_on_and_paired_to_test_and_a_broken_file_is_drawn_anew(tmp_path):
    draw_folders(tmp_path, num_train=3, num_test=2, size=32)
    contents = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert len(contents) == 2 * 3 + 2 * 2
    assert np.array_equal(np.array(Image.open(tmp_path / "test/ink/00001.png")), np.array(draw_scene(3, "ink", 32)))
    assert np.array_equal(
        np.array(Image.open(tmp_path / "test/shaded/00001.png")), np.array(draw_scene(3, "shaded", 32))
    )
    trained = {style: {np.array(draw_scene(seed, "ink", 32)).tobytes() for seed in seeds}
               for style, seeds in {"shaded": (4, 7, 10), "ink": (5, 8, 11)}.items()}  # fmt: skip
    assert not trained["shaded"] & trained["ink"]
    broken = tmp_path / "train/ink/00002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    steps = []
    draw_folders(tmp_path, num_train=3, num_test=2, size=32, progress=steps.append)
    assert sum(steps) == 10
    assert contents == {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.png")}


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_a_second_time(tmp_path):
    flags = ["--num_train", "40", "--num_test", "6"]
    for change in ("stage1_epochs=2", "batch_size=20", "compile=false", "num_workers=0", "save_every_epochs=2"):
        flags += ["--set", f"training.{change}"]
    for change in ("hidden_dim=16", "num_layers=1"):
        flags += ["--set", f"model.{change}"]
    flags += ["--set", "inference.num_steps=2", "--set", "data.image_size=32"]
    done = call(tmp_path, "demo.py", *flags)
    assert done.returncode == 0, done.stderr
    for name in ("shaded_to_ink.png", "ink_to_shaded.png", "losses.png"):
        assert Image.open(tmp_path / "outputs/demo" / name).width > 300
    table = [line for line in done.stdout.splitlines() if "->" in line]
    assert [line.split("|")[1].strip() for line in table[-2:]] == ["ink -> shaded (6)", "shaded -> ink (6)"]
    assert all("| 0 |" in line for line in table[-2:])  # latent elements that the way back changes
    again = call(tmp_path, "demo.py", *flags)
    assert again.returncode == 0 and "0 encoded" in again.stdout
    assert [line for line in again.stdout.splitlines() if "->" in line] == table
    assert (ROOT / "configs/demo.json").exists()
