"""Stages of a run on MONAI's and Ignite's engines, each described by a configuration.

* ``configuration``: from names and overrides to a checked configuration and the plain MONAI command
* ``stage``: one training stage: skip, resume or begin; train; mark as done
* ``latents``: the encode stage, and the cached latents that later stages read
* ``draws``: randomness keyed by (seed, epoch, case, view)
* ``prepare_batch``: from a batch to what the network sees and is asked for
* ``losses``: what the stages minimise
* ``handlers``: what happens around the steps: averaged weights, metrics, progress, checkpoints
"""
