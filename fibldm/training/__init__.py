"""Stages of a run on MONAI's and Ignite's engines, each described by a configuration.

* ``stage``, ``untrained``: one training stage: skip, resume or begin; train; mark as done
* ``autoencoder_trainer``, ``denoising_trainer``: the steps of stage 1 and of stages 2 and 3
* ``latents`` (with ``latent_report``): the encode stage, and the cached latents that later stages read
* ``draws``: randomness keyed by (seed, epoch, case, view)
* ``prepare_batch``, ``masked_volumes``: from a batch to what the network sees and is asked for
* ``losses`` (with ``variational_bound``, ``uncertainty``), ``perceptual``, ``adversarial``: what the stages minimise
* ``distillation``: a teacher's pairs of noise and latent, and what its student is asked for
* ``loss_aware``: tells times that follow the loss of it
* ``initialise``, ``first_guess``: weights to begin with, and weights that stay
* ``adapter``, ``base_latents``: updates of low rank kept apart, and what a run takes from the base that it adapts
* ``prior``: the base's own cases beside few scans of something new
* ``muon``: the optimizer
* ``precision``, ``inferers``, ``distributed``: number formats and several processes
* ``handlers`` (with ``finite``, ``step_losses``), ``checkpoints``: what happens around the steps
* ``watch``: validation, and what small data do: the gap to training, losses by time
* ``preview``, ``trackers``: pictures, experiment trackers
"""
