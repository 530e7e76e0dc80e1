"""Texts of cases on their way into a work folder, and the written findings of phantoms."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_prepare import entries, make_decathlon, make_folders

from fibldm.cli import run as cli
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.errors import FibldmError
from fibldm.phantoms.findings import EXTENTS, PATTERNS, Finding
from fibldm.phantoms.phantoms import FINDINGS, make_phantom, write_phantoms

CT = {"modality": "ct"}
REPORTS = ["Mild fibrosis of the left lung, seen by Dr Who.", "Mild  fibrosis\nof the right lung.", "No fibrosis.", ""]


def make_table(root: Path) -> Path:
    make_folders(root)
    names = sorted(path.name for path in (root / "images").iterdir())
    with (root / "table.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "report", "sex"])
        rows = zip(names, REPORTS, "FMFM", strict=True)
        writer.writerows([f"images/{name}", f"labels/{name}", report, sex] for name, report, sex in rows)
    return root / "table.csv"


def test_free_text_is_carried_along_only_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(tmp_path / "source")
    left = prepare(table, tmp_path / "without", PrepareSettings(**CT), progress=False)
    assert any("may tell the patient are left out" in note and "report" in note for note in left.notes)
    assert "Who" not in "".join(file.read_text() for file in (tmp_path / "without").glob("*.json"))
    command = ["prepare", str(table), "--out", str(tmp_path / "work"), "--modality", "ct"]
    assert cli([*command, "--text", "report", "--workers", "1", "--json"]) == 0
    shown = capsys.readouterr()
    assert "3 of 4 cases (3 different texts, --text report)" in " ".join(shown.err.split())
    assert json.loads(shown.out.splitlines()[-1])["counts"]
    kept = [entry["text"] for _, entry in sorted(entries(tmp_path / "work").items())]
    assert kept == [*[" ".join(report.split()) for report in REPORTS[:3]], None]
    assert all("report" not in entry and entry["sex"] for entry in entries(tmp_path / "work").values())
    with pytest.raises(FibldmError, match="there is no 'other' among report, sex"):
        prepare(table, tmp_path / "work", PrepareSettings(**CT, text="other"), progress=False)


def test_txt_files_beside_the_images_are_texts(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "source")
    images = sorted((source / "images").iterdir())
    for image, report in zip(images, REPORTS[:3], strict=False):
        image.with_name(image.name.removesuffix(".nii.gz") + ".txt").write_text(report)
    prepare(source, tmp_path / "work", PrepareSettings(**CT, text="beside"), progress=False)
    kept = [entry["text"] for _, entry in sorted(entries(tmp_path / "work").items())]
    assert kept == [*[" ".join(report.split()) for report in REPORTS[:3]], None]
    images[0].with_name(images[0].name.removesuffix(".nii.gz") + ".txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FibldmError, match=r"readable text in UTF-8; not of \S+ \(it is not UTF-8\)"):
        prepare(source, tmp_path / "again", PrepareSettings(**CT, text="beside"), progress=False)
    with pytest.raises(FibldmError, match="`text` must find texts in beside; there is none in 3 cases"):
        options = PrepareSettings(modality="ct", text="beside")
        prepare(make_decathlon(tmp_path / "decathlon"), tmp_path / "other", options, progress=False)


def test_entries_of_a_decathlon_dataset_may_hold_texts(tmp_path: Path) -> None:
    source = make_decathlon(tmp_path / "source")
    facts = json.loads((source / "dataset.json").read_text())
    for entry, report in zip(facts["training"], REPORTS, strict=False):
        entry["report"] = report
    (source / "dataset.json").write_text(json.dumps(facts))
    prepare(source, tmp_path / "work", PrepareSettings(text="report"), progress=False)
    kept = sorted(entry["text"] for entry in entries(tmp_path / "work").values())
    assert kept == sorted(" ".join(report.split()) for report in REPORTS[:3])
    prepare(source, tmp_path / "without", PrepareSettings(), progress=False)
    assert all("text" not in entry for entry in entries(tmp_path / "without").values())


def test_a_phantom_shows_what_its_finding_says() -> None:
    """Side, extent and pattern, measured by its labels; the body is that of the same patient without a finding."""
    plain = make_phantom(3, 1, spacing=(8, 8, 8), orientation="RAS")
    for side, extent, pattern in (("left", "moderate", "honeycombing"), ("both", "mild", "ground glass")):
        finding = Finding(side, extent, pattern, "")  # type: ignore[arg-type]
        shown = make_phantom(3, 1, spacing=(8, 8, 8), orientation="RAS", finding=finding)
        assert shown.volume.shape == plain.volume.shape
        x = shown.affine[0, 0] * np.arange(shown.labels.shape[0]) + shown.affine[0, 3]
        low, high = EXTENTS[extent]
        for half, name in ((x > 0, "right"), (x < 0, "left")):
            labels = shown.labels[half]
            share = (labels > 3).sum() / np.isin(labels, (1, 2, 4, 5, 6)).sum()
            assert 0.5 * low < share < 1.4 * high if side in (name, "both") else share < 0.02
        counts = {name: (shown.labels == value).sum() for value, name in zip((4, 5, 6), PATTERNS, strict=True)}
        assert max(counts, key=lambda name: counts[name]) == pattern
    healthy = make_phantom(3, 1, spacing=(8, 8, 8), finding=Finding(None, None, None, "No fibrosis."))
    assert not (healthy.labels > 3).any()


def test_findings_of_phantoms_are_a_table_for_prepare(tmp_path: Path) -> None:
    images = write_phantoms(
        tmp_path / "phantoms", subjects=4, seed=3, spacing=(16, 16, 16), findings=True, progress=iter
    )
    table = tmp_path / "phantoms" / FINDINGS
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["image"] for row in rows] == [f"images/{image.name}" for image in images]
    assert {row["finding"] for row in rows} == {Finding.draw(3, int(row["subject"][-4:])).sentence for row in rows}
    prepare(table, tmp_path / "work", PrepareSettings(text="finding", keep_columns=("side",)), progress=False)
    kept = {(entry["text"], entry["side"]) for entry in entries(tmp_path / "work").values()}
    assert kept == {(row["finding"], row["side"]) for row in rows}
    with pytest.raises(FibldmError, match="must hold phantoms made with"):
        write_phantoms(tmp_path / "phantoms", subjects=4, seed=3, spacing=(16, 16, 16), progress=iter)
