"""Splits by recording: which pictures are one group, and that a group lies on one side."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isonext.config import config_to_dict
from isonext.data.dataset import open_store
from isonext.data.preprocess import preprocess
from isonext.data.splits import group_pictures, held_out, split_off
from isonext.errors import UserError
from preprocess_latents import build_parser, main


def rank(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


#################################################################################
#                              Which group a picture has                        #
#################################################################################


@pytest.mark.parametrize(
    ("picture", "group"),
    [
        ("ink/walk/0001.png", "ink/walk"),
        ("ink/walk/0001_a.png", "ink/walk"),
        ("ink/monday/walk/1.png", "ink/monday/walk"),
        ("ink/walk_0001.png", "ink/walk"),
        ("ink/slow_walk_0001.jpeg", "ink/slow_walk"),
        ("ink/walk.v2_3.png", "ink/walk.v2"),
        ("ink/walk.png", "ink/walk"),
        ("ink/_7.png", "ink/_7"),
        ("user_1/walk_2.png", "user_1/walk"),
    ],
)
def test_folder_prefix_is_the_folder_or_the_name_up_to_its_last_underscore(tmp_path, picture, group):
    assert group_pictures([f"{picture}.pt"], tmp_path, "folder-prefix") == {f"{picture}.pt": group}


def test_each_picture_by_itself_is_the_default(tmp_path):
    assert group_pictures(["a/x_1.png.pt", "a/x_2.png.pt"], tmp_path, "picture") == {
        "a/x_1.png.pt": "a/x_1.png.pt",
        "a/x_2.png.pt": "a/x_2.png.pt",
    }


def test_a_table_gives_each_picture_its_group(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text(
        '\ufeffgroup,path,note\nm,a/1.png,\nt,"a/2,3.png",x\nm,b/1.png,\nm,b/gone.png,\n', encoding="utf-8"
    )
    entries = ["a/1.png.pt", "a/2,3.png.pt", "b/1.png.pt"]
    assert group_pictures(entries, tmp_path, str(table)) == dict(zip(entries, ["m", "t", "m"], strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,group\na/1.png,m\n", r"lacks 2 pictures of .*, the first is a/2\.png; add them"),
        ("a/1.png,m\n", "first line must name the columns path,group"),
        ("", "first line must name the columns path,group"),
        ("path,group\na/1.png,\n", "line 2: needs a path and a group"),
        ("path,group\na/1.png\n", "line 2: needs a path and a group"),
        ("path,group\na/1.png,m\na/1.png,t\n", r"line 3: a/1\.png has another group above"),
        (b"path,group\n\xff\xfe,m\n", "not a CSV table"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, text, message):
    table = tmp_path / "groups.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"groups\.csv: .*{message}") as caught:
        group_pictures(["a/1.png.pt", "a/2.png.pt", "b/1.png.pt"], tmp_path, str(table))
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_and_a_missing_table_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.split_by = folders: must be picture, folder-prefix, or a \.csv file"):
        group_pictures(["a/1.png.pt"], tmp_path, "folders")
    with pytest.raises(UserError, match=r"none\.csv: no such file of groups"):
        group_pictures(["a/1.png.pt"], tmp_path, str(tmp_path / "none.csv"))


#################################################################################
#                                   The split                                   #
#################################################################################


def test_groups_are_held_out_whole_by_their_hashes():
    groups = {f"ink/{group}_{number}.pt": group for group in map(str, range(400)) for number in range(3)}
    held = split_off(groups, 0.2)
    assert held == {entry for entry, group in groups.items() if rank(group) < 0.2}
    assert 150 < len(held) < 330


def test_a_group_that_a_style_cannot_do_without_is_trained_on_in_all_styles():
    low, high = sorted(("monday", "tuesday"), key=rank)
    groups = {"a/1.pt": low, "b/1.pt": low, "b/2.pt": high}
    assert split_off(groups, 1.0) == set(), "a has nothing but the one, b needs the other"
    assert split_off({"b/1.pt": low, "b/2.pt": high}, 1.0) == {"b/1.pt"}


GROUPS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30)).map(lambda pair: f"{pair[0]}/{pair[1]}.pt"),
    st.sampled_from([f"g{number}" for number in range(8)]),
    min_size=1,
)


@settings(deadline=None)
@given(groups=GROUPS, fraction=st.floats(0, 1))
def test_no_group_is_on_both_sides_and_no_style_is_held_out_whole(groups, fraction):
    held = split_off(groups, fraction)
    assert not {groups[entry] for entry in held} & {groups[entry] for entry in groups.keys() - held}
    assert {entry[0] for entry in groups.keys() - held} == {entry[0] for entry in groups}
    assert all(rank(groups[entry]) < fraction for entry in held)


@settings(deadline=None)
@given(groups=GROUPS, fraction=st.floats(0, 1))
def test_pictures_by_themselves_are_split_style_by_style_as_ever(groups, fraction):
    by_style = [
        held_out([entry for entry in groups if entry[0] == style], fraction) for style in {e[0] for e in groups}
    ]
    assert split_off({entry: entry for entry in groups}, fraction) == set().union(*by_style)


def test_another_rule_moves_pictures_but_encodes_none(tmp_path, draw, make_config, cpu):
    for style in ("user1", "user2"):
        for number in range(12):
            draw(tmp_path / "raw" / style / f"rec{number // 3}_{number:04}.png", seed=number)
    config = make_config(tmp_path, {"data.val_fraction": 0.5})
    preprocess(config, cpu, quiet=True)
    config.data.split_by = "folder-prefix"
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (0, 24)
    split = open_store(tmp_path / "latents").split
    groups = {part: {name.rpartition("_")[0] for name in names} for part, names in split.items()}
    recordings = {f"user{user}/rec{number}" for user in (1, 2) for number in range(4)}
    held = {group for group in recordings if rank(group) < 0.5}
    assert held and groups == {"train": recordings - held, "val": held}
    assert all(len(names) % 3 == 0 for names in split.values())


def test_the_command_takes_the_rule_and_a_bad_table_leaves_the_store_alone(store, make_config):
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    table = store / "groups.csv"
    flags = ["--config", str(store / "c.json"), "--device", "cpu", "--split_by", str(table)]
    table.write_text("path,group\n" + "".join(f"{s}/{n}.png,{n % 2}\n" for s in ("ink", "oil") for n in range(10)))
    assert main(build_parser().parse_args([*flags, "--set", "data.val_fraction=0.9"])) == 0
    meta = open_store(store / "latents")
    (odd,) = {int(name.split("/")[1][0]) % 2 for name in meta.split["train"]}
    assert odd == (rank("1") > rank("0")) and len(meta.split["train"]) == len(meta.split["val"]) == 10
    table.write_text("path,group\nink/0.png,1\n")
    with pytest.raises(UserError, match=r"groups\.csv: lacks 19 pictures of .*, the first is ink/1\.png"):
        main(build_parser().parse_args(flags))
    assert open_store(store / "latents") == meta
