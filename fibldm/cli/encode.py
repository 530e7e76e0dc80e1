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
    """Cache the latents of the training and validation cases; what is there is kept."""
    return run_stage("latents", data, run, config, overrides, restart, devices=devices, print_config=print_config)
