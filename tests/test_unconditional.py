"""Volumes without masks: of runs that were trained so, by command and as bundles, and of any other if asked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import with_latents_of
from conftest import TinyStage
from monai.bundle import create_workflow

from fibldm import UNKNOWN_LABEL
from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.verify import run_checks
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.runs import StageFolder
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import sidecar

QUICK = SamplingSettings(steps=1)


@pytest.fixture
def unmasked(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose stage 2 knows no mask, and which has no ControlNet."""
    for stage in ("autoencoder", "latents", "diffusion"):
        shutil.copytree(tiny_run / stage, tmp_path / "run" / stage)
    return tmp_path / "run"


def test_a_run_without_masks_is_sampled_by_the_command(
    unmasked: Path, tmp_path: Path, mask_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the model grid; sidecar and command say that no mask is followed; masks are refused."""
    command = ["synthesize", "--run", str(unmasked), "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli([*command, "--count", "2", "--json"]) == 0
    said = capsys.readouterr()
    files = [Path(name) for name in json.loads(said.out.splitlines()[-1])["outputs"]]
    assert [file.name for file in files] == ["unconditional_000.nii.gz", "unconditional_001.nii.gz"]
    assert "2 synthetic volumes in" in said.err and "drawn without masks on the model grid" in said.err
    volumes = [read_volume(str(file)) for file in files]
    assert volumes[0].array.shape == (32, 32, 32) and np.allclose(volumes[0].grid.spacing, 10)
    assert np.allclose(volumes[0].grid.centre, 0) and not np.array_equal(volumes[0].array, volumes[1].array)
    told = read_json(sidecar(files[0]))
    assert told["synthetic"] is True and told["follows_mask"] is False and told["mask"] is None
    assert "drawn without a mask" in told["notice"] and told["extrapolation"] == []
    assert not (tmp_path / "out" / "masks").exists()
    before = hash_file(files[0])
    assert cli([*command, "--count", "1"]) == 0 and hash_file(files[0]) == before
    for more, message in (
        (["--masks", str(mask_file)], "stage 2 knows no masks"),
        (["--format", "dicom"], "--format dicom writes the masks beside the volumes; none were given"),
        (["--bids", "ct"], "--bids writes the masks beside the volumes; none were given"),
        (["--strength", "0.5"], "without masks no ControlNet counts"),
    ):
        capsys.readouterr()
        assert cli([*command, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_from_python_without_a_mask(unmasked: Path, mask_file: Path) -> None:
    with pytest.raises(FibldmError, match="stage 'controlnet' of .* must be finished first; .*knows no masks; run"):
        Synthesizer.from_run(unmasked)
    made = Synthesizer.from_run(unmasked, unconditional=True)
    one, other = made(seed=1, steps=1), made(seed=2, steps=1)
    assert one.volume.array.shape == tuple(made.grid.size) and not np.array_equal(one.volume.array, other.volume.array)
    with pytest.raises(FibldmError, match="this generator was trained without masks, so that its volumes would not"):
        made(read_volume(str(mask_file)), allow_extrapolation=True)


def test_a_generator_that_follows_masks_draws_without_only_if_asked(
    tiny_run: Path, tmp_path: Path, mask_file: Path
) -> None:
    """By its stage 2 where that knows none; a mask that was never unknown in training is refused."""
    given = {"count": 1, "settings": QUICK, "device": "cpu"}
    with pytest.raises(
        FibldmError, match="masks must be given to this generator, as its volumes follow them; got none"
    ):
        synthesize_files(tiny_run, [], tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    (file,) = synthesize_files(tiny_run, [], tmp_path / "out", unconditional=True, **given)  # type: ignore[arg-type]
    assert read_json(sidecar(file))["source"]["weights"] == StageFolder(tiny_run, "diffusion").require()["weights"]
    with pytest.raises(FibldmError, match="got masks and `unconditional`"):
        synthesize_files(tiny_run, [mask_file], tmp_path / "out", unconditional=True, **given)  # type: ignore[arg-type]
    conditional = Synthesizer.from_run(tiny_run)
    assert conditional.mask_dropout == 0.05
    mask = read_volume(str(mask_file))
    unknown = Volume(np.full(mask.array.shape, UNKNOWN_LABEL, dtype=np.uint8), mask.affine)
    assert conditional(unknown, steps=1).provenance["extrapolation"] == []
    never = replace(conditional, mask_dropout=0.0)
    for asked in (unknown, None):
        with pytest.raises(FibldmError, match=r"nothing is asked of the mask \(training always showed one"):
            never(asked, steps=1)
        told = never(asked, steps=1, allow_extrapolation=True).provenance
        assert "mask_dropout was 0" in told["extrapolation"][0]


def test_a_bundle_that_follows_masks_asks_for_them(tiny_bundle: Path, tmp_path: Path) -> None:
    given = {"count": 1, "settings": QUICK, "device": "cpu", "bundle": tiny_bundle}
    with pytest.raises(FibldmError, match="masks must be given to this generator, .*`unconditional` for volumes"):
        synthesize_files(None, [], tmp_path / "out", **given)  # type: ignore[arg-type]
    (file,) = synthesize_files(None, [], tmp_path / "out", unconditional=True, **given)  # type: ignore[arg-type]
    assert read_json(sidecar(file))["follows_mask"] is False


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_run_without_masks_is_a_bundle_if_asked(
    unmasked: Path, tmp_path: Path, mask_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, makes what its run makes, by MONAI too, and takes no masks."""
    bundle = tmp_path / "bundle"
    command = ["export", "--run", str(unmasked), "--out", str(bundle), "--license", "CC0-1.0"]
    assert cli(command) == 2
    assert "`fibldm export --unconditional`" in " ".join(capsys.readouterr().err.split())
    assert cli([*command, "--unconditional"]) == 0
    made = Synthesizer.from_bundle(bundle)
    wanted = Synthesizer.from_run(unmasked, unconditional=True)(settings=QUICK)
    assert np.array_equal(made(settings=QUICK).volume.array, wanted.volume.array)
    card = (bundle / "docs" / "README.md").read_text()
    assert "It was trained without masks" in card and "--count 4" in card and "--masks" not in card
    with pytest.raises(FibldmError, match="trained without masks"):
        synthesize_files(None, [mask_file], tmp_path / "out", count=1, settings=QUICK, bundle=bundle, device="cpu")
    quick = ("manifest", "generator", "metadata", "inference properties", "verify_net_in_out", "synthesis")
    assert [check for check in run_checks(bundle, tmp_path / "trial", quick) if not check.ok] == []
    workflow = create_workflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(bundle),
        output_dir=str(tmp_path / "monai"),
        device="cpu",
        **{"inferer::steps": 1, "count": 2},
    )
    workflow.run()
    by_monai = sorted((tmp_path / "monai").glob("*.nii.gz"))
    assert [file.name for file in by_monai] == ["unconditional_000.nii.gz", "unconditional_001.nii.gz"]
    assert np.array_equal(read_volume(str(by_monai[0])).array, wanted.volume.array)


def test_networks_of_monai_generative_are_trained_drawn_from_and_exported(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path, mask_file: Path
) -> None:
    """UNet and ControlNet, from the configurations that come along."""
    with_latents_of(tiny_run, tmp_path / "run")
    tiny_stage("diffusion", tmp_path / "run", "unet_generative").run()
    tiny_stage("controlnet", tmp_path / "run", "controlnet_generative").run()
    network = StageFolder(tmp_path / "run", "controlnet").trained()
    assert type(network.unet).__module__.startswith("generative.")
    assert type(network.controls[0].controlnet).__module__.startswith("generative.")
    export(tmp_path / "run", tmp_path / "bundle", ExportSettings("CC0-1.0"))
    mask, one = read_volume(str(mask_file)), Synthesizer.from_run(tmp_path / "run")
    volumes = [made(mask, steps=1).volume.array for made in (one, Synthesizer.from_bundle(tmp_path / "bundle"))]
    assert np.array_equal(*volumes)
