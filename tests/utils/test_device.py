"""What is set up once a process, where a machine allows it and where it does not."""

import ctypes
import getpass
import os

import pytest

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
