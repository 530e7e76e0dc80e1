"""The main job: mask, model grid, condition, sampler, decoder, the mask's grid, written volume.

* ``settings``: how volumes are drawn
* ``synthesizer``: everything that turns a mask into a volume
* ``outputs``: mask files in, marked files out
"""

from fibldm.synthesis.outputs import Output, VolumeLiesThere, synthesize_files
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.synthesizer import Synthesis, Synthesizer, Wanted

__all__ = [
    "Output",
    "SamplingSettings",
    "Synthesis",
    "Synthesizer",
    "VolumeLiesThere",
    "Wanted",
    "synthesize_files",
]
