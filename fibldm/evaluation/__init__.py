"""Numbers and pictures about sets of volumes.

* ``density``: figures of chest CT that need no network: does the lung follow the mask?
* ``figures``: synthetic phantoms against the real ones of the same masks
* ``report``: one HTML file of pictures, loss curves and figures
"""
