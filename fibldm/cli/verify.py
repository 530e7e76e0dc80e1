"""``fibldm verify``: does a bundle do what it says?"""

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> dict[str, Any]:
    """Try out everything that is promised of a bundle, in a fresh process; its configurations run as code."""
    from dataclasses import asdict

    from fibldm.delivery.verify import CHECKS, NOT_TRIED
    from fibldm.delivery.verify import verify as run_verification

    checks, width = [], max(len(name) for name in CHECKS)
    for check in run_verification(bundle):
        said = "-" if check.saw.startswith(NOT_TRIED) else "ok" if check.ok else "FAILED"
        print(f"{said:<8}{check.name:<{width + 2}}{check.saw}", flush=True)
        checks.append(check)
    return {"ok": all(check.ok for check in checks), "checks": {check.name: asdict(check) for check in checks}}
