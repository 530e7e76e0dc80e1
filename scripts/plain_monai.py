"""The plain way by MONAI alone, to compare with: its autoencoder, LatentDiffusionInferer, DDPM on the noise, DDIM.

    python scripts/plain_monai.py --data WORK --config data_hippocampus_mri --out OUT \\
        --autoencoder-seconds 480 --diffusion-seconds 2400
    fibldm evaluate all --data WORK --run RUN --synthetic OUT

As its tutorials have it: volumes of one size, percentiles to [-1, 1], AutoencoderKL at a quarter of the size with L1
and KL, DiffusionModelUNet with the one-hot mask at the latents' size as input channels, one scale factor, Adam. Each
network gets as many seconds of training as it is told; widths, batches and learning rates are those of FibLDM's
configurations. Volumes of the masks of the test patients are written to OUT on the masks' own grids.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from monai.data import CacheDataset, DataLoader
from monai.inferers import LatentDiffusionInferer
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from monai.networks.utils import one_hot
from monai.transforms import Compose, LoadImaged, ResizeWithPadOrCropd, ScaleIntensityRangePercentilesd, Transform
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fibldm.progress import track
from fibldm.runs.config_files import shipped
from fibldm.training.inferers import fast_bfloat16
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.intensity import Intensity, load_intensity
from fibldm.volumes.writer import write_labels, write_synthetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULE = {"schedule": "scaled_linear_beta", "num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both networks for their time, and write a volume of every mask of the test patients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="work folder of fibldm prepare")
    parser.add_argument("--config", default="data_hippocampus_mri", help="shipped configuration with the size")
    parser.add_argument("--out", type=Path, required=True, help="folder of the volumes")
    parser.add_argument("--autoencoder-seconds", type=float, default=480)
    parser.add_argument("--diffusion-seconds", type=float, default=2400)
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    size = yaml.safe_load(shipped(chosen.config).read_text())["size"]
    labels = sorted(int(label) for label in read_datalist(chosen.data)["labels"])
    loader = _batches(load_datalist(chosen.data, "training", masks=True), size)
    autoencoder = _train_autoencoder(loader, chosen.autoencoder_seconds)
    with torch.no_grad():
        first = next(iter(loader))["image"].to(DEVICE)
        scale = 1 / float(autoencoder.encode_stage_2_inputs(first).std())
    inferer = LatentDiffusionInferer(DDPMScheduler(**SCHEDULE), scale_factor=scale)
    unet = _train_diffusion(loader, autoencoder, inferer, labels, chosen.diffusion_seconds)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(chosen.steps)

    def sample(mask: Tensor) -> Tensor:
        noise = torch.randn(1, autoencoder.latent_channels, *(length // 4 for length in size), device=DEVICE)
        condition = _condition(mask, labels, noise)
        networks = {"autoencoder_model": autoencoder, "diffusion_model": unet}
        return inferer.sample(
            noise, **networks, scheduler=scheduler, conditioning=condition, mode="concat", verbose=False
        )

    _write(chosen.data, chosen.out, size, sample)


def _prepared(size: Sequence[int]) -> Compose:
    steps: list[Transform] = [
        LoadImaged(["image", "label"], ensure_channel_first=True),
        ScaleIntensityRangePercentilesd("image", 0.5, 99.5, -1, 1, clip=True),
        ResizeWithPadOrCropd("image", size, mode="constant", value=-1),
        ResizeWithPadOrCropd("label", size),
    ]
    return Compose(steps)


def _batches(items: Sequence[dict[str, str]], size: Sequence[int]) -> DataLoader:
    return DataLoader(CacheDataset(items, _prepared(size), progress=False), batch_size=8, shuffle=True, drop_last=True)


def _train_autoencoder(loader: DataLoader, seconds: float) -> AutoencoderKL:
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(16, 32, 64),
        num_res_blocks=(1, 1, 1),
        latent_channels=4,
        norm_num_groups=8,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).to(DEVICE)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        image = batch["image"].to(DEVICE)
        made, mean, std = network(image)
        kl = 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).flatten(1).sum(1).mean()
        return F.l1_loss(made.float(), image) + 1e-7 * kl

    return _train(network, loader, loss, seconds, rate=1e-3, name="autoencoder")


def _train_diffusion(
    loader: DataLoader, autoencoder: AutoencoderKL, inferer: LatentDiffusionInferer, labels: list[int], seconds: float
) -> DiffusionModelUNet:
    channels = autoencoder.latent_channels
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=channels + len(labels),
        out_channels=channels,
        channels=(32, 64, 96),
        num_res_blocks=1,
        attention_levels=(False, False, True),
        num_head_channels=32,
        norm_num_groups=16,
    ).to(DEVICE)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        image = batch["image"].to(DEVICE)
        noise = torch.randn(len(image), channels, *(length // 4 for length in image.shape[2:]), device=DEVICE)
        times = torch.randint(0, 1000, (len(image),), device=DEVICE)
        condition = _condition(batch["label"].to(DEVICE), labels, noise)
        made = inferer(image, autoencoder, network, noise, times, condition=condition, mode="concat")
        return F.mse_loss(made.float(), noise)

    return _train(network, loader, loss, seconds, rate=1e-3, name="diffusion")


def _condition(mask: Tensor, labels: list[int], like: Tensor) -> Tensor:
    """One-hot at the size of the latents, by the nearest voxel."""
    numbers = torch.stack([mask == label for label in labels]).float().argmax(dim=0)
    return F.interpolate(one_hot(numbers, len(labels)).as_subclass(Tensor), like.shape[2:])  # type: ignore[attr-defined]


def _train(
    network: nn.Module,
    loader: DataLoader,
    loss: Callable[[dict[str, Tensor]], Tensor],
    seconds: float,
    *,
    rate: float,
    name: str,
) -> nn.Module:
    optimizer, console, began = torch.optim.Adam(network.parameters(), lr=rate), Console(stderr=True), time.monotonic()
    reduced = fast_bfloat16(DEVICE)
    steps, total = 0, 0.0
    for batch in _forever(loader):
        share = (time.monotonic() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - share)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=reduced):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps, total = steps + 1, total + float(value.detach())
        if steps % 200 == 0:
            console.print(f"{name}: {steps} steps, {share:.0%} of the time, loss {total / 200:.4f}")
            total = 0.0
    console.print(f"{name}: {steps} steps in {time.monotonic() - began:.0f} s")
    return network.eval().requires_grad_(False)


def _forever(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        for batch in loader:
            yield {key: batch[key].as_tensor() for key in ("image", "label")}


@torch.no_grad()
def _write(work: Path, out: Path, size: Sequence[int], sample: Callable[[Tensor], Tensor]) -> None:
    """Every test mask's volume, on the mask's own grid."""
    intensity: Intensity = load_intensity(work / "intensity.json")
    pad = _prepared(size)
    for case in track(load_datalist(work, "test", masks=True), "synthesize"):
        prepared, mask = pad(case), read_volume(str(case["label"]))
        made = sample(prepared["label"].as_tensor()[None].to(DEVICE))[0].clamp(-1, 1).float().cpu()
        volume = Volume(intensity.to_disk(_back(made, mask.array.shape).numpy())[0], mask.affine)
        write_synthetic(out / f"{case['case']}_000.nii.gz", volume, {"mask": str(case["case"]), "by": "plain MONAI"})
        write_labels(out / "masks" / f"{case['case']}.nii.gz", mask)


def _back(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """The voxels of the mask: MONAI's padding and cropping do not undo each other where a difference is odd."""
    padded = [max(0, length - now) // 2 for length, now in zip(volume.shape[1:], shape, strict=True)]
    cropped = [max(0, now // 2 - length // 2) for length, now in zip(volume.shape[1:], shape, strict=True)]
    out = torch.full((len(volume), *shape), -1.0)
    kept = [min(length, now) for length, now in zip(volume.shape[1:], shape, strict=True)]
    inside = [slice(start, start + length) for start, length in zip(padded, kept, strict=True)]
    placed = [slice(start, start + length) for start, length in zip(cropped, kept, strict=True)]
    out[:, *placed] = volume[:, *inside]
    return out


if __name__ == "__main__":
    main()
