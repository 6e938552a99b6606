"""What the page does with pictures: what inference.py does, from what was kept, and only with what the server lists."""

import functools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT
from isonext.app import studio as studio_module
from isonext.app.recent import Recent
from isonext.app.studio import MOST_PIXELS, Order, Studio
from isonext.errors import UserError
from isonext.inference import jobs
from isonext.inference.structure_file import fixed_bits, load_structure, save_structure
from isonext.pipeline import Pipeline

NAME = Path(CHECKPOINT).name
PICTURE = "raw_data/cold/003.png"


@pytest.fixture
def room(studio, tmp_path, monkeypatch) -> Studio:
    """A studio over the trained folder's runs."""
    monkeypatch.chdir(studio)
    return Studio(Path("checkpoints"), tmp_path / "results", "cpu")


@pytest.fixture
def evaluations(monkeypatch) -> list:
    """One entry for every evaluation of the network."""
    calls, plain = [], Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, *inputs: calls.append(1) or plain(self, *inputs))
    return calls


ORDER = Order(NAME, Path(PICTURE), "cold", "warm", flags={"num_steps": 3, "method": "alf", "cfg_scale": 1.5})


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_transfer_is_that_of_inference_py_to_the_pixel_with_its_certificate_and_structure(room, within, tmp_path):
    done = room.do(room.transfer, ORDER)
    flags = ("--source_style", "cold", "--target_style", "warm", "--num_steps", "3", "--cfg_scale", "1.5")
    kept = ("--certify", "--save_structure", tmp_path / "a.safetensors", "--output", tmp_path / "a.png")
    status, out, _ = within("inference", "--checkpoint", CHECKPOINT, "--input", PICTURE, *flags, *kept)
    assert status == 0
    assert [style for _, style in done.after] == ["warm"]
    assert np.array_equal(pixels(done.after[0][0]), pixels(tmp_path / "a.png"))
    certificate = next(line for line in out.splitlines() if line.startswith("certificate: exact"))
    assert done.lines == [certificate]
    one, other = (load_structure(path) for path in (done.structure, tmp_path / "a.safetensors"))
    assert torch.equal(one.state.position, other.state.position) and torch.equal(one.state.defect, other.state.defect)
    assert replace(one, state=None) == replace(other, state=None)
    assert done.after[0][0].name == "003_warm.png" and done.structure.name == "003.safetensors"


def test_another_target_or_scale_takes_the_inversion_that_was_kept_and_gives_the_same(room, evaluations):
    plain = replace(ORDER, certify=False)
    room.do(room.transfer, plain)
    whole = len(evaluations)
    for change in ({"target": "cold"}, {"flags": ORDER.flags | {"cfg_scale": 3.0, "guidance": "null"}}):
        evaluations.clear()
        again = room.do(room.transfer, replace(plain, **change))
        assert 0 < len(evaluations) <= whole - 3, "the leg of 3 steps backwards was not run"
        other = Studio(Path("checkpoints"), room.results, "cpu")
        fresh = other.do(other.transfer, replace(plain, **change))
        assert np.array_equal(pixels(again.after[0][0]), pixels(fresh.after[0][0]))


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.5},
        {"source": "warm"},
        {"flags": ORDER.flags | {"num_steps": 4}},
        {"flags": ORDER.flags | {"method": "heun"}},
        {"picture": Path("raw_data/cold/004.png")},
        {"size": 16},
    ],
)
def test_what_changes_the_inversion_has_one_of_its_own(room, change):
    plain = replace(ORDER, certify=False)
    room.do(room.transfer, plain)
    again = room.do(room.transfer, replace(plain, **change))
    other = Studio(Path("checkpoints"), room.results, "cpu")
    assert np.array_equal(
        pixels(again.after[0][0]), pixels(other.do(other.transfer, replace(plain, **change)).after[0][0])
    )


def test_a_structure_goes_back_to_equal_pixels_and_on_to_other_styles(room):
    done = room.do(room.transfer, ORDER)
    back = room.do(room.restore, NAME, done.structure)
    assert np.array_equal(pixels(back.after[0][0]), pixels(done.before))
    assert back.lines[0].startswith("certificate: exact (0 of 768 elements differ), sha256 ")
    onward = room.do(room.restyle, NAME, done.structure, "warm", {"cfg_scale": 1.5})
    assert np.array_equal(pixels(onward.after[0][0]), pixels(done.after[0][0]))
    assert onward.lines[0].startswith("certificate: exact")


def test_a_way_back_that_does_not_end_at_the_original_is_no_picture(room, monkeypatch):
    done, plain = room.do(room.transfer, ORDER), Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, *inputs: plain(self, *inputs) + 1e-3)
    with pytest.raises(UserError, match="certificate: NOT exact: other latents than the original's"):
        room.do(room.restore, NAME, done.structure)


def test_a_structure_of_another_precision_goes_back_too(room):
    done = room.do(room.transfer, ORDER)
    other = Studio(Path("checkpoints"), room.results, "cpu")
    loaded = other.do(other.open, NAME)
    loaded.pipeline.bf16 = not loaded.pipeline.bf16
    assert np.array_equal(pixels(other.do(other.restore, NAME, done.structure).after[0][0]), pixels(done.before))


def test_all_styles_and_16_bits(room):
    done = room.do(room.transfer, replace(ORDER, target="all", deep=True))
    assert [style for _, style in done.after] == ["cold", "warm"] and done.structure is None
    assert "exact (0 of 1536 elements differ)" in done.lines[0]
    for path, _ in done.after:
        assert path.read_bytes()[24] == 16  # the depth in a PNG's header


def test_more_styles_than_one_job_may_make_are_refused(room, monkeypatch):
    monkeypatch.setattr(studio_module, "MOST_SAMPLES", 1)
    with pytest.raises(UserError, match=r"2 styles: at most 1 at once here; inference.py makes more"):
        room.do(room.transfer, replace(ORDER, target="all"))
    with pytest.raises(UserError, match=r"2 samples: at most 1 at once here; sample.py makes more"):
        room.do(room.sample, NAME, [], 1, 0, {"num_steps": 1})


def test_samples_are_those_of_sample_py_to_the_pixel(room, within, tmp_path):
    sheet, samples = room.do(room.sample, NAME, ["warm"], 2, 5, {"num_steps": 2, "cfg_scale": 1.5})
    flags = (
        "--styles",
        "warm",
        "--num_samples_per_style",
        "2",
        "--seed",
        "5",
        "--num_steps",
        "2",
        "--cfg_scale",
        "1.5",
    )
    place = ("--output", tmp_path / "out", "--batch_size", "2")
    assert within("sample", "--checkpoint", CHECKPOINT, *flags, *place)[0] == 0
    assert [(path.name, style) for path, style in samples] == [("warm_001.png", "warm"), ("warm_002.png", "warm")]
    for path in (sheet, *(path for path, _ in samples)):
        assert np.array_equal(pixels(path), pixels(tmp_path / "out" / path.name))


def test_a_floor_of_structure_is_kept_and_told(room):
    done = room.do(room.transfer, replace(ORDER, min_structure=0.95, certify=False))
    assert done.lines[0].startswith("003.png as warm: strength ") and "keeps structure" in done.lines[0]
    assert done.structure is None


def test_methods_without_an_exact_way_back_get_no_certificate(room):
    for method in ("euler", "flowedit"):
        done = room.do(room.transfer, replace(ORDER, flags=ORDER.flags | {"method": method}))
        assert done.lines == [] and done.structure is None


def test_the_style_of_a_picture_is_guessed_by_a_trained_network(room):
    for style in ("cold", "warm"):
        hits = [room.do(room.guess, NAME, Path(f"raw_data/{style}/{number:03}.png"))[0][0] for number in range(8)]
        assert hits == [style] * 8


#################################################################################
#                              What is not as it should be                      #
#################################################################################


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": "../checkpoints/stage1_epoch4.pt"}, "no such checkpoint here"),
        ({"source": "lukewarm"}, "style 'lukewarm' does not exist"),
        ({"target": "lukewarm"}, "style 'lukewarm' does not exist"),
        ({"strength": 1.5}, "--strength 1.5: must be from 0 to 1"),
        ({"flags": {"method": "magic"}}, "inference.method"),
        ({"flags": {"cfg_scale": "auto"}}, "no measured front"),
        ({"flags": {"num_steps": 0}}, "inference.num_steps"),
    ],
)
def test_what_a_browser_may_not_say_is_one_sentence(room, change, words):
    with pytest.raises(UserError) as error:
        room.do(room.transfer, replace(ORDER, **change))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bad_picture_is_named_without_its_place_on_the_server(room, tmp_path):
    bad = tmp_path / "secret" / "cat.png"
    bad.parent.mkdir()
    bad.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^cat\.png: not a picture$"):
        room.do(room.transfer, replace(ORDER, picture=bad))
    with pytest.raises(UserError, match=r"^cat\.png: damaged, or not a structure file"):
        room.do(room.restore, NAME, bad)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(room, tmp_path, monkeypatch):
    large = tmp_path / "large.png"
    Image.new("1", (MOST_PIXELS // 4096 + 1, 4096)).save(large)
    monkeypatch.setattr(studio_module.images, "open_picture", lambda path: pytest.fail("it is decoded"))
    with pytest.raises(UserError, match=r"^large.png: has 8193 x 4096 pixels, this page takes at most 33554432"):
        room.do(room.transfer, replace(ORDER, picture=large))


def test_a_checkpoint_that_was_replaced_is_loaded_anew_and_one_that_has_gone_is_a_sentence(room, studio):
    copy = studio / "checkpoints" / "copy"
    copy.mkdir()
    try:
        shutil.copy(studio / "checkpoints/stage1_epoch2.pt", copy / "best.pt")
        order = replace(ORDER, checkpoint="copy/best.pt", certify=False)
        first = pixels(room.do(room.transfer, order).after[0][0])
        shutil.copy(studio / CHECKPOINT, copy / "best.pt")
        second = pixels(room.do(room.transfer, order).after[0][0])
        assert np.array_equal(second, pixels(room.do(room.transfer, replace(order, checkpoint=NAME)).after[0][0]))
        assert not np.array_equal(first, second)
    finally:
        shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"copy/best.pt: no such checkpoint here, or no longer"):
        room.do(room.transfer, order)


def test_the_file_of_a_checkpoint_is_digested_once(room, monkeypatch):
    room.do(room.open, NAME)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "fixed_bits", lambda pipeline: pytest.fail("a large file is read again"))
        first = load_structure(room.do(room.transfer, ORDER).structure)
    assert first.bits == fixed_bits(room.do(room.open, NAME).pipeline)


def test_what_nobody_foresaw_is_a_sentence_and_memory_that_ran_out_is_let_go(room, monkeypatch, capsys):
    def fail(error):
        raise error

    room.do(room.open, NAME)
    with pytest.raises(UserError, match=r"^ValueError: odd; the server's terminal shows more$"):
        room.do(functools.partial(fail, ValueError("odd\nindeed")))
    assert "Traceback" in capsys.readouterr().err and room.loaded.values
    with pytest.raises(UserError, match="out of memory; a smaller size takes less"):
        room.do(functools.partial(fail, MemoryError()))
    assert not room.loaded.values


def test_what_is_kept_is_bounded_in_number_and_in_elements():
    known = Recent(3, elements=10, count=len)
    for name, length in (("a", 4), ("b", 4), ("a", 0), ("c", 2), ("d", 1)):
        known.get(name, lambda length=length: "x" * length)
    assert list(known.values) == ["a", "c", "d"], "b was asked for the longest ago"
    known.get("e", lambda: "x" * 11)
    assert list(known.values) == ["e"], "one that is too large alone is kept until the next"


def test_a_structure_file_of_so_many_steps_that_everybody_would_wait_is_refused(room, tmp_path):
    structure = load_structure(room.do(room.transfer, ORDER).structure)
    long = replace(structure, settings=replace(structure.settings, num_steps=201))
    save_structure(long, tmp_path / "long.safetensors")
    for work in (room.restore, lambda *given: room.restyle(*given, "warm", {})):
        with pytest.raises(UserError, match=r"^long.safetensors: has 201 steps a leg, this page takes 200$"):
            room.do(work, NAME, tmp_path / "long.safetensors")


def test_results_are_deleted_after_some_hours_and_made_again(room):
    first = room.do(room.transfer, replace(ORDER, certify=False))
    for place in room.results.iterdir():
        os.utime(place, (0, 0))
    again = room.do(room.transfer, replace(ORDER, certify=False))
    assert not first.before.exists() and not first.after[0][0].exists()
    assert again.before.exists() and again.after[0][0].exists()


def test_results_lie_where_nobody_can_guess(room):
    one, other = (room.do(room.transfer, replace(ORDER, certify=False)).after[0][0].parent for _ in range(2))
    assert one != other and len(one.name) > 32 and one.parent == room.results


def test_torch_runs_on_one_thread_of_the_studios(room):
    names = {room.do(lambda: torch.get_num_threads() and __import__("threading").current_thread().name) for _ in "ab"}
    assert names == {"device_0"}
