"""``fibldm encode``: the latents between stage 1 and 2."""

from typing import Any

from fibldm.cli.train import Configs, Devices, Overrides, PrintConfig, Restart, Run, Work, run_stage


def encode(
    data: Work,
    run: Run,
    config: Configs = [],
    overrides: Overrides = [],
    devices: Devices = 1,
    restart: Restart = False,
    print_config: PrintConfig = False,
) -> dict[str, Any]:
    """Encode the training and validation cases and cache their latents; existing ones are kept."""
    return run_stage("latents", data, run, config, overrides, restart, devices=devices, print_config=print_config)
