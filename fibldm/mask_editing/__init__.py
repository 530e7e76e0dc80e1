"""A mask changed on purpose: a label grown, shrunk, moved, copied or removed, a lesion put into another patient, the
whole deformed within what patients differ by, fibrosis from none to end stage.

* ``anatomy``: what the training masks say: which labels may lie where, how large they are, how much patients differ
* ``regions``: the voxels that an edit wins and gives up
* ``labels``: edits of one label
* ``lesion``: a label of another patient put into an organ
* ``deformation``: the whole mask bent
* ``fibrosis``: the extent of fibrosis as a dial
* ``words``: edits as they are written on a command line
* ``outputs``: masks in, edited masks with what was done out
"""

from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.outputs import edit_masks
from fibldm.mask_editing.words import read_edits

__all__ = ["Anatomy", "edit_masks", "read_edits"]
