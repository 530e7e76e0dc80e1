"""A folder a case with ct.nii.gz or mri.nii.gz and binary masks under segmentations/, as TotalSegmentator."""

from collections.abc import Mapping
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.binary_masks import binary_masks, check_order
from fibldm.datasets.layouts.entries import case_name, collected, entry_key, visible
from fibldm.datasets.layouts.facts import Search, describe
from fibldm.datasets.layouts.manifest import covariates, read_records, split_name
from fibldm.datasets.source import Case, Source
from fibldm.volumes.scan import Covariate

_IMAGES = {"ct": "CT", "mri": "MR"}
_MASKS = "segmentations"
_ACQUISITION = {"kvp": "tube_voltage_kv", "magnetic_field_strength": "field_strength_t"}


def is_organs(source: Path) -> bool:
    """Whether a folder in ``source`` holds an image beside a folder ``segmentations``."""
    return any((folder / _MASKS).is_dir() and _images(folder) for folder in visible(source))


def organs(search: Search) -> Source:
    """The cases with the masks of ``merge_masks``, whose values are 1, 2, ... and of which an earlier wins.

    Covariates and split come from ``meta.csv`` where there is one.

    Raises:
        FibldmError: ``merge_masks`` is empty (the names that were found are listed); a case lacks its image or one of
            the masks; or ``meta.csv`` does not fit (all of them listed).
    """
    source, findings, order = search.path, search.findings, search.settings.merge_masks
    within = [path for path in visible(source) if path.is_dir() or not path.exists()]
    folders = [folder for folder in within if (folder / _MASKS).is_dir() or _images(folder)]
    check_order(order, (folder / _MASKS for folder in folders))
    meta = _read_meta(source / "meta.csv", findings)
    cases = [_case(folder, search, meta) for folder in folders]
    modalities = sorted({_IMAGES[entry_key(path)] for folder in folders for path in _images(folder)})
    if len(modalities) > 1:
        findings.error(f"all cases must be of one modality; found {' and '.join(modalities)}")
    others = (path.name for path in within if path not in folders)
    search.leave_out("folders without ct.nii.gz, mri.nii.gz and segmentations/", others)
    facts = {"modality": ", ".join(modalities), **search.facts}
    remedy = "give every case its image and all masks, or name fewer in `merge_masks`"
    return describe("organs", search, cases, facts, remedy=remedy, labels=dict(enumerate(order, start=1)))


def _images(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_file() and entry_key(path) in _IMAGES]


def _case(folder: Path, search: Search, meta: Mapping[str, dict[str, Covariate]]) -> Case:
    settings, findings = search.settings, search.findings
    may_lack = settings.missing_is_unknown
    images = _images(folder)
    if len(images) != 1:
        found = ", ".join(path.name for path in images) or "none"
        findings.error(f"{folder.name} must hold one image, ct.nii.gz or mri.nii.gz; found {found}")
    known = dict(meta.get(folder.name, {}))
    split = known.pop("split", None)
    if split is None and any("split" in row for row in meta.values()):
        findings.error(f"meta.csv gives no split for {folder.name}")
    return Case(
        name=case_name(folder.name),
        images=tuple(collected(path, findings) for path in images[:1]),
        masks=binary_masks(
            folder / _MASKS, settings.merge_masks, findings, f"{folder.name}/{_MASKS}", may_lack=may_lack
        ),
        path=f"{folder.name}/{images[0].name}" if images else folder.name,
        split=str(split) if split is not None else None,
        covariates=known,
    )


def _read_meta(path: Path, findings: Findings) -> dict[str, dict[str, Covariate]]:
    """Covariates by case, with ``split`` among them."""
    if not path.is_file():
        return {}
    columns, records = read_records(path, "image_id")
    values = covariates([name for name in columns if name not in ("image_id", "split")], records, findings)
    rows: dict[str, dict[str, Covariate]] = {}
    for record, known in zip(records, values, strict=True):
        row = rows[record["image_id"]] = {_ACQUISITION.get(name, name): value for name, value in known.items()}
        if record.get("split"):
            row["split"] = None
            with findings.collecting("meta.csv: "):
                row["split"] = split_name(record["split"])
    return rows
