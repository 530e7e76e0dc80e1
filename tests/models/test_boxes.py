"""Boxes as a condition: as they are written, rasterised, taken from masks, placed, refused, learned and asked for."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import script, with_latents_of
from conftest import TinyStage

from fibldm import UNKNOWN_LABEL
from fibldm.cli import run as cli
from fibldm.cli.synthesis_options import with_boxes
from fibldm.datasets.boxes import write_boxes
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.models.conditions.box_cells import Span, coverage, spans_of
from fibldm.models.conditions.box_texts import Box, read_boxes
from fibldm.models.conditions.boxes import BoxClass, BoxEmbedding, BoxEncoding, Layout
from fibldm.models.conditions.condition import Case
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.writer import sidecar

CLASSES = {
    "tumour": BoxClass(4, (4.0, 4.0, 4.0), (40.0, 40.0, 40.0), 2),
    "lung": BoxClass(1, (20.0, 20.0, 20.0), (60.0, 60.0, 60.0), 2),
}
BOXES = BoxEncoding(CLASSES, (4, 4, 2), (2.0, 2.0, 4.0))
# turned about the head-foot axis by 30 degrees, anisotropic, away from the origin
TURNED = np.array(
    [
        [2 * np.cos(0.5), -2 * np.sin(0.5), 0, -11],
        [2 * np.sin(0.5), 2 * np.cos(0.5), 0, 7],
        [0, 0, 4, 30],
        [0, 0, 0, 1.0],
    ]
)
GRID = Grid((32, 24, 16), TURNED)


def asked(text: Any, grid: Grid = GRID) -> torch.Tensor:
    return BOXES.encode([BOXES.place(BOXES.read(text), grid)])


# --- as they are written


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("tumour 40x30x20mm at 10,-20,35", Box("tumour", (10, -20, 35), (40, 30, 20))),
        ("left lung 40 x 30 x 20 at 10, -20.5, .5 mm", Box("left lung", (10, -20.5, 0.5), (40, 30, 20))),
        ("label 3 4x3x2 mm at 1,2,3", Box("label 3", (1, 2, 3), (4, 3, 2))),
        ("lung 4x3x2 voxels at 1,2,3 vox", Box("lung", (1, 2, 3), (4, 3, 2), "voxels", "voxels")),
        ("lung 10%x20%x30% at 50%,40%,60%", Box("lung", (50, 40, 60), (10, 20, 30), "%", "%")),
        ("lung 1.5×2×3MM AT 50,40,60%", Box("lung", (50, 40, 60), (1.5, 2, 3), "%")),
    ],
)
def test_boxes_are_read_as_people_write_them(text: str, box: Box) -> None:
    assert read_boxes(text) == (box,) and read_boxes(str(box)) == (box,)


def test_boxes_come_as_texts_rows_and_mappings() -> None:
    one, two = Box("lung", (1, 2, 3), (4, 5, 6)), Box("4", (50, 50, 50), (10, 10, 10), "%", "%")
    text = {"class": "4", "centre": [50, 50, 50], "size": [10, 10, 10], "unit": "relative"}
    assert read_boxes([[1, 2, 3, 4, 5, 6, "lung"], text]) == (one, two)
    assert read_boxes("lung 4x5x6mm at 1,2,3; 4 10x10x10% at 50,50,50%") == (one, two)
    assert read_boxes(["lung 4x5x6mm at 1,2,3"]) == read_boxes([1, 2, 3, 4, 5, 6, "lung"]) == (one,)
    assert read_boxes("None") == read_boxes([]) == ()
    assert BOXES.read("4 8x8x8mm at 1,2,3") == BOXES.read("TUMOUR 8x8x8mm at 1,2,3")
    assert BOXES.read(BOXES.recorded(BOXES.read("lung 4x5x6% at 1,2,3"))) == BOXES.read("lung 4x5x6% at 1,2,3")


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "lung",
        "lung 4x5mm at 1,2,3",
        "lung 4x5x6mm at 1,2",
        "lung 4x5x6mm 1,2,3",
        "lung 4x5x6cm at 1,2,3",
        "lung 4x5x6mm at 1%,2,3mm",
        "lung 4x0x6mm at 1,2,3",
        "lung 4x5x6mm at 1;2;3",
        [[1, 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5, float("nan"), "lung"]],
        [[1, 2, 3, 4, 5, -6, "lung"]],
        {"class": "lung", "center": [1, 2, 3], "size": [1, 2, 3]},
        [{"class": "lung", "centre": [1, 2, 3], "size": [1, 2, 3], "unit": "cm"}],
        [None],
        [True, 2, 3, 4, 5, 6, "lung"],
    ],
)
def test_what_is_no_box_is_refused(wrong: Any) -> None:
    with pytest.raises(FibldmError, match="a box must have a class, and numbers for place and size above 0, such as"):
        BOXES.read(wrong)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(FibldmError, match=r"such as .*; got 'one', 'two 1x2'"):
        read_boxes("one; tumour 8x8x8mm at 1,2,3; two 1x2")
    with pytest.raises(FibldmError, match=r"of the classes of training \(tumour, lung\); got liver, 7$"):
        BOXES.read("liver 8x8x8mm at 1,2,3; tumour 8x8x8mm at 1,2,3; 7 8x8x8mm at 1,2,3; liver 9x9x9mm at 1,2,3")
    with pytest.raises(FibldmError, match="boxes must be a text or a list; got 3"):
        BOXES.read(3)
    with pytest.raises(FibldmError, match="boxes must be asked for once; got --box and --condition boxes"):
        with_boxes({"boxes": "none"}, ["none"])
    assert with_boxes({"field": "3"}, ["a", "b"]) == {"field": "3", "boxes": "a;b"} and with_boxes({}, []) == {}


# --- rasterised


def test_coverage_is_that_of_fine_samples() -> None:
    """Overlapping, nested, cut by the volume's faces, and smaller than a cell; a face may lie on that of a cell."""
    rng = np.random.default_rng(0)
    cells, factors, parts = (3, 4, 2), (4, 2, 3), 20
    sides = [(np.arange(n * f * parts) + 0.5) / parts for n, f in zip(cells, factors, strict=True)]
    for _ in range(5):
        low = rng.integers(-20, 200, (4, 3)) / parts  # on the samples' faces, so that these are exact
        high = low + rng.integers(1, 100, (4, 3)) / parts
        fine = np.zeros([len(side) for side in sides], dtype=bool)
        for one, other in zip(low, high, strict=True):
            inside = [(a < side) & (side < b) for a, side, b in zip(one, sides, other, strict=True)]
            fine |= inside[0][:, None, None] & inside[1][:, None] & inside[2]
        blocks = [part for n, f in zip(cells, factors, strict=True) for part in (n, f * parts)]
        expected = fine.reshape(blocks).mean(axis=(1, 3, 5))
        spans = [Span(tuple(one), tuple(other)) for one, other in zip(low, high, strict=True)]
        assert np.allclose(coverage(spans, cells, factors), expected, atol=1e-5)
        assert np.allclose(coverage(spans[::-1], cells, factors), expected, atol=1e-5)
    assert not coverage([], cells, factors).any()
    assert (coverage([Span((-9, -9, -9), (99, 99, 99))], cells, factors) == 1).all()


def test_order_says_nothing_and_classes_do_not_hide_each_other() -> None:
    one, two, three = (f"{name} 20x20x20mm at {x}%,50%,50%" for name, x in (("lung", 40), ("tumour", 45), ("lung", 55)))
    made = asked(";".join((one, two, three)))
    assert made.shape == (1, *BOXES.shape((8, 6, 8))) and torch.equal(made, asked([three, two, one]))
    tumour, lung = made[0, :2]
    assert torch.equal(tumour, asked(two)[0, 0]) and torch.equal(lung, asked([one, three])[0, 1])
    assert tumour.max() == 1 and lung.max() <= 1 and not made[:, 2:].any()
    volume = 4 * 4 * 2 * 2 * 2 * 4  # of a cell in mm
    assert tumour.sum() * volume == pytest.approx(20**3, rel=1e-4)


def test_an_embedding_is_the_mean_where_classes_overlap() -> None:
    embedding = BoxEmbedding(BOXES, 5)
    covered = torch.zeros(1, 4, 6, 1, 1)
    covered[0, :, :, 0, 0] = torch.tensor([[1, 0, 1, 0.5, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6])
    made = embedding(covered)[0, :, :, 0, 0].T
    tumour, lung = embedding.classes
    expected = [tumour, lung, (tumour + lung) / 2, (tumour + embedding.nothing) / 2, embedding.nothing]
    torch.testing.assert_close(made, torch.stack([*expected, embedding.nothing + embedding.unknown[0]]))


def test_nothing_said_is_another_thing_than_no_box() -> None:
    nothing, none, one = asked(None), asked("none"), asked("tumour 8x8x8mm at 50%,50%,50%")
    assert torch.equal(nothing, BOXES.null(one)) and (nothing[:, 2:] == 1).all() and not nothing[:, :2].any()
    assert not none.any() and one[:, 0].any() and not one[:, 1].any()
    embedding = BoxEmbedding(BOXES, 5)
    assert not torch.allclose(embedding(nothing), embedding(none))
    lung = asked("lung 20x20x20mm at 50%,50%,50%; tumour 8x8x8mm at 50%,50%,50%")
    dropped = BOXES.drop(lung, torch.tensor([[False, True]]))
    assert torch.equal(dropped[:, [0, 2]], lung[:, [0, 2]])
    assert not dropped[:, 1].any() and (dropped[:, 3] == 1).all()


def test_a_batch_may_have_any_numbers_of_boxes() -> None:
    texts = [
        None,
        "none",
        "tumour 8x8x8mm at 50%,50%,50%",
        "lung 20x20x20% at 20%,50%,50%; lung 20x20x20% at 70%,50%,50%",
    ]
    batch = BOXES.encode([BOXES.place(BOXES.read(text), GRID) for text in texts])
    assert torch.equal(batch, torch.cat([asked(text) for text in texts]))
    with pytest.raises(FibldmError, match="boxes must be on a model grid to be encoded"):
        BOXES.encode([BOXES.read(texts[2])])


# --- of masks


def mask() -> torch.Tensor:
    """A lung of two parts, one of which is turned away from the axes, and three tumours, one of them too small."""
    labels = torch.zeros(1, 32, 24, 16, dtype=torch.uint8)
    labels[0, 2:10, 3:20, 1:15] = 1
    for step in range(10):
        labels[0, 18 + step, 5 + step, 4:9] = 1  # connected by edges
    labels[0, 4:6, 8:11, 3:5] = 4
    labels[0, 6, 11:13, 5:8] = 4  # touches it with a corner only
    labels[0, 12:16, 2:4, 9:12] = 4
    labels[0, 30, 1, 1] = 4
    return labels


def test_boxes_of_a_mask_are_the_extents_of_its_parts() -> None:
    voxels = mask()[0].numpy()
    assert spans_of(voxels, 4, 8) == [Span((4, 8, 3), (7, 13, 8)), Span((12, 2, 9), (16, 4, 12))]
    assert len(spans_of(voxels, 4, 1)) == 3 and spans_of(voxels, 7, 1) == [] and spans_of(voxels, 4, 50) == []
    assert spans_of(voxels, 1, 8) == [Span((2, 3, 1), (10, 20, 15)), Span((18, 5, 4), (28, 15, 9))]


def test_a_mask_says_what_its_boxes_say_when_they_are_asked_for() -> None:
    encoded = BOXES.encode_case(Case(mask(), {}))
    texts = ["4 3x5x5 voxels at 5.5,10.5,5.5 voxels", "4 4x2x3 voxels at 14,3,10.5 voxels"]
    texts += ["1 8x17x14 voxels at 6,11.5,8 voxels", "1 10x10x5 voxels at 23,10,6.5 voxels"]
    torch.testing.assert_close(encoded[None], asked(texts))


def test_flips_of_a_mask_flip_its_boxes() -> None:
    encoded = BOXES.encode_case(Case(mask(), {}))
    for axis in (1, 2, 3):
        torch.testing.assert_close(BOXES.encode_case(Case(mask().flip(axis), {})), encoded.flip(axis))


def test_where_a_mask_is_unknown_boxes_are() -> None:
    """As outside of a volume that is smaller than the model grid."""
    unknown = torch.full_like(mask(), UNKNOWN_LABEL)
    assert torch.equal(BOXES.encode_case(Case(unknown, {}))[None], asked(None))
    padded = mask()
    padded[:, :, :, 13:] = UNKNOWN_LABEL
    made = BOXES.encode_case(Case(padded, {}))[2:]
    assert torch.equal(made[:, :, :, 6], torch.full((2, 8, 6), 0.5)) and (made[..., 7] == 1).all()
    assert not made[..., :6].any()
    field = Grid((32, 24, 13), TURNED)
    layout = BOXES.place(BOXES.within(BOXES.read("none"), field), GRID)
    torch.testing.assert_close(BOXES.encode([layout])[0, 2:], made)


def test_training_tells_classes_sizes_and_numbers() -> None:
    names = {"0": "background", "1": "lung", "4": "tumour", "9": "ghost"}

    def fitted(**choices: Any) -> BoxEncoding:
        masks = [mask(), torch.zeros_like(mask())]
        return BoxEncoding.fit(masks, names=names, compression=(4, 4, 2), spacing=(2.0, 2.0, 4.0), **choices)

    made = fitted()
    assert made.parts == ("lung", "tumour")
    assert made.classes["tumour"] == BoxClass(4, (6.0, 4.0, 12.0), (8.0, 10.0, 20.0), 2)
    assert fitted(classes=[4]).parts == ("tumour",) == fitted(classes=["tumour"]).parts
    assert fitted(smallest=1).classes["tumour"].most == 3
    for choices, message in (
        ({"classes": ["tumour", "ghost"]}, "occur in a training case .* in one piece; ghost does not"),
        ({"smallest": 100_000}, "at least 100000 voxels in one piece; lung, tumour, ghost does not"),
        ({"classes": ["liver"]}, "must be some of the labels 1 lung, 4 tumour, 9 ghost; got liver"),
        ({"classes": []}, "got none"),
        ({"smallest": 0}, "must have at least 1 voxel; got 0"),
    ):
        with pytest.raises(FibldmError, match=message):
            fitted(**choices)
    with pytest.raises(FibldmError, match="several are called lung"):
        BoxEncoding.fit([mask()], names={1: "lung", 4: "lung"}, compression=(4, 4, 2), spacing=(2, 2, 4))


# --- placed and compared


def test_a_box_is_at_the_same_place_in_every_unit() -> None:
    """Of a turned grid: mm are RAS+, extents go along the axes; the field may be a part of the model grid."""
    centre = TURNED @ [9.5, 11.5, 5.5, 1]
    mm = f"tumour 8x12x16mm at {','.join(f'{place:.6f}' for place in centre[:3])}"
    voxels, relative = "tumour 4x6x4 voxels at 10,12,6 voxels", "tumour 12.5x25x25% at 31.25,50,37.5%"
    for text in (voxels, relative):
        torch.testing.assert_close(asked(text), asked(mm), atol=1e-4, rtol=0)
    part = Grid((16, 24, 16), TURNED @ np.array([[1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    for text in ("tumour 4x6x4 voxels at 6,12,6 voxels", "tumour 25x25x25% at 37.5,50,37.5%", mm):
        layout = BOXES.place(BOXES.within(BOXES.read(text), part), GRID)
        torch.testing.assert_close(BOXES.encode([layout])[:, :2], asked(mm)[:, :2], atol=1e-4, rtol=0)


def test_boxes_out_of_the_volume_or_unlike_training_are_refused() -> None:
    for text in ("tumour 8x8x8mm at 1%,50%,50%", "tumour 4x4x4 voxels at 31,12,8 voxels", "tumour 8x8x8mm at 900,0,0"):
        with pytest.raises(
            FibldmError, match=r"boxes must lie inside the volume, 64 x 48 x 64 mm from .*; tumour .* does"
        ):
            BOXES.within(BOXES.read(f"lung 20x20x20mm at 50%,50%,50%; {text}"), GRID)
    assert BOXES.within(None, GRID) is None

    def outside(text: str) -> list[str]:
        return BOXES.outside(BOXES.within(BOXES.read(text), GRID))

    assert (
        outside("tumour 40x40x4mm at 50%,50%,50%; tumour 40.9x3.1x3mm at 50%,50%,50%; lung 20x20x20mm at 50%,50%,50%")
        == []
    )
    (told,) = outside("tumour 40x42x4mm at 50%,50%,50%")
    assert told.startswith("tumour 40x42x4mm at ") and told.endswith(" (training 4x4x4 to 40x40x40 mm)")
    assert "(training 20x20x20 to 60x60x60 mm)" in outside("lung 5x5x5 voxels at 50%,50%,50%")[0]
    assert outside(";".join(["tumour 8x8x8mm at 50%,50%,50%"] * 3)) == ["3 boxes of tumour (training at most 2)"]
    with pytest.raises(FibldmError, match="boxes must lie within what the training data covered; 3 boxes of tumour"):
        BOXES.check(BOXES.read(["tumour 8x8x8mm at 1,1,1"] * 3), allow=False)
    assert BOXES.outside(None) == [] == BOXES.outside(Layout(None))


def test_a_sidecar_records_boxes_in_mm() -> None:
    layout = BOXES.place(BOXES.read("4 4x6x4 voxels at 10,12,6 voxels"), GRID)
    centre = [round(float(place), 3) for place in (TURNED @ [9.5, 11.5, 5.5, 1])[:3]]
    recorded = BOXES.recorded(layout)
    assert recorded == [
        {"class": "tumour", "centre": centre, "centre_in": "mm", "size": [8.0, 12.0, 16.0], "size_in": "mm"}
    ]
    torch.testing.assert_close(asked(json.loads(json.dumps(recorded))), BOXES.encode([layout]), atol=1e-3, rtol=0)
    assert BOXES.recorded(None) is None is BOXES.recorded(Layout(None)) and BOXES.recorded(Layout(())) == []
    assert (BOXES.told(None), BOXES.told(Layout(()))) == ("unknown", "none")
    assert BOXES.facts()["lung"] == {
        "label": 1,
        "smallest_mm": (20.0, 20.0, 20.0),
        "largest_mm": (60.0, 60.0, 60.0),
        "most": 2,
    }


# --- from a work folder to volumes


def test_boxes_of_a_work_folder_come_as_a_table(phantom_work: Path, tmp_path: Path) -> None:
    """Whose last column can be asked for."""
    for name in ("images", "labels"):
        (tmp_path / name).symlink_to(phantom_work / name)
    datalist = read_json(phantom_work / "datalist.json")
    write_json(tmp_path / "datalist.json", datalist)
    count = write_boxes(tmp_path)
    rows = list(csv.DictReader((tmp_path / "boxes.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == count > 0 and {row["class"] for row in rows} <= {*datalist["labels"].values()}
    row = rows[-1]
    case = next(
        case for split in ("training", "validation", "test") for case in datalist[split] if case["case"] == row["case"]
    )
    volume = read_volume(str(phantom_work / case["label"]))
    spans = [Span(*ends) for ends in spans_of(volume.canonical().array, int(row["label"]), 8)]
    lengths = [(np.array(span.high) - span.low) * volume.canonical().grid.spacing for span in spans]
    assert any(np.allclose(length, [float(row[name]) for name in ("dx", "dy", "dz")], atol=1e-3) for length in lengths)
    (box,) = read_boxes(row["box"])
    assert box.name == row["class"] and box.centre == tuple(float(row[name]) for name in ("x", "y", "z"))


@pytest.fixture(scope="module")
def boxed(tiny_run: Path, tiny_stage: TinyStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 2 knows boxes and no mask."""
    run = with_latents_of(tiny_run, tmp_path_factory.mktemp("boxes") / "run")
    tiny_stage("diffusion", run, "boxes", preview_every=1).run()
    return run


@pytest.mark.slow
def test_boxes_steer_without_a_mask_from_training_to_the_bundle(
    boxed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list((boxed / "diffusion" / "previews").glob("*.png"))
    synthesizer = Synthesizer.from_run(boxed, unconditional=True)
    kind = synthesizer.conditions["boxes"]
    assert isinstance(kind, BoxEncoding) and synthesizer.network.sees == {"boxes"}
    name, known = next(iter(kind.classes.items()))
    size = "x".join(f"{length:g}" for length in known.low)
    box = f"{name} {size}mm at 40%,50%,60%"
    command = ["synthesize", "--run", str(boxed), "--out", str(tmp_path / "out"), "--sampler", "ddim", "--steps", "2"]
    assert cli([*command, "--guidance", "2", "--box", box, "--json"]) == 0
    (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    (recorded,) = read_json(sidecar(Path(path)))["conditions"]["boxes"]
    assert recorded["class"] == name and recorded["centre_in"] == "mm"
    assert np.allclose(recorded["centre"], [-32, 0, 32]) and np.allclose(recorded["size"], known.low, atol=1e-3)
    for wrong, message in (
        (["--box", f"{name} {size}mm at 100%,50%,50%"], "boxes must lie inside the volume"),
        (["--box", "ghost 40x40x40mm at 0,0,0"], "boxes must be of the classes of training"),
        (["--box", f"{name} 300x300x300mm at 0,0,0"], "boxes must lie within what the training data covered"),
        (["--box", "ghost"], "a box must have a class, and numbers"),
        (["--box", box, "--condition", "boxes=none"], "boxes must be asked for once"),
    ):
        capsys.readouterr()
        assert cli([*command[:4], str(tmp_path / "wrong"), *command[5:], *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    def volume(made: Synthesizer, boxes: Any) -> Any:
        settings = SamplingSettings(sampler="ddim", steps=2, guidance=2.0)
        return made(conditions={"boxes": boxes}, settings=settings, allow_extrapolation=True)

    drawn = [volume(synthesizer, boxes).volume.array for boxes in (box, "none", None)]
    assert not any(np.array_equal(drawn[one], drawn[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    row = [*recorded["centre"], *recorded["size"], name]
    assert np.allclose(volume(synthesizer, [row]).volume.array, drawn[0], atol=1e-2)
    assert volume(synthesizer, f"{name} 300x300x300mm at 0,0,0").provenance["extrapolation"]

    export(boxed, tmp_path / "bundle", ExportSettings("CC0-1.0", unconditional=True))
    bundled = Synthesizer.from_bundle(tmp_path / "bundle")
    assert bundled.conditions["boxes"] == kind
    assert np.array_equal(volume(bundled, box).volume.array, drawn[0])
    card = (tmp_path / "bundle" / "docs" / "README.md").read_text()
    assert f"| {name} | {known.value} |" in card and "--box" in card


@pytest.mark.slow
def test_boxes_beside_a_mask_are_those_of_the_masks_own_volume(
    tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path, mask_file: Path
) -> None:
    """With a ControlNet above it, and of a mask that is smaller than the model grid, in another order of axes."""
    run = with_latents_of(tiny_run, tmp_path / "run")
    tiny_stage("diffusion", run, "mask_concat", "boxes").run()
    tiny_stage("controlnet", run, "mask_concat", "boxes").run()
    synthesizer = Synthesizer.from_run(run)
    assert synthesizer.network.sees == {"mask", "boxes"}
    whole = read_volume(str(mask_file))
    part = Volume(
        whole.array[::-1, 4:],
        whole.affine @ np.array([[-1, 0, 0, len(whole.array) - 1], [0, 1, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    )
    name = next(iter(synthesizer.conditions["boxes"].parts))
    text = f"{name} 20x20x20% at 30%,50%,50%"
    made = synthesizer(part, conditions={"boxes": text}, steps=1, allow_extrapolation=True)
    (recorded,) = made.provenance["conditions"]["boxes"]
    field = part.canonical().grid
    place = np.linalg.solve(field.affine[:3, :3], np.array(recorded["centre"]) - field.affine[:3, 3]) + 0.5
    assert np.allclose(place / field.shape, [0.3, 0.5, 0.5], atol=1e-3)


# --- the measurement


def test_the_measurement_finds_the_balls_of_its_own_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = script("measure_boxes", monkeypatch)
    rows = []
    for number in range(4):
        grey, _ = measuring.phantom(np.random.default_rng([0, number]), 48)
        balls = measuring.draw_balls(np.random.default_rng([0, number]), 48)
        assert all(len(read_boxes(ball.text)) == 1 for ball in balls)
        rows.append(measuring.compared(balls, measuring.parts_of(grey, 48), 4))
    assert {name for row in rows for name in row["asked"]} == {"bright", "dark"}
    perfect = measuring.figures(rows)
    assert perfect["centres found"] == perfect["absent"] == 1 and perfect["extent r"] > 0.98
    empty = [row | {"there": [], "boxes": [box | {"within_a_cell": False} for box in row["boxes"]]} for row in rows]
    assert measuring.figures(empty)["centres found"] == 0 and measuring.figures(empty)["extent r"] is None
    assert measuring.figures([{"asked": [], "there": ["dark"], "boxes": []}])["absent"] == 0.5
