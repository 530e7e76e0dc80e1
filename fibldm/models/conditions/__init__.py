"""What a volume may be asked for: the mask, covariates, and further kinds, each in a file of its own.

* ``condition``: what every kind can do, and where networks see it
* ``mask`` (with ``mask_features``): labels at the latent's size, with a group of channels for *unknown*
* ``mask_encoders``: what a network sees of masks
* ``text`` (with ``text_encoders``): findings and reports as tokens of an encoder
* ``text_tokens``: what a network sees of them
* ``covariates``: age, sex and the like as tokens for cross-attention
* ``label_volumes``: how much of each label there is, as covariates of networks that draw masks
* ``boxes`` (with ``box_texts`` and ``box_cells``): where things of a class are and how large, in any number
* ``image``: a second image of the patient, voxel by voxel as channels of the latent's size
* ``covariate_vectors``: the same in the time embedding
* ``token``: names of what few scans have in common, each with a learned vector in the time embedding
"""
