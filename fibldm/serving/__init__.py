"""A generator that serves: items arrive, volumes leave, unattended, and nothing is lost when a process is killed.

* ``items``: what arrives, read without telling its names
* ``making``: the volumes of an item, all or none
* ``folders``: folders that processes share
* ``ending``: asked to end, it finishes what it has in hand
* ``watch_folder``: items arrive in a folder
* ``opening``: the generator of a bundle, with what is asked of all items
* ``store``: jobs, in one file that outlives any kill
* ``service``: jobs that any door takes on, made one after the other
* ``dicom/``: a door for DICOM (the extra ``node``)
* ``studio``: the door of HTTP; ``page``: what it shows in a browser
"""

from fibldm.serving.ending import Ending
from fibldm.serving.opening import serving_output
from fibldm.serving.service import Service
from fibldm.serving.store import Job, JobStore, State
from fibldm.serving.watch_folder import Watcher

__all__ = ["Ending", "Job", "JobStore", "Service", "State", "Watcher", "serving_output"]
