"""The main job: mask, model grid, condition, sampler, decoder, the mask's grid, written volume.

* ``settings``: what is asked of a synthesis; its options are listed there and nowhere else
* ``asked``: what is asked of volumes beside their masks: of all, of each by a table, or what the data say of its case
* ``scans``: scans that are asked for as a condition, opened as a work folder would hold them
* ``request``: what is asked of a synthesizer, and what comes back
* ``loading``: the parts of a synthesizer, from a run or a bundle
* ``checking``: volumes outside of the ranges of training are drawn again, or left out
* ``adapters``: updates of low rank, put on a generator
* ``student``: what a distilled network was trained for, and is therefore asked for
* ``synthesizer``: everything that turns a mask into a volume
* ``mask_source``: mask files, each read once for all its volumes
* ``label_maps``: masks from nothing, of a generator that was trained on masks
* ``outputs``: volumes as marked files
* ``shared_work``: looks at masks and batches of volumes, as items that an engine hands out
* ``synthesize``: mask files in, marked files out
* ``evaluator``: the same as a MONAI engine
* ``bundle``, ``definitions``: bundles are read, and networks made of what they say
"""

from fibldm.synthesis.checking import OutsideRanges
from fibldm.synthesis.mask_source import Job, MaskSource, jobs_of
from fibldm.synthesis.outputs import Output, OutputConflict
from fibldm.synthesis.request import PreparedMask, Synthesis, SynthesisRequest
from fibldm.synthesis.settings import FileFormat, SamplingSettings, SynthesisSettings
from fibldm.synthesis.synthesize import synthesize_files
from fibldm.synthesis.synthesizer import Synthesizer

__all__ = [
    "FileFormat",
    "Job",
    "MaskSource",
    "Output",
    "OutputConflict",
    "OutsideRanges",
    "PreparedMask",
    "SamplingSettings",
    "Synthesis",
    "SynthesisRequest",
    "SynthesisSettings",
    "Synthesizer",
    "jobs_of",
    "synthesize_files",
]
