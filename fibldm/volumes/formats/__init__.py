"""Images and masks of every format as scans on RAS+ axes.

* ``readers``: by what the files are
* ``nifti``, ``itk_images`` (NRRD, MetaImage), ``plain_arrays`` (HDF5, MATLAB, NumPy, PNG)
* ``raw_volume``: what every format must satisfy, and the turn to RAS+
* ``monai_reader``: the same for MONAI's ``LoadImage``
"""
