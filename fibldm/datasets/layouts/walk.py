"""The files below a folder, also where links lead to other folders, and where a file lies without its name."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_LISTED = 3


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, links that lead nowhere among them; none where there is no folder.

    Links are followed after all else, and to every folder and file once, so that loops of them end. A folder around
    ``root`` is part of a loop and is not followed.

    Raises:
        OSError: a folder cannot be read.
    """
    seen, around = set[str](), {str(folder) for folder in root.resolve().parents}
    waiting, links = [root], list[Path]()
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen or real in around:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            for path in (Path(folder, name) for name in sorted(names)):
                if path.is_symlink():
                    links.append(path)
                else:
                    seen.add(f"{real}/{path.name}")
                    yield path
    for path in links:
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield path


def places(root: Path, files: Iterable[Path]) -> str:
    """The folders of files below ``root`` by their numbers, as the names of folders may be patients'.

    ``3/1`` is the first folder in the third, in the order of their names (hidden ones count).
    """
    numbers = sorted({_numbers(root, folder) for folder in {file.parent for file in files}})
    listed = ["/".join(map(str, number)) or "the source itself" for number in numbers[:_LISTED]]
    more = [f"{len(numbers) - _LISTED} more"] if len(numbers) > _LISTED else []
    words = ", ".join([*listed, *more])
    return words if numbers == [()] else f"{'folder' if len(numbers) == 1 else 'folders'} {words}"


def _numbers(root: Path, folder: Path) -> tuple[int, ...]:
    if folder == root:
        return ()
    names = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return (*_numbers(root, folder.parent), names.index(folder.name) + 1)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
