"""The comparison of volumes with sentences: what it reads off a volume, and that its sentences are none of training."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fibldm.phantoms.findings import EXTENTS, Finding
from fibldm.phantoms.phantoms import make_phantom
from fibldm.volumes.grid import Volume

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_text

    return compare_text


def test_the_sentences_are_none_of_training(script: ModuleType) -> None:
    assert len(script.SENTENCES) == 20
    of_training = {Finding.draw(seed, subject).sentence for seed in (0, 3) for subject in range(1, 1000)}
    assert not of_training & script.SENTENCES.keys()
    assert {extent for _, extent in script.SENTENCES.values()} == {None, *EXTENTS}


def test_shares_are_read_off_labels_and_said_in_words(script: ModuleType) -> None:
    """On a grid that is stored from left to right and the other way round."""
    finding = Finding("left", "severe", "ground glass", "")
    for orientation in ("RAS", "LPS"):
        phantom = make_phantom(3, 1, spacing=(8, 8, 8), orientation=orientation, finding=finding)
        right, left = script.diseased(Volume(phantom.labels, phantom.affine))
        assert right < 0.03 and 0.4 < left < 0.8
        features = script.lung_features(Volume(phantom.volume, phantom.affine))
        assert features.shape == (2, len(script._BINS) - 1) and features.sum(axis=1) == pytest.approx([1, 1])
        assert script.said(np.array([right, left])) == ("left", "severe")
    words = {(0.3, 0.28): ("both", "moderate"), (0.1, 0.0): ("right", "mild"), (0.02, 0.01): (None, None)}
    assert {shares: script.said(np.array(shares)) for shares in words} == words
    measured = [("left", "severe", np.array([0.0, 0.6])), ("right", "mild", np.array([0.0, 0.1]))]
    assert script.accuracy(measured) == {"volumes": 2, "side": 0.5, "extent": 1.0}
    assert script.table({"text": script.accuracy(measured)}).splitlines()[1].split() == ["text", "2", "0.50", "1.00"]
