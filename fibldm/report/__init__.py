"""What people open.

* ``report``: one HTML file of pictures, loss curves and figures
* ``gallery``: any volumes with the outlines of their masks
"""
