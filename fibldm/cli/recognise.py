"""``fibldm recognise``: was a volume drawn by FibLDM?"""

from pathlib import Path
from typing import Annotated, Any

import typer


def recognise(
    volumes: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Volumes of any format, folders of them, folders of DICOM series."),
    ],
    expect: Annotated[
        str | None,
        typer.Option(metavar="synthetic|none", help="End with 1 unless every volume has the mark, or none has."),
    ] = None,
) -> dict[str, Any]:
    """Look for FibLDM's mark in the voxels of volumes, whatever other software did to their headers.

    "No mark found" does not mean that a volume is real. Where FIBLDM_MARK_KEY is set, the mark of that key is looked
    for beside the public one. Ends with 0 whatever was found, unless --expect says otherwise.
    """
    from fibldm.errors import FibldmError, unknown_choice
    from fibldm.evaluation.recognition import recognise_file, volumes_at
    from fibldm.models.mark import Mark

    wanted = {None: None, "synthetic": True, "none": False}
    if expect not in wanted:
        raise unknown_choice("--expect", expect, [name for name in wanted if name])
    key, found, refused = Mark.from_environment().site_key, [], []
    for path in volumes:
        try:
            named = volumes_at(path)
        except FibldmError as error:
            refused.append((str(path), error))
            continue
        for name, files in named:
            try:
                found.append(recognise_file(name, files, site_key=key))
            except FibldmError as error:
                refused.append((name, error))
            else:
                print(found[-1].described)
    if refused:
        raise _together(refused)
    good = wanted[expect] is None or all(volume.synthetic == wanted[expect] for volume in found)
    return {"ok": good, "volumes": [volume.to_dict() for volume in found]}


def _together(refused: list[tuple[str, Any]]) -> Exception:
    from fibldm.errors import FibldmError

    told = "".join(f"\n  {name}: {error.message}" for name, error in refused)
    return FibldmError(f"volumes must be readable to be looked at; {len(refused)} are not:{told}", refused[0][1].remedy)
