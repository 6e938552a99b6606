"""export.py: what is in the folder and what is not, and that it serves as the checkpoint did, bit for bit."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import isonext
from helpers import CHECKPOINT, ROOT, refused, second_stage
from isonext.checkpoint import load_checkpoint
from isonext.data import images
from isonext.data.model_folder import read_model, write_model
from isonext.errors import UserError
from isonext.export import folder as export_folder
from isonext.export.card import Card, draw_samples, escaped
from isonext.export.folder import public_name
from isonext.export.options import ExportOptions
from isonext.utils.io import MARK, folder_written_whole

STYLES = ("--source_style", "cold", "--target_style", "warm", "--num_steps", "3")
PICTURE = "raw_data/cold/003.png"
FRONT = {
    "scale": 1.5,
    "ceiling": 1.0,
    "pictures": 8,
    "points": [{"cfg_scale": 1.5, "style_success": 0.875, "ssim": 0.7123}],
}


@pytest.fixture
def exported(studio, within):
    """The studio's checkpoint as a folder, made by the command."""
    if not (studio / "model").exists():
        status, out, err = within("export", "--checkpoint", CHECKPOINT, "--output", "model", "--license", "cc-by-4.0")
        assert status == 0 and "written to model" in out, err
    return studio / "model"


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def save_changed(path: Path, target: Path, **changes) -> None:
    tree = torch.load(path, weights_only=True)
    for name, value in changes.items():
        tree[name] = tree[name] | value if isinstance(tree[name], dict) else value
    torch.save(tree, target)


#################################################################################
#                                  What is in it                                #
#################################################################################


def test_the_averaged_weights_and_the_base_come_back_bit_for_bit_and_nothing_of_the_training(studio, exported):
    old, new = load_checkpoint(studio / CHECKPOINT), load_checkpoint(exported)
    assert old.ema.keys() == new.ema.keys() == new.model.keys()
    for name, weight in old.ema.items():
        assert torch.equal(weight, new.ema[name]) and torch.equal(weight, new.model[name])
    assert any(not torch.equal(old.ema[name], old.model[name]) for name in old.ema), "the two would not be told apart"
    before, after = asdict(old.base), asdict(new.base)
    assert old.base.strength == 0.8 and old.base.layouts.dtype == torch.float16
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)
    assert (new.latents, new.step, new.epoch, new.version) == (old.latents, 12, 4, isonext.__version__)
    assert (new.run, new.store, new.guard, new.log) == ("", "", {}, {})
    assert old.can_resume and not new.can_resume
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    tensors = load_file(exported / "model.safetensors")
    expected = {f"network.{name}" for name in old.ema} | {"base.mean", "base.deviation", "base.layouts"}
    assert tensors.keys() == expected
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert len(modes) == 1, "safetensors makes a file that others cannot read"


def test_no_path_of_this_machine_is_in_any_file(studio, tmp_path, within):
    paths = {"raw_data_root": f"{studio}/raw_data", "data_root": f"{studio}/latents", "split_by": f"{studio}/x.csv"}
    tree = torch.load(studio / CHECKPOINT, weights_only=True)
    tree["config"]["data"] |= paths
    tree["config"]["checkpoint"]["save_dir"] = f"{studio}/checkpoints"
    tree["config"]["autoencoder"]["name"] = tree["latents"]["autoencoder"] = f"{studio}/my-dct"
    torch.save(tree, studio / "checkpoints/pathy.pt")
    moved = ("--set", "autoencoder.name=dct:f4c12")
    flags = ("--checkpoint", studio / "checkpoints/pathy.pt", "--output", tmp_path / "a")
    status, _, err = within("export", *flags, *moved)
    (studio / "checkpoints/pathy.pt").unlink()
    assert status == 0, err
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".safetensors", ".json", ".md", ".png"}
    for path in (tmp_path / "a").iterdir():
        for secret in (str(studio), str(tmp_path), str(ROOT), str(Path.home()) + "/"):
            assert secret.encode() not in path.read_bytes(), path
    assert json.loads((tmp_path / "a/config.json").read_text())["autoencoder"] == {"name": "my-dct"}
    assert load_checkpoint(tmp_path / "a").latents.autoencoder == "my-dct"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("dct:f4c12", "dct:f4c12"),
        ("/home/me/taesd", "taesd"),
        ("~/vae/", "vae"),
        ("C:\\Users\\me\\vae", "vae"),
        ("/", "autoencoder"),
    ],
)
def test_of_an_autoencoder_that_lies_on_this_machine_the_last_name_goes_along(name, shown):
    assert public_name(name) == shown


def test_the_settings_that_go_along_can_be_changed_and_the_front_goes_along(studio, tmp_path, within):
    save_changed(studio / CHECKPOINT, tmp_path / "a.pt", front=FRONT)
    flags = ("--set", "inference.num_steps=7", "--set", "inference.cfg_scale=auto")
    assert within("export", "--checkpoint", tmp_path / "a.pt", "--output", tmp_path / "m", *flags)[0] == 0
    back = load_checkpoint(tmp_path / "m")
    assert back.front == FRONT and (back.config.inference.num_steps, back.config.inference.cfg_scale) == (7, "auto")
    assert back.config.model == load_checkpoint(studio / CHECKPOINT).config.model
    assert "| 1.5 | 0.875 | 0.712 |" in (tmp_path / "m/README.md").read_text()
    wrong = ("--set", "inference.num_step=7", "--output", tmp_path / "n")
    refused(within("export", "--checkpoint", tmp_path / "a.pt", *wrong), "inference.num_step", "num_steps")


#################################################################################
#                                 It serves as well                             #
#################################################################################


def test_transfers_and_samples_are_those_of_the_checkpoint_bit_for_bit(studio, within, exported):
    made = {}
    for name in (CHECKPOINT, "model"):
        which = ("--checkpoint", name)
        assert within("inference", *which, "--input", PICTURE, "--output", "one.png", *STYLES)[0] == 0
        flags = ("--output", "noise", "--num_samples_per_style", "1", "--num_steps", "2", "--overwrite")
        assert within("sample", *which, *flags)[0] == 0
        made[name] = [(studio / path).read_bytes() for path in ("one.png", "noise/cold_001.png", "noise/warm_001.png")]
    assert made[CHECKPOINT] == made["model"]
    assert made["model"][0] != (studio / PICTURE).read_bytes()


def test_a_structure_file_of_either_restores_with_the_other(studio, within, exported):
    for maker, user in ((CHECKPOINT, "model"), ("model", CHECKPOINT)):
        kept = ("--output", "k.png", "--save_structure", "k.safetensors")
        assert within("inference", "--checkpoint", maker, "--input", PICTURE, *STYLES, *kept)[0] == 0
        status, out, err = within("inference", "--checkpoint", user, "--restore", "k.safetensors", "--output", "b.png")
        assert status == 0 and "exact (0 of" in out, err
    other = ("--checkpoint", "checkpoints/stage1_epoch2.pt", "--restore", "k.safetensors", "--output", "c.png")
    refused(within("inference", *other), "k.safetensors: made with another checkpoint")


@pytest.mark.slow
def test_evaluate_takes_it(within, exported):
    status, _, err = within("evaluate", "--checkpoint", "model", "--quick", "--limit", "2", "--output", "report_of_it")
    assert status == 0, err


def test_a_new_training_takes_it_and_resume_says_why_not(studio, within, exported):
    flags = ("--set", "training.stage1_epochs=1", "--set", "checkpoint.save_dir=again")
    status, out, err = within("train", "--init", "model", *flags)
    assert status == 0 and "weights from model at step 12; styles kept: cold, warm" in out, err
    refused(within("train", "--resume", "model"), "model: an exported model has no training state", "--init model")


def test_an_exported_model_can_be_exported_again(studio, within, exported, tmp_path):
    assert within("export", "--checkpoint", "model", "--output", tmp_path / "m")[0] == 0
    first, second = read_model(exported), read_model(tmp_path / "m")
    assert first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


#################################################################################
#                                    The card                                   #
#################################################################################


def test_the_card_says_styles_counts_figures_and_licence(studio, exported):
    card = (exported / "README.md").read_text()
    counts = json.loads((studio / "latents/meta.json").read_text())["counts"]
    for number, style in enumerate(("cold", "warm")):
        assert f"| {number} | {style} | {counts[style]['train']} | {counts[style]['val']} |" in card
    lines = [json.loads(line) for line in (studio / "checkpoints/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_ssim" in line][-1]
    assert f"| SSIM to the source | {last['val_ssim']:.4g} | {last['step']} |" in card
    assert 'license: "cc-by-4.0"' in card and "## Licence\n\ncc-by-4.0\n" in card
    assert "12 steps, batch 8" in card and "`dct:f4c12`" in card
    sheet = Image.open(exported / "samples.png")
    assert sheet.height > 3 * 32 and sheet.width > 2 * 32


def test_figures_of_another_run_or_of_later_steps_are_not_the_model_s(studio, exported, tmp_path):
    folder = Path(shutil.copytree(studio / "checkpoints", tmp_path / "checkpoints"))
    options = ExportOptions(str(folder / "stage1_epoch2.pt"), tmp_path / "m")
    checkpoint = load_checkpoint(options.checkpoint)
    config = json.loads((exported / "config.json").read_text())
    assert "| 6 |" in Card(options, checkpoint, config).text()
    assert "| 12 |" not in Card(options, checkpoint, config).text()
    assert "at step" not in Card(options, replace(checkpoint, run="0" * 32), config).text()
    assert "training pictures" in Card(options, checkpoint, config).text()
    assert "training pictures" not in Card(options, replace(checkpoint, store="0" * 64), config).text()


def test_names_of_others_are_text_in_the_card():
    assert escaped("<b>|`x`|</b>") == r"\<b\>\|\`x\`\|\</b\>"


def test_a_style_s_name_does_not_end_the_code_of_the_card(studio, exported, monkeypatch):
    monkeypatch.chdir(studio)
    checkpoint = load_checkpoint(CHECKPOINT)
    styles = ['a"; import os #', "```\nb".replace("\n", " ")]
    odd = replace(checkpoint, latents=replace(checkpoint.latents, styles=styles))
    text = Card(ExportOptions(CHECKPOINT, Path("m")), odd, json.loads((exported / "config.json").read_text())).text()
    block = text.split("```python\n")[1].split("```")[0]
    assert compile(block, "card", "exec") and '"a\\"; import os #"' in block
    assert text.count("```") == 2


def test_samples_are_of_the_pictures_given(studio, within, tmp_path):
    Image.new("RGB", (40, 36), (200, 40, 40)).save(_made(tmp_path / "mine/warm") / "a.png")
    flags = ("--pictures", tmp_path / "mine", "--output", tmp_path / "m")
    assert within("export", "--checkpoint", CHECKPOINT, *flags)[0] == 0
    sheet = Image.open(tmp_path / "m/samples.png")
    assert (200, 40, 40) in {colour for _, colour in sheet.getcolors(10**6)}
    empty = ("--pictures", _made(tmp_path / "empty"), "--output", tmp_path / "n")
    refused(within("export", "--checkpoint", CHECKPOINT, *empty), "empty", "cold, warm")
    assert not (tmp_path / "n").exists()


def test_without_the_autoencoder_or_a_good_picture_there_is_a_model_without_samples(studio, within, tmp_path):
    tree = torch.load(studio / CHECKPOINT, weights_only=True)
    tree["latents"]["autoencoder"] = "dct:f4c13"  # not the one that it was trained with
    torch.save(tree, tmp_path / "a.pt")
    status, out, err = within("export", "--checkpoint", tmp_path / "a.pt", "--output", tmp_path / "m")
    assert status == 0 and f"no sample transfers: {tmp_path}/a.pt: trained on 12-channel latents" in out, err
    assert "samples.png" not in (tmp_path / "m/README.md").read_text()
    given = ("--pictures", "raw_data", "--output", tmp_path / "n")
    refused(
        within("export", "--checkpoint", tmp_path / "a.pt", *given),
        "12-channel latents, autoencoder dct:f4c13 gives 13",
    )
    (_made(tmp_path / "mine/warm") / "a.png").write_bytes(b"none")
    bad = ("--pictures", tmp_path / "mine", "--output", tmp_path / "n")
    refused(within("export", "--checkpoint", CHECKPOINT, *bad), "a.png: not a picture")
    assert not (tmp_path / "n").exists()


def test_a_model_of_one_style_has_no_transfer_to_show(studio, exported, monkeypatch, tmp_path):
    monkeypatch.chdir(studio)
    checkpoint, options = load_checkpoint(CHECKPOINT), ExportOptions(CHECKPOINT, tmp_path / "m")
    alone = replace(checkpoint, latents=replace(checkpoint.latents, styles=["cold"]))
    config = json.loads((exported / "config.json").read_text())
    assert draw_samples(options, alone, config, tmp_path) == "there is one style alone"
    text = Card(options, alone, config).text()
    assert "sample.py" in text and "FlowStylePipeline" not in text


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


#################################################################################
#                               Whole or not at all                             #
#################################################################################


def test_an_output_that_is_there_is_left_alone(studio, within, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine.txt").write_text("x")
    (tmp_path / "b").write_text("x")
    for name in "ab":
        result = within("export", "--checkpoint", CHECKPOINT, "--output", tmp_path / name)
        refused(result, str(tmp_path / name), "is there already", "another folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "mine.txt"]
    (tmp_path / "c").mkdir()
    assert within("export", "--checkpoint", CHECKPOINT, "--output", tmp_path / "c")[0] == 0


def test_a_folder_that_fails_in_the_middle_leaves_nothing_and_one_that_was_killed_is_cleared(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "m") as beside:
        (beside / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    killed = _made(tmp_path / f".m{MARK}1_0")
    (killed / "a.txt").write_text("half")
    others = _made(tmp_path / f".mm{MARK}1_0")
    with folder_written_whole(tmp_path / "m") as beside:
        (beside / "a.txt").write_text("whole")
    assert (tmp_path / "m/a.txt").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == [others, tmp_path / "m"]


def test_a_card_that_cannot_be_written_leaves_no_folder(studio, within, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_folder.Card, "text", fail)
    result = within("export", "--checkpoint", CHECKPOINT, "--output", tmp_path / "m")
    refused(result, "could not be written (No space left on device)")
    assert not any(tmp_path.iterdir())


#################################################################################
#                                  What is refused                              #
#################################################################################


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def of_a_later_format(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["isonext"]) | {"format": 2}
    save_file(load_file(path), path, metadata | {"isonext": json.dumps(header)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["copy: is a folder without config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["copy: is a folder without model.safetensors"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json: not valid JSON"]),
        (lambda folder: (folder / "config.json").write_text('{"modl": {}}'), ["modl"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["model.safetensors: damaged"]),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), ["was changed after it was written"]),
        (lambda folder: without_metadata(folder / "model.safetensors"), ["of another program"]),
        (lambda folder: of_a_later_format(folder / "model.safetensors"), ["model format 2, this program reads 1"]),
    ],
)
def test_a_damaged_folder_is_one_line(copied, within, damage, words):
    damage(copied)
    flags = ("--input", PICTURE, "--output", "none.png", *STYLES)
    refused(within("inference", "--checkpoint", copied, *flags), *words)
    refused(within("export", "--checkpoint", copied, "--output", copied.parent / "m"), *words)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_one_line(copied, share):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged") as caught:
        load_checkpoint(copied)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_named(copied):
    header, tensors = read_model(copied)
    config = json.loads((copied / "config.json").read_text())
    for change, word in (
        ({"network.head.bias": torch.zeros(5)}, "head.bias"),
        ({"network.more": torch.zeros(5)}, "more"),
        ({"stranger": torch.zeros(5)}, "tensors of neither network nor base"),
        ({"base.mean": torch.zeros(5)}, "base.mean"),
    ):
        (copied / "model.safetensors").unlink()
        write_model(copied, tensors | change, header, config)
        with pytest.raises(UserError, match=word):
            load_checkpoint(copied)


def test_flags_that_go_with_nothing_are_refused(within):
    out = ("--checkpoint", CHECKPOINT, "--output", "none")
    refused(within("export", *out, "--opset", "18"), "--opset is of --format onnx")
    refused(within("export", *out, "--license", "a\nb"), "--license: must be one line")
    refused(within("export", "--checkpoint", "gone.pt", "--output", "none"), "gone.pt: no such checkpoint")
    refused(
        within("export", "--checkpoint", "raw_data", "--output", "none"),
        "raw_data: is a folder without model.safetensors",
        "a model of export.py",
    )


#################################################################################
#                                  Lines of Python                              #
#################################################################################


def test_five_lines_make_the_picture_of_inference_py(studio, within, exported):
    flags = ("--input", PICTURE, "--output", "cmd.png", *STYLES, "--cfg_scale", "3", "--strength", "0.75")
    assert within("inference", "--checkpoint", "model", *flags)[0] == 0
    pipeline = isonext.FlowStylePipeline.from_pretrained(exported, device="cpu")
    assert pipeline.styles == ["cold", "warm"]
    asked = {"strength": 0.75, "cfg_scale": 3, "num_steps": 3}
    by_path = pipeline(PICTURE, "cold", "warm", **asked)
    by_image = pipeline(Image.open(PICTURE), source="cold", target="1", **asked)
    expected = images.open_picture(studio / "cmd.png")
    assert by_path.tobytes() == by_image.tobytes() == expected.tobytes()
    assert by_path.size == expected.size and by_path.mode == "RGB"
    assert pipeline(PICTURE, "cold", "warm").tobytes() != by_path.tobytes(), "by the model's own settings"


def test_a_scale_of_auto_is_the_measured_one_and_nothing_is_printed(studio, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(studio)
    save_changed(studio / CHECKPOINT, tmp_path / "a.pt", front=FRONT)
    pipeline = isonext.FlowStylePipeline.from_pretrained(tmp_path / "a.pt", device="cpu")
    auto, measured, other = (pipeline(PICTURE, "cold", "warm", cfg_scale=scale) for scale in ("auto", 1.5, 3))
    assert auto.tobytes() == measured.tobytes() != other.tobytes()
    assert capsys.readouterr() == ("", "")


def test_a_picture_of_pillow_is_read_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (4, 2), (250, 10, 10)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("LA", (3, 5), (0, 128)).save(tmp_path / "clear.png")
    for name, size in (("turned.jpg", (2, 4)), ("clear.png", (3, 5))):
        picture, path = images.convert_picture(Image.open(tmp_path / name)), tmp_path / name
        assert picture.size == size and picture.tobytes() == images.open_picture(path).tobytes()
    assert images.convert_picture(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    (tmp_path / "cut.png").write_bytes((tmp_path / "clear.png").read_bytes()[:45])
    with pytest.raises(UserError, match=r"cut\.png: "):
        images.convert_picture(Image.open(tmp_path / "cut.png"))


def test_what_is_wrong_with_a_call_is_one_line(exported, monkeypatch, studio, capsys):
    monkeypatch.chdir(studio)
    pipeline = isonext.FlowStylePipeline.from_pretrained("model", device="cpu")
    for arguments, words in (
        ((PICTURE, "cold", "blue"), "style 'blue' does not exist; there are: 0 = cold, 1 = warm"),
        (("none.png", "cold", "warm"), "none.png: no such picture"),
        ((PICTURE, "cold", "warm", 1.5), "--strength 1.5: must be from 0 to 1"),
        ((PICTURE, "cold", "warm", 1.0, -1), "cfg_scale"),
        ((PICTURE, "cold", "warm", 1.0, "auto"), "has no measured front"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline(*arguments)
    with pytest.raises(AttributeError, match="no attribute 'FlowPipeline'"):
        isonext.FlowPipeline  # noqa: B018
    assert capsys.readouterr() == ("", "")


def test_a_model_of_stage_2_takes_its_teacher_along_and_is_none_for_onnx(studio, within, tmp_path):
    second = second_stage(studio / CHECKPOINT, tmp_path / "stage2_epoch1.pt")
    status, _, err = within("export", "--checkpoint", second, "--output", tmp_path / "few")
    assert status == 0, err
    two, back = load_checkpoint(second), load_checkpoint(tmp_path / "few")
    assert back.stage == 2 and back.config.inference.method == "map"
    for mine, theirs in ((two.ema, back.ema), (two.teacher, back.teacher)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    made = []
    for number, model in enumerate((second, tmp_path / "few")):
        flags = ("--checkpoint", model, *STYLES, "--input", PICTURE, "--output", tmp_path / f"{number}.png")
        status, out, err = within("inference", *flags)
        assert status == 0 and "map, one leg of 3 steps" in out, err
        made.append((tmp_path / f"{number}.png").read_bytes())
    assert made[0] == made[1]
    flags = ("--checkpoint", second, "--output", tmp_path / "onnx", "--format", "onnx")
    refused(within("export", *flags), "stage 2", "--format onnx")
    assert not (tmp_path / "onnx").exists()
