"""Numbers and pictures about sets of volumes.

* ``cases``: the volumes that are measured, on the model grid, and what is computed of them once
* ``statistics``, ``record``: figures with intervals over patients; ``RUN/evaluation/metrics.json``
* ``segmenter``: one small UNet of real scans for every measurement
* ``faithfulness`` (with ``overlap``): do volumes follow their masks?
* ``realism`` (with ``radiomics``, ``distances``, ``spectrum``, ``structure``): do they look like real scans?
* ``utility``: can a segmenter learn from them?
* ``reconstruction``: what does the autoencoder lose?
* ``copies``: is one a copy of a training scan?
* ``measurements``: all of these by name
* ``density``, ``figures``: the demo's figures of chest phantoms, which need no network
* ``pictures``, ``report``: volumes side by side; one HTML file of pictures, loss curves and figures
"""
