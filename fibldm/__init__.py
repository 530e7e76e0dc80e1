"""FibLDM: 3-D latent diffusion for synthetic CT and MRI that follow a mask.

Legend, used by every docstring and comment of the package:

* ``B`` batch, ``C`` channels, ``X Y Z`` voxel axes in RAS+ (first axis towards the patient's right, second towards the
  front, third towards the head); ``c x y z`` the same of a latent.
* Spacing is in millimetres; an affine maps voxel indices (voxel centres) to RAS+ millimetres.
* CT is in Hounsfield units (HU) on disk and in ``[-1, 1]`` in tensors; MR is in arbitrary units on disk, ``[-1, 1]`` in
  tensors.
* ``t`` in ``[0, 1]`` is the time of a diffusion process: 0 is data, 1 is noise. The network's own time input belongs to
  the process.
* Label 255 in a label volume means *unknown*: nothing is asked for there.
"""

from fibldm.surroundings import settle

settle()

__version__ = "0.1.0"

UNKNOWN_LABEL = 255
