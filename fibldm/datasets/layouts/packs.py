"""An HDF5 pack: one file with many images, each a case.

* arrays: ``images`` ``(N, X, Y[, Z[, C]])`` and ``masks`` (or ``labels``) alike; further arrays ``(N,)`` are columns,
  as those of a table: ``case``, ``subject``, ``split``, and covariates. ``labels`` ``(N,)`` are classes, the column
  ``class``.
* groups: one a case, with the arrays ``image`` and, where there is one, ``mask`` (or ``label``); its attributes are the
  columns.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.entries import case_name
from fibldm.datasets.layouts.facts import Search, describe
from fibldm.datasets.layouts.manifest import MISSING, split_name
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.formats.plain_arrays import PACK_NAMES, Key
from fibldm.volumes.formats.readers import stem
from fibldm.volumes.scan import Covariate

CLASS = "class"

_SUFFIXES = (".h5", ".hdf5")
_REMEDY = "see the layout pack in docs/data.md"
_LEAST_AXES = 3


def is_pack(source: Path) -> bool:
    """Whether a source is one HDF5 file."""
    return source.is_file() and source.name.lower().endswith(_SUFFIXES)


def pack(search: Search) -> Source:
    """The cases of an HDF5 file.

    Raises:
        FibldmError: it is no HDF5, holds neither an array of images nor groups with one each, the number of masks or
            the length of a column is another one, or a split is unknown (all listed).
    """
    import h5py

    source, findings = search.path, search.findings
    if not is_pack(source):
        raise FibldmError(f"a pack must be one HDF5 file ({', '.join(_SUFFIXES)}); {source} is none", _REMEDY)
    try:
        with h5py.File(source) as file:
            arrays = {name: node for name, node in file.items() if isinstance(node, h5py.Dataset)}
            groups = {name: node for name, node in file.items() if isinstance(node, h5py.Group)}
            cases = _of_arrays(source, arrays, findings) if arrays else _of_groups(source, groups, findings)
            if arrays and groups:
                findings.error(f"it must hold arrays or groups; it holds {len(arrays)} and {len(groups)}")
    except OSError as error:
        raise FibldmError(f"{source} must be HDF5; it cannot be read ({error})", "copy or export it again") from error
    return describe("pack", search, cases, {"name": stem(source), **search.facts}, remedy=_REMEDY)


def _of_arrays(source: Path, arrays: Mapping[str, Any], findings: Findings) -> list[Case]:
    image, mask = (_first(arrays, key) for key in ("image", "label"))
    if image is None:
        findings.error(
            f"it must hold images (N, X, Y[, Z[, C]]) as one of {', '.join(PACK_NAMES['image'])}; it holds "
            + (", ".join(f"{name} {node.shape}" for name, node in arrays.items()) or "nothing")
        )
        return []
    count = arrays[image].shape[0]
    columns = {name: node[()] for name, node in arrays.items() if node.ndim == 1 and len(node) == count}
    if (classes := next((name for name in PACK_NAMES["label"] if name in columns), None)) is not None:
        columns[CLASS] = columns.pop(classes)
    used = {image, mask, classes, *columns}
    for name, node in arrays.items():
        if name not in used or (name == mask and node.shape[0] != count):
            allowed = f"masks and columns of {count} entries each"
            findings.error(f"beside {image} there may be {allowed}; {name} has the shape {node.shape}")
    width = len(str(count - 1))
    rows = [{name: _plain(values[index]) for name, values in columns.items()} for index in range(count)]
    return [
        _case(source, str(index), f"{index:0{width}d}", mask is not None, row, findings)
        for index, row in enumerate(rows)
    ]


def _of_groups(source: Path, groups: Mapping[str, Any], findings: Findings) -> list[Case]:
    cases = []
    for name, group in groups.items():
        if not any(key in group for key in PACK_NAMES["image"]):
            findings.error(f"every group must hold an array image; {name} holds {', '.join(group) or 'nothing'}")
            continue
        masked = any(key in group for key in PACK_NAMES["label"])
        row = {key: _plain(value) for key, value in group.attrs.items()}
        cases.append(_case(source, name, name, masked, row, findings))
    return cases


def _first(arrays: Mapping[str, Any], key: Key) -> str | None:
    return next((name for name in PACK_NAMES[key] if name in arrays and arrays[name].ndim >= _LEAST_AXES), None)


def _case(source: Path, item: str, name: str, masked: bool, row: Mapping[str, Covariate], findings: Findings) -> Case:
    known = dict(row)
    given, subject, stated = (known.pop(key, None) for key in ("case", "subject", "split"))
    split = None
    with findings.collecting(f"image {item}: "):
        split = None if stated is None else split_name(_text(stated))
    return Case(
        name=case_name(_text(given) if given is not None else f"{stem(source)}_{name}"),
        images=((source,),),
        masks=(Mask((source,), item=item),) if masked else (),
        path=f"{source.name}/{item}",
        subject=None if subject is None else _text(subject),
        split=split,
        covariates=known,
        item=item,
    )


def _plain(value: Any) -> Covariate:
    """A number or text of HDF5; ``None`` for what is missing."""
    if isinstance(value, bytes | str):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return None if text.lower() in MISSING else text
    number = float(np.asarray(value).reshape(-1)[0]) if np.asarray(value).size == 1 else np.nan
    return number if np.isfinite(number) else None


def _text(value: Covariate) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
