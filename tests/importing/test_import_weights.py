"""Weights of other programs: what was built and saved there says the same after it was imported."""

import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import generative.networks.nets as old
import numpy as np
import pytest
import torch
import typer
import yaml
from builders import normal
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks import nets
from monai.networks.schedulers import RFlowScheduler
from monai.utils.enums import SpaceKeys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from fibldm.cli.import_weights import import_weights as command
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.importing.import_weights import ImportSettings, import_weights
from fibldm.models.denoiser import Denoiser
from fibldm.models.latents import LatentSpace
from fibldm.models.process import RectifiedFlow, VariancePreserving
from fibldm.models.samplers import ddim
from fibldm.runs.options import parse_overrides
from fibldm.runs.stages import TABLE
from fibldm.synthesis.definitions import build
from fibldm.training.initialise import initialise

CONFIGS = Path(__file__).parents[2] / "configs"

AUTOENCODER: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "num_channels": [8, 16],
    "latent_channels": 3,
    "num_res_blocks": [1, 2],
    "attention_levels": [False, True],
    "norm_num_groups": 4,
    "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": False,
}
UNET: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "num_channels": [8, 16],
    "num_res_blocks": [1, 2],
    "attention_levels": [False, True],
    "norm_num_groups": 4,
    "num_head_channels": [0, 8],
}
CONTROLNET: dict[str, Any] = {
    **{key: value for key, value in UNET.items() if key != "out_channels"},
    "conditioning_embedding_in_channels": 2,
    "conditioning_embedding_num_channels": [4, 6],
}
CONTEXT: dict[str, Any] = {"with_conditioning": True, "cross_attention_dim": 5}
MAISI: dict[str, Any] = {
    **UNET,
    "include_spacing_input": True,
    "num_class_embeds": 4,
    "resblock_updown": True,
    "include_fc": True,
}
FIXED: dict[str, Any] = {"class": [1.0], "spacing": [1.5, 1.0, 2.0]}
VQVAE: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "num_channels": [6, 8],
    "num_res_layers": 2,
    "num_res_channels": [4, 5],
    "downsample_parameters": [[2, 4, 1, 1], [1, 3, 1, 1]],
    "upsample_parameters": [[1, 3, 1, 1, 0], [2, 4, 1, 1, 0]],
    "num_embeddings": 16,
    "embedding_dim": 3,
}
HIDDEN = ("norm_num_groups", "num_head_channels")


def random_weights(network: nn.Module) -> Any:
    """Also where a network begins at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def present(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"channels" if key == "num_channels" else key: value for key, value in arguments.items()}


def hidden(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key in HIDDEN}


def imported(content: Any, out: Path, source: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Save, import, and give what ``import.json`` says."""
    source = source or out.parent / f"{out.name}.pt"
    torch.save(content, source)
    import_weights(source, out, ImportSettings(**{"licence": "MIT", **settings}))
    facts: dict[str, Any] = read_json(out / "import.json")
    return facts


def made(folder: Path) -> Any:
    """FibLDM's network of what was written, by its definition, with all its weights."""
    said = yaml.safe_load((folder / "network.yaml").read_text())
    definition = said.get("network_def") or said.get("controlnet")
    if "unet" in said:
        definition = {"_target_": "fibldm.models.network.ConditionedNetwork", "unet": said["unet"]}
    network: Any = build(definition, "network.yaml")
    weights = load_file(folder / "weights.safetensors")
    network.load_state_dict({name.removeprefix("controls.0.controlnet."): part for name, part in weights.items()})
    return network.eval()


def assert_equal(ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-5) -> None:
    assert float(theirs.abs().max()) > 1e-2
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


# --- monai-generative


@pytest.mark.parametrize("changes", [{}, {"with_decoder_nonlocal_attn": True}, {"spatial_dims": 2}])
@torch.no_grad()
def test_autoencoder_of_monai_generative(changes: dict[str, Any], tmp_path: Path) -> None:
    """Encoder and decoder by FibLDM's interface say what the old ones say."""
    arguments = {**AUTOENCODER, **changes}
    network = random_weights(old.AutoencoderKL(**arguments))
    facts = imported(network.state_dict(), tmp_path / "out", arguments=hidden(arguments))
    assert facts["format"] == "monai-generative" and facts["parity"]["largest_difference"] <= 1e-5
    expected = {**present(arguments), "include_fc": False, "use_combined_linear": False}
    assert facts["arguments"] == expected
    assert facts["left_out"] and all(".proj_attn." in name for name in facts["left_out"])
    size = (8, 12, 4)[: arguments["spatial_dims"]]
    volume, ours = normal(1, 1, *size), made(tmp_path / "out")
    flat = (lambda tensor: tensor) if len(size) == 3 else (lambda tensor: tensor[..., 0])
    posterior = ours.encode(volume if len(size) == 3 else volume[..., None])
    mean, std = network.encode(volume)
    assert_equal(flat(posterior.mean), mean)
    assert_equal(flat(posterior.std), std)
    assert_equal(flat(ours.decode(posterior.mean)), network.decode(mean))


@pytest.mark.parametrize("changes", [{}, CONTEXT, {"resblock_updown": True}, {"spatial_dims": 2}])
@torch.no_grad()
def test_unet_of_monai_generative(changes: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**UNET, **changes}
    network = random_weights(old.DiffusionModelUNet(**arguments))
    facts = imported({"epoch": 3, "model": network.state_dict()}, tmp_path / "out", arguments=hidden(arguments))
    assert facts["format"] == "monai-generative" and facts["source"]["place"] == "model/"
    kept = {key: facts["arguments"][key] for key in present(arguments)}
    assert kept == present(arguments) and facts["arguments"]["include_fc"] is ("cross_attention_dim" in arguments)
    z, times, ours = normal(2, 3, 4, 8, 4), torch.tensor([3.0, 700.0]), made(tmp_path / "out")
    if arguments["spatial_dims"] == 2:
        assert_equal(ours(z[..., :1], times)[..., 0], network(z[..., 0], times))
    elif "cross_attention_dim" in arguments:
        context = normal(2, 3, 5)
        assert_equal(ours.unet(z, times, context=context), network(z, times, context=context))
    else:
        assert_equal(ours(z, times), network(z, times))


@pytest.mark.parametrize("changes", [{}, CONTEXT])
@torch.no_grad()
def test_controlnet_of_monai_generative(changes: dict[str, Any], tmp_path: Path) -> None:
    """Without context, too, which MONAI's own load_old_state_dict cannot map."""
    arguments = {**CONTROLNET, **changes}
    network = random_weights(old.ControlNet(**arguments))
    facts = imported({"state_dict": network.state_dict()}, tmp_path / "out", arguments=hidden(arguments))
    assert {key: facts["arguments"][key] for key in present(arguments)} == present(arguments)
    given = {"context": normal(2, 3, 5)} if changes else {}
    inputs = (normal(2, 3, 4, 4, 4), torch.tensor([3.0, 700.0]), normal(2, 2, 8, 8, 8, seed=1))
    theirs, ours = network(*inputs, **given), made(tmp_path / "out")(*inputs, **given)
    for one, two in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert_equal(one, two)


@torch.no_grad()
def test_vqvae(tmp_path: Path) -> None:
    network = random_weights(old.VQVAE(**VQVAE))
    network.quantizer.quantizer.embedding.weight.data = normal(16, 3)
    facts = imported(network.state_dict(), tmp_path / "out")
    assert facts["arguments"] == present(VQVAE) and "check downsample_parameters" in facts["notes"][0]
    volume, ours = normal(1, 1, 8, 8, 8), made(tmp_path / "out")
    assert_equal(ours(volume).volume, network(volume)[0])
    assert_equal(ours.encode(volume).mean, network.quantizer.quantizer.embed(network.index_quantize(volume)))


@pytest.mark.parametrize(
    ("theirs", "ours", "arguments", "more"),
    [
        (old.AutoencoderKL, nets.AutoencoderKL, AUTOENCODER, {"include_fc": False}),
        (old.DiffusionModelUNet, nets.DiffusionModelUNet, UNET, {"include_fc": False}),
        (old.DiffusionModelUNet, nets.DiffusionModelUNet, {**UNET, **CONTEXT}, {}),
        (old.ControlNet, nets.ControlNet, {**CONTROLNET, **CONTEXT}, {}),
    ],
)
def test_weights_are_those_of_monais_own_mapping(
    theirs: Any, ours: Any, arguments: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    network = random_weights(theirs(**arguments))
    imported(network.state_dict(), tmp_path / "out", arguments=hidden(arguments))
    monais = ours(**present(arguments), **more)
    monais.load_old_state_dict(dict(network.state_dict()))
    written = load_file(tmp_path / "out" / "weights.safetensors")
    by_name = {name.split(".", 3 if name.startswith("controls") else 1)[-1]: part for name, part in written.items()}
    assert by_name.keys() == monais.state_dict().keys()
    assert all(torch.equal(part, by_name[name]) for name, part in monais.state_dict().items())


@pytest.mark.parametrize("kind", [nets.AutoencoderKL, nets.DiffusionModelUNet, nets.ControlNet])
@pytest.mark.parametrize("combined", [False, True])
def test_present_networks_are_taken_as_they_are(kind: Any, combined: bool, tmp_path: Path) -> None:
    all_arguments: dict[Any, dict[str, Any]] = {nets.AutoencoderKL: AUTOENCODER, nets.ControlNet: CONTROLNET}
    arguments = all_arguments.get(kind, UNET)
    network = random_weights(kind(**present(arguments), include_fc=True, use_combined_linear=combined))
    facts = imported(network.state_dict(), tmp_path / "out", arguments=hidden(arguments))
    assert facts["format"] == "monai" and not facts["renamed"] and not facts["left_out"]
    assert facts["arguments"]["include_fc"] and facts["arguments"]["use_combined_linear"] is combined


# --- where in a file the weights lie


def test_names_may_begin_with_anything(tmp_path: Path) -> None:
    """As DistributedDataParallel, torch.compile and Lightning make them; an average counts more than the last step."""
    network = random_weights(old.AutoencoderKL(**AUTOENCODER)).state_dict()
    expected = load_after(network, tmp_path / "plain")
    for place, prefix in (("", "module."), ("", "_orig_mod.module."), ("state_dict/", "first_stage.")):
        state = {f"{prefix}{name}": part for name, part in network.items()}
        content = {"state_dict": state, "hyper_parameters": {"lr": 1e-4}} if place else state
        assert all(torch.equal(part, expected[name]) for name, part in load_after(content, tmp_path / "out").items())
        assert read_json(tmp_path / "out" / "import.json")["source"]["place"] == f"{place}{prefix}"
    other = {name: torch.zeros_like(part) for name, part in network.items()}
    both = load_after({"model": other, "optimizer": {"state": {}}, "ema": network}, tmp_path / "out")
    assert all(torch.equal(part, expected[name]) for name, part in both.items())


def load_after(content: Any, out: Path) -> dict[str, Tensor]:
    imported(content, out, arguments=hidden(AUTOENCODER))
    return load_file(out / "weights.safetensors")


def test_half_precision_and_safetensors(tmp_path: Path) -> None:
    network = random_weights(old.AutoencoderKL(**AUTOENCODER)).half().state_dict()
    save_file(network, tmp_path / "half.safetensors")
    import_weights(
        tmp_path / "half.safetensors", tmp_path / "out", ImportSettings("MIT", arguments=hidden(AUTOENCODER))
    )
    written = load_file(tmp_path / "out" / "weights.safetensors")
    assert all(part.dtype == torch.float32 for part in written.values())
    assert torch.equal(written["network.encoder.blocks.0.conv.weight"], network["encoder.blocks.0.conv.weight"].float())


def test_what_was_imported_can_be_imported_again(tmp_path: Path) -> None:
    network = random_weights(old.AutoencoderKL(**AUTOENCODER))
    imported(network.state_dict(), tmp_path / "one", arguments=hidden(AUTOENCODER))
    import_weights(
        tmp_path / "one" / "weights.safetensors",
        tmp_path / "two",
        ImportSettings("MIT", network=tmp_path / "one" / "network.yaml"),
    )
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(part, two[name]) for name, part in one.items())


# --- into training


def test_a_stage_begins_with_what_was_imported(tmp_path: Path) -> None:
    """By the two things that the command says to give: the definition as a configuration, the file as init_from."""
    network = random_weights(old.AutoencoderKL(**AUTOENCODER))
    facts = imported(network.state_dict(), tmp_path / "out", arguments=hidden(AUTOENCODER))
    assert facts["use"] == (
        f"fibldm train autoencoder --data WORK --run RUN --config {tmp_path}/out/network.yaml "
        f"--set init_from={tmp_path}/out/weights.safetensors"
    )
    odd = imported(network.state_dict(), tmp_path / "$a #1", arguments=hidden(AUTOENCODER))["use"]
    *_, config, _, begun = shlex.split(odd)
    assert Path(config) == tmp_path / "$a #1" / "network.yaml"
    assert ConfigParser(parse_overrides([begun])).get_parsed_content("init_from") == str(
        tmp_path / "$a #1" / "weights.safetensors"
    )
    shipped = [str(CONFIGS / f"{name}.yaml") for name in ("common", *TABLE["autoencoder"].files)]
    files = [*shipped, str(tmp_path / "out" / "network.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    built = parser.get_parsed_content("network_def")
    assert initialise(built, tmp_path / "out" / "weights.safetensors").complete
    optimiser = torch.optim.SGD(built.parameters(), lr=1e-3)
    volume = normal(1, 1, 8, 8, 8)
    losses = []
    for _ in range(3):
        loss = (built(volume, seeds=torch.tensor([1])).volume.mean(1, keepdim=True) - volume).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
def test_all_stages_go_on_from_what_was_imported(tiny_stage: Any, tmp_path: Path) -> None:
    """An autoencoder as it is, its latents, a UNet and a ControlNet, each trained two steps further."""
    parts = {
        "autoencoder": old.AutoencoderKL(**{**AUTOENCODER, "out_channels": 1}),
        "diffusion": old.DiffusionModelUNet(**UNET),
        "controlnet": old.ControlNet(**CONTROLNET),
    }
    more = {"autoencoder": ["autoencoder_as_given"], "latents": []}
    strict: dict[str, dict[str, Any]] = {"controlnet": {"init_strict": False}}
    for stage in ("autoencoder", "latents", "diffusion", "controlnet"):
        configs, settings = more.get(stage, []), strict.get(stage, {})
        if stage in parts:
            folder = tmp_path / f"imported_{stage}"
            imported(random_weights(parts[stage]).state_dict(), folder, arguments=hidden(UNET))
            configs = [str(folder / ("controlnet.yaml" if stage == "controlnet" else "network.yaml")), *configs]
            settings = {**settings, "init_from": str(folder / "weights.safetensors")}
        tiny_stage(stage, tmp_path / "run", *configs, **settings).run()
    weights = torch.load(tmp_path / "run" / "controlnet" / "checkpoints" / "best.pt", weights_only=True)["model"]
    name = "controls.0.controlnet.time_embed.0.weight"
    begun = load_file(tmp_path / "imported_controlnet" / "weights.safetensors")[name]
    assert 0 < float((weights[name] - begun).abs().max()) < 0.1


def test_a_unet_brings_the_numbers_of_its_controlnets(tmp_path: Path) -> None:
    network = random_weights(old.DiffusionModelUNet(**UNET))
    imported(network.state_dict(), tmp_path / "out", arguments=hidden(UNET), prediction="v", scale_factor=0.18215)
    said = yaml.safe_load((tmp_path / "out" / "network.yaml").read_text())
    assert said["target"] == "v" and "process" not in said
    control = yaml.safe_load((tmp_path / "out" / "controlnet.yaml").read_text())["controlnet"]
    control.update(conditioning_embedding_in_channels=2, conditioning_embedding_num_channels=[4])
    steered = {"_target_": "fibldm.models.network.steered", "controlnet": control}
    base = {"_target_": "fibldm.models.network.ConditionedNetwork", "unet": said["unet"]}
    assert len(build({**steered, "base": base}, "stage 3").controls) == 1
    facts = read_json(tmp_path / "out" / "import.json")
    scale = facts["latent_space"].pop("scale_factor")
    assert scale == 0.18215 and LatentSpace.from_dict(facts["latent_space"]) == LatentSpace.constant(scale, 3, "")


# --- MAISI


def maisi_unet(**changes: Any) -> Any:
    return random_weights(DiffusionModelUNetMaisi(**{**MAISI, **changes}))


@torch.no_grad()
def test_maisi_says_the_same_for_what_was_fixed(tmp_path: Path) -> None:
    """Class, spacing and body region are in the weights afterwards, exactly."""
    regions = {"include_top_region_index_input": True, "include_bottom_region_index_input": True}
    network = maisi_unet(**regions)
    fixed = {**FIXED, "top_region": [0, 1, 0, 0], "bottom_region": [0, 0, 1, 0]}
    content = {"unet_state_dict": network.state_dict(), "scale_factor": torch.tensor(0.97), "epoch": 7}
    facts = imported(content, tmp_path / "out", arguments=hidden(MAISI), fixed=fixed)
    assert facts["format"] == "maisi" and facts["prediction"] == "epsilon" and not facts["negated"]
    assert facts["latent_space"]["scale_factor"] == pytest.approx(0.97)
    z, times = normal(2, 3, 4, 4, 8), torch.tensor([20.0, 950.0])
    theirs = network(
        z,
        times,
        class_labels=torch.tensor([1, 1]),
        spacing_tensor=100 * torch.tensor([[1.5, 1.0, 2.0]] * 2),
        top_region_index_tensor=100 * torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2),
        bottom_region_index_tensor=100 * torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 2),
    )
    assert_equal(made(tmp_path / "out")(z, times), theirs)
    said = yaml.safe_load((tmp_path / "out" / "network.yaml").read_text())
    process = build(said["process"], "process")
    assert process == VariancePreserving("scaled_linear", beta_start=0.0015, beta_end=0.0195)


@torch.no_grad()
def test_maisis_rectified_flow_runs_the_other_way(tmp_path: Path) -> None:
    """MONAI's RFlowScheduler with MAISI's UNet and FibLDM's sampler with the imported one end at the same latent."""
    network = maisi_unet()
    facts = imported({"unet_state_dict": network.state_dict()}, tmp_path / "out", arguments=hidden(MAISI), fixed=FIXED)
    assert facts["prediction"] == "rflow" and facts["negated"]
    said = yaml.safe_load((tmp_path / "out" / "network.yaml").read_text())
    assert said["target"] == "flow" and build(said["process"], "process") == RectifiedFlow()
    scheduler = RFlowScheduler(use_discrete_timesteps=False)
    scheduler.set_timesteps(5)
    start = normal(1, 3, 4, 4, 4)
    z, times = start, [float(time) for time in scheduler.timesteps] + [0.0]
    given = {"class_labels": torch.tensor([1]), "spacing_tensor": torch.tensor([[150.0, 100.0, 200.0]])}
    for time, following in zip(times[:-1], times[1:], strict=True):
        velocity = network(z, torch.tensor([time]), **given)
        z, _ = scheduler.step(velocity, int(time), z, int(following))
    denoiser = Denoiser(made(tmp_path / "out"), RectifiedFlow(), "flow")
    ours = ddim(
        denoiser, start, torch.tensor(times) / 1000, process=RectifiedFlow(), generators=[torch.Generator()], eta=0.0
    )
    assert_equal(ours, z)
    assert float((z - start).abs().max()) > 0.1


@torch.no_grad()
def test_maisis_controlnet_and_autoencoder(tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_class_embeds": 4, "resblock_updown": True, "include_fc": True}
    control = random_weights(ControlNetMaisi(**CONTROLNET, **more, use_checkpointing=False))
    content = {"controlnet_state_dict": control.state_dict(), "epoch": 1}
    facts = imported(content, tmp_path / "control", arguments=hidden(MAISI), fixed={"class": [2]})
    assert "learned anew" in facts["notes"][-1] and facts["use"].endswith("--set init_strict=false")
    inputs = (normal(1, 3, 4, 4, 4), torch.tensor([800.0]), normal(1, 2, 8, 8, 8, seed=1))
    ours = made(tmp_path / "control")(*inputs)
    theirs = control(*inputs, class_labels=torch.tensor([2]))
    for one, two in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert_equal(one, two)

    first = AutoencoderKlMaisi(**{**AUTOENCODER, "attention_levels": [False, False]}, num_splits=1, save_mem=False)
    imported({"unet_state_dict": random_weights(first).state_dict()}, tmp_path / "ae", arguments=hidden(AUTOENCODER))
    volume, mine = normal(1, 1, 8, 8, 8), made(tmp_path / "ae")
    assert type(mine).__name__ == "MaisiAutoencoder" and mine.splits == 1
    assert_equal(mine.encode(volume).mean, first.encode(volume)[0])


@pytest.mark.skipif(
    SpaceKeys.RAS.__reduce_ex__(2)[0] is getattr, reason="early 3.11 pickles enumerations by getattr, which is refused"
)
def test_numbers_and_marks_of_a_training_are_no_code(tmp_path: Path) -> None:
    """MetaTensors of MONAI with what they remember, and losses of NumPy, as published checkpoints hold them."""
    scale = MetaTensor(torch.tensor(0.5), applied_operations=[{"class": "X"}])
    content = {"unet_state_dict": maisi_unet().state_dict(), "scale_factor": scale, "loss": np.float64(0.3)}
    content["rate"] = np.float32(0.1)
    facts = imported(content, tmp_path / "out", arguments=hidden(MAISI), fixed=FIXED)
    assert facts["latent_space"]["scale_factor"] == 0.5


# --- bundles of MONAI's model zoo


def zoo(folder: Path, **changes: Any) -> Path:
    """A bundle in the layout of brats_mri_generative_diffusion: old weights under definitions of present classes."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    autoencoder = {**present(AUTOENCODER), "_target_": "monai.networks.nets.autoencoderkl.AutoencoderKL"}
    autoencoder.update(latent_channels="@latent_channels", use_checkpoint=True)
    network = {**present(UNET), "_target_": "monai.networks.nets.DiffusionModelUNet", "use_flash_attention": True}
    network.update(in_channels="@latent_channels", out_channels="@autoencoder_def::latent_channels")
    common = {"imports": ["$import torch"], "latent_channels": 3, "autoencoder_def": autoencoder}
    (folder / "configs" / "train_autoencoder.json").write_text(
        json.dumps({**common, "network_def": "@autoencoder_def"})
    )
    scheduler = {"_target_": "DDPMScheduler", "schedule": "scaled_linear_beta", "beta_start": 0.002, "beta_end": 0.02}
    diffusion = {"network_def": network, "noise_scheduler": scheduler, "scale_factor": "$1 / @z.std()", **changes}
    (folder / "configs" / "train_diffusion.json").write_text(json.dumps(diffusion))
    torch.save(
        random_weights(old.AutoencoderKL(**AUTOENCODER)).state_dict(), folder / "models" / "model_autoencoder.pt"
    )
    torch.save({"model": random_weights(old.DiffusionModelUNet(**UNET)).state_dict()}, folder / "models" / "model.pt")
    return folder


def test_a_bundle_of_the_model_zoo(tmp_path: Path) -> None:
    """Both networks by the bundle's own definitions, with the latents' scale that a person gives."""
    facts = import_weights(zoo(tmp_path / "zoo"), tmp_path / "out", ImportSettings("MIT", scale_factor=2.0))
    assert [Path(folder).name for folder in facts] == ["unet", "autoencoder"]
    assert {one["kind"]: one["source"]["file"] for one in facts.values()} == {
        "unet": "model.pt",
        "autoencoder": "model_autoencoder.pt",
    }
    said = yaml.safe_load((tmp_path / "out" / "unet" / "network.yaml").read_text())
    assert said["target"] == "epsilon" and said["unet"]["num_head_channels"] == [0, 8]
    assert build(said["process"], "process") == VariancePreserving("scaled_linear", beta_start=0.002, beta_end=0.02)
    assert all(one["parity"]["largest_difference"] <= 1e-5 for one in facts.values())
    space = facts[str(tmp_path / "out" / "unet")]["latent_space"]
    assert space["std"] == [0.5] * 3 and len(space["autoencoder"]) == 64
    made(tmp_path / "out" / "unet"), made(tmp_path / "out" / "autoencoder")


@pytest.mark.parametrize(
    ("scheduler", "prediction", "said"),
    [
        ({"_target_": "monai.networks.schedulers.RFlowScheduler"}, "rflow", {"target", "process"}),
        ({"_target_": "DDIMScheduler", "prediction_type": "v_prediction"}, "v", {"target", "process"}),
        ({"_target_": "DDIMScheduler", "schedule": "cosine"}, "epsilon", {"target"}),
        ({"_target_": "DDIMScheduler", "beta_end": "$0.02"}, "epsilon", {"target"}),
        ({"_target_": "DDIMScheduler", "num_train_timesteps": "$__import__('os')"}, "epsilon", {"target"}),
        ({"_target_": "DDIMScheduler", "prediction_type": "$x"}, None, set()),
    ],
)
def test_what_a_bundles_unet_says(scheduler: Any, prediction: str | None, said: set[str], tmp_path: Path) -> None:
    """By its scheduler, as far as that is plain values; the rest is left to those who know."""
    source = zoo(tmp_path / "zoo", noise_scheduler=scheduler)
    (facts,) = import_weights(source, tmp_path / "out", ImportSettings("MIT", kind="unet")).values()
    assert facts["prediction"] == prediction and facts["negated"] is (prediction == "rflow")
    assert any("is not known: set target and process" in note for note in facts["notes"]) is (prediction is None)
    assert set(yaml.safe_load((tmp_path / "out" / "network.yaml").read_text())) == {"unet", *said}


PLANTED = "$[__import__('pathlib').Path('planted').touch(), [8, 16]][1]"


def test_expressions_of_a_bundle_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where somebody asks for it."""
    monkeypatch.chdir(tmp_path)
    network = {**present(UNET), "_target_": "monai.networks.nets.DiffusionModelUNet", "channels": PLANTED}
    source = zoo(tmp_path / "zoo", network_def=network)
    with pytest.raises(
        FibldmError, match=r"network_def::channels must hold plain values .* the expression .\$\[__import"
    ):
        import_weights(source, tmp_path / "out", ImportSettings("MIT"))
    assert not (tmp_path / "planted").exists() and not (tmp_path / "out").exists()
    facts = import_weights(source, tmp_path / "out", ImportSettings("MIT", kind="unet", trust=True))
    assert (tmp_path / "planted").exists() and facts[str(tmp_path / "out")]["arguments"]["channels"] == [8, 16]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ("@nowhere", "network_def::channels must refer to what stands beside it; nothing is found for '@nowhere'"),
        ("@loop", "must not refer to itself; it does by '@loop'"),
        ([16, 32], "the definition must fit the weights, .*; none of network_def does"),
    ],
)
def test_definitions_that_are_refused(channels: Any, message: str, tmp_path: Path) -> None:
    network = {**present(UNET), "_target_": "monai.networks.nets.DiffusionModelUNet", "channels": channels}
    source = zoo(tmp_path / "zoo", network_def=network, loop="@loop")
    with pytest.raises(FibldmError, match=message):
        import_weights(source, tmp_path / "out", ImportSettings("MIT"))


def test_a_definition_by_hand(tmp_path: Path) -> None:
    """The old network's own arguments, or a file with definitions of several networks."""
    network = random_weights(old.DiffusionModelUNet(**UNET)).state_dict()
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(UNET))
    (tmp_path / "several.json").write_text(
        json.dumps(
            {"dims": 3, "diffusion_unet_def": {**UNET, "spatial_dims": "@dims", "_target_": "DiffusionModelUNet"}}
        )
    )
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name in ("plain.yaml", "several.json"):
        facts = imported(network, tmp_path / "out", network=tmp_path / name)
        assert facts["arguments"]["num_head_channels"] == [0, 8]
    with pytest.raises(FibldmError, match="`network` must hold arguments or definitions by name; got a list"):
        imported(network, tmp_path / "out", network=tmp_path / "list.yaml")
    (tmp_path / "endless.yaml").write_text("&a {x: *a}")
    for name in ("broken.json", "endless.yaml", "absent.yaml"):
        with pytest.raises(FibldmError, match=f"{name} must be JSON or YAML of plain values"):
            imported(network, tmp_path / "out", network=tmp_path / name)


@torch.no_grad()
def test_a_definition_leaves_out_what_is_as_by_default(tmp_path: Path) -> None:
    """Nobody but its author knows that: without a definition it is asked for."""
    arguments = {**AUTOENCODER, "num_channels": [32, 64]}
    del arguments["norm_num_groups"]
    network = random_weights(old.AutoencoderKL(**arguments))
    (tmp_path / "definition.yaml").write_text(yaml.safe_dump({**arguments, "_target_": "AutoencoderKL"}))
    facts = imported(network.state_dict(), tmp_path / "out", network=tmp_path / "definition.yaml")
    assert facts["arguments"]["norm_num_groups"] == 32
    assert_equal(made(tmp_path / "out").encode(normal(1, 1, 4, 4, 4)).mean, network.encode(normal(1, 1, 4, 4, 4))[0])
    with pytest.raises(FibldmError, match="norm_num_groups of the autoencoder in .* must be known, .* give it by"):
        imported(network.state_dict(), tmp_path / "other")


# --- what is refused


class Planted:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch planted",)


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: part for key, part in state.items() if key != name}


def _with(state: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {**state, **{name.replace("__", "."): part for name, part in more.items()}}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "code": (
        lambda state: {"model": state, "x": Planted()},
        {},
        "and nothing that runs as code; Weights only load failed",
    ),
    "unknown names": (
        lambda _: {"net.0.weight": torch.zeros(2), "net.0.bias": torch.zeros(2)},
        {},
        "must hold a network of MONAI, monai-generative or MAISI: .*; it begins with net.0.weight, net.0.bias; check",
    ),
    "nothing": (lambda _: {"epoch": 3}, {}, "it begins with no tensors at all"),
    "no mapping": (lambda _: [torch.zeros(3)], {}, "it begins with no tensors at all"),
    "a transformer": (
        lambda _: {"to_logits.weight": torch.zeros(2)},
        {},
        "holds a transformer that draws codes one by",
    ),
    "diffusers": (
        lambda _: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)},
        {},
        "holds a model of the diffusers library",
    ),
    "no licence": (lambda state: state, {"licence": ""}, "--license must be the SPDX identifier .*; got ''"),
    "no text": (lambda state: state, {"licence": "X", "licence_file": Path("/no")}, "--license-file must be a text"),
    "another kind": (lambda state: state, {"kind": "vqvae"}, "must hold a network of the kind vqvae; it holds unet"),
    "no kind": (lambda state: state, {"kind": "gan"}, "`kind` must be one of auto, controlnet, unet, .*; got 'gan'"),
    "no prediction": (lambda state: state, {"prediction": "x"}, "`prediction` must be one of epsilon, .*; got 'x'"),
    "hidden": (
        lambda state: state,
        {"arguments": {}},
        "norm_num_groups, num_head_channels of the unet in .* must be known, and cannot be read from .*; give them by",
    ),
    "groups": (
        lambda state: state,
        {"arguments": {**hidden(UNET), "norm_num_groups": 3}},
        "must describe a monai.*UNet",
    ),
    "other numbers": (
        lambda state: state,
        {"arguments": {**hidden(UNET), "num_res_blocks": 1}},
        "must fit DiffusionModelUNet; they hold also down_blocks.1.attentions.1.norm.bias, .*, \\.\\.\\., and have",
    ),
    "incomplete": (
        lambda state: _without(state, "conv_in.conv.weight"),
        {},
        "weights must be those of a whole unet; a layer is missing or out of order",
    ),
    "a weight is missing": (
        lambda state: _without(state, "time_embed.0.bias"),
        {},
        "weights of .* must fit DiffusionModelUNet; they lack time_embed.0.bias; give",
    ),
    "another shape": (
        lambda state: _with(state, time_embed__0__bias=torch.zeros(3)),
        {},
        "they have other shapes for time_embed.0.bias",
    ),
    "not finite": (
        lambda state: _with(state, time_embed__0__bias=torch.full((32,), torch.nan)),
        {},
        "weights must be finite; time_embed.0.bias of .* is not",
    ),
    "no such input": (
        lambda state: state,
        {"fixed": {"spacing": [1, 1, 1]}},
        "`fixed` must name an input of the network, which asks for nothing beside .* context; got 'spacing'",
    ),
    "no scale": (lambda state: state, {"scale_factor": 0.0}, "the scale factor of latents must be above 0; got 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own message, before anything is written or run."""
    monkeypatch.chdir(tmp_path)
    change, settings, message = REFUSED[name]
    content = change(random_weights(old.DiffusionModelUNet(**UNET)).state_dict())
    with pytest.raises(FibldmError, match=message):
        imported(content, tmp_path / "out", **{"arguments": hidden(UNET), **settings})
    assert not (tmp_path / "planted").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({}, "this one also asks for class, spacing; give the value for which it is imported .*modality, 1 for CT"),
        ({"class": [1]}, "this one also asks for spacing; "),
        ({**FIXED, "spacing": [1.0]}, "`fixed` spacing needs 3 numbers; got 1; millimetres along each axis"),
        ({**FIXED, "class": [4]}, "`fixed` class must be 0 to 3; got 4"),
        ({**FIXED, "class": [0.5]}, "`fixed` class must be 0 to 3; got 0.5"),
        ({**FIXED, "top_region": [1, 0, 0, 0]}, "which asks for class, spacing; got 'top_region'"),
    ],
)
def test_values_of_maisis_inputs_that_are_refused(fixed: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match=message):
        imported(maisi_unet().state_dict(), tmp_path / "out", arguments=hidden(MAISI), fixed=fixed)


def test_files_that_are_refused(tmp_path: Path) -> None:
    settings = ImportSettings("MIT")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" + bytes(20))
    (tmp_path / "empty").mkdir()
    for name, message in {
        "absent.pt": "a checkpoint must be a file or a folder; .* does not exist",
        "text.pt": "text.pt must hold tensors as safetensors or by torch.save",
        "broken.safetensors": "broken.safetensors must hold tensors as safetensors",
        "empty": "must hold files of weights .*; there are none; large files of MONAI's model zoo",
    }.items():
        with pytest.raises(FibldmError, match=message):
            import_weights(tmp_path / name, tmp_path / "out", settings)


def test_what_says_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mapping is wrong, outputs differ, and nothing is written."""
    from fibldm.importing import conversion

    real = conversion._present_name

    def swapped(name: str, wanted: Mapping[str, Tensor]) -> str:
        present = real(name, wanted)
        pair = ("down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.norm1.bias")
        return dict([pair, pair[::-1]]).get(present, present)

    monkeypatch.setattr(conversion, "_present_name", swapped)
    network = random_weights(old.DiffusionModelUNet(**UNET))
    with pytest.raises(
        FibldmError, match="must say the same as generative's DiffusionModelUNet, to 0.0001 .* it differs by"
    ):
        imported(network.state_dict(), tmp_path / "out", arguments=hidden(UNET))
    assert not (tmp_path / "out").exists()


# --- by the command


def test_the_command(tmp_path: Path) -> None:
    """Source, hash and licence travel along."""
    app = typer.Typer()
    app.command()(command)
    torch.save(maisi_unet().state_dict(), tmp_path / "diff_unet.pt")
    given = [str(tmp_path / "diff_unet.pt"), "--out", str(tmp_path / "out"), "--set", "norm_num_groups=4"]
    given += ["--set", "num_head_channels=[0, 8]", "--fix", "spacing=1.5,1.5,2", "--fix", "class=1"]
    assert CliRunner().invoke(app, given).exit_code == 2  # no licence
    (tmp_path / "terms.txt").write_text("Not for sale.")
    more = ["--license", "LicenseRef-Theirs", "--license-file", str(tmp_path / "terms.txt"), "--prediction", "flow"]
    told = CliRunner().invoke(app, [*given, *more])
    assert told.exit_code == 0 and "unet of maisi" in told.output and "--set init_from=" in told.output
    facts = read_json(tmp_path / "out" / "import.json")
    assert facts["licence"] == "LicenseRef-Theirs" and not facts["negated"]
    assert facts["source"] == {"file": "diff_unet.pt", "sha256": hash_file(tmp_path / "diff_unet.pt"), "place": ""}
    assert facts["fixed"] == {"class": [1.0], "spacing": [1.5, 1.5, 2.0]}
    notice = (tmp_path / "out" / "LICENSE").read_text()
    assert notice == "SPDX-License-Identifier: LicenseRef-Theirs\n\nNot for sale."


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--set", "groups"], "--set needs KEY=VALUE; got groups"),
        (["--set", "a=[1"], "--set needs KEY=VALUE with a value of YAML"),
        (["--fix", "class=one"], "--fix needs NAME=NUMBERS, such as class=1; got class=one"),
    ],
)
def test_options_that_are_refused(option: list[str], message: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(app, ["x.pt", "--out", str(tmp_path), "--license", "MIT", *option])
    assert isinstance(told.exception, FibldmError)
    with pytest.raises(FibldmError, match=message):
        raise told.exception
