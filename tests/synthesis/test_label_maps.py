"""Masks from nothing, by a network of random weights whose first stage has a channel for each label."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import awake, unet_numbers
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from fibldm.cli import run
from fibldm.cli.synthesize_masks import read_volumes
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.models.conditions.covariate_vectors import CovariateVectors
from fibldm.models.conditions.label_volumes import LabelVolumeEncoding
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.label_autoencoder import LabelAutoencoder
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import RectifiedFlow
from fibldm.synthesis import Synthesizer, loading
from fibldm.synthesis.label_maps import EmptyLabels, cut_to_view, synthesize_masks
from fibldm.synthesis.outputs import OutputConflict
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.masks import find_masks

NAMES = {1: "organ", 4: "lesion"}
STEP = 4  # voxels of a cell


class Cells(nn.Module):
    """A first stage whose latents are the channels themselves, coarse."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(3, 3, STEP, stride=STEP)  # its stride is looked at

    def decode(self, latent: Tensor) -> Tensor:
        return latent.repeat_interleave(STEP, 2).repeat_interleave(STEP, 3).repeat_interleave(STEP, 4)


def volumes_of(low: int, high: int) -> LabelVolumeEncoding:
    masks = [torch.zeros(1, 8, 8, 8, dtype=torch.uint8) for _ in range(2)]
    for mask, size in zip(masks, (low, high), strict=True):
        mask.view(-1)[:size], mask.view(-1)[-size:] = 1, 4
    names = {0: "background", **NAMES}
    return LabelVolumeEncoding.fit(masks, names=names, spacing=(10.0, 10.0, 10.0))


@pytest.fixture(scope="module")
def generator() -> Synthesizer:
    """Draws organ and lesion; the background's channel is rare."""
    torch.manual_seed(0)
    encoding = volumes_of(50, 200)
    unet = DiffusionModelUNet(**unet_numbers(in_channels=3, attention_levels=(False, False)), out_channels=3)
    vectors = CovariateVectors(encoding, unet.time_embed[-1].out_features)
    view = ((300.0, 310.0), (260.0, 320.0), (320.0, 320.0))
    return Synthesizer(
        network=awake(ConditionedNetwork(unet, time={"covariates": vectors}), 0),
        first_stage=FrozenFirstStage(LabelAutoencoder(Cells())),
        space=LatentSpace((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "ae"),
        process=RectifiedFlow(),
        target="flow",
        conditions={"mask": MaskEncoding((0, 1, 4), STEP), "covariates": encoding},
        grid=ModelGrid((10.0, 10.0, 10.0), (32, 32, 32)),
        intensity=Intensity("range", low=0.0, high=1.0),
        envelope=Envelope(((9.0, 11.0),) * 3, view, {1: (1.0, 40000.0), 4: (1.0, 40000.0)}),
        source={"weights": "w", "autoencoder": "ae", "licence": "CC0-1.0"},
        names=NAMES,
        channels=("lesion", "background", "organ"),  # in whatever order training had them
    )


@pytest.fixture
def as_run(generator: Synthesizer, monkeypatch: pytest.MonkeyPatch) -> Synthesizer:
    """The generator of any run."""

    def from_run(run_dir: object, *, masks: bool, **choices: object) -> Synthesizer:
        assert masks and choices["unconditional"]
        return generator

    monkeypatch.setattr(Synthesizer, "from_run", from_run)
    return generator


def draw(out: Path, **asked) -> list[Path]:
    return synthesize_masks("run", out, device="cpu", **{"steps": 1, "seed": 3, **asked})


def test_masks_say_what_they_are_and_come_again_by_seed_and_number(
    as_run: Synthesizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the batch; a count that grows draws what is missing and keeps the others."""
    files = draw(tmp_path / "a", count=2, batch_size=1)
    assert [file.name for file in files] == ["mask_000.nii.gz", "mask_001.nii.gz"]
    before = [file.stat().st_mtime_ns for file in files]
    more = draw(tmp_path / "a", count=3)
    assert more[:2] == files and [file.stat().st_mtime_ns for file in files] == before
    again = draw(tmp_path / "b", count=3, batch_size=3)
    volumes = [read_volume(file) for file in more]
    for one, other in zip(volumes, again, strict=True):
        np.testing.assert_array_equal(one.array, read_volume(other).array)
    assert not np.array_equal(volumes[0].array, volumes[1].array)
    caplog.clear()
    assert find_masks([tmp_path / "a"]) == more and not caplog.records
    for file, volume in zip(more, volumes, strict=True):
        facts = read_json(file.with_name(file.name.replace(".nii.gz", ".json")))
        assert volume.array.dtype == np.uint8 and {*np.unique(volume.array)} == {0, 1, 4}
        np.testing.assert_allclose(volume.grid.spacing, 10)
        assert facts["synthetic"] is True and facts["labels"] == {"0": "background", "1": "organ", "4": "lesion"}
        got = {name: float((volume.array == value).sum()) for value, name in NAMES.items()}
        assert facts["volumes_ml"] == {"asked": {}, "got": got}  # a voxel is a ml
        assert {"source", "sampling", "notice"} <= facts.keys() and "intensity" not in facts
        assert as_run.envelope.check(volume, allow=False) == []  # a generator of volumes takes it
    with pytest.raises(OutputConflict, match="made by another run or settings"):
        draw(tmp_path / "a", count=1, seed=4)


def test_volumes_that_are_asked_for_reach_the_network(as_run: Synthesizer, tmp_path: Path) -> None:
    """A range gives every mask one of its own, the same whatever the number of masks."""
    files = draw(tmp_path / "asked", count=3, volumes={"lesion": (60.0, 200.0)})
    asked = [read_json(file.with_name(f"mask_{number:03d}.json"))["volumes_ml"] for number, file in enumerate(files)]
    ml = [one["asked"]["lesion"] for one in asked]
    assert len({*ml}) == 3 and all(60 <= value <= 200 for value in ml)
    (alone,) = draw(tmp_path / "alone", count=1, volumes={"lesion": (60.0, 200.0)})
    np.testing.assert_array_equal(read_volume(alone).array, read_volume(files[0]).array)
    (free,) = draw(tmp_path / "free", count=1)
    assert not np.array_equal(read_volume(free).array, read_volume(files[0]).array)


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        ({"lesion": (10.0, 100.0)}, r"volume of lesion 10 ml \(training 50 to 200 ml\)"),
        ({"lesion": (60.0, 300.0)}, r"volume of lesion 300 ml \(training 50 to 200 ml\)"),
        ({"tumour": (60.0, 100.0)}, "volumes can be asked of organ, lesion; got tumour"),
        ({"lesion": (100.0, 60.0)}, "a volume must go from at least 0 ml up; that of lesion is 100 to 60 ml"),
    ],
)
def test_volumes_that_cannot_be_asked_for_are_refused(as_run, tmp_path: Path, volumes, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        draw(tmp_path, volumes=volumes)
    assert not [*tmp_path.glob("*.nii.gz")]


def test_extrapolation_is_told(as_run: Synthesizer, tmp_path: Path) -> None:
    (file,) = draw(tmp_path, volumes={"lesion": (300.0, 300.0)}, allow_extrapolation=True)
    assert read_json(tmp_path / "mask_000.json")["extrapolation"] == ["volume of lesion 300 ml (training 50 to 200 ml)"]


def test_a_mask_without_a_label_that_all_have_is_left_out_and_the_others_are_kept(
    generator: Synthesizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Bare(Cells):
        def decode(self, latent: Tensor) -> Tensor:
            decoded = super().decode(latent)
            return decoded if latent[0, 0, 0, 0, 0] > 0 else decoded - 99 * torch.tensor([1, 0, 0]).view(3, 1, 1, 1)

    bare = replace(generator, first_stage=FrozenFirstStage(LabelAutoencoder(Bare())))
    monkeypatch.setattr(Synthesizer, "from_run", lambda *_, **__: bare)
    monkeypatch.setattr("fibldm.synthesis.label_maps.DRAWS_AGAIN", 0)
    with pytest.raises(EmptyLabels, match=r"left out, as no draw of 1 did: mask_00\d \(no lesion\)"):
        draw(tmp_path, count=6)
    kept = [*tmp_path.glob("*.nii.gz")]
    assert 0 < len(kept) < 6
    monkeypatch.setattr("fibldm.synthesis.label_maps.DRAWS_AGAIN", 20)
    assert len(draw(tmp_path, count=6)) == 6  # drawn again, by another seed
    assert max(read_json(file)["draws"] for file in tmp_path.glob("*.json")) > 1


def test_a_mask_is_cut_to_a_usual_view_but_keeps_all_its_labels() -> None:
    array = np.zeros((32, 32, 32), dtype=np.uint8)
    array[10:31, 12, 12] = 1
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    view = Envelope(((9.0, 11.0),) * 3, ((100.0, 140.0), (150.0, 250.0), (320.0, 330.0)), {})
    cut = cut_to_view(Volume(array, affine), view)
    assert cut.array.shape == (24, 20, 32) and cut.array.sum() == array.sum()
    assert cut.affine[:3, 3].tolist() == [80.0, 60.0, 0.0]


def test_the_command_reads_volumes(as_run: Synthesizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["synthesize-masks", "--run", "run", "--out", str(out), "--count", "2", "--steps", "1", "--device", "cpu"]
    assert run([*words, "--volume", "lesion=60..70ml", "--volume", "organ=99"]) == 0
    assert f"2 masks in {out}" in capsys.readouterr().out
    asked = read_json(out / "mask_001.json")["volumes_ml"]["asked"]
    assert 60 <= asked["lesion"] <= 70 and asked["organ"] == 99
    shutil.rmtree(out)
    assert run([*words, "--volume", "lesion=much"]) == 2
    assert "LABEL=ML or LABEL=LOW..HIGH" in capsys.readouterr().err
    assert read_volumes(["a=b=1.5ml"]) == {"a=b": (1.5, 1.5)}
    with pytest.raises(FibldmError, match="a came twice"):
        read_volumes(["a=1", "a=2..3"])


@pytest.mark.parametrize("masks", [True, False])
def test_runs_and_bundles_that_draw_the_other_are_refused_before_they_are_loaded(
    masks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    channels = ["ct"] if masks else ["background", "organ"]
    facts = {"channels": channels, "labels": {"0": "background", "1": "organ"}}
    monkeypatch.setattr(loading, "load_facts", lambda _: facts)
    with pytest.raises(FibldmError, match="draws volumes" if masks else "draws masks"):
        Synthesizer.from_run(tmp_path, masks=masks)
    command = "synthesize-masks" if masks else "synthesize"
    assert run([command, "--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
