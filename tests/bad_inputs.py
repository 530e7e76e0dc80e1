"""Datasets that the tests spoil: three sound patients, and a fourth case that something is wrong with.

Arrays are ``(X, Y, Z)`` as stored; affines go to RAS+ mm.
"""

import gzip
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import scipy.io
import SimpleITK
from dicom_files import write_series
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Spoil = Callable[[Path], None]
"""Changes the dataset in a folder, which holds the four cases of `CASES` in images/ and labels/."""
Change = Callable[[bytes], bytes]

CASES = ("a", "b", "c", "bad")
SHAPE = (7, 9, 5)
IMAGE, LABEL = "images/bad.nii.gz", "labels/bad.nii.gz"
SPACING = (0.9, 1.3, 2.5)
NEAR = (0.85, 1.25, 2.5)
"""mm, of DICOM series; like the others not so anisotropic that it is a finding."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ANGLE = np.deg2rad(12)
_TURN = [[np.cos(_ANGLE), -np.sin(_ANGLE), 0], [np.sin(_ANGLE), np.cos(_ANGLE), 0], [0, 0, 1]]
AFFINE = nibabel.affines.from_matvec(
    np.array(_TURN) @ np.array([[0, -0.9, 0], [0, 0, 1.3], [-2.5, 0, 0]]), (31.0, -17.0, 240.0)
)
"""Anisotropic, oblique, its axes permuted; right-handed."""


@dataclass(frozen=True)
class Input:
    """One bad or tricky input, and what must come of it.

    Attributes:
        name: of the test.
        spoil: makes it.
        error: pattern of the error; empty where the input must be read.
        finding: pattern of what the report must say of an input that is read; empty: nothing of the case.
        image: what must be written, voxels and affine in RAS+; by default those of the sound fourth case.
        label: the same of the label's voxels; ``None`` where it has no label.
        settings: of the preparation, besides CT.
        source: what is given to it, relative to the dataset.
    """

    name: str
    spoil: Spoil
    error: str = ""
    finding: str = ""
    image: tuple[Array, Array] = field(default_factory=lambda: canonical(image(), AFFINE))
    label: Array | None = field(default_factory=lambda: canonical(label(), AFFINE)[0])
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = "."


def image(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> NDArray[np.int16]:
    """HU of a sound case; every voxel differs from its neighbours."""
    array: NDArray[np.int16] = np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)
    return array


def label(seed: int = 3) -> NDArray[np.uint8]:
    """Two labels of a sound case, without symmetry."""
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2:5, 1:3] = 1
    array[4, 2 : 4 + seed, 3] = 2
    return array


def canonical(array: Array, affine: Array) -> tuple[Array, Array]:
    """What must be written; by nibabel alone."""
    stored = array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(stored, affine))
    return np.asanyarray(turned.dataobj), np.asarray(turned.affine)


def nifti(
    array: Array, affine: Array = AFFINE, *, kind: Callable[..., Any] = nibabel.Nifti1Image, qform: bool = True
) -> bytes:
    """An uncompressed NIfTI file in mm, with both of its forms."""
    made = kind(array, affine, dtype=array.dtype)
    made.set_sform(affine, 1)
    if qform:
        made.set_qform(affine, 1)
    made.header.set_xyzt_units("mm")
    content: bytes = made.to_bytes()
    return content


def write(path: Path, content: bytes) -> None:
    """Write a file, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def make_sound(root: Path) -> Path:
    """Write the four cases, all sound."""
    for seed, name in enumerate(CASES):
        write(root / f"images/{name}.nii.gz", nifti(image(seed)))
        write(root / f"labels/{name}.nii.gz", nifti(label(seed)))
    return root


# One file changed


def stored(change: Change, name: str = IMAGE) -> Spoil:
    """Changes the bytes of a file as it lies there."""
    return lambda root: _rewrite(root / name, change(_read(root / name)))


def content(change: Change, name: str = IMAGE) -> Spoil:
    """Changes the bytes of a file before it is compressed."""
    return stored(lambda data: gzip.compress(change(gzip.decompress(data)), 1), name)


def header(name: str = IMAGE, **fields: Any) -> Spoil:
    """Sets fields of a NIfTI-1 header, whatever they are."""

    def change(data: bytes) -> bytes:
        made = nibabel.Nifti1Header(data[:348], check=False)
        for key, value in fields.items():
            made[key] = value
        return bytes(made.binaryblock) + data[348:]

    return content(change, name)


def voxels(array: Array, affine: Array = AFFINE, name: str = IMAGE, **options: Any) -> Spoil:
    """Another image or label in the place of the sound one."""
    return content(lambda _: nifti(array, affine, **options), name)


def labelled(array: Array, affine: Array = AFFINE) -> Spoil:
    """Another label in the place of the sound one."""
    return voxels(array, affine, LABEL)


def both(array: Array, labels: Array, affine: Array = AFFINE, **options: Any) -> Spoil:
    """Another image and label in the place of the sound ones."""
    return together(voxels(array, affine, **options), voxels(labels, affine, LABEL, **options))


def together(*spoils: Spoil) -> Spoil:
    """Several changes, one after the other."""

    def spoil(root: Path) -> None:
        for each in spoils:
            each(root)

    return spoil


def renamed(old: str, new: str) -> Spoil:
    """Another name for a file of the dataset, or its place outside of it."""
    return lambda root: _moved(root / old, root / new)


def case_called(name: str, suffix: str = ".nii.gz") -> Spoil:
    """Another name for the fourth case."""
    return together(*(renamed(f"{kind}/bad.nii.gz", f"{kind}/{name}{suffix}") for kind in ("images", "labels")))


def removed(*names: str) -> Spoil:
    """Takes files away."""
    return together(*(lambda root, name=name: (root / name).unlink() for name in names))  # type: ignore[misc]


def added(name: str, data: bytes = b"no volume") -> Spoil:
    """One more file."""
    return lambda root: _rewrite(root / name, data)


def in_place_of(make: Callable[[Path], Any], name: str = IMAGE) -> Spoil:
    """What ``make`` makes of the path, in the place of a file."""

    def spoil(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return spoil


def linked(target: str) -> Spoil:
    """A symbolic link in the place of the image."""
    return lambda root: ((root / IMAGE).unlink(missing_ok=True), (root / IMAGE).symlink_to(target))  # type: ignore


# Other layouts and formats


def table(text: str | bytes, name: str = "cases.csv") -> Spoil:
    """A table that names the files of the dataset, which lie in i/ and l/."""
    data = text.encode() if isinstance(text, str) else text
    return together(renamed("images", "i"), renamed("labels", "l"), added(name, data))


def rows(last: str = "i/bad.nii.gz,l/bad.nii.gz", *, columns: str = "image,label", extra: Sequence[str] = ()) -> str:
    """A sound table but for its last row; ``extra`` are values of one more column of the others."""
    more = [f",{value}" for value in extra] or [""] * 3
    sound = [f"i/{name}.nii.gz,l/{name}.nii.gz{value}" for name, value in zip(CASES[:3], more, strict=True)]
    return "\n".join([columns, *sound, last, ""])


def dicom(*makers: Callable[[Path], Any]) -> Spoil:
    """A folder of DICOM files, without a label, in the place of the fourth case."""

    def spoil(root: Path) -> None:
        removed(IMAGE, LABEL)(root)
        for make in makers:
            make(root / "images/bad")

    return spoil


def studies(*makers: Callable[[Path], Any]) -> Spoil:
    """A tree of DICOM studies in the place of everything, after one of three patients."""

    def spoil(root: Path) -> None:
        shutil.rmtree(root / "images")
        shutil.rmtree(root / "labels")
        for seed, name in enumerate(CASES[:3]):
            write_series(root / name, image(seed), spacing=NEAR, study=name, patient=name)
        for make in makers:
            make(root / "bad")

    return spoil


def itk(suffix: str, change: Change = bytes, *, beside: bool = True) -> Spoil:
    """The image by SimpleITK in another format, then its bytes changed; ``beside``: with the file of its voxels."""

    def spoil(root: Path) -> None:
        path = root / f"images/bad{suffix}"
        (root / IMAGE).unlink()
        made = SimpleITK.GetImageFromArray(np.ascontiguousarray(image().transpose(2, 1, 0)))
        lps = LPS @ AFFINE
        steps = np.linalg.norm(lps[:3, :3], axis=0)
        made.SetSpacing(steps.tolist())
        made.SetDirection((lps[:3, :3] / steps).ravel().tolist())
        made.SetOrigin(lps[:3, 3].tolist())
        SimpleITK.WriteImage(made, str(path), useCompression=False)
        path.write_bytes(change(path.read_bytes()))
        for raw in () if beside else path.parent.glob("*.raw"):
            raw.unlink()

    return spoil


def arrays(suffix: str, spoil: Callable[[Path], Any] = bool) -> Spoil:
    """All cases in a format without geometry, then the file of the fourth image changed."""

    def make(root: Path) -> None:
        for kind, of in (("image", image), ("label", label)):
            shutil.rmtree(root / f"{kind}s")
            (root / f"{kind}s").mkdir()
            for seed, name in enumerate(CASES):
                write_array(root / f"{kind}s/{name}{suffix}", **{kind: of(seed)})
        spoil(root / f"images/bad{suffix}")

    return make


def write_array(path: Path, **named: Array) -> None:
    """An HDF5 or MATLAB file of named arrays."""
    if path.suffix == ".mat":
        scipy.io.savemat(path, named)
        return
    with h5py.File(path, "w") as file:
        for name, array in named.items():
            file.create_dataset(name, data=array)


def pictures(change: Callable[[Path], Any] = bool) -> Spoil:
    """All images as folders of PNG slices without labels, then the second slice of the fourth case changed."""

    def make(root: Path) -> None:
        shutil.rmtree(root / "images")
        shutil.rmtree(root / "labels")
        (root / "labels").mkdir()
        for seed, name in enumerate(CASES):
            folder = root / "images" / name
            folder.mkdir(parents=True)
            for number, plane in enumerate(np.moveaxis(grey(seed), 2, 0)):
                Image.fromarray(np.ascontiguousarray(plane[::-1, ::-1].T)).save(folder / f"s{number}.png")
        change(root / "images/bad/s1.png")

    return make


def grey(seed: int = 3) -> NDArray[np.uint8]:
    """Grey values ``(X, Y, Z)``, R, A, S, of a case of PNG slices."""
    array: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 255, SHAPE).astype(np.uint8)
    return array


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _rewrite(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _moved(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    old.rename(new)
