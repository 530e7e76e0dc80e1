"""A process without a user's name or a home that it may write to, as in containers."""

import getpass
import logging
import os
import pwd
from pathlib import Path

import pytest

from fibldm.surroundings import settle

_NAMES = ("USER", "LOGNAME", "LNAME", "USERNAME")
_FOLDERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is set, and what is set by a test is taken back."""
    for name in (*_NAMES, *_FOLDERS):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_user_without_an_entry_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    settle()
    assert getpass.getuser() == f"user{os.getuid()}"


def test_a_name_that_is_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody")
    settle()
    assert getpass.getuser() == "somebody" and "USER" not in os.environ


@pytest.mark.parametrize("home", ["/nonexistent", "relative"])
def test_caches_go_to_a_temporary_folder_of_ones_own_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    settle()
    folder = tmp_path / f"fibldm-{os.getuid()}"
    assert all(Path(os.environ[name]).is_relative_to(folder) for name in _FOLDERS)
    assert folder.stat().st_mode & 0o077 == 0


def test_caches_go_where_they_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    settle()
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "given" / "matplotlib")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_home_that_can_be_written_keeps_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settle()
    assert not any(name in os.environ for name in _FOLDERS)


def test_only_the_note_of_a_decoder_that_nothing_uses_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")
    logger.warning("nvImageCodec is not available; skipping pydicom decoder plugin registration.")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
