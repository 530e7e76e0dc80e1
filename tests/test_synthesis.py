"""From a mask to a written volume, with tiny networks of random weights: H1, H5, H8, A27, A4, A5, B20.

Nothing here looks anatomical; what is tested is geometry, marks, seeds, costs and what is refused.
"""

import gzip
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from highdicom import get_volume_from_series
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from nibabel import orientations

from fibldm.cli import run
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import RectifiedFlow
from fibldm.models.samplers import SAMPLERS
from fibldm.synthesis import SamplingSettings, Synthesizer, find_masks, synthesize_file
from fibldm.volumes.dicom.output import DicomOutput
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import ModelGrid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar

LABELS = (0, 1, 2, 5)
QUICK = SamplingSettings(sampler="ddim", steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost time on networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    """Random weights everywhere, in the ControlNet's outputs too, so that the mask matters."""
    torch.manual_seed(0)
    numbers = {"spatial_dims": 3, "in_channels": 4, "channels": (8, 8), "attention_levels": (False, True)}
    numbers |= {"num_res_blocks": 1, "num_head_channels": 8, "norm_num_groups": 4}
    mask = MaskEncoding(LABELS, 4)
    controlnet = ControlNet(
        **numbers,
        conditioning_embedding_in_channels=mask.channels,
        conditioning_embedding_num_channels=(8,),
    )
    network = ConditionedNetwork(DiffusionModelUNet(**numbers, out_channels=4), controlnet)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    return Synthesizer(
        network=network.eval(),
        first_stage=FrozenFirstStage(_autoencoder()),
        space=LatentSpace((0.1, 0.0, -0.1, 0.0), (1.0, 0.5, 1.0, 2.0), "ae"),
        process=RectifiedFlow(),
        target="flow",
        mask=mask,
        grid=ModelGrid((5.0, 5.0, 5.0), (32, 32, 32)),
        intensity=Intensity("window", low=-1000, high=600),
        envelope=Envelope(
            ((4.0, 6.0),) * 3, ((80.0, 200.0),) * 3, {1: (1.0, 9000.0), 2: (1.0, 9000.0), 5: (0.0, 90.0)}
        ),
        source={"weights": "w", "autoencoder": "ae", "licence": "CC0-1.0"},
        names={1: "left lung", 2: "right lung", 5: "nodule"},
    )


def _autoencoder() -> Autoencoder:
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=8,
        out_channels=8,
        channels=(8, 8),
        num_res_blocks=(1, 1),
        latent_channels=4,
        norm_num_groups=4,
        attention_levels=(False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    return Autoencoder(network, wavelet=True, local_norm=True)


def body(shape=(22, 27, 19), spacing=(5.2, 4.9, 5.0), flips=(-1, 1, -1)) -> Volume:
    """An asymmetric mask, oblique, flipped, cropped: no axis is divisible by 8."""
    labels = np.zeros(shape, dtype=np.uint8)
    labels[2:9, 4:20, 3:15], labels[12:20, 5:18, 2:12], labels[13:15, 6:8, 3:5] = 1, 2, 5
    cos, sin = np.cos(0.2), np.sin(0.2)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return Volume(labels, nibabel.affines.from_matvec(turn @ np.diag(np.array(spacing) * flips), (80.0, -31.0, 412.0)))


def write_mask(path: Path, mask: Volume) -> Path:
    nibabel.save(nibabel.Nifti1Image(mask.array, mask.affine), path)
    return path


@pytest.mark.parametrize(
    ("spacing", "resampled"), [((5.2, 4.9, 5.0), None), ((4.0, 5.0, 5.9), [5.0, 5.0, 5.0])], ids=["kept", "resampled"]
)
def test_the_volume_lies_on_the_masks_grid_in_hounsfield_units(synthesizer, spacing, resampled):
    """H5, A5, A27."""
    mask = body(spacing=spacing)
    made = synthesizer(mask, settings=QUICK)
    assert made.volume.array.shape == mask.array.shape
    np.testing.assert_array_equal(made.volume.affine, mask.affine)
    assert made.volume.array.dtype == np.int16
    assert -1000 <= made.volume.array.min() < made.volume.array.max() <= 600
    used = made.provenance["grid"]
    assert used["resampled"] == bool(resampled)
    assert used["spacing_mm"] == pytest.approx(resampled or spacing)


@pytest.mark.parametrize("spacing", [(5.2, 4.9, 5.0), (4.0, 5.0, 5.9)], ids=["kept", "resampled"])
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_turning_the_mask_turns_the_volume_and_changes_nothing_else(synthesizer, spacing, order):
    """H5: to the bit."""
    mask = body(spacing=spacing)
    turn = np.array([[axis, flip] for axis, flip in zip(order, (-1, -1, 1), strict=True)], dtype=float)
    turned = Volume(
        orientations.apply_orientation(mask.array, turn),
        mask.affine @ orientations.inv_ornt_aff(turn, mask.array.shape),
    )
    plain, other = (synthesizer(volume, settings=QUICK).volume for volume in (mask, turned))
    assert len(np.unique(plain.array)) > 50
    np.testing.assert_array_equal(orientations.apply_orientation(plain.array, turn), other.array)


def test_one_seed_per_sample(synthesizer):
    """H8: seed, name and number decide a volume; nothing else does."""
    torch.manual_seed(1)
    first = synthesizer(body(), name="a", number=1, settings=QUICK).volume.array
    torch.manual_seed(2)
    synthesizer(body(), name="b", number=7, settings=QUICK)
    np.testing.assert_array_equal(synthesizer(body(), name="a", number=1, settings=QUICK).volume.array, first)
    others = [("a", 2, QUICK), ("b", 1, QUICK), ("a", 1, replace(QUICK, seed=1))]
    volumes = [synthesizer(body(), name=name, number=k, settings=how).volume.array for name, k, how in others]
    for one, other in itertools.combinations([first, *volumes], 2):
        assert (one != other).mean() > 0.5


def test_the_mask_matters(synthesizer):
    """A4: fewer labels, another volume, and most where they were taken away."""
    mask, without = body(), body()
    without.array[without.array == 2] = 0
    one, other = (synthesizer(volume, settings=QUICK).volume.array.astype(float) for volume in (mask, without))
    assert np.abs(one - other)[mask.array == 2].mean() > 1


@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_those_that_are_made(synthesizer, name, guidance):
    """B20: one call a step without guidance, two with it; heun takes one more a step, but for the last."""
    seen: list[int] = []
    settings = SamplingSettings(sampler=name, steps=3, guidance=guidance)
    hook = synthesizer.network.unet.register_forward_hook(lambda *_: seen.append(1))
    try:
        made = synthesizer(body(), settings=settings)
    finally:
        hook.remove()
    steps = 5 if name == "heun" else 3
    assert len(seen) == settings.network_calls == made.provenance["network_calls"] == steps * (1 + (guidance != 1))


def test_the_autoencoder_gets_latents_in_its_own_scale(synthesizer):
    """The latent space is undone once, just before decoding."""
    decoded = []

    class Recorder(FrozenFirstStage):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            decoded.append(latent)
            return super().decode(latent)

    recording = replace(synthesizer, first_stage=Recorder(synthesizer.first_stage.autoencoder))
    recording(body(), settings=QUICK)
    replace(recording, space=LatentSpace((0.0,) * 4, (1.0,) * 4, "ae"))(body(), settings=QUICK)
    torch.testing.assert_close(decoded[0], synthesizer.space.denormalise(decoded[1]))


def test_guidance_changes_the_volume(synthesizer):
    plain, guided = (synthesizer(body(), settings=replace(QUICK, guidance=g)).volume.array for g in (1.0, 3.0))
    assert (plain != guided).mean() > 0.3


def _changed(value: float, dtype: type = np.float32) -> Volume:
    mask = body()
    array = mask.array.astype(dtype)
    array[3, 5, 4] = value
    return Volume(array, mask.affine)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (_changed(3), r"may hold the labels \[0, 1, 2, 5\] or 255 \(unknown\); got also \[3\]"),
        (_changed(0.5), "a mask must hold whole numbers; is this a label map"),
        (_changed(np.nan), "a mask must hold whole numbers"),
        (_changed(-1), r"must lie in 0..255; got -1..5"),
        (_changed(256, np.int16), r"must lie in 0..255; got 0..256"),
        (body(spacing=(5.0, 5.0, 8.0)), r"spacing along S 8.00 mm \(training up to 6.00 mm\); give --allow-extrapol"),
        (body(spacing=(2.0, 5.0, 5.0)), r"field of view along R 44 mm \(training 80-200 mm\)"),
        (Volume(np.zeros((20, 20, 20), dtype=np.uint8), np.diag([5.0, 5, 5, 1])), "no voxel has a label"),
    ],
)
def test_masks_that_are_refused(synthesizer, mask, message):
    """A27: label set, whole numbers, envelope."""
    with pytest.raises(FibldmError, match=message):
        synthesizer(mask, settings=QUICK)


def test_extrapolation_is_allowed_and_told(synthesizer):
    """B20."""
    made = synthesizer(body(spacing=(5.0, 5.0, 8.0)), settings=QUICK, allow_extrapolation=True)
    assert made.provenance["extrapolation"] == ["spacing along S 8.00 mm (training up to 6.00 mm)"]
    assert synthesizer(body(), settings=QUICK).provenance["extrapolation"] == []


def test_whole_numbers_of_any_type_and_unknown_voxels_are_taken(synthesizer):
    """A27."""
    plain = synthesizer(body(), settings=QUICK).volume.array
    for dtype in (np.int64, np.float32, np.int16):
        np.testing.assert_array_equal(synthesizer(_changed(1, dtype), settings=QUICK).volume.array, plain)
    assert synthesizer(_changed(255), settings=QUICK).volume.array.shape == plain.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddim, ancestral, heun, dpmpp_2m; got 'euler'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"guidance": -1.0}, "guidance must be a number of at least 0; got -1.0"),
        ({"guidance": float("nan")}, "guidance must be a number of at least 0; got nan"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(FibldmError, match=message):
        SamplingSettings(**given)


def test_file_with_sidecar_and_mask(synthesizer, tmp_path):
    """H1, H5, B20."""
    file = write_mask(tmp_path / "case.1.nii.gz", body())
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=2, settings=QUICK)
    assert path == tmp_path / "out" / "case.1_002.nii.gz"
    written, mask = nibabel.load(path), nibabel.load(file)
    assert written.header["descrip"].item().startswith(b"SYNTHETIC")
    np.testing.assert_allclose(written.affine, mask.affine, atol=1e-4)
    assert written.shape == mask.shape and written.get_data_dtype() == np.int16
    told = json.loads(sidecar(path).read_text())
    assert told["synthetic"] is True
    assert told["mask"] == "case.1.nii.gz" and told["mask_sha256"] == hash_file(file)
    assert told["sampling"] == {"sampler": "ddim", "steps": 2, "guidance": 1.0, "seed": 0}
    assert (told["number"], told["network_calls"], told["units"]) == (2, 2, "HU")
    assert told["intensity"] == synthesizer.intensity.to_dict() and told["source"] == synthesizer.source
    assert told["extrapolation"] == [] and "anatomy of its patient" in told["notice"]
    used = read_volume(str(tmp_path / "out" / "masks" / "case.1.nii.gz"))
    np.testing.assert_array_equal(used.array, body().array)
    np.testing.assert_allclose(used.affine, body().affine, atol=1e-4)
    names = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*"))
    assert names == ["case.1_002.json", "case.1_002.nii.gz", "masks/case.1.nii.gz"]


def test_a_file_and_an_array_give_the_same_volume(synthesizer, tmp_path):
    """H8: the file's name is the mask's name."""
    file = write_mask(tmp_path / "case.nii.gz", body())
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=3, settings=QUICK)
    made = synthesizer(read_volume(str(file)), name="case", number=3, settings=QUICK)
    np.testing.assert_array_equal(read_volume(str(path)).array, made.volume.array)


def test_a_rerun_keeps_what_is_there_and_refuses_another_request(synthesizer, tmp_path):
    file = write_mask(tmp_path / "case.nii.gz", body())
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    before = [(part, part.stat().st_mtime_ns) for part in (tmp_path / "out").rglob("*.*")]
    for allow in (False, True):
        again = synthesize_file(
            synthesizer, file, tmp_path / "out", number=0, settings=QUICK, allow_extrapolation=allow
        )
        assert again == path
    assert before == [(part, part.stat().st_mtime_ns) for part in (tmp_path / "out").rglob("*.*")]
    (tmp_path / "out/masks/case.nii.gz").unlink()
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    assert (tmp_path / "out/masks/case.nii.gz").is_file()
    retrained = replace(synthesizer, source={**synthesizer.source, "weights": "other"})
    for other, settings in ((synthesizer, replace(QUICK, seed=1)), (retrained, QUICK)):
        with pytest.raises(FibldmError, match="case_000.nii.gz lies there already and was made from another mask, run"):
            synthesize_file(other, file, tmp_path / "out", number=0, settings=settings)


def test_two_masks_of_one_name_are_not_mixed(synthesizer, tmp_path):
    """B20: ``masks/case.nii.gz`` stays the mask of every volume of that name."""
    (tmp_path / "other").mkdir()
    file, other = (
        write_mask(tmp_path / "case.nii.gz", body()),
        write_mask(tmp_path / "other" / "case.nii.gz", _changed(2)),
    )
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK)
    with pytest.raises(FibldmError, match="case.nii.gz lies there already and is another mask; choose another --out"):
        synthesize_file(synthesizer, other, tmp_path / "out", number=1, settings=QUICK)
    assert not (tmp_path / "out" / "case_001.nii.gz").exists()


def test_an_interrupted_write_is_made_good(synthesizer, tmp_path, monkeypatch):
    """H1: stopped between sidecar and volume, there is no volume; the next run overwrites the lone sidecar."""
    file, out = write_mask(tmp_path / "case.nii.gz", body()), tmp_path / "out"
    replace_file = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if str(target).endswith("_000.nii.gz"):
            raise KeyboardInterrupt
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            synthesize_file(synthesizer, file, out, number=0, settings=QUICK)
    assert sorted(os.listdir(out)) == ["case_000.json", "masks"]
    other = replace(QUICK, seed=9)
    path = synthesize_file(synthesizer, file, out, number=0, settings=other)
    assert json.loads(sidecar(path).read_text())["sampling"]["seed"] == 9
    assert sorted(os.listdir(out)) == ["case_000.json", "case_000.nii.gz", "masks"]


def test_find_masks(tmp_path):
    """A27: files and folders, in order; unfinished files and other files of a folder are passed over."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("b.nii.gz", "a.nii", ".writing-x.nii.gz", "._b.nii.gz", "notes.txt", "c.nii.bak", "d.dcm"):
        (folder / name).write_bytes(gzip.compress(b""))
    (tmp_path / "z.nii.gz").touch()
    found = [folder / name for name in ("a.nii", "b.nii.gz", "d.dcm")]
    assert find_masks([tmp_path / "z.nii.gz", folder]) == [tmp_path / "z.nii.gz", *found]


def test_find_masks_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.nii", "a.nii.gz", "a.dcm", "scan.mha"):
        (tmp_path / name).touch()
    bad = [
        ([tmp_path / "absent"], "masks must exist; .*absent does not"),
        ([tmp_path / "empty"], r"masks must be NIfTI files \(.nii, .nii.gz\) or DICOM .* \(.dcm\); got none"),
        ([tmp_path / "scan.mha"], r"masks must be NIfTI files .*; got .*scan.mha"),
        ([tmp_path], "every mask needs a name of its own; given twice: a; rename them"),
    ]
    for sources, message in bad:
        with pytest.raises(FibldmError, match=message):
            find_masks(sources)


def _tree(folder: Path) -> dict[str, int]:
    return {str(part.relative_to(folder)): part.stat().st_mtime_ns for part in folder.rglob("*.*")}


def test_dicom_and_nifti_are_one_volume(synthesizer, tmp_path):
    """H1, H5: the same voxels at the same places, a mask that references the series, and a sidecar."""
    file, dicom = write_mask(tmp_path / "case.nii.gz", body()), DicomOutput.read()
    nifti = synthesize_file(synthesizer, file, tmp_path / "nifti", number=1, settings=QUICK)
    path = synthesize_file(synthesizer, file, tmp_path / "out", number=1, settings=QUICK, dicom=dicom)
    assert path == tmp_path / "out" / "case_001"
    slices = [pydicom.dcmread(part) for part in sorted(path.iterdir())]
    read = get_volume_from_series(slices)
    placed = Volume(read.array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ read.affine).canonical()
    wanted = read_volume(str(nifti)).canonical()
    np.testing.assert_array_equal(placed.array, wanted.array)
    np.testing.assert_allclose(placed.affine, wanted.affine, atol=1e-4)
    mask = pydicom.dcmread(tmp_path / "out" / "masks" / "case_001.dcm")
    assert mask.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert [item.SegmentLabel for item in mask.SegmentSequence] == ["left lung", "right lung", "nodule"]
    told, told_nifti = (json.loads(sidecar(part).read_text()) for part in (path, nifti))
    assert told["synthetic"] is True and told["dicom"] == {"quantisation_step": 1.0, "template": False, "slices": 19}
    assert {key: told[key] for key in told_nifti} == told_nifti
    number = len(slices)
    assert sorted(_tree(tmp_path / "out"))[0] == "case_001.json" and len(_tree(tmp_path / "out")) == number + 2


def test_a_dicom_rerun_keeps_what_is_there_and_refuses_another_request(synthesizer, tmp_path):
    file, out, dicom = write_mask(tmp_path / "case.nii.gz", body()), tmp_path / "out", DicomOutput.read()
    path = synthesize_file(synthesizer, file, out, number=0, settings=QUICK, dicom=dicom)
    before = _tree(out)
    assert synthesize_file(synthesizer, file, out, number=0, settings=QUICK, dicom=dicom) == path
    assert before == _tree(out)
    with pytest.raises(
        FibldmError, match="case_000 lies there already and was made from another mask, run or settings"
    ):
        synthesize_file(synthesizer, file, out, number=0, settings=replace(QUICK, seed=1), dicom=dicom)
    with pytest.raises(FibldmError, match="case_000 lies there already, in another format; choose another --out"):
        synthesize_file(synthesizer, file, out, number=0, settings=QUICK)
    again = synthesize_file(synthesizer, file, tmp_path / "again", number=0, settings=QUICK, dicom=dicom)
    for part in sorted(path.iterdir()):
        assert part.read_bytes() == (again / part.name).read_bytes()
    next(again.glob("*.dcm")).unlink()
    with pytest.raises(FibldmError, match=r"must hold \d+ slices, and .*case_000.dcm its mask; \d+ slices are there"):
        synthesize_file(synthesizer, file, tmp_path / "again", number=0, settings=QUICK, dicom=dicom)


def test_a_label_without_coded_meaning_is_refused_before_anything_is_made(synthesizer, tmp_path):
    file = write_mask(tmp_path / "case.nii.gz", body())
    odd = replace(synthesizer, names={1: "left lung", 2: "label 2", 5: "odd"}, network=None)
    with pytest.raises(FibldmError, match="there is none for label 2, odd; give --label-codes FILE"):
        synthesize_file(odd, file, tmp_path / "out", number=0, settings=QUICK, dicom=DicomOutput.read())
    assert not (tmp_path / "out").exists()


def test_a_dicom_segmentation_is_taken_as_mask(synthesizer, tmp_path):
    """A27: the mask that was written gives the volume of the same name again; strange segments are refused."""
    file = write_mask(tmp_path / "case.nii.gz", body())
    synthesize_file(synthesizer, file, tmp_path / "out", number=0, settings=QUICK, dicom=DicomOutput.read())
    written = tmp_path / "out" / "masks" / "case_000.dcm"
    path = synthesize_file(synthesizer, written, tmp_path / "again", number=0, settings=QUICK)
    assert path.name == "case_000_000.nii.gz"
    used = read_volume(str(tmp_path / "again" / "masks" / "case_000.nii.gz"))
    canonical = body().canonical()
    np.testing.assert_array_equal(used.array, canonical.array)
    np.testing.assert_allclose(used.affine, canonical.affine, atol=1e-4)
    made = synthesizer(body(), name="case_000", settings=QUICK).volume.canonical()
    np.testing.assert_array_equal(read_volume(str(path)).array, made.array)
    other = replace(synthesizer, names={1: "left lung", 2: "right lung"})
    with pytest.raises(
        FibldmError, match=r"must have the name of a label of the run \(left.*; got also nodule; rename"
    ):
        synthesize_file(other, written, tmp_path / "other", number=0, settings=QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "dcm"], "--format must be one of nifti, dicom; got 'dcm'"),
        (["--template", "x"], "--format nifti takes no --template"),
        (["--label-codes", "x"], "--format nifti takes no --label-codes"),
        (["--format", "dicom", "--bids", "T1w"], "--format dicom takes no --bids"),
        (["--format", "dicom", "--template", "/absent"], "a template must be a folder"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    assert run(["synthesize", "--run", str(tmp_path), "--masks", "x", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_writes_dicom_and_bids(tiny_run, phantom_work, tmp_path):
    """H1: with the phantoms' own labels, whose codes and names come from the run."""
    mask = sorted((phantom_work / "labels").glob("*.nii.gz"))[0]
    command = ["synthesize", "--run", str(tiny_run), "--masks", str(mask), "--steps", "1", "--allow-extrapolation"]
    assert run([*command, "--out", str(tmp_path / "dicom"), "--format", "dicom"]) == 0
    (segmentation,) = (tmp_path / "dicom" / "masks").iterdir()
    named = {item.SegmentLabel for item in pydicom.dcmread(segmentation).SegmentSequence}
    assert {"left lung", "right lung", "airways"} <= named
    assert run([*command, "--out", str(tmp_path / "nifti"), "--bids", "ct"]) == 0
    assert len(list((tmp_path / "nifti" / "bids").glob("sub-*/ct/*_desc-synthetic_ct.nii.gz"))) == 1
    assert "left lung" in (tmp_path / "nifti" / "bids" / "dseg.tsv").read_text()
    assert run([*command, "--out", str(tmp_path / "other"), "--bids", "T1w"]) == 2
