"""Which folders are styles, and what is said of those that look like held-out pictures."""

import json
from collections import Counter

import pytest

from helpers import call_within, refused
from isonext.config import config_to_dict
from isonext.data.style_folders import find_styles, held_out_hint
from isonext.errors import UserError


def fill(root, *names: str) -> None:
    """A file, which by its name is a picture, in each of the folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").touch()


def hint(root, *names: str) -> str | None:
    fill(root, *names)
    return held_out_hint(root, find_styles(root, None))


@pytest.mark.parametrize("name", ["test", "Test", "val", "valid", "VALIDATION", "holdout", "train"])
def test_a_folder_named_like_a_split_beside_others_is_suspected(tmp_path, name):
    looks = f"{tmp_path / name} looks like a folder of held-out pictures, not a style; move it out of {tmp_path}"
    assert hint(tmp_path, "monet", "photo", name) == f"{looks} (e.g. to test_data/)"


def test_several_suspects_are_named_together(tmp_path):
    found = hint(tmp_path, "monet", "photo", "test", "val")
    assert found.startswith(f"{tmp_path / 'test'} and {tmp_path / 'val'} look like folders of held-out pictures")


def test_a_folder_that_repeats_other_styles_is_suspected_whatever_its_name(tmp_path):
    fill(tmp_path, "extra")
    assert hint(tmp_path, "monet", "photo", "extra/monet").startswith(f"{tmp_path / 'extra'} looks like a folder of")


def test_files_beside_the_folders_are_counted_with_those_that_are_no_pictures(tmp_path):
    fill(tmp_path, "monet", "photo")
    for name in ("a.PNG", "b.png", ".c.png", "photo/notes.txt"):
        (tmp_path / name).touch()
    left_out = Counter()
    find_styles(tmp_path, None, left_out)
    assert left_out == {".png beside the folders": 2, ".txt": 1}


def test_folders_that_are_all_splits_mean_a_root_one_too_high(tmp_path):
    found = hint(tmp_path, "test/monet", "test/photo", "train/monet", "train/photo")
    assert "its folders (test, train) look like splits, not styles; set data.raw_data_root to" in found
    assert found.endswith(f"e.g. {tmp_path / 'train'}")


@pytest.mark.parametrize(
    "names",
    [
        ["monet", "photo"],
        ["test"],  # alone
        ["testament", "contest"],
        ["user1/walk", "user1/run", "user2/walk", "user2/run"],  # recordings
        ["monet/early", "monet/photo", "photo"],  # of its folders only one has another style's name
    ],
)
def test_other_folders_are_styles_without_a_word(tmp_path, names):
    assert hint(tmp_path, *names) is None


@pytest.mark.parametrize("name", ["test", "extra"])
def test_a_folder_of_nothing_but_other_styles_folders_is_an_error_with_the_reason(tmp_path, name):
    fill(tmp_path, "monet", "photo", f"{name}/monet", f"{name}/photo")
    for expected in (None, 2, 3):
        with pytest.raises(UserError, match="has no pictures but those in folders named like other styles") as caught:
            find_styles(tmp_path, expected)
        assert str(caught.value).startswith(str(tmp_path / name)) and "(e.g. to test_data/)" in str(caught.value)


def test_the_error_of_the_count_says_the_likely_cause(tmp_path):
    fill(tmp_path, "monet", "photo", "test")
    with pytest.raises(UserError, match=r"3 folders \(monet, photo, test\), but data.num_classes = 2") as caught:
        find_styles(tmp_path, 2)
    assert f"; {tmp_path / 'test'} looks like a folder of held-out pictures" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_style_that_is_called_test_is_allowed_with_a_warning_on_stderr(store, make_config, draw):
    for number in range(3):
        draw(store / "raw" / "test" / f"{number}.png", seed=number + 50)
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    flags = ("--config", store / "c.json", "--device", "cpu")
    status, out, err = call_within(store, "preprocess_latents", *flags)
    assert status == 0 and "style 2 test: " in out
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {store / 'raw' / 'test'} looks like a folder of held-out pictures")
    refused(call_within(store, "preprocess_latents", *flags, "--set", "data.num_classes=2"), "3 folders", "held-out")


def test_styles_without_a_suspect_are_preprocessed_without_a_warning(store, make_config):
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    status, _, err = call_within(store, "preprocess_latents", "--config", store / "c.json", "--device", "cpu")
    assert status == 0 and "warning" not in err
