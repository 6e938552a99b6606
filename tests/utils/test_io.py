import errno
import io
import os
import pickle
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from helpers import ROOT, call
from isonext.config import load_config
from isonext.data.store import read_meta
from isonext.errors import UserError
from isonext.utils.io import check_output, folder_lock, load_data, natural_order, remove_unfinished, written_whole


@pytest.mark.parametrize("old", [None, b"old content"])
def test_an_exception_leaves_nothing_behind_and_keeps_the_old_content(tmp_path, old):
    path = tmp_path / "entry.png"
    if old:
        path.write_bytes(old)

    def fail() -> None:
        with written_whole(path) as beside:
            beside.write_bytes(b"half of the n")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == (["entry.png"] if old else [])
    assert not old or path.read_bytes() == old


def full_disk(path):
    raise OSError(28, "No space left on device")


def full_disk_within_torch(path):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    torch.save(torch.zeros(9), Full())


def full_disk_within_safetensors(path):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [full_disk, full_disk_within_torch, full_disk_within_safetensors])
def test_a_full_disk_is_one_line_with_the_path_whoever_writes(tmp_path, write):
    path = tmp_path / "deep" / "entry.pt"
    with pytest.raises(UserError) as caught, written_whole(path) as beside:
        beside.write_bytes(b"half")
        write(beside)
    line = str(caught.value)
    assert line.startswith(f"{path}: could not be written (") and "No space left on device" in line
    assert "make room" in line and "\n" not in line and not list(path.parent.iterdir())


def test_a_folder_that_cannot_be_made_is_the_same_line(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "entry.pt"
    with pytest.raises(UserError, match="could not be written"), written_whole(path):
        pytest.fail("there is no place to write to")


def test_a_block_that_succeeds_puts_the_whole_new_content_in_place(tmp_path):
    path = tmp_path / "deep" / "er" / "a.b.png"
    for content in (b"first", b"second, and longer"):
        with written_whole(path) as beside:
            assert beside.parent == path.parent and beside.suffix == ".png" and beside.name.startswith(".")
            beside.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "entry.bin"
    path.write_bytes(b"old" * 1000)
    script = tmp_path.with_suffix(".py")
    script.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); from isonext.utils.io import written_whole\n"
        f"with written_whole({str(path)!r}) as beside:\n"
        "    file = open(beside, 'wb'); file.write(b'new' * 500); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert call(tmp_path, script).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" * 1000
    assert len(list(tmp_path.iterdir())) == 2, "the half-written file lies beside, under another name"
    theirs = [".hidden", ".notes.tmpl", ".x.tmp12.png", ".x.isonext-tmp-1.png", ".y.isonext-tmp-1_2.a.png"]
    for name in theirs:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, "entry.bin"])
    for name in (".entry.isonext-tmp-12_0.bin", ".a b.c.isonext-tmp-1_22"):
        (tmp_path / name).touch()
    (tmp_path / ".model.isonext-tmp-7_0").mkdir()  # of `folder_written_whole`, which may be under way
    remove_unfinished(tmp_path)
    left = sorted([*theirs, "entry.bin", ".model.isonext-tmp-7_0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == left


#################################################################################
#                              One process a folder                             #
#################################################################################


def test_a_folder_is_locked_by_one_at_a_time_and_nothing_stays_behind(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(UserError, match=rf"{tmp_path}: is in use by another run of this program; wait"):
            folder_lock(tmp_path).__enter__()
        with folder_lock(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    folder, script = tmp_path / "folder", tmp_path / "killed.py"
    script.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); from isonext.utils.io import folder_lock\n"
        f"with folder_lock({str(folder)!r}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert call(tmp_path, script).returncode == -signal.SIGKILL
    with folder_lock(folder):
        pass


#################################################################################
#                                  Reading back                                 #
#################################################################################


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, writer):
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    content = {"latent": torch.zeros(1), "x": Payload(made)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt: .*checkpoint"):
        load_data(path, "checkpoint")
    assert not made.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert made.is_dir(), "the payload was a live one"


def test_data_comes_back_as_it_was(tmp_path):
    content = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2.5, "x", None], "c": {"d": (1, 2)}}
    torch.save(content, tmp_path / "a.pt")
    loaded = load_data(tmp_path / "a.pt", "checkpoint")
    assert torch.equal(loaded.pop("a"), content.pop("a"))
    assert loaded == content


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_one_line_with_its_path(tmp_path, kept):
    path = tmp_path / "cut.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError) as caught:
        load_data(path, "checkpoint")
    assert str(caught.value).startswith(f"{path}: ") and "checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_weight_is_named(tmp_path):
    path = tmp_path / "flipped.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(bytes(1000)) + 500] ^= 1  # torch itself would load this
    path.write_bytes(damaged)
    assert torch.load(path, weights_only=True)["a"].any()
    with pytest.raises(UserError, match=r"flipped\.pt: damaged: the checksum of its part .*data/0 does not match"):
        load_data(path, "checkpoint")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_loads_as_other_data(tmp_path, place, bit):
    path = tmp_path / "flipped.pt"
    content = {"a": torch.arange(40.0), "b": [1, 2.5, "x"]}
    torch.save(content, path)
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        loaded = load_data(path, "checkpoint")
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert torch.equal(loaded["a"], content["a"]) and loaded["b"] == content["b"]


@pytest.mark.parametrize("content", [b"", b"hello, this is a text\n", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_another_kind_of_file_is_one_line_with_its_path(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.pt: .*checkpoint"):
        load_data(path, "checkpoint")


def test_a_folder_and_a_missing_file_say_so(tmp_path):
    with pytest.raises(UserError, match="is a folder, not a checkpoint"):
        load_data(tmp_path, "checkpoint")
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        load_data(tmp_path / "none.pt", "checkpoint")


#################################################################################
#                                  Natural order                                #
#################################################################################


def test_numbers_in_names_count_as_numbers_and_case_does_not_matter():
    names = ["User10", "user2", "user1", "B", "a", "C", "10", "9", "user2b", "user2a"]
    expected = ["9", "10", "a", "B", "C", "user1", "user2", "user2a", "user2b", "User10"]
    assert sorted(names, key=natural_order) == expected


@settings(deadline=None)
@given(prefix=st.text("abcXYZ-_ ", max_size=5), a=st.integers(0, 10**12), b=st.integers(0, 10**12))
def test_after_the_same_letters_the_number_decides(prefix, a, b):
    assert (natural_order(f"{prefix}{a}x") < natural_order(f"{prefix.upper()}{b}x")) == (
        (a, f"{prefix}{a}x") < (b, f"{prefix.upper()}{b}x")
    )


NAMES = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8, unique=True)


@settings(deadline=None)
@given(names=NAMES)
def test_any_mixture_of_digits_and_letters_can_be_sorted_into_one_order(names):
    once = sorted(names, key=natural_order)
    assert sorted(names[1:] + names[:1], key=natural_order) == once
    assert sorted(once) == sorted(names)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9" * 20), "\U0001f600" * 63, "é" * 125])
def test_a_name_of_any_bytes_can_be_written(tmp_path, name):
    with written_whole(tmp_path / name) as beside:
        beside.write_text("whole")
        assert beside.name.encode() and len(os.fsencode(beside.name)) < 200
    assert (tmp_path / name).read_text() == "whole"


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("a" * 251 + ".txt")
    with written_whole(path) as beside:
        beside.write_text("whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("content", [b"", b"P", b"PK\x03", b"text", b"\x80\x02."])
def test_what_is_no_torch_file_is_named_so(tmp_path, content):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pt: damaged, or not a checkpoint$"):
        load_data(path, "checkpoint")


def test_the_format_before_torch_1_6_is_read_only_of_other_programs(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_data(path, "VAE checkpoint", foreign=True)["a"], torch.arange(4.0))
    with pytest.raises(UserError, match=r"old\.pt: damaged, or not a checkpoint$"):
        load_data(path, "checkpoint")


def test_an_archive_that_unpacks_to_more_than_itself_is_refused_before_it_is_read(tmp_path):
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))
    assert (tmp_path / "packed.pt").stat().st_size < 10**4
    load_data(tmp_path / "plain.pt", "checkpoint")
    with pytest.raises(UserError, match=r"packed\.pt: not a checkpoint: it is a packed archive"):
        load_data(tmp_path / "packed.pt", "checkpoint")


def test_an_output_that_cannot_be_a_folder_is_refused_before_the_work_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"mine")
    for output in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(UserError, match="file is a file; give a folder for the output"):
            check_output(output)
    check_output(tmp_path / "new" / "deep")
    (tmp_path / "made" / "metrics.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.json: is a folder, where a file is to be written"):
        check_output(tmp_path / "made", "report.md", "metrics.json")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: is a link that leads nowhere"):
        check_output(tmp_path / "link")
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "link").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="may not be written to"):
        check_output(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_or_a_device_is_no_file_to_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a checkpoint, but a pipe or a device"):
            load_data(path, "checkpoint")
        with pytest.raises(UserError, match="not a JSON text file, but a pipe or a device"):
            load_config(path)
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(UserError, match=r"meta\.json: not a file"):
        read_meta(tmp_path)


def test_what_the_disk_does_not_take_keeps_the_systems_number(tmp_path):
    with pytest.raises(OSError) as caught, written_whole(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value, UserError)
