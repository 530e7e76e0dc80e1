"""The boxes of the masks of a work folder, as a table for people."""

import csv
import io
from pathlib import Path

from fibldm.datasets.work_folder import BOXES
from fibldm.files import write_text
from fibldm.models.conditions.box_cells import spans_of
from fibldm.models.conditions.box_texts import Box
from fibldm.models.conditions.boxes import Frame
from fibldm.volumes.datalist import SPLITS, read_datalist
from fibldm.volumes.formats.nifti import read_volume

_COLUMNS = ("case", "split", "label", "class", "x", "y", "z", "dx", "dy", "dz", "box")


def write_boxes(work: Path, *, smallest: int = 8) -> int:
    """Write `BOXES`: a row for each connected component of each label, and how many there are.

    ``x, y, z`` is the centre in RAS+ mm, ``dx, dy, dz`` the extent in mm along the mask's axes; ``box`` says the same
    as ``fibldm synthesize --box`` takes it.

    Args:
        work: folder of a preparation.
        smallest: voxels that a component has at least.

    Raises:
        FibldmError: the folder is none, or a mask cannot be read.
    """
    content = read_datalist(work)
    names = {int(value): str(name) for value, name in content["labels"].items() if int(value)}
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(_COLUMNS)
    count = 0
    for split in SPLITS:
        for case in content[split]:
            for value, box in _boxes_of(Path(case["label"]), names, smallest) if "label" in case else ():
                rows.writerow([case["case"], split, value, box.name, *map(_shown, (*box.centre, *box.size)), str(box)])
                count += 1
    write_text(Path(work) / BOXES, table.getvalue())
    return count


def _boxes_of(mask: Path, names: dict[int, str], smallest: int) -> list[tuple[int, Box]]:
    volume = read_volume(str(mask)).canonical()
    grid = Frame.of(volume.grid)
    found = [(value, span) for value in names for span in spans_of(volume.array, value, smallest)]
    return [(value, grid.box(names[value], span)) for value, span in found]


def _shown(number: float) -> str:
    return f"{round(number, 3) + 0:.10g}"
