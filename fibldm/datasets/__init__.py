"""From a dataset to a work folder.

* ``source``: a dataset as found: cases, and where the labels of each come from
* ``layouts``: find them: Decathlon, nnU-Net, BIDS, DICOM, TotalSegmentator, folders, tables
* ``settings``: what a user decides, and all that is settled before a voxel is read
* ``split``: tell patients apart, and split by patient
* ``pseudonyms``: names that do not tell the patient
* ``checks``: what may be wrong with a case
* ``case``, ``masks``: one case, read, checked and written
* ``lung``, ``bias_field``: masks from HU; N4
* ``preparation``: the whole of ``fibldm prepare``
* ``work_folder``: write the work folder, whole or not at all
* ``fitting_grid``: the model grid that a work folder asks for
* ``slices``: axial slices of a work folder, for networks in two dimensions
* ``torch_datasets`` (with ``torch_items``): work folders as torch datasets, and torch datasets as sources
* ``subjects``: work folders and synthetic volumes as TorchIO's datasets
"""
