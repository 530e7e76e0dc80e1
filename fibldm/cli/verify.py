"""``fibldm verify``: does a bundle do what it says?"""

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    update_manifest: Annotated[
        bool,
        typer.Option(
            "--update-manifest", help="Rewrite the manifest first: accept the bundle's files as they are now."
        ),
    ] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run the bundle although files changed since export.")] = False,
) -> dict[str, Any]:
    """Test everything that a bundle promises, in a fresh process; this runs its configurations as code."""
    from dataclasses import asdict

    from fibldm.cli.output import log_to_standard_error
    from fibldm.delivery.verify import CHECKS, NOT_TRIED
    from fibldm.delivery.verify import verify as run_verification

    log_to_standard_error()
    if update_manifest:
        _update(bundle)
    checks, width = [], max(len(name) for name in CHECKS)
    for check in run_verification(bundle, trust=trust):
        said = "-" if check.saw.startswith(NOT_TRIED) else "ok" if check.ok else "FAILED"
        print(f"{said:<8}{check.name:<{width + 2}}{check.saw}", flush=True)
        checks.append(check)
    return {"ok": all(check.ok for check in checks), "checks": {check.name: asdict(check) for check in checks}}


def _update(bundle: Path) -> None:
    from fibldm.delivery.verify import require_bundle
    from fibldm.errors import FibldmError
    from fibldm.manifest import differences, write_manifest

    require_bundle(bundle)
    try:
        before = differences(bundle)
    except FibldmError as error:  # one that cannot be read is replaced as well
        before = [error.message]
    file = write_manifest(bundle)
    print("\n".join([f"{file} is written", *(f"  {line}" for line in before or ())]))
