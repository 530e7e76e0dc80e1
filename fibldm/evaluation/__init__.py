"""Numbers and pictures about sets of volumes.

* ``cases``: the volumes that are measured, on the model grid, and what is computed of them once
* ``statistics``, ``results``: figures with intervals over patients; ``RUN/evaluation/metrics.json``
* ``segmenter``: one small UNet of real scans for every measurement
* ``faithfulness`` (with ``segmentation_metrics``): do volumes follow their masks?
* ``sets``: who is compared with whom
* ``realism`` (with ``radiomics``, ``distances``, ``spectrum``, ``ms_ssim``): do they look like real scans?
* ``utility``: can a segmenter learn from them?
* ``reconstruction``: what does the autoencoder lose?
* ``gate``: how often volumes, and scans that were spoilt, lie outside of the ranges of training
* ``ct`` (with ``ct_density``): HU of labels, and what densitometry counts in lungs
* ``masks`` (with ``mask_shapes``): are masks from nothing like real ones, with the volumes that were asked for?
* ``seed_spread``: a map of how much volumes of one mask differ
* ``dicom_volumes``: what was written as DICOM, as NIfTI
* ``perceptual``: LPIPS in three planes, of realism and reconstruction
* ``preview_figures``: a few of these while a stage trains
* ``memorisation``: is one a copy of a training scan?
* ``recognition/``: was one drawn by FibLDM?
* ``measurements``: all of these by name
"""
