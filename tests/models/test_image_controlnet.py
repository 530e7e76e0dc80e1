"""A second image of the patient as the hint of a ControlNet, whose base need not know of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import awake, data_file, normal, tiny_configuration, unet_numbers
from monai.networks.nets import ControlNet, DiffusionModelUNet
from second_images import write_dataset
from torch import nn

from fibldm.cli import run as cli
from fibldm.datasets.preparation import prepare
from fibldm.datasets.settings import PrepareSettings
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.verify import run_checks
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.models.conditions.image import ImageEncoding, ImageMixture
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.control import Control
from fibldm.models.network import ConditionedNetwork, steered
from fibldm.models.one_tensor import OneTensorNetwork
from fibldm.runs import StageFolder
from fibldm.synthesis import Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar

PERCENTILES = Intensity("percentile", output_low=-1.0, output_high=1.0).to_dict()
MR = ImageEncoding((2, 2, 2), "mr", PERCENTILES)
Z, T = normal(2, 1, 4, 4, 4), torch.tensor([100.0, 900.0])
SEEN = MR.encode([torch.stack([normal(8, 8, 8, seed=seed).clamp(-1, 1), torch.ones(8, 8, 8)]) for seed in (1, 2)])
MASK = torch.rand(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
QUICK = ("manifest", "generator", "metadata", "inference properties", "verify_net_in_out", "torch.export", "synthesis")


def controlled(base: ConditionedNetwork, **more: Any) -> ConditionedNetwork:
    torch.manual_seed(0)
    numbers = unet_numbers(in_channels=base.unet.in_channels, conditioning_embedding_num_channels=(8,))
    width = 4 + (3 if "beside" in more else 0)
    return steered(base, ControlNet(conditioning_embedding_in_channels=width, **numbers), **more).eval()


def unaware(**changes: Any) -> ConditionedNetwork:
    torch.manual_seed(0)
    return ConditionedNetwork(
        awake(DiffusionModelUNet(**{"in_channels": 1, "out_channels": 1, **unet_numbers(**changes)}))
    )


# --- the network


def test_a_controlnet_of_an_image_leaves_its_base_as_it_was() -> None:
    base = unaware()
    with torch.no_grad():
        alone = base(Z, T)
        network = controlled(base, sees="image", encoder=ImageMixture(MR, 4))
        assert network.sees == {"image"} and not network.sees_mask
        assert torch.equal(network(Z, T, {"image": SEEN}), alone)
        awake(network, seed=0)
        followed = network(Z, T, {"image": SEEN})
        assert not torch.equal(followed, alone) and torch.equal(network(Z, T), alone)
        unknown = MR.drop(SEEN, torch.tensor([[True], [False]]))
        half = network(Z, T, {"image": unknown})
    assert not torch.equal(half[0], followed[0]) and torch.allclose(half[1], followed[1], atol=1e-6)


def test_a_controlnet_may_see_mask_and_image() -> None:
    """Each changes what it makes, and one of them without the other is no silent nothing."""
    parts = {"image": ImageMixture(MR, 4), "text": None}
    with torch.no_grad():
        network = awake(controlled(unaware(), encoder=nn.Identity(), beside=parts), seed=0)
        both = network(Z, T, {"mask": MASK, "image": SEEN})
        assert network.sees == {"mask", "image"} == network.in_space
        assert not torch.equal(both, network(Z, T, {"mask": MASK, "image": MR.null(SEEN)}))
        assert not torch.equal(both, network(Z, T, {"mask": 1 - MASK, "image": SEEN}))
        for given, missing in (({"mask": MASK}, "image"), ({"image": SEEN}, "mask")):
            with pytest.raises(FibldmError, match=f"sees mask, image needs all of them or none; there is no {missing}"):
                network(Z, T, given)
        assert torch.equal(network(Z, T), network.unet(Z, T))


def test_labels_are_of_a_controlnet_that_sees_the_mask() -> None:
    control = controlled(unaware(), sees="image", encoder=ImageMixture(MR, 4)).controls[0].controlnet
    with pytest.raises(FibldmError, match="sees labels of the mask; this one sees the image"):
        Control(control, sees="image", mask=MaskEncoding((0, 1), 2, 1), labels=[1])


def test_a_network_of_one_tensor_asks_nothing_of_further_conditions() -> None:
    """Input channels of an image as its ControlNet, which exporters of bundles call with latent, time and mask."""
    torch.manual_seed(0)
    unet = awake(DiffusionModelUNet(in_channels=5, out_channels=1, **unet_numbers()))
    for network in (
        ConditionedNetwork(unet, channels={"image": ImageMixture(MR, 4)}).eval(),
        awake(controlled(unaware(), sees="image", encoder=ImageMixture(MR, 4)), seed=0),
    ):
        packed = torch.cat([Z, T.view(2, 1, 1, 1, 1).expand(2, 1, 4, 4, 4)], dim=1)
        with torch.no_grad():
            expected = network(Z, T, {"image": MR.null(SEEN)})
            assert torch.equal(OneTensorNetwork(network, 1, {"image": MR})(packed), expected)


# --- all the way


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared; the second patient has no second image."""
    folder = tmp_path_factory.mktemp("steered")
    settings = PrepareSettings(modality="ct", second_modality="mr")
    prepare(write_dataset(folder, without=(1,)), folder / "work", settings, progress=False)
    return folder / "work"


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    """A run whose stage 2 knows neither mask nor image; read only."""
    run = work.parent / "run"
    for stage in ("autoencoder", "latents", "diffusion"):
        train(run, work, stage)
    return run


def train(run: Path, work: Path, stage: str, *configs: str, **overrides: Any) -> None:
    data = data_file(work.parent, 4.0, 32, 32, 32)
    tiny_configuration(stage, work, run, data, "tiny", *configs, **overrides).run()


def drawn(synthesizer: Synthesizer, mask: Any = None, **asked: Any) -> np.ndarray:
    made = synthesizer(mask, name="m", steps=1, allow_extrapolation=True, conditions=asked)
    return np.asarray(made.volume.array)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_an_image_alone_steers_a_base_that_knows_nothing_of_it(
    work: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scan = Path(shutil.copytree(base, tmp_path / "run")), work.parent / "mr4.nii.gz"
    train(run, work, "controlnet", "image_controlnet", control_mask=False, learning_rate=0.05)
    trained, before = (StageFolder(run, stage).trained().state_dict() for stage in ("controlnet", "diffusion"))
    assert all(torch.equal(trained[name], weight) for name, weight in before.items())
    with pytest.raises(FibldmError, match=r"neither stage 2 of .* nor its ControlNet knows masks"):
        Synthesizer.from_run(run)

    synthesizer = Synthesizer.from_run(run, unconditional=True)
    followed = drawn(synthesizer, image=scan)
    assert followed.shape == (28, 40, 38) and not synthesizer.network.sees_mask
    off = drawn(Synthesizer.from_run(run, unconditional=True, strength=0.0), image=scan)
    assert not np.array_equal(followed, off)
    with pytest.raises(FibldmError, match="trained without masks"):
        drawn(synthesizer, read_volume(load_datalist(work, "test")[0]["label"]))

    export(run, tmp_path / "bundle", ExportSettings("CC0-1.0", unconditional=True))
    assert np.array_equal(drawn(Synthesizer.from_bundle(tmp_path / "bundle"), image=scan), followed)
    checks = list(run_checks(tmp_path / "bundle", tmp_path / "trial", QUICK))
    assert [check for check in checks if not check.ok] == []

    command = ["synthesize", "--run", str(run), "--image", str(scan), "--steps=1", "--allow-extrapolation"]
    command += ["--device=cpu", "--json"]
    assert cli([*command, "--out", str(tmp_path / "weak"), "--strength=0.5"]) == 0
    assert cli([*command, "--out", str(tmp_path / "out")]) == 0
    (file,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    told = read_json(sidecar(Path(file)))
    assert read_json(sidecar(tmp_path / "weak" / Path(file).name))["choice"] == {"strength": 0.5}
    assert told["conditions"]["image"] == {"name": "mr4.nii.gz", "sha256": hash_file(scan)}
    assert told["follows_mask"] is False and read_volume(file).array.shape == (28, 40, 38)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_mask_and_image_steer_together_or_by_two_controlnets(work: Path, base: Path, tmp_path: Path) -> None:
    both, other = (Path(shutil.copytree(base, tmp_path / name)) for name in ("both", "other"))
    train(both, work, "controlnet", "image_controlnet", learning_rate=0.05)
    train(other, work, "controlnet", learning_rate=0.05)  # of the mask alone
    mask, scan = read_volume(load_datalist(work, "test")[0]["label"]), work.parent / "mr4.nii.gz"
    synthesizer = Synthesizer.from_run(both)
    followed, blind = drawn(synthesizer, mask, image=scan), drawn(synthesizer, mask)
    assert followed.shape == mask.array.shape and not np.array_equal(followed, blind)

    joined = Synthesizer.from_run(other, others={both: 0.5})
    assert joined.network.sees == {"mask", "image"} and "image" in joined.conditions
    assert not np.array_equal(drawn(joined, mask, image=scan), drawn(joined, mask))

    export(both, tmp_path / "bundle", ExportSettings("CC0-1.0"))
    assert np.array_equal(drawn(Synthesizer.from_bundle(tmp_path / "bundle"), mask, image=scan), followed)
    checks = list(run_checks(tmp_path / "bundle", tmp_path / "trial", ("generator", "verify_net_in_out")))
    assert [check for check in checks if not check.ok] == []


@pytest.mark.slow
def test_a_controlnet_of_the_mask_stands_on_a_base_that_knows_the_image(work: Path, base: Path, tmp_path: Path) -> None:
    """By input channels in stage 2, which stage 3 needs to be told of; it may steer by the image as well."""
    run = tmp_path / "run"
    for stage in ("autoencoder", "latents"):
        shutil.copytree(base / stage, run / stage)
    train(run, work, "diffusion", "image")
    again = Path(shutil.copytree(run, tmp_path / "again"))
    train(run, work, "controlnet", "image", learning_rate=0.05)
    train(again, work, "controlnet", "image_controlnet", learning_rate=0.05)
    mask, scan = read_volume(load_datalist(work, "test")[0]["label"]), work.parent / "mr4.nii.gz"
    for folder in (run, again):
        synthesizer = Synthesizer.from_run(folder)
        assert synthesizer.network.routes["channels"] == ("image",)
        assert not np.array_equal(drawn(synthesizer, mask, image=scan), drawn(synthesizer, mask))
