"""DICOM in and out; nothing else imports pydicom or highdicom.

* ``series`` (with ``frames``, ``stack``, ``pixels``): series found among files and read, or refused
* ``masks`` (with ``segments``, ``contours``): segmentations and RT structure sets
* ``output`` (with ``writer``, ``segmentation_writer``, ``template``, ``label_codes``): synthetic series and their masks
"""
