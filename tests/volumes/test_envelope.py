"""The envelope of the training data: B20 (what lies outside is refused or said), A27 (masks of any size)."""

import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import Volume

ENVELOPE = Envelope(
    spacing=((1.0, 2.0), (1.0, 2.0), (2.0, 5.0)),
    field_of_view=((40.0, 60.0), (40.0, 60.0), (80.0, 100.0)),
    label_volume={0: (1.0, 1.0), 1: (4.0, 8.0), 2: (0.0, 1.0)},
)


def mask(spacing=(2.0, 2.0, 4.0), shape=(25, 25, 22), filled: int = 300, label: int = 1) -> Volume:
    """So many voxels of a label; the defaults lie inside (4.8 ml of label 1)."""
    labels = np.zeros(shape, dtype=np.uint8)
    labels.reshape(-1)[:filled] = label
    return Volume(labels, np.diag([*spacing, 1.0]))


def test_a_mask_like_those_of_training_has_no_findings():
    assert ENVELOPE.outside(mask()) == []
    assert ENVELOPE.check(mask(), allow=False) == []


@pytest.mark.parametrize(
    ("labels", "finding"),
    [
        (mask((2.6, 2.0, 4.0), (20, 25, 22)), r"spacing along R 2.60 mm \(training up to 2.00 mm\)"),
        (mask((2.0, 2.0, 6.3), (25, 25, 14)), r"spacing along S 6.30 mm"),
        (mask(shape=(25, 14, 22)), r"field of view along A 28 mm \(training 40-60 mm\)"),
        (mask(shape=(25, 25, 32)), r"field of view along S 128 mm \(training 80-100 mm\)"),
        (mask(filled=1100), r"label 1 fills 17.6 ml \(training 4.0-8.0 ml\)"),
        (mask(filled=100), r"label 1 fills 1.6 ml"),
        (mask(filled=200, label=2), r"label 2 fills 3.2 ml \(training 0.0-1.0 ml\)"),
        (mask(filled=0), "no voxel has a label"),
    ],
)
def test_one_finding_for_each_thing_that_lies_outside(labels, finding):
    """Refused, unless it is allowed and then told."""
    with pytest.raises(FibldmError, match=finding) as refused:
        ENVELOPE.check(labels, allow=False)
    assert "`allow_extrapolation`" in refused.value.remedy
    (told,) = ENVELOPE.check(labels, allow=True)
    assert told in refused.value.message


@pytest.mark.parametrize(
    "labels",
    [
        mask((2.5, 2.0, 4.0), (20, 25, 22), filled=240),
        mask((0.5, 0.5, 1.0), (100, 100, 88), filled=20000),
        mask(shape=(16, 37, 31)),
        mask(filled=130),
        mask(filled=990),
        mask(filled=25 * 25 * 22, label=255),
    ],
    ids=["coarser by a quarter", "finer", "views within a quarter", "half", "double", "all unknown"],
)
def test_margins(labels):
    """A quarter for lengths, a factor 2 for volumes; finer masks are resampled and therefore inside."""
    assert ENVELOPE.outside(labels) == []


def test_all_findings_come_at_once():
    with pytest.raises(FibldmError, match="spacing along R.*field of view along R.*label 1"):
        ENVELOPE.check(mask((9.0, 2.0, 4.0), filled=2000), allow=False)


def test_from_the_datalist():
    read = Envelope.from_dict(
        {
            "spacing_mm": {"min": [1.0, 1.0, 2.0], "max": [2.0, 2.0, 5.0]},
            "field_of_view_mm": {"min": [40, 40, 80], "max": [60, 60, 100]},
            "label_volume_ml": {
                "0": {"min": 1.0, "max": 1.0},
                "1": {"min": 4.0, "max": 8.0},
                "2": {"min": 0.0, "max": 1.0},
            },
        }
    )
    assert read == ENVELOPE
