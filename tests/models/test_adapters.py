"""Adapters: updates of low rank apart from the network that they were learned on, put on it by any strength."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import create_workflow
from safetensors.torch import save_file
from torch import Tensor, nn

from fibldm.cli import run as cli
from fibldm.cli.synthesis_options import read_strengths
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json, write_json
from fibldm.models.adapters import ADAPTER, Adapter, put_on, write_adapter
from fibldm.models.lean_unet import LeanUNet
from fibldm.models.low_rank import add_low_rank, base_state, merged_state, updates_of
from fibldm.recipe import Recipe
from fibldm.runs import StageFolder, hash_weights
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files
from fibldm.synthesis.bundle import GENERATOR
from fibldm.training.base_latents import covariates_as_fitted
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import sidecar, write_labels

TinyStage = Callable[..., Configuration]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

FRAME: Mapping[str, Any] = {"target": "flow", "spacing": [1.0, 1.0, 2.0]}
QUICK = SamplingSettings(steps=1, residual_noise=0.0)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(2, 6, 3), nn.Conv3d(6, 4, 1), nn.Linear(5, 7), nn.ConvTranspose3d(4, 3, 2))


def adapted(rank: int, alpha: float | None, seed: int) -> nn.Sequential:
    made = network()
    add_low_rank(made, rank, ["*"], alpha=alpha)
    torch.manual_seed(seed)
    for name, weight in made.named_parameters():
        if name.endswith(".lora_b"):
            nn.init.normal_(weight)
    return made


def kept(file: Path, rank: int = 2, alpha: float | None = 3.0, seed: int = 1) -> Adapter:
    made = adapted(rank, alpha, seed)
    facts = {
        "stage": "diffusion",
        "rank": rank,
        "alpha": alpha,
        "targets": ["*"],
        "frame": FRAME,
        "data": {"cases": 10},
    }
    write_adapter(file, updates_of(made), {"base": hash_weights(base_state(made)), **facts})
    return Adapter.read(file)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_alpha_scales_updates_and_none_is_the_rank() -> None:
    """Hu et al. 2022, section 4.1; against the sum by hand."""
    plain = network().state_dict()
    for alpha, scale in ((None, 1.0), (2.0, 1.0), (3.0, 1.5), (0.5, 0.25)):
        made = adapted(2, alpha, seed=1)
        merged, updates = merged_state(made), updates_of(made)
        for layer, shape in (("0", (6, 54)), ("1", (4, 6)), ("2", (7, 5)), ("3", (4, 24))):
            product = updates[f"{layer}.lora_b"] @ updates[f"{layer}.lora_a"]
            assert product.shape == shape
            expected = plain[f"{layer}.weight"] + scale * product.view_as(plain[f"{layer}.weight"])
            torch.testing.assert_close(merged[f"{layer}.weight"], expected)
            assert torch.equal(merged[f"{layer}.weight"], made[int(layer)].weight.detach())
        assert same(base_state(made), plain)
    for wrong in (0, -1.0, float("nan"), True, "4"):
        with pytest.raises(FibldmError, match="lora_alpha must be a number above 0; got"):
            add_low_rank(network(), 2, ["*"], alpha=wrong)  # type: ignore[arg-type]


def test_an_update_of_a_convolution_is_two_convolutions() -> None:
    """A of the kernel's own size to rank channels, B of one voxel back."""
    made = adapted(2, None, seed=1)
    updates, image = updates_of(made), torch.rand(1, 2, 5, 6, 7)
    inner = nn.functional.conv3d(image, updates["0.lora_a"].view(2, 2, 3, 3, 3))
    expected = network()[0](image) + nn.functional.conv3d(inner, updates["0.lora_b"].view(6, 2, 1, 1, 1))
    torch.testing.assert_close(made[0](image), expected)


def test_an_adapter_of_the_usual_network_is_a_few_percent_of_it() -> None:
    """By the numbers of the configurations."""
    stage, asked = (yaml.safe_load(shipped(name).read_text()) for name in ("train_diffusion", "adapter"))
    sizes = {key: stage[f"unet_{key}"] for key in ("channels", "attention_levels")}
    sizes |= {"num_head_channels": stage["unet_head_channels"], "norm_num_groups": stage["unet_norm_groups"]}
    usual = LeanUNet(spatial_dims=3, in_channels=16, out_channels=8, num_res_blocks=stage["unet_res_blocks"], **sizes)
    whole = sum(weight.numel() for weight in usual.parameters())
    count = add_low_rank(usual, asked["lora_rank"], asked["lora_weights"], alpha=asked["lora_alpha"])
    assert 0 < count < 0.03 * whole


def test_strengths_scale_add_up_and_switch_off(tmp_path: Path) -> None:
    one, two = kept(tmp_path / "one.safetensors"), kept(tmp_path / "two.safetensors", rank=1, alpha=None, seed=2)
    plain = network().state_dict()
    assert same(put_on(plain, [(one, 0.0), (two, 0)], FRAME), plain)
    assert same(put_on(plain, [(one, 1.0)], FRAME), merged_state(adapted(2, 3.0, seed=1)))
    both = put_on(plain, [(one, 0.5), (two, 2.0)], FRAME)
    assert same(both, put_on(plain, [(two, 2.0), (one, 0.5)], FRAME))
    alone = [put_on(plain, [(part, 1.0)], FRAME) for part in (one, two)]
    for name, weight in plain.items():
        expected = weight + 0.5 * (alone[0][name] - weight) + 2.0 * (alone[1][name] - weight)
        torch.testing.assert_close(both[name], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(both[name], weight) == name.endswith("bias")


def test_the_same_updates_are_the_same_file(tmp_path: Path) -> None:
    """And it says what they were learned on."""
    files = [kept(tmp_path / f"{number}.safetensors") for number in range(4)]
    assert len({part.sha256 for part in files}) == 1
    facts = files[0].facts
    assert (facts["rank"], facts["alpha"], facts["targets"], facts["data"]) == (2, 3.0, ["*"], {"cases": 10})


@pytest.mark.parametrize("strength", [-0.5, float("inf"), float("nan"), True, "1"])
def test_what_is_no_strength_is_refused(tmp_path: Path, strength: Any) -> None:
    with pytest.raises(FibldmError, match="strength of an adapter must be a number of at least 0"):
        put_on(network().state_dict(), [(kept(tmp_path / "one.safetensors"), strength)], FRAME)


def test_an_adapter_of_another_network_is_refused(tmp_path: Path) -> None:
    """Of other layers, other weights, or in another frame; ControlNets on top of its own are none of its business."""
    one, plain = kept(tmp_path / "one.safetensors"), network().state_dict()
    with pytest.raises(FibldmError, match="every adapter must be given once"):
        put_on(plain, [(one, 1.0), (kept(tmp_path / "two.safetensors"), 1.0)], FRAME)
    with pytest.raises(FibldmError, match=r"moves 3\.weight, a matrix of 4 x 24, and this network has no such layer"):
        put_on({name: part for name, part in plain.items() if name[0] != "3"}, [(one, 1.0)], FRAME)
    with pytest.raises(
        FibldmError, match=r"moves 0\.weight, a matrix of 6 x 54, and this network has \(6, 2, 1, 1, 1\)"
    ):
        put_on({**plain, "0.weight": torch.zeros(6, 2, 1, 1, 1)}, [(one, 1.0)], FRAME)
    with pytest.raises(FibldmError, match=r"was trained on [0-9a-f]{12}, and these are [0-9a-f]{12}"):
        put_on({**plain, "2.bias": torch.zeros(7)}, [(one, 1.0)], FRAME)
    with pytest.raises(
        FibldmError, match=r"was trained with spacing \[1.0, 1.0, 2.0\], and this generator has spacing 2"
    ):
        put_on(plain, [(one, 1.0)], {**FRAME, "spacing": 2})
    put_on(plain, [(one, 1.0)], {**FRAME, "condition mask": {}})
    with_control = {**plain, "controls.0.weight": torch.zeros(1), "controls.1.weight": torch.ones(1)}
    assert put_on(with_control, [(one, 1.0)], FRAME)["controls.1.weight"] == 1


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="an adapter must be a file, adapter.safetensors of a stage; .* is none"):
        Adapter.read(tmp_path / "absent")
    wrong, told = tmp_path / "wrong.safetensors", kept(tmp_path / "one.safetensors").facts
    wrong.write_bytes(b"no tensors")
    with pytest.raises(FibldmError, match="must be an adapter, which is safetensors"):
        Adapter.read(wrong)
    save_file({"0.lora_a": torch.zeros(1, 2)}, wrong)
    with pytest.raises(FibldmError, match="must be an adapter of this version"):
        Adapter.read(wrong)
    for tensors, message in (
        ({"0.lora_a": torch.zeros(1, 2)}, "must hold lora_a .* of every layer; 0 has not"),
        ({"0.lora_a": torch.zeros(1, 2), "0.lora_b": torch.zeros(3, 2)}, "of every layer; 0 has not"),
        ({"0.lora_a": torch.full((1, 2), torch.nan), "0.lora_b": torch.zeros(3, 1)}, "updates must be finite"),
        ({}, "must hold updates; it holds none"),
        ({"0.lora_a": torch.zeros(1, 2), "0.lora_b": torch.zeros(3, 1), "more": torch.zeros(1)}, "more has not"),
    ):
        write_adapter(wrong, tensors, told)
        with pytest.raises(FibldmError, match=message):
            Adapter.read(wrong)


# --- stages


@pytest.fixture(scope="session")
def site(tiny_run: Path, tiny_stage: TinyStage, made_once: MadeOnce) -> Path:
    """A run that adapts stage 2 of the tiny run: its autoencoder, and latents of its scale."""

    def make(folder: Path) -> None:
        begin(tiny_run, tiny_stage, folder / "site")
        tiny_stage("diffusion", folder / "site", "adapter", init_from=str(tiny_run), epochs=2, **STRONG).run()

    return made_once("site", make) / "site"


STRONG = {"lora_rank": 1, "lora_alpha": 2, "learning_rate": 0.05}


def begin(base: Path, tiny_stage: TinyStage, run: Path, **of_latents: object) -> None:
    tiny_stage("autoencoder", run, "autoencoder_as_given", init_from=str(base)).run()
    given = {"latent_space": str(base), "subset": 1.0, **of_latents}
    tiny_stage("latents", run, **given).run()


@pytest.fixture(scope="session")
def mask(made_once: MadeOnce) -> Path:
    """A box of one label."""

    def make(folder: Path) -> None:
        labels = np.zeros((32, 32, 32), dtype=np.uint8)
        labels[8:20, 10:22, 6:24] = 1
        write_labels(folder / "box.nii.gz", Volume(labels, np.diag([10.0, 10.0, 10.0, 1.0])))

    return made_once("adapter_mask", make) / "box.nii.gz"


def of(run: Path) -> Path:
    return StageFolder(run, "diffusion").checkpoints / ADAPTER


def test_a_stage_keeps_its_adapter_beside_the_checkpoint(site: Path, tiny_run: Path) -> None:
    """At strength 1 on its base it is what training ended with, to the bit."""
    stage, adapter = StageFolder(site, "diffusion"), Adapter.read(of(site))
    facts, base = adapter.facts, StageFolder(tiny_run, "diffusion")
    assert facts["base"] == base.require()["weights"] and stage.require()["adapter"] == adapter.sha256
    assert (facts["stage"], facts["rank"], facts["alpha"], facts["targets"]) == ("diffusion", 1, 2, ["*"])
    assert facts["data"]["cases"] == len(
        {item["case"] for item in read_json(site / "latents/latents.json")["items"]["training"]}
    )
    assert str(site) not in json.dumps(facts)
    before, after = (part.trained(device="cpu").state_dict() for part in (base, stage))
    assert same(put_on(before, [(adapter, 1.0)], facts["frame"]), after)
    assert not same(before, after)


def test_latents_have_the_scale_of_the_base(site: Path, tiny_run: Path) -> None:
    """Even of other scans, from which another one would be fitted."""
    spaces = [read_json(run / "latents" / "latents.json")["space"] for run in (site, tiny_run)]
    assert spaces[0] == spaces[1]


def test_an_adapter_that_goes_on_is_the_same(site: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    for stage in ("autoencoder", "latents"):
        shutil.copytree(site / stage, tmp_path / stage)
    for epochs in (1, 2):
        tiny_stage("diffusion", tmp_path, "adapter", init_from=str(tiny_run), epochs=epochs, **STRONG).run()
        assert of(tmp_path).exists()
    assert hash_file(of(tmp_path)) == hash_file(of(site))


@pytest.mark.slow
def test_an_adapter_of_a_controlnet(site: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    """Its base network stays frozen, so that only layers of the ControlNet are moved."""
    for run, stage in ((site, "autoencoder"), (site, "latents"), (tiny_run, "diffusion")):
        shutil.copytree(run / stage, tmp_path / stage)
    tiny_stage("controlnet", tmp_path, "adapter", init_from=str(tiny_run), **STRONG).run()
    file = StageFolder(tmp_path, "controlnet").checkpoints / ADAPTER
    adapter = Adapter.read(file)
    assert {name.split(".")[0] for name in adapter.updates} == {"controls"}
    made = Synthesizer.from_run(tiny_run, adapters={file: 1.0, of(site): 0.5})
    ended = StageFolder(tmp_path, "controlnet").require()["weights"]
    assert Synthesizer.from_run(tiny_run, adapters={file: 1.0}).source["weights"] == ended != made.source["weights"]
    twice = Synthesizer.from_run(tiny_run, strength=0.5, others={tiny_run: 1.0}, adapters={file: 1.0})
    assert twice.source["weights"] not in (ended, made.source["weights"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": None}, "lora_rank adapts weights that are there; init_from names none"),
        ({"lora_rank": 0}, "an adapter needs a lora_rank of at least 1; got 0"),
        ({"lora_full": ["unet.out.*"]}, r"an adapter is updates of low rank alone; lora_full asks for \['unet.out"),
        ({"process::_target_": "fibldm.models.process.VariancePreserving"}, "frame of its base; .* has process"),
        ({"unet_channels": [16, 32]}, "needs all weights of its network from init_from; .* lacks"),
    ],
)
def test_an_adapter_that_its_base_could_not_take_is_refused_before_training(
    site: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    for stage in ("autoencoder", "latents"):
        shutil.copytree(site / stage, tmp_path / stage)
    with pytest.raises(FibldmError, match=message):
        tiny_stage("diffusion", tmp_path, "adapter", **{"init_from": str(tiny_run), **settings}).run()
    assert not list(tmp_path.glob("diffusion/checkpoints/*"))


def test_latents_of_another_scale_are_refused(
    site: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """An adapter of them would colour the volumes of its base wrongly; so is a scale of another autoencoder."""
    for stage in ("autoencoder", "latents"):
        shutil.copytree(site / stage, tmp_path / stage)
    facts = read_json(tmp_path / "latents" / "latents.json")
    facts["space"]["std"][0] *= 2
    write_json(tmp_path / "latents" / "latents.json", facts)
    with pytest.raises(FibldmError, match="in the frame of its base; .* has latent space .*latent_space="):
        tiny_stage("diffusion", tmp_path, "adapter", init_from=str(tiny_run)).run()
    with pytest.raises(FibldmError, match="latents have one scale; got latent_scale and latent_space"):
        tiny_stage("latents", tmp_path, latent_space=str(tiny_run), latent_scale=0.5, restart=True).run()
    for space, message in (
        (str(tmp_path / "absent"), "latent_space must be a run"),
        (str(site), "this run has another"),
    ):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(tmp_path / "autoencoder", other / "autoencoder")
        done = read_json(other / "autoencoder" / "done.json")
        write_json(other / "autoencoder" / "done.json", {**done, "weights": "0" * 64})
        with pytest.raises(FibldmError, match=message):
            tiny_stage("latents", other, latent_space=space).run()


def test_only_networks_that_draw_volumes_have_adapters(tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    settings = {"init_from": str(tiny_run), "lora_rank": 1, "lora_apart": True}
    with pytest.raises(FibldmError, match="volumes are drawn with; got lora_apart at stage autoencoder"):
        tiny_stage("autoencoder", tmp_path, **settings).run()


def test_covariates_stay_as_the_base_fitted_them() -> None:
    fitted = {
        "age": {"mean": 60.0, "std": 9.0, "low": 40.0, "high": 80.0},
        "sex": {"_target_": "x", "values": ["F", "M"]},
    }
    encoding = covariates_as_fitted(fitted, ["age", "sex"])
    assert encoding.encode([{"age": 69, "sex": "M"}]).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]
    with pytest.raises(FibldmError, match=r"those of latent_space \(age, sex\), in this order; got sex"):
        covariates_as_fitted(fitted, ["sex"])


# --- synthesis


def drawn(folder: Path) -> np.ndarray:
    return read_volume(str(folder / "box_000.nii.gz")).array


def test_the_command_puts_adapters_on_by_their_strengths(
    site: Path, tiny_run: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is the base to the bit; the sidecar says hash and strength; another base is refused in one sentence."""
    given = ["synthesize", "--masks", str(mask), "--steps", "1", "--residual-noise", "0", "--allow-extrapolation"]
    given += ["--device", "cpu"]

    def made(name: str, *options: str, run: Path = tiny_run) -> dict[str, Any]:
        assert cli([*given, "--run", str(run), "--out", str(tmp_path / name), *options]) == 0
        told: dict[str, Any] = read_json(sidecar(tmp_path / name / "box_000.nii.gz"))
        return told

    base, off = made("base"), made("off", "--adapter", f"{of(site)}=0")
    assert np.array_equal(drawn(tmp_path / "base"), drawn(tmp_path / "off"))
    assert off["source"] == base["source"] and off["request"] == base["request"] and "choice" not in base
    on, half = made("on", "--adapter", str(of(site))), made("half", "--adapter", f"{of(site)}=0.5")
    sha256 = hash_file(of(site))
    assert on["choice"] == {"adapters": [{"sha256": sha256, "strength": 1.0}]}
    assert half["choice"] == {"adapters": [{"sha256": sha256, "strength": 0.5}]}
    assert len({told["source"]["weights"] for told in (base, on, half)}) == 3
    assert not np.array_equal(drawn(tmp_path / "base"), drawn(tmp_path / "on"))
    capsys.readouterr()
    refused = [*given, "--run", str(tiny_run), "--out", str(tmp_path / "no"), "--adapter"]
    for text, message in (
        (str(tmp_path / "absent"), "an adapter must be a file"),
        (f"{of(site)}=x", "--adapter needs FILE or FILE=STRENGTH; got"),
        (f"{of(site)}=-1", "strength of an adapter must be a number of at least 0"),
    ):
        assert cli([*refused, text]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    twice = [*refused, str(of(site)), "--adapter", f"{of(site)}=0.5"]
    assert cli(twice) == 2 and "came twice" in " ".join(capsys.readouterr().err.split())
    unconditional = ["synthesize", "--run", str(site), "--out", str(tmp_path / "no"), "--steps", "1", "--device", "cpu"]
    assert cli([*unconditional, "--adapter", str(of(site))]) == 2
    assert "must be put on the weights that it was trained on" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("no/*.nii.gz"))


def test_a_path_may_hold_what_stands_before_a_strength(tmp_path: Path) -> None:
    (tmp_path / "dose=2").touch()
    assert read_strengths([f"{tmp_path}/dose=2"]) == {f"{tmp_path}/dose=2": 1.0}
    assert read_strengths([f"{tmp_path}/dose=2=0.5", "b=3"]) == {f"{tmp_path}/dose=2": 0.5, "b": 3.0}
    with pytest.raises(FibldmError, match="--with-controlnet must name each RUN once; b came twice"):
        read_strengths(["b=1", "b"], "--with-controlnet", "RUN")


def test_an_adapted_run_and_its_base_with_the_adapter_draw_the_same(site: Path, tiny_run: Path) -> None:
    """What the grain aside, which each run measured by itself, is one generator."""
    one = Synthesizer.from_run(site, unconditional=True)
    other = Synthesizer.from_run(tiny_run, unconditional=True, adapters={of(site): 1.0})
    assert one.source["weights"] == other.source["weights"]
    volumes = [made(settings=QUICK).volume.array for made in (one, other)]
    assert np.array_equal(*volumes)


@pytest.fixture(scope="session")
def bundle(tiny_run: Path, made_once: MadeOnce) -> Path:
    return (
        made_once("adapter_bundle", lambda folder: export(tiny_run, folder / "base", ExportSettings("CC0-1.0")))
        / "base"
    )


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_every_door_takes_adapters(
    site: Path, tiny_run: Path, bundle: Path, mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle by Python, by its own configuration, and in a watch folder; a recipe says why it does not."""
    given = {"masks": [mask], "settings": QUICK, "allow_extrapolation": True, "device": "cpu"}
    synthesize_files(None, bundle=bundle, out=tmp_path / "python", adapters={of(site): 0.5}, **given)
    told = read_json(sidecar(tmp_path / "python" / "box_000.nii.gz"))
    assert told["choice"]["adapters"][0]["strength"] == 0.5
    assert told["source"]["weights"] == Synthesizer.from_bundle(bundle, adapters={of(site): 0.5}).source["weights"]

    options = {"masks": str(mask), "inferer::steps": 1, "inferer::residual_noise": 0.0, "allow_extrapolation": True}
    workflow = create_workflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(bundle),
        output_dir=str(tmp_path / "monai"),
        adapters={str(of(site)): 0.5},
        device="cpu",
        **options,
    )
    workflow.run()
    assert np.array_equal(drawn(tmp_path / "monai"), drawn(tmp_path / "python"))

    (tmp_path / "inbox").mkdir()
    shutil.copy(mask, tmp_path / "inbox" / "box.nii.gz")
    folders = ["--bundle", str(bundle), "--inbox", str(tmp_path / "inbox"), "--outbox", str(tmp_path / "outbox")]
    asked = ["--once", "--interval", "0.01", "--steps", "1", "--allow-extrapolation", "--device", "cpu"]
    assert cli(["watch", *folders, *asked, "--format", "nifti", "--adapter", f"{of(site)}=0.5"]) == 0
    (volume,) = (tmp_path / "outbox").rglob("*_000.nii.gz")
    assert read_json(sidecar(volume))["source"]["weights"] == told["source"]["weights"]

    with pytest.raises(FibldmError, match="a recipe measures volumes of the networks that it trains"):
        _ = Recipe.read(None, overrides={"synthesize": {"adapters": {str(of(site)): 1.0}}}).drawing(tmp_path)


def test_a_bundle_with_an_adapter_merged_draws_as_its_run_with_it(
    site: Path, tiny_run: Path, mask: Path, tmp_path: Path
) -> None:
    """Figures of the base are not told of it; card and ``generator.json`` say what was merged."""
    run = tmp_path / "run"
    for part in ("autoencoder", "latents", "diffusion", "controlnet"):
        shutil.copytree(tiny_run / part, run / part)
    base = StageFolder(run, "controlnet").require()["weights"]
    figure = {"value": 0.5, "low": None, "high": None, "n": 1, "real_vs_real": None}
    section = {
        "figures": {"dice": figure},
        "drawn": {"weights": base, "sampling": SamplingSettings(shift=1.0).to_dict(), "seeds": [0]},
    }
    write_json(run / "evaluation" / "metrics.json", {"faithfulness": section})
    assert not export(run, tmp_path / "plain", ExportSettings("CC0-1.0"))["notes"]
    command = ["export", "--run", str(run), "--out", str(tmp_path / "merged"), "--license", "CC0-1.0"]
    assert cli([*command, "--adapter", f"{of(site)}=0.5"]) == 0
    facts, card = read_json(tmp_path / "merged" / GENERATOR), (tmp_path / "merged" / "docs" / "README.md").read_text()
    assert [(part["sha256"], part["strength"]) for part in facts["adapters"]] == [(hash_file(of(site)), 0.5)]
    assert "Not measured." in card and hash_file(of(site))[:12] in card
    made, expected = Synthesizer.from_bundle(tmp_path / "merged"), Synthesizer.from_run(run, adapters={of(site): 0.5})
    assert made.source["weights"] == expected.source["weights"]
    given = {"settings": QUICK, "allow_extrapolation": True}
    assert np.array_equal(*(part(read_volume(str(mask)), **given).volume.array for part in (made, expected)))
    with pytest.raises(FibldmError, match="must be put on the weights that it was trained on"):
        made.adapted({of(site): 1.0})


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_bundle(site: Path, bundle: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    """The same as on the run that it was made of."""
    begin(bundle, tiny_stage, tmp_path)
    tiny_stage("diffusion", tmp_path, "adapter", init_from=str(bundle), epochs=2, **STRONG).run()
    one, other = Adapter.read(of(tmp_path)), Adapter.read(of(site))
    assert one.facts["base"] == other.facts["base"] and one.facts["frame"] == other.facts["frame"]
    for name, pair in one.updates.items():
        for factor, expected in zip(pair, other.updates[name], strict=True):
            assert torch.equal(factor, expected)
    Synthesizer.from_bundle(bundle, adapters={of(tmp_path): 1.0})


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_two_processes_keep_the_adapter_of_one(
    site: Path, tiny_run: Path, tiny_data: Path, phantom_work: Path, tmp_path: Path
) -> None:
    """With --devices, but for rounding."""
    settings = {**STRONG, "init_from": str(tiny_run), "epochs": 2, "batch_size": 2, "device": "cpu"}
    settings["precision"] = "float32"
    made = []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        for stage in ("autoencoder", "latents"):
            shutil.copytree(site / stage, run / stage)
        given = ["train", "diffusion", "--data", str(phantom_work), "--run", str(run), "--config", str(tiny_data)]
        given += ["--config", "tiny", "--config", "adapter", "--devices", str(devices)]
        assert cli([*given, *(f"--set={key}={json.dumps(value)}" for key, value in settings.items())]) == 0
        made.append(Adapter.read(of(run)))
    one, two = made
    assert one.facts == two.facts
    for name, pair in one.updates.items():
        for factor, expected in zip(two.updates[name], pair, strict=True):
            torch.testing.assert_close(factor, expected, atol=1e-3, rtol=1e-2)
