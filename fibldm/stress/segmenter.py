"""Any segmenter as a command: it is told a folder of images and a folder to write masks to."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fibldm.errors import FibldmError, some_of
from fibldm.files import atomic_folder
from fibldm.volumes.formats.nifti import read_grid, read_volume
from fibldm.volumes.grid import Grid, Volume, turned_like
from fibldm.volumes.masks import as_labels
from fibldm.volumes.writer import volume_stem, write_labels

_SAME_MM = 1e-2


@dataclass(frozen=True)
class Segmenter:
    """A command that segments every image of a folder.

    Attributes:
        command: its words, with ``{images}`` and ``{masks}`` for the two folders; no shell reads it.
        suffix: of image names, such as ``_0000`` for nnU-Net.

    Raises:
        FibldmError: the command lacks one of the two, or cannot be read.
    """

    command: str
    suffix: str = ""

    def __post_init__(self) -> None:
        if not all(place in self.command for place in ("{images}", "{masks}")) or not self._words("i", "m"):
            raise FibldmError(
                f"a segmenter is a command with {{images}} and {{masks}} in it; got {self.command!r}",
                "such as 'nnUNetv2_predict -i {images} -o {masks} -d 7 -c 3d_fullres'",
            )

    def segment(self, images: Sequence[Path], out: Path) -> list[Path]:
        """Masks of images, ``out/<stem of the image>.nii.gz`` on the image's grid; those that are there are kept.

        Args:
            images: with distinct names.
            out: folder; all masks that are missing come into it together.

        Raises:
            FibldmError: the command fails, or leaves no mask, two, or one on another grid, of an image.
        """
        wanted = {volume_stem(image): image for image in images}
        if all((out / f"{name}.nii.gz").is_file() for name in wanted):
            return [out / f"{name}.nii.gz" for name in wanted]
        if out.exists():
            shutil.rmtree(out)  # of another set of images; the command runs once for all
        with atomic_folder(out) as temporary:
            given, got = temporary / "images", temporary / "masks"
            given.mkdir()
            got.mkdir()
            for name, image in wanted.items():
                _linked(image, given / f"{name}{self.suffix}.nii.gz")
            self._run(given, got, out.with_name(f"{out.name}.log"))
            for name, file in _found(got, list(wanted), self.suffix).items():
                write_labels(temporary / f"{name}.nii.gz", _on_grid(file, read_grid(wanted[name])))
            shutil.rmtree(given)
            shutil.rmtree(got)
        return [out / f"{name}.nii.gz" for name in wanted]

    def _words(self, images: str, masks: str) -> list[str]:
        try:
            words = shlex.split(self.command)
        except ValueError:
            return []
        return [word.replace("{images}", images).replace("{masks}", masks) for word in words]

    def _run(self, images: Path, masks: Path, log: Path) -> None:
        words = self._words(str(images), str(masks))
        with log.open("w", encoding="utf-8") as stream:
            try:
                code = subprocess.run(
                    words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                ).returncode
            except OSError as error:
                raise FibldmError(f"the segmenter cannot be run: {error}", "check the command") from error
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = f": {lines[-1]}" if lines else ""
            raise FibldmError(f"the segmenter ended with exit code {code}{said}", f"see {log}")


def _linked(image: Path, place: Path) -> None:
    try:
        os.link(image, place)
    except OSError:  # another file system
        shutil.copyfile(image, place)


def _found(folder: Path, names: Sequence[str], suffix: str) -> dict[str, Path]:
    """The mask of each name: of the same stem, or of one that goes on with ``_``, in any folder below."""
    files: dict[str, list[Path]] = {name: [] for name in names}
    for file in sorted(path for ending in ("*.nii", "*.nii.gz") for path in folder.rglob(ending)):
        stem = volume_stem(file)
        fitting = [name for name in names if stem == name or stem.startswith(f"{name}_") or stem == f"{name}{suffix}"]
        if fitting:
            files[max(fitting, key=len)].append(file)
    wrong = [name for name, found in files.items() if len(found) != 1]
    if wrong:
        raise FibldmError(
            f"the segmenter must write one mask of each image, NAME.nii.gz or NAME_*.nii.gz; of {some_of(wrong, 3)} "
            f"it wrote {len(files[wrong[0]])}",
            "check what the command writes to {masks}",
        )
    return {name: found[0] for name, found in files.items()}


def _on_grid(file: Path, grid: Grid) -> Volume:
    mask = turned_like(as_labels(read_volume(file)).canonical(), grid)
    if mask.array.shape != tuple(grid.shape) or not np.allclose(mask.affine, grid.affine, atol=_SAME_MM):
        raise FibldmError(
            f"a segmenter's mask must lie on the grid of its image; {file.name} has {mask.array.shape} voxels, the "
            f"image {tuple(grid.shape)}",
            "let it write masks on the input's grid",
        )
    return mask
