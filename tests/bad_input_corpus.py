"""The corpus of bad and tricky inputs: what is spoiled, and what must come of it."""

import gzip
import os
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from bad_inputs import (
    AFFINE,
    CASES,
    IMAGE,
    LABEL,
    NEAR,
    SHAPE,
    SPACING,
    Input,
    added,
    arrays,
    both,
    canonical,
    case_called,
    content,
    dicom,
    grey,
    header,
    image,
    in_place_of,
    itk,
    label,
    labelled,
    linked,
    pictures,
    removed,
    renamed,
    rows,
    stored,
    studies,
    table,
    together,
    voxels,
    write_array,
)
from dicom_files import example, expected, write_enhanced, write_scout, write_series
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

FLAT = np.diag([0.9, 1.3, 2.5, 1.0])
SHIFT = nibabel.affines.from_matvec(np.eye(3), (0.5, 0, 0))
SHEAR = nibabel.affines.from_matvec([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]])
MIRROR = nibabel.affines.from_matvec(np.diag([-1, 1, 1]), (SHAPE[0] - 1, 0, 0))
TURNED = np.array([[0.0, 1.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
BIG_ENDIAN = partial(nibabel.Nifti1Image, header=nibabel.Nifti1Header(endianness=">"))
SIZES = r"its size \(dim\) must be 1 to 7 positive numbers"
STEPS = nibabel.affines.voxel_sizes(AFFINE) * (-1, 1, 1)
UNPLACED = nibabel.affines.from_matvec(np.diag(STEPS), -STEPS * (np.array(SHAPE) - 1) / 2)
FLOAT = image().astype(np.float32)
NUDGE, FAR = (nibabel.affines.from_matvec(np.eye(3), (move, 0, 0)) for move in (0.4, 100))
ARRAY = example()
READ = expected(ARRAY, spacing=NEAR)
PET = (0.5, 1.0, 2.0, 0.25, 4.0, 1.5)


def extended(data: bytes) -> bytes:
    """An extension that says it is longer than the file."""
    return data[:348] + b"\1\0\0\0\xf0\xff\xff\x7f\6\0\0\0".ljust(20, b" ") + data[352:]


def halves(data: bytes) -> tuple[bytes, bytes]:
    return data[:300], data[300:]


def series(folder: Path, **options: Any) -> None:
    write_series(folder, ARRAY, spacing=NEAR, **options)


def enhanced(folder: Path) -> None:
    write_enhanced(folder / "0001.dcm", ARRAY, spacing=NEAR)


def cut(folder: Path) -> None:
    file = sorted(folder.iterdir())[3]
    file.write_bytes(file.read_bytes()[:-40])


def of_kind(kind: str, modality: str) -> Any:
    def change(dataset: Dataset, _: int) -> None:
        dataset.SOPClassUID, dataset.Modality = kind, modality

    return partial(series, change=change)


def dicom_read(name: str, *makers: Any, finding: str = "") -> Input:
    return Input(name, dicom(*makers), finding=finding, image=READ, label=None)


def only(make: Any) -> Any:
    """A dataset of nothing but what is made."""

    def spoil(root: Path) -> None:
        together(*(removed(f"{kind}/{name}.nii.gz") for kind in ("images", "labels") for name in CASES))(root)
        (root / "images").rmdir()
        (root / "labels").rmdir()
        make(root / "bad")

    return spoil


def without(start: bytes) -> Any:
    """Takes the lines that begin so out of a header."""
    return lambda data: b"\n".join(line for line in data.split(b"\n") if not line.startswith(start))


def picture(mode: str, size: tuple[int, int], path: Path) -> None:
    Image.new(mode, size).save(path)


def splits(first: str, second: str) -> str:
    """Two cases of one patient in two splits."""
    columns = "image,label,subject,split"
    extra = [f"{name},{split}" for name, split in zip("xyz", ("train", "val", "test"), strict=True)]
    return rows(f"i/bad.nii.gz,l/bad.nii.gz,{first},{second}", columns=columns, extra=extra)


FLATTENED: dict[str, Any] = {"image": (image(), np.diag([*SPACING, 1])), "label": label()}
FLATTENED["finding"] = "orientation is not stated by .* files"
GREY: dict[str, Any] = {
    "image": (grey().astype(np.float32), np.diag([*SPACING, 1])),
    "label": None,
    "finding": "orientation is not stated by .png files",
    "settings": {"spacing": SPACING, "modality": "mr"},
}


def with_voxel(value: float, dtype: Any = np.float64) -> np.ndarray:
    array = image().astype(dtype)
    array[2, 3, 1] = value
    return array


GZIP = [
    Input("gzip-cut-in-its-header", stored(lambda data: data[:8]), "bad.nii.gz cannot be read to its last byte"),
    Input("gzip-cut-in-the-voxels", stored(lambda data: data[: len(data) // 2]), "cannot be read to its last byte"),
    Input("gzip-cut-in-the-checksum", stored(lambda data: data[:-4]), "cannot be read to its last byte"),
    Input("gzip-with-a-wrong-checksum", stored(lambda data: data[:-8] + b"\1\2\3\4" + data[-4:]), "CRC check failed"),
    Input("gzip-with-a-wrong-length", stored(lambda data: data[:-4] + b"\1\2\3\4"), "Incorrect length of data"),
    Input("gzip-with-garbage-after-it", stored(lambda data: data + b"garbage"), "Not a gzipped file"),
    Input(
        "gzip-in-two-members",
        stored(lambda data: b"".join(gzip.compress(part) for part in halves(gzip.decompress(data)))),
    ),
    Input("gzip-of-a-gzip", content(lambda data: gzip.compress(data)), "it has no NIfTI header"),
    Input("gzip-of-a-short-volume", content(lambda data: data[:-1]), "its header asks for 982 bytes, and it has 981"),
    Input("label-cut", stored(lambda data: data[:-9], LABEL), "label: bad.nii.gz cannot be read to its last byte"),
    Input(
        "plain-volume-cut",
        together(
            stored(gzip.decompress), renamed(IMAGE, "images/bad.nii"), stored(lambda data: data[:-9], "images/bad.nii")
        ),
        "bad.nii cannot be read to its last byte: its header asks for 982 bytes, and it has 973",
    ),
    Input("gzip-called-nii", renamed(IMAGE, "images/bad.nii"), "bad.nii must not be compressed, as its name says"),
    Input("plain-called-gz", stored(gzip.decompress), "bad.nii.gz must be compressed by gzip, as its name says"),
    Input(
        "empty-file",
        stored(lambda _: b""),
        "bad.nii.gz cannot be read to its last byte: it is empty",
    ),
    Input("empty-gzip", content(lambda _: b""), "it has no NIfTI header"),
    Input("text", stored(lambda _: b"<html>404 Not Found</html>"), "bad.nii.gz must be compressed by gzip"),
    Input("text-in-gzip", content(lambda _: b"<html>404 Not Found</html>" * 40), "it has no NIfTI header"),
]

HEADERS = [
    Input("sform-is-not-qform", header(qoffset_x=80.0), "sform and qform of the header must agree; corners lie"),
    Input("both-codes-0", header(sform_code=0, qform_code=0), "image and label must have one size"),
    Input(
        "both-codes-0-everywhere",
        together(header(sform_code=0, qform_code=0), header(LABEL, sform_code=0, qform_code=0)),
        finding="left and right are a guess",
        image=canonical(image(), UNPLACED),
        label=canonical(label(), UNPLACED)[0],
    ),
    Input(
        "zero-spacing",
        header(sform_code=0, pixdim=[1, 0.7, 0, 2.5, 0, 0, 0, 0]),
        r"spacing \(pixdim\) must be positive",
    ),
    Input(
        "negative-spacing", header(sform_code=0, pixdim=[1, 0.7, -1, 2.5, 0, 0, 0, 0]), r"spacing \(pixdim\) must be"
    ),
    Input("nan-spacing", header(sform_code=0, pixdim=[1, 0.7, np.nan, 2.5, 0, 0, 0, 0]), r"spacing \(pixdim\) must be"),
    Input("qform-is-no-rotation", header(quatern_b=0.9, quatern_c=0.9), "the qform of the header must be a rotation"),
    Input("qform-alone-is-no-rotation", header(sform_code=0, quatern_b=0.9, quatern_c=0.9), "cannot be read"),
    Input("sform-is-singular", header(srow_x=[0, 0, 0, 0]), "the affine must be finite and invertible"),
    Input("sform-is-nan", header(srow_x=[np.nan, 0, 0, 0]), "the affine must be finite and invertible"),
    Input("sheared", both(image(), label(), AFFINE @ SHEAR, qform=False), "the axes must be at right angles"),
    Input(
        "left-handed",
        both(image(), label(), AFFINE @ MIRROR),
        image=canonical(image(), AFFINE @ MIRROR),
        label=canonical(label(), AFFINE @ MIRROR)[0],
    ),
    Input("metres", header(xyzt_units=1), "the file must be in mm; its header says meter"),
    Input("microns", header(xyzt_units=3), "the file must be in mm; its header says micron"),
    Input("unknown-units", header(xyzt_units=0)),
    Input("voxels-beyond-the-file", header(vox_offset=1e6), "its header asks for 1000630 bytes, and it has 982"),
    Input("voxels-within-the-header", header(vox_offset=16), "cannot be read"),
    Input("header-of-another-size", header(sizeof_hdr=347), "it has no NIfTI header"),
    Input("header-of-a-pair", header(magic=b"ni1"), "it has no NIfTI header"),
    Input("huge-dimensions", header(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "asks for 54000000000352 bytes"),
    Input(
        "too-many-dimensions",
        header(dim=[99, 7, 9, 5, 1, 1, 1, 1]),
        SIZES,
    ),
    Input(
        "negative-dimension",
        header(dim=[3, 7, -9, 5, 1, 1, 1, 1]),
        SIZES,
    ),
    Input("no-voxels", header(dim=[3, 7, 0, 5, 1, 1, 1, 1]), SIZES),
    Input("unknown-type", header(datatype=9999), "cannot be read to its last byte"),
    Input("huge-extension", together(content(extended), header(vox_offset=368)), "cannot be read"),
    Input("scaling-of-0", header(scl_slope=0, scl_inter=7)),
    Input("scaling-of-nan", header(scl_slope=np.nan, scl_inter=7)),
    Input(
        "scaling-to-infinity",
        header(scl_slope=np.inf),
        r"the scaling \(scl_slope\) must be finite",
    ),
    Input("offset-of-nan", header(scl_slope=1, scl_inter=np.nan), "invalid intercept nan"),
    Input("scaled", header(scl_slope=0.5, scl_inter=-500), image=canonical(FLOAT * 0.5 - 500, AFFINE)),
    Input("big-endian", voxels(image().astype(">i2"), kind=BIG_ENDIAN)),
    Input("nifti-2", voxels(image(), kind=nibabel.Nifti2Image)),
]

VOXELS = [
    Input("nan", voxels(with_voxel(np.nan, np.float32)), "image must be finite; 1 of 315 voxels are NaN or infinite"),
    Input("infinity", voxels(with_voxel(np.inf, np.float32)), "image must be finite; 1 of 315 voxels"),
    Input("huge-float64", voxels(with_voxel(1e300)), "image must be finite; 1 of 315 voxels"),
    Input(
        "complex",
        voxels(image().astype(np.complex64)),
        "voxels must be plain numbers; in bad.nii.gz they are complex64",
    ),
    Input("colours", voxels(np.zeros(SHAPE, [(c, "u1") for c in "RGB"])), "voxels must be plain numbers"),
    Input("int64", voxels(image().astype(np.int64))),
    Input("float64", voxels(image().astype(np.float64))),
    Input("float-with-fractions", voxels(FLOAT + 0.25), image=canonical(FLOAT + 0.25, AFFINE)),
    Input("uint64-that-overflows", voxels(with_voxel(2**63, np.uint64)), r"a CT must have air .* runs from"),
    Input("time-series", voxels(np.stack([image()] * 3, 3)), r"must have the channels image; it has 3 \(name them"),
    Input("five-axes", voxels(np.zeros((*SHAPE, 2, 2), np.int16)), r"bad.nii.gz has size \(7, 9, 5, 2, 2\)"),
    Input("four-axes-of-one-volume", voxels(image()[..., None])),
    Input("one-axis", voxels(image()[:, :1, :1]), r"bad.nii.gz has size \(7, 1, 1\)"),
    Input(
        "one-slice-thick",
        both(image()[:, :, :1], label()[:, :, 1:2]),
        image=canonical(image()[:, :, :1], AFFINE),
        label=canonical(label()[:, :, 1:2], AFFINE)[0],
    ),
    Input(
        "two-axes",
        both(image()[:, :, 0], label()[:, :, 1]),
        image=canonical(image()[:, :, :1], AFFINE),
        label=canonical(label()[:, :, 1:2], AFFINE)[0],
    ),
    Input("constant", voxels(np.full(SHAPE, -700, np.int16)), "image must not be constant; every voxel is -700"),
    Input("mr-as-ct", voxels(abs(image()) % 800), "a CT must have air"),
    Input("ct-times-1000", voxels(image().astype(np.int32) * 1000), r"lie within \[-4096, 32767\] HU; it runs from -9"),
    Input("ct-without-rescale", voxels(image() + 1024), "a CT must have air .*; rescale to HU"),
    Input("only-air", voxels(image() % 300 - 1000), "a CT must show more than air"),
    Input(
        "padded-circle",
        voxels(np.where(image() < -900, -3000, image()).astype(np.int16)),
        finding=r"lie below -1024 HU \(padding, from -3000\) and become air",
        image=canonical(np.where(image() < -900, -1024, image()).astype(np.int16), AFFINE),
    ),
    Input("a-label-as-image", voxels(label()), "a CT must have air"),
]

LABELS = [
    Input("swapped-axes", labelled(label().transpose(1, 0, 2), AFFINE @ TURNED), image=canonical(image(), AFFINE)),
    Input("swapped-axes-with-the-image-s-affine", labelled(label().transpose(1, 0, 2)), "must have one size; image"),
    Input("half-a-voxel-away", labelled(label(), AFFINE @ SHIFT), "must have one affine; they differ by 0.5 voxels"),
    Input(
        "half-a-voxel-away-resampled",
        labelled(label(), AFFINE @ NUDGE),
        finding="brought to the image's by its nearest",
        settings={"resample_masks": True},
    ),
    Input(
        "of-another-place-resampled",
        labelled(label(), AFFINE @ FAR),
        "label must lie inside of the image; only 0 %",
        settings={"resample_masks": True},
    ),
    Input("of-another-patient", labelled(label()[:-1], FLAT), "image and label must have one size"),
    Input("mirrored-with-its-affine", labelled(label()[::-1], AFFINE @ MIRROR)),
    Input("fractions", labelled(label() * 0.5), "labels must be whole numbers"),
    Input("nan-label", labelled(np.where(label() == 2, np.nan, label())), "labels must be whole numbers"),
    Input("negative", labelled(label().astype(np.int16) - 1), r"labels must be within 0...254 .* from -1 to 1"),
    Input("label-255", labelled(label() * 127 + (label() == 2)), "labels must be within .* from 0 to 255"),
    Input("label-256", labelled(label().astype(np.int16) * 128), "labels must be within .* from 0 to 256"),
    Input("label-40000", labelled(label().astype(np.uint16) * 20000), "labels must be within .* from 0 to 40000"),
    Input("huge-int64", labelled(label().astype(np.int64) << 40), "labels must be within"),
    Input("labels-in-float64", labelled(label().astype(np.float64))),
    Input("labels-in-uint64", labelled(label().astype(np.uint64))),
    Input(
        "channels", labelled(np.stack([label()] * 2, 3)), r"a mask must be one label map \(X, Y, Z\); bad.nii.gz has 2"
    ),
    Input("colour-label", labelled(np.zeros(SHAPE, [(c, "u1") for c in "RGB"])), "voxels must be plain numbers"),
    Input("an-image-as-label", labelled(image()), "labels must be within 0...254"),
    Input("a-probability-as-label", labelled(np.linspace(0, 1, label().size).reshape(SHAPE)), "labels must be whole"),
    Input(
        "all-background",
        labelled(label() * 0),
        finding="the label volume is all background",
        label=canonical(label() * 0, AFFINE)[0],
    ),
    Input(
        "all-background-everywhere",
        together(*(voxels(label() * 0, name=f"labels/{name}.nii.gz") for name in CASES)),
        "at least one label must occur; every label volume is background",
    ),
    Input(
        "more-than-200-labels", labelled(np.arange(315).reshape(SHAPE) % 250), "there must be at most 200 labels; 249"
    ),
    Input(
        "a-label-without-a-name",
        labelled(label() * 3),
        "every label must have a name; 3, 6 has none",
        settings={"labels": {1: "lung", 2: "node"}},
    ),
    Input(
        "twice",
        in_place_of(lambda path: path.write_bytes((path.parent / "a.nii.gz").read_bytes())),
        "image must be there once; it has the same voxels as a",
    ),
]

FILES = [
    Input("absent-source", lambda root: None, "the source .* must exist", source="nowhere"),
    Input(
        "nothing",
        together(*(removed(f"{kind}/{name}.nii.gz") for kind in ("images", "labels") for name in CASES)),
        "no case was found",
    ),
    Input("no-layout", renamed("images", "pictures"), "must follow one layout; none fits"),
    Input(
        "two-layouts",
        added("cases.csv", rows("").replace("i/", "images/").replace("l/", "labels/").encode()),
        "folders, csv fits",
    ),
    Input("label-without-image", removed(IMAGE), "labels/bad.nii.gz has no image"),
    Input("image-without-label", removed(LABEL), label=None),
    Input("names-that-differ-in-case", case_called("A"), "the name a stands for 2 cases"),
    Input("two-files-of-one-stem", added("images/bad.nrrd"), "images/ has bad.nii.gz and bad.nrrd; keep one"),
    Input("format-that-is-unknown", added("images/Thumbs.db"), "is of no supported format"),
    Input(
        "folder-in-place-of-a-file",
        in_place_of(Path.mkdir),
        "a folder must hold the slices of one series, DICOM or PNG; it holds 0",
    ),
    Input("dangling-link", linked("nowhere.nii.gz"), "bad.nii.gz does not exist"),
    Input("link-to-itself", linked("bad.nii.gz"), "bad.nii.gz does not exist"),
    Input("link-to-a-file", together(renamed(IMAGE, "kept/x"), linked("../kept/x"))),
    Input(
        "loop-of-folders",
        lambda root: (root / "images/loop").symlink_to(".."),
        "a folder must hold the slices of one series",
    ),
    Input(
        "loop-of-folders-around-dicom",
        studies(series, lambda folder: (folder / "loop").symlink_to("..")),
        image=READ,
        label=None,
    ),
    Input("pipe", in_place_of(os.mkfifo), "is of no supported format"),
    Input("pipe-without-a-suffix", lambda root: os.mkfifo(root / "images/pipe"), "is of no supported format"),
    Input(
        "pipe-in-a-dicom-tree",
        studies(series, lambda folder: os.mkfifo(folder / "pipe")),
        image=READ,
        label=None,
    ),
    Input(
        "pipe-in-a-table",
        together(table(rows()), in_place_of(os.mkfifo, "i/bad.nii.gz")),
        "is of no supported format",
        source="cases.csv",
    ),
    Input("pipe-as-source", in_place_of(os.mkfifo), "must follow one layout; none fits", source=IMAGE),
    Input("spaces-in-a-name", case_called("left lung  2")),
    Input("signs-in-a-name", case_called("a'b\"c$(d);*?&<>|%s{}#~`!\\")),
    Input("newline-in-a-name", case_called("first\nsecond")),
    Input("leading-dash-in-a-name", case_called("--rf")),
    Input("long-name", case_called("n" * 248)),
    Input(
        "long-name-with-dots",
        case_called(".".join("n" * 124)),
    ),
    Input("composed-letters", case_called("Mu\u0308ller-\u00e9")),
    Input(
        "image-composed-label-not",
        together(renamed(IMAGE, "images/M\u00fcller.nii.gz"), renamed(LABEL, "labels/Mu\u0308ller.nii.gz")),
    ),
    Input("bytes-that-are-no-unicode", case_called(os.fsdecode(b"\xff\xfe"))),
    Input("suffix-in-capitals", case_called("BAD", ".NII.GZ")),
    Input(
        "hidden-files-beside",
        together(added("images/._bad.nii.gz"), added("labels/._bad.nii.gz"), added("images/.DS_Store")),
    ),
    Input("side-files-beside", together(added("images/bad.json"), added("images/README.txt"), added("notes.md"))),
]

TABLES = [
    Input("byte-order-mark", table("\ufeff" + rows()), source="cases.csv"),
    Input("semicolons", table(rows().replace(",", ";")), source="cases.csv"),
    Input("windows-lines", table(rows().replace("\n", "\r\n"))),
    Input("way-around", table(rows("../data/i/bad.nii.gz,./l/../l/bad.nii.gz"))),
    Input("empty-table", table(""), "missing: image; repeated: none; it has none", source="cases.csv"),
    Input("empty-table-in-a-folder", table(""), "none fits"),
    Input("only-a-header", table("image,label\n"), "no case was found"),
    Input("column-missing", table(rows(columns="picture,label")), "missing: image", source="cases.csv"),
    Input("column-called-mask", table(rows(columns="image,mask")), "has no column label, but mask, which may be meant"),
    Input("column-twice", table(rows(columns="image,image")), "repeated: image", source="cases.csv"),
    Input("ragged", table(rows("i/bad.nii.gz")), "cases.csv line 5 has 1 values for 2 columns"),
    Input("too-many-values", table(rows("i/bad.nii.gz,l/bad.nii.gz,,")), "line 5 has 4 values for 2 columns"),
    Input(
        "quotes-unbalanced",
        table(rows('"i/bad.nii.gz,l/bad.nii.gz')),
        "must be a CSV file in UTF-8; unexpected end",
        source="cases.csv",
    ),
    Input(
        "nul-bytes",
        table(rows("i/b\0ad.nii.gz,l/bad.nii.gz")),
        "line 5: .* does not exist",
        source="cases.csv",
    ),
    Input("utf-16", table(rows().encode("utf-16")), "must be a CSV file in UTF-8", source="cases.csv"),
    Input(
        "latin-1",
        table(rows("i/M\u00fcller.nii.gz,l/bad.nii.gz").encode("latin-1")),
        "must be a CSV file in UTF-8",
        source="cases.csv",
    ),
    Input("binary-table", lambda root: None, "must be a CSV file in UTF-8", source=IMAGE),
    Input("absent-file", table(rows("i/worse.nii.gz,l/bad.nii.gz")), "line 5: .*worse.nii.gz does not exist"),
    Input(
        "address-in-place-of-a-file", table(rows("https://x.org/bad.nii.gz,l/bad.nii.gz")), "line 5: .* does not exist"
    ),
    Input("image-is-empty", table(rows(",l/bad.nii.gz")), "line 5: image is empty"),
    Input("row-twice", table(rows("i/c.nii.gz,l/c.nii.gz")), "the name i_c stands for 2 cases"),
    Input(
        "same-file-under-two-names",
        table(rows("i/c.nii.gz,l/c.nii.gz,d", columns="image,label,case", extra="abc")),
        "image must be there once; it has the same voxels as c",
    ),
    Input(
        "name-with-a-slash",
        table(rows("i/bad.nii.gz,l/bad.nii.gz,../d", columns="image,label,case", extra="abc")),
        "line 5: case must be letters",
    ),
    Input(
        "patient-in-two-splits",
        together(table(splits("x", "test")), added("dataset.json", b"{}")),
        "every patient must be in one split only; .* in training, .* in test",
    ),
    Input(
        "unknown-split",
        table(rows("i/bad.nii.gz,l/bad.nii.gz,later", columns="image,label,split", extra=("train", "val", "test"))),
        "split must be one of train, .* got 'later'",
    ),
    Input("dataset-json-is-a-list", added("dataset.json", b"[]"), "dataset.json must hold an object; got list"),
    Input("dataset-json-is-cut", added("dataset.json", b'{"labels": '), "dataset.json must be JSON"),
    Input("labels-are-no-names", added("dataset.json", b'{"labels": [1, 2]}'), "labels of dataset.json must be"),
]

DICOM = [
    dicom_read("dicom", series),
    dicom_read("dicom-reversed", partial(series, reverse=True)),
    dicom_read("dicom-numbered-against-space", partial(series, instance_numbers=(4, 1, 6, 3, 2, 5))),
    dicom_read("dicom-without-numbers", partial(series, instance_numbers=None)),
    dicom_read("dicom-with-long-decimals", partial(series, long_decimals=True)),
    dicom_read("dicom-with-a-scout", series, write_scout, finding=r"1 localizers \(scouts\) .* left out"),
    dicom_read("dicom-enhanced", enhanced),
    Input(
        "dicom-slice-missing", dicom(partial(series, skip=(2,))), "slices are missing between -118.25 and -113.25 mm"
    ),
    Input("dicom-slice-twice", dicom(partial(series, repeat=(2,))), "several slices lie in one place along the stack"),
    Input("dicom-tilted", dicom(partial(series, tilt=12.0)), "gantry tilt of 12.0 degrees"),
    Input("dicom-two-series", dicom(series, partial(series, series="b", start=100)), "it mixes 2 series"),
    Input(
        "dicom-pet-as-ct",
        dicom(partial(series, modality="PT", slope=PET)),
        "every image must be CT; the files of this one say PT",
    ),
    Input("dicom-voxels-cut", dicom(series, cut), "slice 4 of 6 of a DICOM series must hold all its voxels"),
    Input(
        "dicom-secondary-capture", dicom(of_kind(uid.SecondaryCaptureImageStorage, "OT")), "its kind of object is Sec"
    ),
    Input("dicom-and-others-in-a-folder", dicom(series, added("note.doc")), "it holds 0 PNG, 6 DICOM, 1 others"),
    Input("dicom-directory-only", only(of_kind(uid.MediaStorageDirectoryStorage, "")), "none of 0 series is one"),
    Input("dicom-mask-without-image", only(of_kind(uid.SegmentationStorage, "SEG")), "none of 6 series is one"),
    Input(
        "dicom-header-cut", only(lambda folder: added("x", bytes(128) + b"DICM")(folder)), "1 of those found cannot be"
    ),
    Input(
        "dicom-tree-with-a-lonely-mask",
        studies(series, lambda folder: of_kind(uid.SegmentationStorage, "SEG")(folder / "mask", study="other")),
        "a DICOM segmentation must hold at least one segment, and each must have a label",
    ),
]

SPACED = {"settings": {"spacing": SPACING, "modality": "mr"}}
FORMATS = [
    Input("nrrd", itk(".nrrd")),
    Input("nrrd-cut", itk(".nrrd", lambda data: data[:-5]), "bad.nrrd cannot be read to its last byte"),
    Input("nrrd-without-space", itk(".nrrd", without(b"space: ")), "SimpleITK refuses it"),
    Input(
        "nrrd-in-a-space-without-a-name",
        itk(".nrrd", lambda data: data.replace(b"space: left-posterior-superior", b"space dimension: 3")),
        finding="no orientation; left and right are a guess",
    ),
    Input("nrrd-without-directions", itk(".nrrd", without(b"space directions: ")), "the header must give the spacing"),
    Input(
        "nrrd-in-another-space",
        itk(".nrrd", lambda data: data.replace(b"left-posterior", b"scanner-xyz")),
        "the space of",
    ),
    Input("nrrd-beside-a-missing-file", itk(".nhdr", beside=False), "the file of its voxels is missing"),
    Input("mha-cut", itk(".mha", lambda data: data[:-5]), "bad.mha cannot be read to its last byte"),
    Input("mha-without-spacing", itk(".mha", without(b"ElementSpacing")), "the header must give the spacing"),
    Input("mhd-beside-a-missing-file", itk(".mhd", beside=False), "the file of its voxels is missing"),
    Input("mhd", itk(".mhd")),
    Input("text-called-nrrd", itk(".nrrd", lambda _: b"no volume"), "bad.nrrd must be NRRD, as its name says"),
    Input("hdf5", arrays(".h5"), **FLATTENED, **SPACED),
    Input("hdf5-without-spacing", arrays(".h5"), "spacing"),
    Input(
        "hdf5-without-a-dataset",
        arrays(".h5", partial(write_array, other=image(), more=image())),
        "must hold an array named 'image'",
        **SPACED,
    ),
    Input("text-called-h5", arrays(".h5", lambda path: path.write_bytes(b"text")), "bad.h5 cannot be read", **SPACED),
    Input("mat", arrays(".mat"), **FLATTENED, **SPACED),
    Input(
        "mat-of-two-variables",
        arrays(".mat", partial(write_array, t1=image(), t2=image())),
        "it holds t1, t2",
        **SPACED,
    ),
    Input(
        "mat-cut",
        arrays(".mat", lambda path: path.write_bytes(path.read_bytes()[:200])),
        "bad.mat cannot be read",
        **SPACED,
    ),
    Input("png", pictures(), **GREY),
    Input(
        "png-in-colour", pictures(partial(picture, "RGB", (7, 9))), "a PNG slice must be grey .*; s1.png is not", **GREY
    ),
    Input(
        "png-of-another-size", pictures(partial(picture, "L", (9, 7))), "slices must have one size and depth", **GREY
    ),
    Input("png-cut", pictures(lambda path: path.write_bytes(path.read_bytes()[:-9])), "s1.png cannot be read", **GREY),
    Input(
        "png-numbered-twice",
        pictures(lambda path: path.rename(path.with_name("s002.png"))),
        "names of slices must",
        **GREY,
    ),
    Input("spacing-beside-a-geometry", stored(bytes), "and no other may be given", **SPACED),
]

CORPUS = (*GZIP, *HEADERS, *VOXELS, *LABELS, *FILES, *TABLES, *DICOM, *FORMATS)
