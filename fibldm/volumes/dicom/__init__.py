"""DICOM in and out; nothing else imports pydicom or highdicom.

* ``files``: which files are DICOM, with a preamble or without
* ``series`` (with ``frames``, ``stack``, ``pixels``): series found among files and read, or refused
* ``masks`` (with ``segments``, ``contours``, ``polygons``): segmentations and RT structure sets
* ``output`` (with ``writer``, ``segmentation_writer``, ``structure_set_writer``, ``outlines``, ``template``,
  ``label_codes``): synthetic series and their masks
"""
