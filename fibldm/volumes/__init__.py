"""One image or mask: files, voxels and millimetres; no network, no dataset.

* ``scan``: what readers give
* ``formats``, ``dicom``: read and write files
* ``grid``: a volume's own voxels to the model grid and back
* ``intensity``: HU or MR units to ``[-1, 1]`` and back
* ``transforms``, ``crops``: the MONAI transforms that MONAI lacks
* ``datalist``: the cases of a work folder
* ``coverage``: what of a work folder a model grid holds
* ``envelope``: what the training data covered, outside which a mask is refused
* ``second_image``: a second image of a patient, brought to the model grid of the first
* ``label_values``, ``masks``: values of labels; the masks to synthesise from
* ``label_images``: masks in place of images, a channel for each label
* ``interchange``: volumes as SimpleITK and TorchIO know them
* ``pictures``: three planes of a volume
* ``writer``, ``bids_writer``: synthetic volumes with geometry, mark and provenance
* ``header_mark``: what headers say of that
"""
