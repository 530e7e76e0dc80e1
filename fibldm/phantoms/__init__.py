"""Chest CT with fibrosis, without patients.

* ``phantoms``: a dataset of them, made and written
* ``anatomy``: one patient as shapes in millimetres
* ``fibrosis``: the disease
* ``rendering``: one examination painted on its voxels
"""
