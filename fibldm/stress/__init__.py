"""Where does a segmenter break? It is run on synthetic volumes of which one thing changes at a time.

* ``sweeps``: what changes, and through which values: an edit of the mask, or a change of the image
* ``images``: changes of an image: noise, blur, contrast of a label
* ``segmenter``: any command that maps a folder of images to a folder of masks
* ``trial``: all volumes are made, segmented and measured; what is there is kept
* ``weaknesses``: which values lower Dice by more than chance does
* ``page``: what came of it, as one HTML file
"""

from fibldm.stress.sweeps import Sweep, read_sweeps
from fibldm.stress.trial import StressSettings, stress

__all__ = ["StressSettings", "Sweep", "read_sweeps", "stress"]
