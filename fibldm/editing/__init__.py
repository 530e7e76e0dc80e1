"""Into a scan that is there: a region drawn anew so that it follows a new mask, all else as it was, to the voxel.

* ``region``: which voxels are drawn
* ``blending``: what was drawn back into the scan, without a seam
* ``editor``: scan, mask and region in, edited scan out
* ``outputs``: files in, marked files out
"""

from fibldm.editing.editor import Edit, Editor, EditRequest, EditSettings
from fibldm.editing.outputs import edit_files

__all__ = ["Edit", "EditRequest", "EditSettings", "Editor", "edit_files"]
