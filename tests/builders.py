"""What tests of several files are made of: seeded numbers, arguments of the smallest networks, files."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import nibabel
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from fibldm.runs.configuration import Configuration, stage_configuration
from fibldm.runs.stages import usual

ROOT = Path(__file__).parents[1]
STAGES = usual()
"""Of a run that nobody asked more of."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl_numbers(levels: int = 2, *, spatial_dims: int = 3, channels: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of a small ``AutoencoderKL`` without attention, by which a cell would see the whole volume."""
    numbers: dict[str, Any] = {"spatial_dims": spatial_dims, "in_channels": channels, "out_channels": channels}
    numbers |= {"channels": (8,) * levels, "num_res_blocks": (1,) * levels, "attention_levels": (False,) * levels}
    numbers |= {"latent_channels": 3, "norm_num_groups": 4}
    return numbers | {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False} | changes


def unet_numbers(**changes: Any) -> dict[str, Any]:
    """Arguments that a small ``DiffusionModelUNet`` and its ``ControlNet`` share."""
    numbers: dict[str, Any] = {"spatial_dims": 3, "channels": (8, 16), "attention_levels": (False, True)}
    return numbers | {"num_res_blocks": 1, "num_head_channels": 8, "norm_num_groups": 4} | changes


def awake(network: Any, seed: int | None = None, *, std: float = 0.3) -> Any:
    """With weights where MONAI starts at 0, which would hide all that comes before; by torch's own draws or a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=std, generator=generator)
    return network.eval()


def tiny_configuration(stage: str, work: Path, run: Path, /, *configs: Path | str, **overrides: Any) -> Configuration:
    """As `stage_configuration`, on the CPU in float32."""
    settings = {"device": "cpu", "precision": "float32", **overrides}
    named = [str(config) for config in configs]
    return stage_configuration(stage, work=work, run_dir=run, configs=named, overrides=settings)


def data_file(folder: Path, spacing: float, *size: int) -> Path:
    """A data configuration with such a model grid."""
    (folder / "data.yaml").write_text(yaml.safe_dump({"spacing": [spacing] * 3, "size": [*size]}))
    return folder / "data.yaml"


def write_nifti(path: Path, array: NDArray[Any], affine: NDArray[Any]) -> Path:
    """With one affine in both places of the header, in millimetres; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def with_latents_of(run: Path, folder: Path) -> Path:
    """A run folder that is trained as far as its latents, which are those of another run."""
    for stage in ("autoencoder", "latents"):
        shutil.copytree(run / stage, folder / stage)
    return folder


def verified_here(bundle: Path) -> Iterator[Any]:
    """Checks of a bundle in this process, but for those that compile its networks: test_bundles.py does all of them."""
    from fibldm.delivery.verify import run_checks

    with TemporaryDirectory() as folder:
        yield from run_checks(bundle, Path(folder), ("manifest", "layout", "generator", "metadata", "synthesis"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of ``scripts/``, which child processes find as well."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)
