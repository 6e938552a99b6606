"""What is set up once a process, where a machine allows it and where it does not."""

import ctypes
import getpass
import os

import pytest
import torch

from isonext.errors import is_out_of_memory
from isonext.utils import device


@pytest.fixture
def no_cache_yet(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    yield
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


def test_what_is_compiled_is_kept_where_a_restart_does_not_empty_it(no_cache_yet, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device.prepare_process()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "isonext" / "compiled")
    assert (tmp_path / "isonext" / "compiled").is_dir()


def test_a_cache_that_the_user_has_chosen_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    device.prepare_process()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_where_no_cache_folder_can_be_made_torch_chooses(no_cache_yet, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    device.prepare_process()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="user ids are POSIX's")
def test_a_user_without_entry_name_and_home_has_a_name_and_torch_chooses(no_cache_yet, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "")  # so that it is taken away again
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of whom pwd knows nothing
    device.prepare_process()
    assert getpass.getuser() == "user54321"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_the_c_library_is_told_to_keep_memory(monkeypatch):
    told = {}

    class Library:
        def mallopt(self, parameter, value):
            told[parameter] = value

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    device.prepare_process()
    assert told == {-4: 0, -1: 2**31 - 1}


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    device.prepare_process()


def test_memory_that_ran_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)  # more than an address can say
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape '[7]' is invalid")) and not is_out_of_memory(OSError())


@pytest.mark.parametrize(("room", "tried"), [(9, [8]), (4, [8, 4]), (1, [8, 4, 2, 1])])
def test_what_does_not_fit_begins_again_smaller(room, tried):
    size, seen = [8], []

    def work():
        seen.append(size[0])
        if size[0] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size[0] * 10

    def halve():
        size[0] //= 2

    assert device.fitting(work, lambda: halve) == 10 * tried[-1]
    assert seen == tried


def test_where_nothing_is_left_to_cut_or_it_is_no_memory_the_error_stands():
    for error, asked in ((torch.OutOfMemoryError("CUDA out of memory"), 1), (RuntimeError("else"), 0)):
        calls = []

        def work(error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            device.fitting(work, lambda calls=calls: calls.append(1))
        assert len(calls) == asked
