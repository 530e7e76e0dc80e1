"""Folders that are whole or absent, whatever goes wrong while they are written."""

import stat
from pathlib import Path

import pytest

from fibldm.errors import FibldmError
from fibldm.files import atomic_folder

PARTS = ("models", "LICENSE", "docs")


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write(folder: Path, text: str) -> None:
    (folder / "models").mkdir()
    (folder / "docs").mkdir()
    for name in ("models/a", "LICENSE", "docs/b"):
        (folder / name).write_text(text)


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new" / "one") as folder:
        write(folder, "half")
        raise RuntimeError
    assert content(tmp_path) == {} and not list(tmp_path.rglob(".writing-*"))
    with atomic_folder(tmp_path / "new" / "one") as folder:
        write(folder, "whole")
        assert not (tmp_path / "new" / "one").exists()
    assert content(tmp_path / "new" / "one") == dict.fromkeys(("models/a", "LICENSE", "docs/b"), "whole")
    assert stat.S_IMODE((tmp_path / "new" / "one").stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", "before")
    with pytest.raises(FibldmError, match="cannot write .*one: Directory not empty"), atomic_folder(tmp_path / "one"):
        pass
    assert set(content(tmp_path).values()) == {"before"} and [path.name for path in tmp_path.iterdir()] == ["one"]


def test_parts_take_the_place_of_those_of_the_same_name(tmp_path: Path) -> None:
    for text in ("before", "after"):
        with atomic_folder(tmp_path, PARTS) as folder:
            write(folder, text)
        (tmp_path / "notes.txt").write_text("mine")
    found = content(tmp_path)
    assert found.pop("notes.txt") == "mine" and len(found) == 3 and set(found.values()) == {"after"}


@pytest.mark.parametrize("fails_at", range(1, 7))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_all_parts_of_before_lie_there_where_one_cannot_be_put(
    error: BaseException, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "before")
    moves, rename = [], Path.rename

    def fail(source: Path, target: Path) -> Path:
        moves.append(source)
        if len(moves) == fails_at:
            raise error
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises((FibldmError, KeyboardInterrupt)), atomic_folder(tmp_path, PARTS) as folder:
            write(folder, "after")
    assert set(content(tmp_path).values()) == {"before"} and len(content(tmp_path)) == 3
    assert not list(tmp_path.glob(".writing-*"))
