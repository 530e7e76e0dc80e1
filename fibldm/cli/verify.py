"""``fibldm verify``: does a bundle do what it says?"""

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> dict[str, Any]:
    """Try out everything that is promised of a bundle, in a fresh process; its configurations run as code."""
    from dataclasses import asdict

    from fibldm.delivery.verify import verify as run_verification

    checks = run_verification(bundle)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok' if check.ok else 'FAILED':<8}{check.name:<{width + 2}}{check.saw}")
    return {"ok": all(check.ok for check in checks), "checks": {check.name: asdict(check) for check in checks}}
