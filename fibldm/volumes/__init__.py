"""Files, voxels and millimetres; no network.

From a dataset to a work folder:

* ``scan``: what readers give and layouts find
* ``layouts``: the images and masks of a dataset
* ``formats``, ``dicom``: read them
* ``prepare_settings``: what a user decides, and all that is settled before a voxel is read
* ``pseudonyms``: names that tell no patient
* ``case_checks``: what may be wrong with a case
* ``prepare_case``: one case, read, checked and written
* ``lung``, ``bias_field``: masks from HU; N4
* ``datalist``: tell patients apart, split by patient, read the split back
* ``preparation``: the whole of ``fibldm prepare``
* ``work_folder``: write the work folder, whole or not at all
* ``slices``: axial slices of a work folder, for networks in two dimensions
* ``torch_datasets``: work folders as torch datasets, and torch datasets as sources

Between files and tensors:

* ``intensity``: HU or MR units to ``[-1, 1]`` and back
* ``grid``: a volume's own voxels to the model grid and back
* ``transforms``, ``crops``: the MONAI transforms that MONAI lacks
* ``envelope``: what the training data covered, outside which a mask is refused
* ``masks``: the masks to synthesise from
* ``writer``, ``bids_writer``: synthetic volumes with geometry, mark and provenance

Data without patients:

* ``phantoms``: chest CT with fibrosis, made and written
* ``phantom_anatomy``: one patient as shapes in millimetres
* ``phantom_fibrosis``: the disease
* ``phantom_rendering``: one examination painted on its voxels
"""
