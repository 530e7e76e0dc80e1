"""Volumes of labels as covariates, and a first stage whose channels are labels."""

import pytest
import torch
from builders import awake, kl_numbers, normal
from monai.networks.nets import AutoencoderKL

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.label_volumes import LabelVolumeEncoding, volume_of
from fibldm.models.label_autoencoder import LabelAutoencoder

NAMES = {"0": "background", "1": "organ", "4": "lesion", "7": "fixed"}


def mask(organ: int, lesion: int, unknown: int = 0) -> torch.Tensor:
    """With so many voxels of each label; one of the label that never changes."""
    labels = torch.zeros(1000, dtype=torch.uint8)
    labels[:organ], labels[organ : organ + lesion], labels[-1] = 1, 4, 7
    labels[500 : 500 + unknown] = UNKNOWN_LABEL
    return labels.view(1, 10, 10, 10)


MASKS = [mask(100, 0), mask(200, 8), mask(300, 27)]


def fitted(masks=MASKS, **more) -> LabelVolumeEncoding:
    return LabelVolumeEncoding.fit(masks, names=NAMES, spacing=(10.0, 10.0, 10.0), **more)


def test_volumes_that_differ_are_covariates_in_ml() -> None:
    encoding = fitted([*MASKS, mask(400, 400, unknown=3)])  # of which nobody knows how much it is
    assert encoding.parts == (volume_of("organ"), volume_of("lesion"))
    assert encoding.facts()[volume_of("organ")] == {"low": 100.0, "high": 300.0, "unit": "ml"}
    assert encoding.facts()[volume_of("lesion")] == {"low": 0.0, "high": 27.0, "unit": "ml"}
    assert encoding.always == ("organ", "fixed")
    assert encoding.outside({volume_of("lesion"): 30.0}) == ["volume of lesion 30 ml (training 0 to 27 ml)"]
    assert encoding.outside({volume_of("lesion"): 27.0}) == []


def test_training_sees_the_volumes_of_the_very_mask() -> None:
    """Edges of cubes, in deviations: of 0, 8 and 27 ml they are evenly spaced; a mask in part unknown has none."""
    encoding = fitted()
    rows = [encoding.encode_case(Case(one, {}, {}, "a")) for one in MASKS]
    lesion = [float(row[1, 0]) for row in rows]
    assert lesion[1] - lesion[0] > lesion[2] - lesion[1] > 0  # 0, 2 and 3 cm
    assert sum(lesion) == pytest.approx(0, abs=1e-6)
    assert all(row[:, 1].tolist() == [1, 1] for row in rows)
    assert torch.equal(rows[1], encoding.encode([{volume_of("organ"): 200, volume_of("lesion"): 8}])[0])
    assert not encoding.encode_case(Case(mask(100, 8, unknown=1), {}, {}, "a")).any()


def test_further_covariates_stand_beside_volumes() -> None:
    encoding = fitted(covariates=["age"], cases=[{"age": 40}, {"age": 60}])
    assert encoding.parts[-1] == "age"
    assert encoding.encode_case(Case(MASKS[1], {"age": 60}, {}, "a"))[-1].tolist() == [1, 1]


@pytest.mark.parametrize("masks", [MASKS[:1], [mask(100, 8, unknown=1), mask(200, 27, unknown=1)]])
def test_volumes_that_are_all_the_same_are_refused(masks) -> None:
    with pytest.raises(FibldmError, match="volumes of labels must differ .* of organ, lesion, fixed none does in"):
        fitted(masks)


def test_what_is_decoded_are_probabilities_of_the_labels() -> None:
    network = awake(AutoencoderKL(**kl_numbers(channels=3)), 0)
    autoencoder = LabelAutoencoder(network, local_norm=True)
    volume = normal(2, 3, 8, 8, 8).sign()
    latent = autoencoder.encode(volume).mean
    shares = (autoencoder.decode(latent) + 1) / 2
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 8, 8, 8))
    assert 0 <= shares.min() < shares.max() <= 1
    logits = autoencoder(volume, seeds=torch.tensor([1, 2])).volume
    assert logits.min() < -1 or logits.max() > 1  # of training they are no probabilities
    torch.testing.assert_close(logits, autoencoder(volume, seeds=torch.tensor([1, 2])).volume)
