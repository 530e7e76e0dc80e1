"""Files, voxels and millimetres; no network.

From a dataset to a work folder:

* ``layouts``: find the image and label files of a dataset
* ``manifest``: read a CSV manifest of cases
* ``prepare_settings``: what a user decides, and all that is settled before a voxel is read
* ``case_checks``: read one case and say everything that is wrong with it
* ``datalist``: tell patients apart, split by patient, read the split back
* ``preparation``: check, split and write, the whole of ``fibldm prepare``
* ``work_folder``: write the work folder, whole or not at all

Between files and tensors:

* ``intensity``: HU or MR units to ``[-1, 1]`` and back
* ``grid``: a volume's own voxels to the model grid and back
* ``transforms``: the MONAI transforms of both
* ``envelope``: what the training data covered, outside which a mask is refused
* ``writer``: synthetic volumes with geometry, mark and provenance

Data without patients:

* ``phantoms``: chest CT with fibrosis, made and written
* ``phantom_anatomy``: one patient as shapes in millimetres
* ``phantom_fibrosis``: the disease
* ``phantom_rendering``: one examination painted on its voxels
"""
