"""A user's own volumes with the outlines of their masks, by one command: A32, B20."""

import base64
import io
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.report.colours import label_colour
from fibldm.report.gallery import volumes_of, write_gallery
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_nifti, write_synthetic

SHAPE = (20, 30, 10)
AFFINE = np.diag([-4.0, -4.0, 8.0, 1.0])
"""Stored as LPS+: the first voxels are the patient's right and front."""


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """Two volumes of one mask, whose only label is a box at the right front; one of them without any contrast."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:7, 3:12, 2:6], labels[0, 0, 0] = 2, 255
    facts = {"intensity": {"kind": "window", "low": -1000.0, "high": 600.0}}
    for number, values in enumerate((np.where(labels == 2, 600, -1000), np.full(SHAPE, -1000))):
        volume = Volume(values.astype(np.int16), AFFINE)
        write_synthetic(tmp_path / "out" / f"ä$x$_{number:03d}.nii.gz", volume, facts)
    write_labels(tmp_path / "out" / "masks" / "ä$x$.nii.gz", Volume(labels, AFFINE))
    return tmp_path / "out"


def coloured(picture: np.ndarray, label: int) -> np.ndarray:
    """Where a picture has the colour of a label."""
    return np.abs(picture[..., :3] / 255 - to_rgb(label_colour(label))).max(axis=-1) < 0.1


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_outlines_lie_where_the_mask_is(synthetic: Path, tmp_path: Path) -> None:
    """Around what is bright, in every plane; nothing is drawn of background and unknown."""
    assert run(["picture", str(synthetic), "--out", str(tmp_path / "look.html")]) == 0
    html = (tmp_path / "look.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|url\(|@import|<script""", html)
    assert html.count("SYNTHETIC, not a patient") == 2 and "ä$x$_001" in html and "label 2" in html
    first, second = (pixels(base64.b64decode(part)) for part in re.findall(r'base64,([A-Za-z0-9+/=]+)"', html))
    width = first.shape[1] // 3
    for plane in range(3):
        part = first[:, plane * width : (plane + 1) * width]
        white, line = (part.min(axis=-1) > 250), coloured(part, 2)
        white[:40] = False  # the titles
        (top, bottom), (left, right) = (np.flatnonzero(line.any(axis=axis))[[0, -1]] for axis in (1, 0))
        inside = np.zeros(part.shape[:2], dtype=bool)
        inside[top : bottom + 1, left : right + 1] = True
        assert white.any() and not (white & ~inside).any() and white.sum() > 0.8 * inside.sum()
        if plane == 0:  # right and front
            assert right < width / 2 and bottom < 0.65 * len(part)
    assert coloured(second, 2).any() and not coloured(second, 1).any()


def test_one_png_shows_no_more_than_is_asked_for(synthetic: Path, tmp_path: Path, capsys) -> None:
    assert run(["picture", str(synthetic), "--out", str(tmp_path / "look.png"), "--most", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["volumes"] == 1 and told["left_out"] == 1
    one = pixels((tmp_path / "look.png").read_bytes())
    assert run(["picture", str(synthetic), "--out", str(tmp_path / "look.png")]) == 0
    both = pixels((tmp_path / "look.png").read_bytes())
    assert both.shape[0] > 1.6 * one.shape[0] and coloured(both, 2).sum() > coloured(one, 2).sum() + 100


def test_labels_are_named_as_asked(synthetic: Path, tmp_path: Path) -> None:
    page = tmp_path / "look.html"
    assert run(["picture", str(synthetic), "--out", str(page), "--labels", "2=tumour", "--most", "1"]) == 0
    assert "tumour" in page.read_text() and "label 2" not in page.read_text()
    assert run(["picture", str(synthetic), "--out", str(page), "--labels", "tumour"]) == 2


def test_many_volumes_make_a_picture_about_as_wide_as_high(synthetic: Path, tmp_path: Path) -> None:
    (first, *_), _ = volumes_of(synthetic)
    write_gallery(tmp_path / "many.png", [first] * 20, names={})
    height, width = pixels((tmp_path / "many.png").read_bytes()).shape[:2]
    assert 0.6 < width / height < 1.7


def test_work_folders_and_pairs_of_folders_are_shown(phantom_work: Path, tmp_path: Path) -> None:
    """With the names of the labels; a split alone."""
    shown, names = volumes_of(phantom_work, "test")
    assert names[1] == "left lung" or "left lung" in names.values()
    assert (
        len(shown) == len(json.loads((phantom_work / "datalist.json").read_text())["test"]) and not shown[0].synthetic
    )
    write_gallery(tmp_path / "work.html", shown[:1], names=names)
    assert "left lung" in (tmp_path / "work.html").read_text()
    two = np.random.default_rng(0).normal(size=(*SHAPE[:2], 1, 2)).astype(np.float32)
    write_nifti(tmp_path / "source" / "images" / "患者.nii.gz", two, AFFINE)
    (pair,), _ = volumes_of(tmp_path / "source")
    assert pair.mask is None
    for name in ("a.png", "a.html"):  # a slice of two channels, and a name that the font lacks
        write_gallery(tmp_path / name, [pair], names={})
    assert "患者 (no mask)" in " ".join((tmp_path / "a.html").read_text().split())


def test_what_cannot_be_shown_is_refused(synthetic: Path, tmp_path: Path) -> None:
    shown, _ = volumes_of(synthetic)
    with pytest.raises(FibldmError, match=r"written to a .png or an .html file; got a.jpg; change --out"):
        write_gallery(tmp_path / "a.jpg", shown, names={})
    with pytest.raises(FibldmError, match="must end above its beginning"):
        write_gallery(tmp_path / "a.png", shown, names={}, window=(1.0, 1.0))
    with pytest.raises(FibldmError, match="pictures are of a work folder, .* check the path"):
        volumes_of(tmp_path / "absent")
    with pytest.raises(FibldmError, match="--split is of a work folder"):
        volumes_of(synthetic, "test")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE), shown[0].mask)
    with pytest.raises(FibldmError, match="must lie on the grid of its mask"):
        write_gallery(tmp_path / "a.png", shown, names={})
