"""``fibldm encode``: the latents between stage 1 and 2."""

from typing import Any

from fibldm.cli.engine_options import Cluster, Workers
from fibldm.cli.train import Configs, Devices, Overrides, PrintConfig, Restart, Run, Work, run_stage


def encode(
    data: Work,
    run: Run,
    config: Configs = [],
    overrides: Overrides = [],
    devices: Devices = 1,
    workers: Workers = None,
    cluster: Cluster = None,
    restart: Restart = False,
    print_config: PrintConfig = False,
) -> dict[str, Any]:
    """Encode the training and validation cases and cache their latents; existing ones are kept."""
    engine = {"workers": workers, "cluster": cluster}
    return run_stage(
        "latents",
        data,
        run,
        config,
        overrides,
        restart,
        devices=devices,
        print_config=print_config,
        more={name: value for name, value in engine.items() if value is not None},
    )
