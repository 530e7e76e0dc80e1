"""Run folders: what a stage was made from, whether it is done, and going on where it stopped.

* ``stages``: the table of stages
* ``stage_folder``: the folder of one stage
* ``fingerprints``: what decides a stage
* ``renamed``: names of earlier versions
* ``configuration``: from names and overrides to a checked configuration and the plain MONAI command
* ``config_files``, ``config_keys``: where configurations lie; whether a stage takes what they say
* ``options``: overrides, from and to options of a command line
* ``locator``: MONAI's parser, quick to find dotted names
* ``workflow``: MONAI's workflow of a stage, and the parser that it runs by
* ``values``, ``causes``: checks of single values; what lies behind an error of MONAI's parser
"""

from fibldm.runs.fingerprints import decisive, hash_weights
from fibldm.runs.stage_folder import BUDGET, Progress, StageConflict, StageFolder, load_facts
from fibldm.runs.stages import STAGES

__all__ = ["BUDGET", "STAGES", "StageConflict", "Progress", "StageFolder", "decisive", "hash_weights", "load_facts"]
