"""A second image of the patient as latents of the run's own autoencoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import data_file, kl_numbers, normal, tiny_configuration
from monai.networks.nets import AutoencoderKL
from safetensors.torch import load_file
from second_images import write_dataset

from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.resolve import plain
from fibldm.delivery.verify import run_checks
from fibldm.errors import FibldmError
from fibldm.models.adapters import frame_of
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.image import ImageMixture
from fibldm.models.conditions.image_latents import ImageLatents
from fibldm.models.latents import LatentSpace
from fibldm.models.process import RectifiedFlow
from fibldm.runs import StageFolder
from fibldm.synthesis import Synthesizer
from fibldm.synthesis.definitions import build
from fibldm.training.latents import Latents, LoadLatent
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.intensity import Intensity

PERCENTILES = Intensity("percentile", output_low=-1.0, output_high=1.0).to_dict()
SPACE = LatentSpace((0.5, -1.0, 0.0), (2.0, 0.5, 1.0), "")
UNOPENED = ImageLatents((2, 2, 2), "mr", PERCENTILES, SPACE.mean, SPACE.std)
QUICK = ("generator", "verify_net_in_out")


@pytest.fixture(scope="module")
def first_stage() -> FrozenFirstStage:
    torch.manual_seed(0)
    return FrozenFirstStage(Autoencoder(AutoencoderKL(**kl_numbers())))


def test_an_image_is_the_middle_of_its_posterior_and_unknown_where_it_says_nothing(
    first_stage: FrozenFirstStage,
) -> None:
    voxels = normal(8, 8, 8).clamp(-1, 1)
    known = torch.ones(8, 8, 8)
    known[5:] = 0  # through the middle of a cell
    kind = UNOPENED.with_first_stage(first_stage)
    encoded = kind.encode([torch.stack([voxels, known])])
    assert encoded.shape[1:] == kind.shape((4, 4, 4)) == (4, 4, 4, 4)
    given = torch.where(known > 0, voxels, -1.0)[None, None]
    expected = SPACE.normalise(first_stage.encode(given).mean)
    torch.testing.assert_close(encoded[:, :3, :3], expected[:, :, :3])
    assert encoded[0, 3, :, 0, 0].tolist() == [1, 1, 0.5, 0] and not encoded[:, :, 3].any()


def test_an_image_that_is_not_there_is_as_one_that_was_dropped(first_stage: FrozenFirstStage) -> None:
    kind = UNOPENED.with_first_stage(first_stage)
    case = Case(torch.zeros(1, 8, 8, 8), {}, {"second_image": torch.ones(2, 8, 8, 8)})
    encoded = torch.stack([kind.encode_case(case), kind.encode_case(case)])
    dropped = kind.drop(encoded, torch.tensor([[True], [False]]))
    assert torch.equal(dropped[0], kind.encode_case(Case(case.labels, {}))) and torch.equal(dropped[1], encoded[1])
    assert torch.equal(dropped[0], UNOPENED.encode_case(Case(case.labels, {})))  # which needs no autoencoder
    with pytest.raises(FibldmError, match="latents of an image need its autoencoder, which was not loaded"):
        UNOPENED.encode_case(case)


def test_latents_of_an_image_are_plain_values_in_a_bundle_and_in_an_adapter(first_stage: FrozenFirstStage) -> None:
    kind = UNOPENED.with_first_stage(first_stage)
    assert build(json.loads(json.dumps(plain(kind, "image"))), "test") == UNOPENED == kind
    frames = [
        frame_of(SPACE, RectifiedFlow(), "flow", {"image": part}, intensity=PERCENTILES, spacing=(1, 1, 1))
        for part in (kind, UNOPENED)
    ]
    assert frames[0] == frames[1] and frames[0]["condition image"]["mean"] == [0.5, -1.0, 0.0]


def test_latents_of_an_image_that_do_not_fit_are_refused(first_stage: FrozenFirstStage) -> None:
    about = {"modality": "mr", "intensity": PERCENTILES}
    facts: dict[str, Any] = {"second_image": about, "space": SPACE.to_dict(), "channels": ["t1", "t2"]}
    with pytest.raises(FibldmError, match="need an autoencoder of one channel; that of this run takes t1, t2"):
        ImageLatents.fit(facts, (2, 2, 2))
    voxels = ImageLatents.fit({**facts, "channels": ["t1"]}, (2, 2, 2))
    assert voxels == UNOPENED
    mixture = ImageMixture(UNOPENED, 2)
    with pytest.raises(FibldmError, match="sees an image in 4 channels of a cell; got 9"):
        mixture(torch.zeros(1, 9, 2, 2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize("way", ["image", "image_controlnet"])
def test_latents_of_an_image_steer_from_training_to_the_bundle(way: str, tmp_path: Path) -> None:
    """As input channels of stage 2, and by a ControlNet on a stage 2 that knows nothing of it."""
    settings = PrepareSettings(modality="ct", second_modality="mr")
    prepare(write_dataset(tmp_path, without=(1,)), tmp_path / "work", settings, progress=False)
    work, run, data = tmp_path / "work", tmp_path / "run", data_file(tmp_path, 4.0, 32, 32, 32)
    stages: dict[str, list[str]] = {"autoencoder": [], "latents": [], "diffusion": ["mask_concat"]}
    stages |= {"diffusion": ["mask_concat", "image", "image_latents"]} if way == "image" else {}
    stages |= {"controlnet": [way, "image_latents"]} if way != "image" else {}
    for stage, more in stages.items():
        views = {"views": 2} if stage == "latents" else {}
        tiny_configuration(stage, work, run, data, "tiny", *more, **views).run()
    last = StageFolder(run, list(stages)[-1])
    kind = last.component("conditions")["image"]
    latents = Latents.open(run)
    first_stage = FrozenFirstStage(StageFolder(run, "autoencoder").trained())
    for item in latents.items("training")[:2]:  # one that is not augmented and one that is, of whom has an image
        stored = load_file(item["file"])
        if "second_image" in stored:
            shown = LoadLatent(latents, {"image": kind})(item)["image"]
            voxels, known = stored["second_image"].float()
            given = torch.where(known > 0, voxels, -1.0)[None, None]
            expected = latents.space.normalise(first_stage.encode(given).mean)[0]
            whole = shown[-1] == 1
            torch.testing.assert_close(shown[:-1, whole], expected[:, whole])

    mask, scan = read_volume(load_datalist(work, "test")[0]["label"]), tmp_path / "mr4.nii.gz"

    def drawn(synthesizer: Synthesizer, **asked: Any) -> np.ndarray:
        made = synthesizer(mask, name="m", steps=1, allow_extrapolation=True, conditions=asked)
        return np.asarray(made.volume.array)

    followed = drawn(Synthesizer.from_run(run), image=scan)
    export(run, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    shutil.rmtree(run)  # the bundle stands alone
    bundled = Synthesizer.from_bundle(tmp_path / "bundle")
    assert bundled.conditions["image"] == kind
    assert np.array_equal(drawn(bundled, image=scan), followed)
    if way == "image":  # the ControlNet of one step of training changes less than rounding
        assert not np.array_equal(drawn(bundled), followed)
        checks = list(run_checks(tmp_path / "bundle", tmp_path / "trial", QUICK))
        assert [check for check in checks if not check.ok] == []
