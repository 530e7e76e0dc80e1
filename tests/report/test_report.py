"""The report: A32 and B20 (pictures, mask over the volume), H1 (synthetic is said), H3 and H4 (audit, figures)."""

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.figure import Figure

from fibldm.cli import run
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.files import read_json, write_json
from fibldm.report import niivue, page
from fibldm.report.cases import View, choose
from fibldm.report.curves import Losses
from fibldm.report.niivue import NiiVue, module_of
from fibldm.report.payload import _coarse, coarseness, payload_of
from fibldm.report.planes import Row, centre_of, draw, letters_of
from fibldm.report.report import IN_BUNDLE, ReportSettings, bundle_report, write_report
from fibldm.report.subject import Subject
from fibldm.synthesis import SamplingSettings
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Volume
from fibldm.volumes.pictures import PLANES
from fibldm.volumes.writer import write_labels, write_nifti, write_synthetic

SHAPE = (12, 16, 10)
AFFINE = np.diag([-4.0, -4.0, 6.0, 1.0])
"""Stored as LPS+, as DICOM does: the first voxel is the rightmost, foremost and lowest."""
NAME = "<b>a&1"
OTHER = 'zoë"7'
WEIGHTS = "ab" * 32
SAMPLING = SamplingSettings(sampler="dpmpp_2m", steps=5, guidance=1.5, seed=3).to_dict()


def corner_volume() -> np.ndarray:
    """Air, with a bright corner at the patient's right, front and bottom."""
    volume = np.full(SHAPE, -1000, dtype=np.int16)
    volume[:4, :5, :3] = 300
    return volume


@pytest.fixture
def labels() -> Volume:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:3, 1:4, 1:2], labels[3, 1, 1], labels[0, 0, 1] = 5, 7, 255
    return Volume(labels, AFFINE)


@pytest.fixture
def work(tmp_path: Path, labels: Volume) -> Path:
    """A work folder of two patients: one to train, one to test."""
    folder = tmp_path / "work"
    split: dict[str, list] = {"training": [], "validation": [], "test": []}
    for name, part in ((OTHER, "training"), (NAME, "test")):
        write_nifti(folder / "images" / f"{name}.nii.gz", corner_volume(), AFFINE)
        write_labels(folder / "labels" / f"{name}.nii.gz", labels)
        files = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        split[part].append({**files, "case": name, "subject": f"sub-{name}"})
    names = {"0": "background", "5": "scar <i>", "7": "seven"}
    write_json(folder / "datalist.json", {"content": "data1", "labels": names, "licence": "CC0", **split})
    write_json(folder / "intensity.json", {"kind": "window", "low": -1000.0, "high": 300.0})
    case = {"shape": [12, 16, 10], "spacing_mm": [4.0, 4.0, 6.0], "label_volume_ml": {"5": 1.5}}
    finding = {"case": NAME, "level": "warning", "message": "thick <slices>"}
    report = {"ok": True, "cases": {NAME: case}, "left_out": [], "findings": [finding], "notes": ["said & noted"]}
    write_json(folder / "report.json", report)
    return folder


@pytest.fixture
def synthetic(tmp_path: Path, labels: Volume) -> Path:
    folder = tmp_path / "synthetic"
    facts = {"source": {"weights": WEIGHTS}, "sampling": SAMPLING, "network_calls": 10, "follows_mask": True}
    write_synthetic(folder / f"{NAME}_000.nii.gz", Volume(corner_volume(), AFFINE), facts)
    write_labels(folder / "masks" / f"{NAME}.nii.gz", labels)
    return folder


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What `fibldm evaluate` and `fibldm audit` write."""
    drawn = {"volumes": 1, "weights": WEIGHTS, "sampling": SAMPLING, "seeds": [3], "network_calls": 10}
    faithful = Section(
        {"hd95": Estimate(0.125, 0.1, 0.15, 12, 0.05), "hd95/shuffled": Estimate(0.5, None, None, 12)},
        {"units": {"hd95": "mm"}, "drawn": drawn},
        [{"case": f"{NAME}_000", "subject": "p", "dice": 0.8}],
        [f"{NAME} is too <smooth>"],
    )
    copies = Section({"named": Estimate(0.0, 0.0, 0.0, 12, 0.0)}, {"drawn": drawn, "picture": "copies.png"})
    folder = tmp_path / "measured"
    write_json(folder / "evaluation" / "metrics.json", {"faithfulness": faithful.to_dict(), "copies": copies.to_dict()})
    (folder / "evaluation" / "copies.png").write_bytes(b"a picture of a patient")
    write_json(folder / "audit.json", audit([pair()]))
    return folder


def pair() -> dict:
    return {"synthetic": f"{NAME}_000.nii.gz", "train": f"{OTHER}.nii.gz", "score": 0.975, "transform": "turned"}


def audit(copies: list) -> dict:
    return {
        "verdict": "1 of 1 volumes are copies of training scans" if copies else "no evidence of copying",
        "threshold": 0.75,
        "copy_rate": {"value": 1.0, "low": 0.025, "high": 1.0, "count": 1, "of": 1},
        "copies": copies,
        "memorised_patients": ["p"] * len(copies),
        "membership": {"auc": 0.625, "low": 0.5, "high": 0.75, "training": 2, "held_out": 4},
        "own_masks": "not measured: too few",
        "closest": [pair()],
        "facts": {"training_scans": 2, "held_out_scans": 4, "synthetic_volumes": 1},
    }


def written(folder: Path, **settings) -> str:
    write_report(folder, folder.parent / "report.html", ReportSettings(**settings))
    return (folder.parent / "report.html").read_text()


def without_programs(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def index_of(text: str) -> dict:
    return json.loads(re.search(r'id="volumes">(.*?)</script>', text, flags=re.DOTALL)[1])


# --- the page


def test_a_report_is_one_file_that_fetches_nothing_and_escapes_names(measured, synthetic, work) -> None:
    text = written(measured, synthetic=synthetic, data=work)
    plain = without_programs(text)
    assert not re.search(r"""\b(src|href|action)\s*=\s*["']?(?!["']|data:image/png;base64,|#)""", plain)
    assert not re.search(r"url\(|@import|<link|<iframe|<form", plain)
    assert "<b>a" not in text and "scar <i>" not in text and "<slices>" not in text
    assert html.escape(NAME, quote=False) in plain and "scar &lt;i&gt;" in plain and "thick &lt;slices&gt;" in plain
    assert "SYNTHETIC." in plain and "not patients" in plain and "said &amp; noted" in plain
    assert all(re.search(r'alt="[^"]+"', picture) for picture in re.findall(r"<img[^>]*>", text))
    assert len(re.findall(r"<h1", text)) == 1 and 'lang="en"' in text and "<main" in text


def test_its_policy_allows_its_own_programs_and_nothing_else(measured, synthetic) -> None:
    text = written(measured, synthetic=synthetic)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    programs = re.findall(r"<script(?: type=module)?>(.*?)</script>", text, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() for program in programs]
    assert policy.startswith("default-src 'none'; ") and len(programs) >= 1
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "http" not in policy and not re.search(r"\son\w+=", without_programs(text))


def test_every_figure_stands_with_its_interval_beside_real_scans(measured) -> None:
    text = written(measured)
    row = re.search(r'<th scope="row">hd95, mm</th>(.*?)</tr>', text)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["0.125", "[0.1, 0.15]", "0.05", "0.5", "12"]
    assert "1 volume, drawn by dpmpp_2m in 5 steps at guidance 1.5, 10 network calls each." in text
    assert WEIGHTS in text and "is too &lt;smooth&gt;" in text
    assert "Not measured: realism, reconstruction, audit, utility, gate, ct, spread" in text


def test_the_audit_names_copies_on_top_of_its_tables(measured) -> None:
    text = written(measured)
    assert re.search(r'class="warning"><p>1 volume named as copies', text)
    assert "<td>[0.025, 1]</td><td>1 of 1</td>" in text and "<td>0.975</td><td>turned</td>" in text
    assert "<td>[0.5, 0.75]</td><td>2 training, 4 held out</td>" in text and "not measured: too few" in text
    write_json(measured / "audit.json", {"verdict": "audit not possible: few", "copy_rate": None})
    assert "<p>Audit not possible: few.</p>" in written(measured)


def test_what_is_missing_is_said_in_a_line(measured) -> None:
    (measured / "audit.json").unlink()
    text = written(measured)
    for line in (
        "Not measured: no audit.json was found",
        "Not shown: no synthetic volumes were given",
        "Not shown: no work folder was given",
        "Not shown: training curves and times are kept by a run",
    ):
        assert line in text


def test_a_folder_that_is_none_of_the_three_is_refused_with_what_it_must_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"of a run .* of a bundle .*generator\.json.* audit\.json .* holds notes\.txt", told)
    assert run(["report", str(tmp_path)]) == 2
    assert "give --out report.html" in capsys.readouterr().err
    with pytest.raises(FibldmError, match="must exist"):
        write_report(tmp_path / "gone", tmp_path / "report.html", ReportSettings())


def test_a_report_that_would_be_too_large_is_refused(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LARGEST", 1000)
    with pytest.raises(FibldmError, match="at most 0.001 MB"):
        written(measured)
    with pytest.raises(FibldmError, match="written to an .html file; got report.pdf"):
        write_report(measured, measured / "report.pdf", ReportSettings())


# --- volumes


def test_real_scans_are_left_out_unless_they_are_asked_for(measured, synthetic, work) -> None:
    """And then the page says on top that it is patient data."""
    text = written(measured, synthetic=synthetic, data=work)
    assert [view["what"] for view in index_of(text)["cases"][0]["views"]] == ["mask", "synthetic"]
    assert "PATIENT DATA" not in text and "Left out: real scans" in text
    picture = base64.b64encode(b"a picture of a patient").decode()
    assert picture not in text
    text = written(measured, synthetic=synthetic, data=work, with_real=True)
    shown = [view["what"] for view in index_of(text)["cases"][0]["views"]]
    nearest = "nearest training scan, similarity 0.975"
    assert shown == ["mask", "synthetic", nearest, "scan that the mask was drawn on"]
    assert "PATIENT DATA" in text and picture in text
    with pytest.raises(FibldmError, match="real scans are those of the work folder"):
        written(measured, synthetic=synthetic, with_real=True)


def test_volumes_of_other_weights_are_refused(measured, synthetic) -> None:
    content = read_json(measured / "evaluation" / "metrics.json")
    content["audit"] = dict(content["copies"])
    for part in content.values():
        part["drawn"]["weights"] = "cd" * 32
    write_json(measured / "evaluation" / "metrics.json", content)
    with pytest.raises(FibldmError, match="must be made with the weights of measured"):
        written(measured, synthetic=synthetic)


def test_data_that_the_generator_was_not_trained_on_are_refused(tiny_run: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="shows the data that the generator was trained on"):
        write_report(tiny_run, tmp_path / "report.html", ReportSettings(data=work))


def test_the_worst_is_shown_and_not_a_choice_of_beauty() -> None:
    cases = [{"case": f"c{number}", "dice": value} for number, value in enumerate((0.8, 0.5, 0.9, 0.7, 0.6, 0.65))]
    near = [{"synthetic": "c3.nii.gz", "train": "t.nii", "score": 0.5, "transform": ""}]
    subject = Subject("run", "r", figures={"faithfulness": {"figures": {}, "cases": cases}}, audit={"closest": near})
    chosen = choose([case["case"] for case in cases], subject, 5)
    assert chosen == {
        "c1": "lowest Dice (0.500)",
        "c3": "middle Dice (0.700) and closest to a training scan",
        "c2": "highest Dice (0.900)",
        "c0": "",
        "c4": "",
    }
    assert list(choose(["a", "b", "c", "d"], Subject("run", "r"), 2)) == ["a", "c"]


@pytest.mark.parametrize("stored", ["RAS", "LPS", "LAI", "SRA", "IPL"])
def test_letters_come_from_the_affine_however_a_file_is_stored(tmp_path: Path, stored: str) -> None:
    """A bright corner at the patient's right, front and bottom lies beside the letters R, A and I."""
    volume = np.zeros(SHAPE, dtype=np.uint8)
    volume[-4:, -5:, :3] = 255
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(stored)
    )
    image = nibabel.Nifti1Image(volume, np.diag([2.0, 3.0, 4.0, 1.0])).as_reoriented(turn)
    nibabel.save(image, tmp_path / "stored.nii.gz")
    scan = read_scan((tmp_path / "stored.nii.gz",))
    for plane in range(3):
        assert bright_sides(scan.array.astype(np.uint8), scan.affine, plane) == {"RA", "RI", "AI"} & {
            ("RA", "RI", "AI")[plane]
        }


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_an_array_that_was_never_turned_has_the_letters_of_its_affine(flips: tuple[int, ...]) -> None:
    """Where the affine of what is drawn is flipped, so are the letters: they are not those of a convention."""
    volume = np.zeros(SHAPE, dtype=np.uint8)
    volume[-4:, -5:, :3] = 255  # the high end of the first two axes, the low end of the last
    affine = np.diag([*flips, 1.0])
    ends = ["RL"[flips[0] < 0], "AP"[flips[1] < 0], "IS"[flips[2] < 0]]
    assert [bright_sides(volume, affine, plane) for plane in range(3)] == [
        {ends[0] + ends[1]},
        {ends[0] + ends[2]},
        {ends[1] + ends[2]},
    ]
    assert letters_of(np.eye(4), 0) == ("R", "L", "A", "P") and letters_of(np.eye(4), 2) == ("A", "P", "S", "I")


def bright_sides(voxels: np.ndarray, affine: np.ndarray, plane: int) -> set[str]:
    """The letters that stand at the bright sides of a slice as it is drawn."""
    axis = Figure().subplots()
    places = np.argwhere(voxels)
    x, y, z = (int(place) for place in places.mean(axis=0))
    draw(axis, Row("what", voxels, None, affine, False, (x, y, z)), plane)
    seen = np.asarray(axis.images[0].get_array())[::-1]
    rows, columns = np.nonzero(seen == seen.max())
    letters = {text.get_position(): text.get_text() for text in axis.texts}
    across = (0.02, 0.5) if columns.mean() < seen.shape[1] / 2 else (0.98, 0.5)
    up = (0.5, 0.98) if rows.mean() < seen.shape[0] / 2 else (0.5, 0.02)
    return {letters[across] + letters[up]}


def test_a_page_carries_the_voxels_that_it_shows(measured, synthetic, work) -> None:
    text = written(measured, synthetic=synthetic, data=work)
    index = index_of(text)
    mask, made = index["cases"][0]["views"]
    assert mask["voxels"] is None and mask["labels"] == made["labels"]
    assert made["letters"] == [list("RLAP"), list("RLSI"), list("APSI")] and made["shape"] == list(SHAPE)
    assert index["labels"]["5"]["name"] == "scar <i>" and index["planes"] == list(PLANES)
    voxels = carried(text, made["voxels"], made["shape"])
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[-4:, -5:, :3] = 255  # on RAS+ axes
    assert (voxels == expected).all()
    affine = np.array(made["affine"]).reshape(4, 4)
    assert np.allclose(affine[:3, :3], np.diag([4, 4, 6])) and np.allclose(affine[:3, 3], [-44, -60, 0])
    assert set(np.unique(carried(text, made["labels"], made["shape"]))) == {0, 5, 7, 255}


def carried(text: str, name: str, shape: list[int]) -> np.ndarray:
    written = re.search(f'id="{name}">([^<]*)<', text)[1]
    return np.frombuffer(gzip.decompress(base64.b64decode(written)), np.uint8).reshape(shape, order="F")


def test_volumes_for_which_there_is_no_room_are_made_coarser_in_place() -> None:
    """The middle of a block lies where the block lay."""
    voxels = np.random.default_rng(0).integers(0, 255, (24, 32, 40), dtype=np.uint8)
    view = View("synthetic", voxels, (voxels > 250).astype(np.uint8), np.diag([1.0, 2.0, 3.0, 1.0]))
    step = coarseness(view, 8000)
    assert 1 < step <= 3 and coarseness(view, 10**6) == 1
    blocks = _coarse(voxels, 2)
    assert blocks[0, 0, 0] == round(voxels[:2, :2, :2].mean()) and blocks.shape == (12, 16, 20)
    case = type("Case", (), {"views": [view], "name": "</script>"})
    payload = payload_of([case], {1: "one"}, 16000)
    entry = json.loads(payload.contents)["cases"][0]["views"][0]
    assert payload.coarsest == step and entry["coarse"] == step and "<" not in payload.contents
    assert np.allclose(np.array(entry["affine"]).reshape(4, 4)[:3, 3], (step - 1) / 2 * np.array([1, 2, 3]))


def test_slices_go_through_the_labels(labels: Volume) -> None:
    assert centre_of(labels.array, labels.array) == (1, 1, 1)
    assert centre_of(labels.array, None) == (8, 8, 5)


# --- training


def test_curves_skip_epochs_without_validation(tmp_path: Path) -> None:
    lines = "epoch,loss,validation_loss,seconds\n1,0.9,1.1,3\n2,0.7,,3\n3,0.5,0.8,3\n"
    (tmp_path / "metrics.csv").write_text(lines)
    losses = Losses.read("diffusion", tmp_path / "metrics.csv")
    assert losses.training == [(1, 0.9), (2, 0.7), (3, 0.5)] and losses.validation == [(1, 1.1), (3, 0.8)]
    assert losses.seconds == 9 and losses.epochs == 3
    picture = losses.picture()
    assert picture.alt.endswith("3 epochs: training loss from 0.9 to 0.5, validation loss from 1.1 to 0.8")
    training, validation = re.findall(r'<g class="\w+"><path d="M([^"]*)"', picture.svg)
    heights = [float(place.split()[1]) for place in (*training.split("L"), *validation.split("L"))]
    assert len(heights) == 5 and heights[3] < heights[0] < heights[4] < heights[1] < heights[2]


def test_a_run_has_curves_times_and_its_data(tiny_run: Path, tmp_path: Path) -> None:
    text = run_report(tiny_run, tmp_path)
    for stage in ("autoencoder", "diffusion", "controlnet"):
        assert f"{stage}: loss by epoch" in text
    weights = read_json(tiny_run / "controlnet" / "done.json")["weights"]
    assert weights in text and "Cases of each split, parted by patient" in text
    assert "Licence of the weights: not decided" in text and "Not for diagnosis" in text


def run_report(source: Path, folder: Path) -> str:
    assert run(["report", str(source), "--out", str(folder / "report.html")]) == 0
    return (folder / "report.html").read_text()


# --- bundles


def test_a_bundle_tells_the_hashes_of_its_manifest_and_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    text = run_report(tiny_bundle, tmp_path)
    manifest = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    told = read_json(tiny_bundle / "manifest.json")["sha256"]
    assert manifest in text and told["models/network.safetensors"] in text
    assert "Licence of the weights: CC0-1.0" in text


def test_the_bundle_of_a_measured_run_carries_a_report_without_volumes_and_names(
    tiny_run: Path, measured: Path, tmp_path: Path
) -> None:
    """And one of a run that was not measured carries none."""
    made = tmp_path / "run"
    shutil.copytree(tiny_run, made)
    export(made, tmp_path / "plain", ExportSettings("CC0-1.0"), also=bundle_report(made))
    assert not (tmp_path / "plain" / IN_BUNDLE).exists()
    content = read_json(measured / "evaluation" / "metrics.json")
    content["audit"] = dict(content["copies"])
    for part in content.values():
        part["drawn"]["weights"] = read_json(made / "controlnet" / "done.json")["weights"]
    write_json(made / "evaluation" / "metrics.json", content)
    write_json(made / "evaluation" / "audit" / "audit.json", audit([pair()]))
    export(made, tmp_path / "bundle", ExportSettings("CC0-1.0"), also=bundle_report(made))
    text = (tmp_path / "bundle" / IN_BUNDLE).read_text()
    assert IN_BUNDLE in read_json(tmp_path / "bundle" / "manifest.json")["sha256"]
    assert "[0.1, 0.15]" in text and "1 of 1 volumes are copies" in text and "loss by epoch" in text
    del content["audit"]  # what nobody knows the weights of stays here
    write_json(made / "evaluation" / "metrics.json", content)
    export(made, tmp_path / "other", ExportSettings("CC0-1.0"), also=bundle_report(made))
    assert "no audit.json was found" in (tmp_path / "other" / IN_BUNDLE).read_text()
    named = [
        entry["case"] for listed in read_json(made / "latents" / "latents.json")["items"].values() for entry in listed
    ]
    for name in (html.escape(NAME), html.escape(OTHER), "octet-stream", str(tmp_path), str(tiny_run), *named):
        assert name not in text
    assert "[name left out] is too &lt;smooth&gt;" in text


# --- NiiVue


def test_the_class_of_niivue_is_found_by_how_its_widget_uses_it() -> None:
    widget = 'var a="</script>",b=class{};\r\nfunction f(){q=new b(o);q.attachToCanvas(c)} // <!-- \n'
    program = module_of(widget)
    assert program is not None and program.endswith("\nconst FibldmNiivue = b;\n")
    assert "</script" not in program and "<!--" not in program and "\r" not in program
    assert module_of("nothing of it") is None and module_of("q.attachToCanvas(c)") is None


def test_three_dimensions_are_offered_where_niivue_is_installed(
    measured, synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "find_niivue", lambda: None)
    text = written(measured, synthetic=synthetic)
    assert 'id="space"' not in text and "wasm" not in text and 'id="at-axial"' in text
    monkeypatch.setattr(page, "find_niivue", lambda: NiiVue("const FibldmNiivue = 1;\n", "2.4", "terms <of> use"))
    text = written(measured, synthetic=synthetic)
    assert 'id="space"' in text and "terms &lt;of&gt; use" in text
    assert re.search(r"<script type=module>const FibldmNiivue = 1;\n// Three planes", text)


def test_without_the_package_there_is_no_niivue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(niivue, "PACKAGE", "a_package_that_nobody_has")
    assert niivue.find_niivue() is None


# --- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_without_a_network_shows_slices_with_their_letters_and_complains_of_nothing(
    measured, synthetic, tmp_path: Path
) -> None:
    written(measured, synthetic=synthetic)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    page_file = f"file://{tmp_path / 'report.html'}"
    made = subprocess.run(
        ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page_file],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = [line for line in made.stderr.splitlines() if "CONSOLE" in line and "fallback to software WebGL" not in line]
    assert said == []  # but for what some Chromium says of machines without a GPU
    assert '<div id="viewer">' in made.stdout  # shown by its program, which the policy lets run
    assert re.findall(r'aria-label="synthetic, (\w+) slice (\d+) of (\d+)"', made.stdout) == [
        ("axial", "2", "10"),
        ("coronal", "15", "16"),
        ("sagittal", "10", "12"),
    ]
    sides = re.findall(r'<span class="(?:left|right|top|bottom)">(.)</span>', made.stdout)
    assert "".join(sides) == 2 * "RLAPRLSIAPSI"
