"""Masks in place of images."""

import json

import pytest
import torch
from monai.data import MetaTensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.volumes.label_images import (
    LabelsAsImaged,
    LabelsOfImaged,
    channels_are_labels,
    check_what_is_drawn,
    datalist_of_masks,
    labels_of,
)

LABELS = [0, 2, 5]
OF_MASKS = {"channels": ["background", "organ"], "labels": {"0": "background", "1": "organ"}}
OF_VOLUMES = {"channels": ["ct"], "labels": {"0": "background", "1": "organ"}}


def item(**more) -> dict:
    label = torch.tensor([0, 2, 5, UNKNOWN_LABEL, UNKNOWN_LABEL]).view(1, 5, 1, 1).float()
    valid = torch.tensor([1, 1, 1, 1, 0]).view(1, 5, 1, 1).float()
    affine = torch.eye(4)
    made = {"image": torch.zeros(1, 5, 1, 1), "label": label, "valid": valid}
    return {name: MetaTensor(part.clone(), affine=affine) for name, part in made.items()} | more


def test_channels_are_labels_and_what_is_unknown_does_not_count() -> None:
    """What lies beyond the field of view is background, and counts."""
    given = item()
    made = LabelsAsImaged(LABELS)(given)
    expected = [[1, -1, -1, -1, 1], [-1, 1, -1, -1, -1], [-1, -1, 1, -1, -1]]
    assert made["image"].view(3, 5).tolist() == expected
    assert made["valid"].flatten().tolist() == [1, 1, 1, 0, 1]
    assert made["label"].flatten().tolist() == [0, 2, 5, UNKNOWN_LABEL, 0]
    assert given["valid"].flatten().tolist() == [1, 1, 1, 1, 0]  # nothing is changed in place
    assert labels_of(made["image"].as_tensor()[:, [0, 1, 2, 4]], LABELS).flatten().tolist() == [0, 2, 5, 0]


def test_of_a_case_without_a_mask_nothing_counts() -> None:
    without = item()
    del without["label"]
    made = LabelsAsImaged(LABELS)(without)
    assert not made["valid"].any() and "label" not in made


def test_after_a_move_between_voxels_the_largest_channel_is_the_label() -> None:
    made = LabelsAsImaged(LABELS)(item())
    image = made["image"].clone()
    image[:, 1] = torch.tensor([0.2, -0.1, -0.9]).view(3, 1, 1)
    again = LabelsOfImaged(LABELS)({**made, "image": image})
    assert again["label"].flatten().tolist() == [0, 0, 5, UNKNOWN_LABEL, 0]
    assert again["image"][:, 1].flatten().tolist() == [1, -1, -1]


def test_masks_and_volumes_are_told_apart(tmp_path) -> None:
    (tmp_path / "datalist.json").write_text(json.dumps({**OF_VOLUMES, "training": [], "validation": [], "test": []}))
    content = datalist_of_masks(tmp_path)
    assert content["channels"] == ["background", "organ"] and channels_are_labels(content)
    assert not channels_are_labels(OF_VOLUMES)
    check_what_is_drawn(OF_MASKS, "run", masks=True)
    check_what_is_drawn(OF_VOLUMES, "run", masks=False)
    with pytest.raises(FibldmError, match="trained on masks; run draws volumes") as told:
        check_what_is_drawn(OF_VOLUMES, "run", masks=True)
    assert "--config masks_by_volume" in told.value.remedy
    with pytest.raises(FibldmError, match="trained on volumes; run draws masks") as told:
        check_what_is_drawn(OF_MASKS, "run", masks=False)
    assert "synthesize-masks" in told.value.remedy
