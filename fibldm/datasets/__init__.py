"""From a dataset to a work folder, in the order in which it goes.

* ``settings``: what a user decides
* ``findings``: what is wrong and what has to be said, collected and told at once
* ``source``: a dataset as found: cases, and where the labels of each come from
* ``layouts``: find them: Decathlon, nnU-Net, BIDS, DICOM, TotalSegmentator, folders, tables
* ``several``: several datasets as one, with a common legend; ``annotated``: what was annotated of each case
* ``plan``: all that is settled before a voxel is read, with ``split`` (by patient) and ``pseudonyms`` (privacy)
* ``case``: one case, read, checked and written
* ``checks``, ``masks``, ``lung``, ``bias_field``: what a case needs: its checks, its masks, masks from HU, N4
* ``second_image``, ``stored_image``: another image of the patient, checked; images as a work folder holds them
* ``preparation``: the whole of ``fibldm prepare``
* ``work_folder``: write the work folder, whole or not at all
* ``boxes``: the boxes of its masks as a table
* ``fitting_grid``: the model grid that a work folder asks for
* ``slices``: axial slices of a work folder, for networks in two dimensions
* ``torch_datasets`` (with ``torch_items``): work folders as torch datasets, and torch datasets as sources
* ``subjects``: work folders and synthetic volumes as TorchIO's datasets
"""
