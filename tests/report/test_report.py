"""The report: A32 (pictures of volumes), B20 (mask over the volume)."""

import re

import nibabel
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.report.report import Match, loss_curves, montage, write_report
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels, write_synthetic

SHAPE = (12, 16, 10)
AFFINE = np.diag([-4.0, -4.0, 6.0, 1.0])
"""Stored as LPS+, as DICOM does: the first voxel is the rightmost, foremost and lowest."""


def corner_volume() -> np.ndarray:
    """Air, with a bright corner at the patient's right, front and bottom."""
    volume = np.full(SHAPE, -1000, dtype=np.int16)
    volume[:4, :5, :3] = 300
    return volume


@pytest.fixture
def match(tmp_path) -> Match:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:3, 1:4, 1:2], labels[3, 1, 1], labels[0, 0, 1] = 5, 7, 255
    write_labels(tmp_path / "mask.nii.gz", Volume(labels, AFFINE))
    nibabel.save(nibabel.Nifti1Image(corner_volume(), AFFINE), tmp_path / "real.nii.gz")
    write_synthetic(tmp_path / "mask_000.nii.gz", Volume(corner_volume(), AFFINE), {})
    return Match("<b>case&1", "p1", tmp_path / "mask.nii.gz", tmp_path / "real.nii.gz", [tmp_path / "mask_000.nii.gz"])


@pytest.fixture
def losses(tmp_path):
    lines = "epoch,loss,validation_loss,seconds\n1,0.9,1.1,3\n2,0.7,,3\n3,0.5,0.8,3\n"
    (tmp_path / "metrics.csv").write_text(lines)
    return {"autoencoder": tmp_path / "metrics.csv", "diffusion": tmp_path / "metrics.csv"}


def figures(*cases: dict) -> dict:
    means = (
        "lung_dice",
        "lung_dice_real",
        "lung_dice_shuffled",
        "fibrosis_contrast_ratio",
        "texture_ratio",
        "seed_ratio",
    )
    return {
        **dict.fromkeys(means, 0.5),
        "network_calls": 10,
        "outputs": ["a"],
        "masks": ["a"],
        "cases": list(cases),
    }


def test_report_is_one_file_with_every_case_and_escaped_names(tmp_path, match, losses):
    healthy = {"case": "healthy", "lung_dice": 0.91, "lung_dice_real": 0.97, "lung_dice_shuffled": 0.4}
    healthy |= {"texture_ratio_lung": 0.8}
    ill = {**healthy, "case": match.case, "texture_ratio_fibrosis": 0.7, "fibrosis_contrast_ratio": 1.23}
    loss_curves(losses).savefig(tmp_path / "worst.png")
    measured = Section(
        {"kid/<x>": Estimate(0.125, 0.1, 0.15, 12, 0.05)}, {"picture": "worst.png"}, notes=["too <smooth>"]
    )
    write_report(
        tmp_path / "report.html",
        figures=figures(healthy, ill),
        matches=[match],
        sections={"realism": measured},
        evaluation=tmp_path,
        losses=losses,
        labels={"0": "background", "5": "scar <i>", "7": "seven"},
        window=(-1000, 300),
        commands=["fibldm prepare 'a&b' --out <work>"],
    )
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|url\(|@import|<script""", html)
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}"', html)) == 3
    assert "healthy" in html and "no fibrosis" in html and "1.23" in html
    assert html.count("&lt;b&gt;case&amp;1") == 3 and "<b>case" not in html
    assert "scar &lt;i&gt;" in html and "--out &lt;work&gt;" in html
    assert "not patients" in html
    assert "kid/&lt;x&gt;" in html and "[0.1, 0.15]" in html and "<td>0.05</td>" in html
    assert "too &lt;smooth&gt;" in html


def test_montage_shows_the_patients_right_on_the_left(match):
    """Bright: right, front, bottom. Radiologists look from the feet and from the front."""
    figure = montage(match, (-1000, 300))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["mask, axial", "mask, coronal", "mask, sagittal", "real, axial"]
    for axis in figure.axes[3:]:
        shown = _as_seen(axis)
        plane = axis.get_title().split(", ")[1]
        rows, columns = np.nonzero(shown == shown.max())
        left, top = columns.mean() < shown.shape[1] / 2, rows.mean() < shown.shape[0] / 2
        assert shown.max() == 300
        assert (left, top) == {"axial": (True, True), "coronal": (True, False), "sagittal": (True, False)}[plane]


def test_montage_draws_voxels_in_their_proportions(match):
    axial, coronal, sagittal = (axis.get_aspect() for axis in montage(match, (-1000, 300)).axes[:3])
    assert (axial, coronal, sagittal) == pytest.approx((1, 1.5, 1.5))


def test_montage_overlay_is_clear_but_for_labels(match):
    overlay = np.asarray(montage(match, (-1000, 300)).axes[0].images[1].get_array())
    assert overlay.shape == (SHAPE[1], SHAPE[0], 4)
    drawn = overlay[..., 3] > 0
    assert drawn.sum() == 7
    assert len(np.unique(overlay[drawn], axis=0)) == 2


def test_montage_of_an_empty_mask_goes_through_the_middle(tmp_path, match):
    write_labels(match.mask, Volume(np.zeros(SHAPE, dtype=np.uint8), AFFINE))
    assert len(montage(match, (-1000, 300)).axes) == 9


def test_loss_curves_skip_epochs_without_validation(losses):
    figure = loss_curves(losses)
    FigureCanvasAgg(figure).draw()
    training, validation = figure.axes[1].lines
    assert figure.axes[1].get_title() == "diffusion"
    assert training.get_xydata().tolist() == [[1, 0.9], [2, 0.7], [3, 0.5]]
    assert validation.get_xydata().tolist() == [[1, 1.1], [3, 0.8]]


def _as_seen(axis) -> np.ndarray:
    """The picture with its first row at the top and its first column at the left of the screen."""
    image = axis.images[0]
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert left < right and bottom < top and image.origin == "lower"
    return np.asarray(image.get_array())[::-1]
