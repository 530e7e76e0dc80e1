"""A generator of masks through every stage, as small as it gets."""

import pytest
import torch
from conftest import MadeOnce, TinyStage

from fibldm.errors import FibldmError
from fibldm.models.conditions.label_volumes import LabelVolumeEncoding, volume_of
from fibldm.models.label_autoencoder import LabelAutoencoder
from fibldm.runs import StageFolder, load_facts
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.synthesis.label_maps import MaskGenerator
from fibldm.training.latents import Latents, LoadLatent

pytestmark = pytest.mark.slow


def test_masks_go_through_every_stage(tiny_stage: TinyStage, made_once: MadeOnce) -> None:
    """Latents of one-hot masks; covariates of the mask that a view has; whatever is drawn has labels of training."""

    def make(folder) -> None:
        shape = {"wavelet_levels": 2, "autoencoder_channels": [16]}
        tiny_stage(
            "autoencoder", folder / "run", "masks", "masks_autoencoder", **shape, epochs=2, preview_every=1
        ).run()
        tiny_stage("latents", folder / "run", "masks", views=2).run()
        tiny_stage("diffusion", folder / "run", "masks_by_volume", preview_every=1).run()

    run = made_once("masks", make) / "run"
    facts = load_facts(run)
    names = [*facts["labels"].values()]
    assert facts["channels"] == names and len(names) > 2
    assert isinstance(StageFolder(run, "autoencoder").trained(), LabelAutoencoder)
    encoding = StageFolder(run, "diffusion").component("conditions")["covariates"]
    assert isinstance(encoding, LabelVolumeEncoding) and volume_of("left lung") in encoding.kinds
    latents = Latents.open(run)
    views = latents.items("training")[:2]
    plain, moved = (LoadLatent(latents, {"covariates": encoding})(item)["covariates"] for item in views)
    assert views[0]["case"] == views[1]["case"] and plain[:, 1].all()
    assert not torch.equal(plain, moved)  # the volumes of the view, not of the case
    with pytest.raises(FibldmError, match="draws masks"):
        Synthesizer.from_run(run, unconditional=True)
    drawer = Synthesizer.from_run(run, unconditional=True, masks=True)
    middle = sum(encoding.facts()[volume_of("left lung")][end] for end in ("low", "high")) / 2
    asked = {"left lung": (middle, middle)}
    generator = MaskGenerator(drawer, asked, {}, SamplingSettings(sampler="ddim", steps=1))
    ((_, label_map, prepared),) = generator._drawn([0], SamplingSettings(sampler="ddim", steps=1))
    assert {*label_map.array.ravel().tolist()} <= {int(value) for value in facts["labels"]}
    assert prepared.asked["covariates"] == {volume_of("left lung"): middle}
