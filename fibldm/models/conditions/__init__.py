"""What a volume may be asked for: the mask, covariates, and further kinds, each in a file of its own.

* ``condition``: what every kind can do, and where networks see it
* ``mask`` (with ``mask_features``): labels at the latent's size, with a group of channels for *unknown*
* ``mask_encoders``: what a network sees of masks
* ``covariates``: age, sex and the like as tokens for cross-attention
* ``covariate_vectors``: the same in the time embedding
"""
