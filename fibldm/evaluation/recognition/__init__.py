"""Was a volume drawn by FibLDM? From its voxels alone.

* ``grain``: what is random about neighbouring voxels, made even in strength and spectrum
* ``folding``: grain laid together by the period of a mark, at any size of its voxels
* ``recognition``: how well that agrees with a key, and how likely chance does as well
* ``files``: the same of files of any format, and what their headers say
"""

from fibldm.evaluation.recognition.files import Recognised, recognise_file, volumes_at
from fibldm.evaluation.recognition.recognition import SYNTHETIC, Recognition, recognise

__all__ = ["SYNTHETIC", "Recognised", "Recognition", "recognise", "recognise_file", "volumes_at"]
