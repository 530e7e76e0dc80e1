"""What people open.

* ``report``: one HTML file of a run, a bundle or an evaluation; what it shows is `ReportSettings`
* ``subject``: what a report is of, as it lies on disk
* ``parts``: sections, tables and pictures, before they are HTML; ``made``, ``measured``: these of a subject
* ``cases``, ``planes``, ``payload``: which volumes are shown, slices with letters, and volumes as a page carries them
* ``page``, ``niivue``: one file, with NiiVue where that is installed
* ``curves``: losses as lines
* ``reader_study``: a blinded folder of real and synthetic volumes
* ``gallery``: any volumes with the outlines of their masks
* ``colours``: of labels
"""
