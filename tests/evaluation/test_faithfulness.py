"""Whether volumes follow their masks, and what can be learned from them, by segmenters that threshold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.faithfulness import measure_faithfulness, measure_overlaps
from fibldm.evaluation.measurements import Measurements, evaluate
from fibldm.evaluation.results import Section, record
from fibldm.evaluation.utility import measure_utility
from fibldm.files import read_json, write_json
from fibldm.volumes.datalist import ANNOTATED, UNKNOWN_VOXELS
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import write_labels, write_synthetic

SPACING = (2.0, 3.0, 4.0)
SHAPE = (24, 20, 14)
AFFINE = np.diag([*SPACING, 1.0])
NAMES = {0: "background", 2: "lung", 5: "lesion"}
HU = {0: -1000, 2: 0, 5: 600}
LUNG_WIDTH = 10

Labels = NDArray[np.uint8]


class Thresholds:
    """Finds the labels by their HU, and counts what it is asked for."""

    fingerprint = "t" * 64

    def __init__(self) -> None:
        self.calls = 0

    def segment(self, image: NDArray[np.float32]) -> Labels:
        self.calls += 1
        return np.select([image > 0.3, image > -0.5], [5, 2], 0).astype(np.uint8)


def anatomy(patient: int) -> Labels:
    """A box of lung with a lesion in it, elsewhere in every patient."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    y = 1 + patient % 7
    labels[5 : 5 + LUNG_WIDTH, y : y + 8, 3:10] = 2
    labels[7:11, y + 2 : y + 5, 4:8] = 5
    return labels


def scan(labels: Labels, shift: int = 0) -> NDArray[np.int16]:
    """What shows these labels, moved along x."""
    return np.roll(np.vectorize(HU.get)(labels), shift, axis=0).astype(np.int16)


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """Ten patients, the last of them for training; the real scans lie a voxel off their masks."""
    work = tmp_path / "work"
    splits: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for patient in range(10):
        entry = {"case": f"p{patient}", "subject": f"p{patient}"}
        entry |= {"image": f"images/p{patient}.nii.gz", "label": f"labels/p{patient}.nii.gz"}
        write_labels(work / entry["label"], Volume(anatomy(patient), AFFINE))
        write_synthetic(work / entry["image"], Volume(scan(anatomy(patient), shift=1), AFFINE), {})
        splits["training" if patient == 9 else "test"].append(entry)
    write_json(work / "datalist.json", splits)
    return Evaluated(tmp_path / "run", work, ModelGrid(SPACING, SHAPE), Intensity("window"), NAMES)


Synthesize = Callable[..., list[Case]]


@pytest.fixture
def synthesize(evaluated: Evaluated, tmp_path: Path) -> Synthesize:
    """Writes volumes of patients' masks, each with a shift, as `fibldm synthesize` does."""

    def write(
        shifts: dict[int, list[int]], folder: str = "out", draw: Callable[[Labels], Labels] = lambda labels: labels
    ) -> list[Case]:
        for patient, values in shifts.items():
            write_labels(tmp_path / folder / "masks" / f"p{patient}.nii.gz", Volume(anatomy(patient), AFFINE))
            for number, shift in enumerate(values):
                volume = Volume(scan(draw(anatomy(patient)), shift), AFFINE)
                write_synthetic(tmp_path / folder / f"p{patient}_{number:03d}.nii.gz", volume, {})
        return evaluated.synthetic(tmp_path / folder)

    return write


def value(section: Section, name: str) -> float:
    measured = section.figures[name].value
    assert measured is not None
    return measured


def test_volumes_that_follow_their_masks_reach_one_and_shuffled_masks_do_not(
    evaluated: Evaluated, synthesize: Synthesize
) -> None:
    section = measure_faithfulness(evaluated, synthesize({0: [0, 0], 1: [0], 3: [0]}), Thresholds())
    for name in ("dice", "dice/lung", "dice/lesion"):
        assert (value(section, name), section.figures[name].n) == (1, 3)
        assert value(section, f"{name}/shuffled") < 0.9
    for measure in ("hd95", "assd", "volume_error", "volume_bias"):
        assert value(section, measure) == 0
    assert value(section, "hd95/lung/shuffled") == pytest.approx(SPACING[1] * (1 + 2 + 3) / 3)  # 0-1, 1-3, 3-0 in y
    assert [case["case"] for case in section.cases] == ["p0_000", "p0_001", "p1_000", "p3_000"]
    assert section.cases[0]["dice/lung"] == 1
    assert section.facts["segmenter"] == Thresholds.fingerprint
    assert section.facts["units"] == {"hd95": "mm", "assd": "mm"}
    written = read_json(record(evaluated.folder, "faithfulness", section))["faithfulness"]
    for figure in written["figures"].values():
        assert {"value", "low", "high", "n", "real_vs_real"} <= set(figure)


def test_the_ceiling_is_what_real_scans_of_the_same_patients_reach(
    evaluated: Evaluated, synthesize: Synthesize
) -> None:
    section = measure_faithfulness(evaluated, synthesize({0: [1], 4: [1]}), Thresholds())
    assert section.facts["ceiling"] == {"patients": 2, "same_patients": True}
    for name, figure in section.figures.items():
        if not name.endswith("/shuffled"):
            assert figure.real_vs_real == pytest.approx(figure.value), name  # moved as the real scans are
    assert section.figures["dice/lesion"].real_vs_real == pytest.approx(1 - 1 / 4)
    assert section.figures["dice/lung/shuffled"].real_vs_real is None
    assert not section.notes


def test_masks_of_training_patients_are_said_and_measured_against_all_test_scans(
    evaluated: Evaluated, synthesize: Synthesize
) -> None:
    section = measure_faithfulness(evaluated, synthesize({9: [2]}), Thresholds())
    assert section.facts["ceiling"] == {"patients": 9, "same_patients": False}
    assert section.figures["dice/lesion"].real_vs_real == pytest.approx(1 - 1 / 4)
    assert section.notes == [
        "The segmenter was trained on scans of 1 of the 1 patients whose masks were used, "
        "which may flatter these figures.",
        "All masks are of one patient, so there is no other mask to shuffle with.",
    ]
    assert not [name for name in section.figures if name.endswith("/shuffled")]


def test_the_further_a_volume_lies_from_its_mask_the_worse_it_is(evaluated: Evaluated, synthesize: Synthesize) -> None:
    sections = [
        measure_faithfulness(evaluated, synthesize({0: [shift], 1: [shift]}, f"moved-{shift}"), Thresholds())
        for shift in (0, 1, 2, 4)
    ]
    dices = [value(section, "dice/lesion") for section in sections]
    assert dices == pytest.approx([1, 3 / 4, 2 / 4, 0])
    assert [value(section, "hd95/lesion") for section in sections] == pytest.approx([0, 2, 4, 8])
    assert all(np.diff([value(section, "dice") for section in sections]) < 0)


def test_permuted_labels_are_worse_than_none(evaluated: Evaluated, synthesize: Synthesize) -> None:
    def permuted(labels: Labels) -> Labels:
        return np.select([labels == 2, labels == 5], [5, 2], 0).astype(np.uint8)

    section = measure_faithfulness(evaluated, synthesize({0: [0], 1: [0]}, draw=permuted), Thresholds())
    assert value(section, "dice") == value(section, "dice/lung") == value(section, "dice/lesion") == 0
    lesion, lung = 4 * 3 * 4, LUNG_WIDTH * 8 * 7 - 4 * 3 * 4
    assert value(section, "volume_bias/lesion") == pytest.approx(lung / lesion - 1)
    assert value(section, "volume_bias/lung") == pytest.approx(lesion / lung - 1)


def test_a_label_that_is_missing_counts_as_nothing_found(evaluated: Evaluated, synthesize: Synthesize) -> None:
    def healthy(labels: Labels) -> Labels:
        return np.where(labels == 5, 2, labels)

    section = measure_faithfulness(evaluated, synthesize({0: [0], 1: [0]}, draw=healthy), Thresholds())
    assert (value(section, "dice/lesion"), value(section, "volume_bias/lesion")) == (0, -1)
    assert value(section, "hd95/lesion") == pytest.approx(np.linalg.norm(np.multiply(SHAPE, SPACING)))


def test_dice_above_that_of_real_scans_is_said(evaluated: Evaluated, synthesize: Synthesize) -> None:
    sentence = "Dice above that of real scans for {}: what is easier to segment than a real scan may be simpler."
    few = measure_faithfulness(evaluated, synthesize({0: [0], 1: [0]}, "few"), Thresholds())
    assert few.notes == [sentence.format("lung (too few to say), lesion (too few to say)")]
    many = measure_faithfulness(evaluated, synthesize({n: [0] for n in range(9)}, "many"), Thresholds())
    assert many.notes == [sentence.format("lung, lesion")]
    # five volumes a voxel better than real ones and four a voxel worse: above, but within the interval
    mixed = synthesize({n: [0 if n < 5 else 2] for n in range(9)}, "mixed")
    unsure = measure_faithfulness(evaluated, mixed, Thresholds())
    figure = unsure.figures["dice/lung"]
    assert figure.low is not None and figure.real_vs_real is not None
    assert figure.low < figure.real_vs_real < value(unsure, "dice/lung")
    assert not unsure.notes


def test_small_labels_are_left_out_and_counted(evaluated: Evaluated, synthesize: Synthesize) -> None:
    volumes = synthesize({0: [0], 1: [0]})
    mask = anatomy(1)
    mask[mask == 5] = 2
    mask[7, 5, 4:13] = 5
    write_labels(volumes[1].label, Volume(mask, AFFINE))  # type: ignore[arg-type]
    section = measure_faithfulness(evaluated, volumes, Thresholds())
    assert section.facts["volumes_not_measured"] == {"lesion": 1}
    assert "dice/lesion" not in section.cases[1]
    assert (section.figures["dice/lesion"].n, section.figures["dice/lung"].n) == (1, 2)


def test_every_volume_is_segmented_once(evaluated: Evaluated, synthesize: Synthesize) -> None:
    segmenter, volumes = Thresholds(), synthesize({0: [2, 3], 1: [4]})
    first = measure_faithfulness(evaluated, volumes, segmenter)
    assert segmenter.calls == 3 + 2  # and the two real scans
    assert measure_faithfulness(evaluated, volumes, segmenter) == first
    assert segmenter.calls == 3 + 2


def test_volumes_without_masks_or_labels_are_refused(evaluated: Evaluated, synthesize: Synthesize) -> None:
    volumes = synthesize({0: [0], 1: [0]})
    write_labels(volumes[0].label, Volume(np.zeros(SHAPE, np.uint8), AFFINE))  # type: ignore[arg-type]
    assert measure_faithfulness(evaluated, volumes, Thresholds()).facts["volumes_not_measured"] == {
        "lung": 1,
        "lesion": 1,
    }
    with pytest.raises(FibldmError, match=r"at least 10 voxels of a label .* none of 1 has as many of lung, lesion;"):
        measure_faithfulness(evaluated, volumes[:1], Thresholds())
    volumes[1].label.unlink()  # type: ignore[union-attr]
    with pytest.raises(FibldmError, match="faithfulness needs the mask of every volume; p1_000 came without"):
        measure_faithfulness(evaluated, evaluated.synthetic(volumes[1].image.parent), Thresholds())


@pytest.mark.parametrize("name", ["faithfulness", "realism", "utility"])
def test_missing_masks_are_refused_before_a_segmenter_is_trained(
    evaluated: Evaluated, synthesize: Synthesize, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (volume,) = synthesize({0: [0]})
    volume.label.unlink()  # type: ignore[union-attr]
    monkeypatch.setattr(Evaluated, "open", lambda *_: evaluated)
    monkeypatch.setattr(Measurements, "segmenter", property(lambda _: pytest.fail("it was trained")))
    with pytest.raises(FibldmError, match=f"{name} needs the mask of every volume; p0_000 came without"):
        evaluate([name], run_dir=evaluated.run_dir, work=evaluated.work, synthetic=volume.image.parent)


# --- utility


class Learned(Thresholds):
    """Learned from volumes: finds the labels as far off as those lay, and remembers what it saw."""

    def __init__(self, cases: list[Case], shift: int) -> None:
        super().__init__()
        self.cases, self.shift, self.fingerprint = [case.name for case in cases], shift, "l" * 64

    def segment(self, image: NDArray[np.float32]) -> Labels:
        return np.roll(super().segment(image), self.shift, axis=0)


def test_utility_is_what_synthetic_volumes_teach_beside_what_real_scans_teach(
    evaluated: Evaluated, synthesize: Synthesize
) -> None:
    """The real scans lie a voxel off: the one segmenter finds them so, the other, taught to look back, exactly."""
    taught: list[Learned] = []

    def train(cases: list[Case]) -> Learned:
        taught.append(Learned(cases, shift=-1))
        return taught[-1]

    section = measure_utility(evaluated, synthesize({9: [0, 1], 0: [0]}), Thresholds(), train)
    assert taught[0].cases == ["p9_000", "p9_001"]
    assert section.notes == ["1 volumes of masks of validation or test patients were left out."]
    assert section.facts["volumes"] == 2 and section.facts["real_training_scans"] == 1
    lesion = 1 - 1 / 4
    assert section.figures["dice/lesion"].real_vs_real == pytest.approx(lesion)
    assert value(section, "dice/lesion") == value(section, "dice") == 1
    assert section.figures["utility"].real_vs_real == 1
    assert value(section, "utility") == pytest.approx(2 / (section.figures["dice/lung"].real_vs_real + lesion))
    assert section.figures["utility"].n == 9 and section.figures["utility"].low is not None


def test_volumes_of_test_masks_teach_nothing(evaluated: Evaluated, synthesize: Synthesize) -> None:
    with pytest.raises(FibldmError, match="all of these are of validation or test patients; synthesize from the masks"):
        measure_utility(evaluated, synthesize({0: [0], 3: [0]}), Thresholds(), lambda cases: Thresholds())


def test_what_is_found_of_an_annotated_label_outside_is_wrong_and_of_others_nothing_is_said(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    """Nobody drew the lesion; the volume shows it, and lung where there is none; only one of them is a fault."""
    labels, shown = anatomy(0), anatomy(0)
    shown[:2] = 2
    image, mask = tmp_path / "q.nii.gz", tmp_path / "q_mask.nii.gz"
    write_synthetic(image, Volume(scan(shown), AFFINE), {})
    write_labels(mask, Volume(np.where(labels == 2, 2, UNKNOWN_LABEL).astype(np.uint8), AFFINE))
    lung, wrong = int((labels == 2).sum()), int((shown[:2] == 2).sum())

    def measured(annotated: tuple[int, ...] | None) -> dict[str, float]:
        case = Case("q", "q", "test", image, mask, annotated=annotated)
        (row,) = measure_overlaps(evaluated, [(case, case)], Thresholds())  # type: ignore[arg-type]
        return {name: figure for name, figure in row.values.items() if name.startswith("dice/")}

    assert measured((2,)) == {"dice/lung": pytest.approx(2 * lung / (2 * lung + wrong))}
    assert measured(None) == {"dice/lung": 1}


def test_cases_of_the_work_folder_and_volumes_of_their_masks_know_what_was_annotated(
    evaluated: Evaluated, synthesize: Synthesize
) -> None:
    datalist = read_json(evaluated.work / "datalist.json")
    datalist["test"][0][ANNOTATED] = [2]
    datalist["test"][1] |= {ANNOTATED: [2], UNKNOWN_VOXELS: True}
    write_json(evaluated.work / "datalist.json", datalist)
    known = {case.name: case.annotated for case in (*evaluated.real("test"), *synthesize({0: [0], 1: [0], 2: [0]}))}
    assert [known[name] for name in ("p0", "p1", "p2", "p0_000", "p1_000")] == [(2,), None, None, (2,), None]
