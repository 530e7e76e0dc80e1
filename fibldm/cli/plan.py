"""``fibldm plan``."""

from typing import Annotated, Any

import typer

from fibldm.cli.train import Configs, Overrides, Work
from fibldm.typed_settings import counted


def plan(
    data: Work,
    config: Configs = [],
    autoencoder_config: Annotated[
        list[str], typer.Option("--autoencoder-config", help="Like --config, for stage 1 only; repeatable.")
    ] = [],
    overrides: Overrides = [],
    controlnet: Annotated[
        bool,
        typer.Option(
            "--controlnet",
            help="Plan a ControlNet as well, on stage 2 as --config has it; default: no ControlNet, and stage 2 with "
            "mask_concat unless --config says how it sees the mask.",
        ),
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; default: cuda if available.")] = "",
    memory: Annotated[
        float | None, typer.Option("--memory", help="Device memory in GB; default: this machine's.")
    ] = None,
) -> dict[str, Any]:
    """Estimate memory and time of each stage, and the largest batch that fits, from a few trial steps."""
    import torch

    from fibldm.planning.plan import plan as make_plan
    from fibldm.planning.traced_step import Request
    from fibldm.runs.options import parse_overrides

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    request = Request(
        data, tuple(config), parse_overrides(overrides), device, {"autoencoder": tuple(autoencoder_config)}
    )
    made = make_plan(request, memory=None if memory is None else memory * 1e9, controlnet=controlnet)
    print(f"{device}, {made['memory_gb']:.1f} GB{' (imitated on a CPU)' if made['imitated'] else ''}")
    print(f"{made['grid']['sentence'][:1].upper()}{made['grid']['sentence'][1:]}")
    if made["grid"]["lost"]:
        print(f"warning: training will refuse this grid, as nothing is left of {', '.join(made['grid']['lost'])}")
    for stage, found in made["stages"].items():
        size = " x ".join(str(axis) for axis in found["input_size"])
        configs = f" with {', '.join(found['configs'])}" if found["configs"] else ""
        parts = ", ".join(f"{part} {_memory(found[f'{part}_gb'])}" for part in ("resident", "step", "validation"))
        print(
            f"{stage:<12} {_memory(found['peak_gb'])} at batch {found['batch_size']} of {size}{configs} ({parts}): "
            f"{'fits' if found['fits'] else 'does not fit'}"
        )
        print(f"{'':<12} {_largest(found)}")
        print(f"{'':<12} {_minutes(found)}")
    if made["encoding_minutes"] is not None:
        print(f"{'latents':<12} {made['encoding_minutes']:6.1f} minutes")
    return made


def _memory(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.1f} MB"


def _minutes(found: dict[str, Any]) -> str:
    if found["minutes"] is None:
        return "not timed: the steps cannot be tried out on this machine"
    return (
        f"{found['minutes']:.1f} minutes: {counted(found['epochs'], 'epoch')} of {counted(found['steps'], 'step')} of "
        f"{found['seconds_per_step']:.2g} s, {counted(found['validations'], 'validation')} of "
        f"{found['seconds_per_validation']:.2g} s"
    )


def _largest(found: dict[str, Any]) -> str:
    patch = found.get("largest_patch")
    return (
        f"largest batch {found['largest_batch']}, with activation_checkpointing {found['largest_batch_checkpointed']}"
        + (f", or patch {patch} at this batch" if patch else "")
    )
