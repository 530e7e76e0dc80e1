"""Networks and the mathematics of diffusion on tensors; no file format, no training engine.

Volumes and latents:

* ``autoencoder``: volumes to latents and back
* ``vector_quantised``, ``spade_autoencoder``, ``maisi``, ``identity_autoencoder``: other first stages of the same
  interface
* ``label_autoencoder``: one of masks, whose channels are labels
* ``tiling`` (with ``tiles``, ``receptive_field``): volumes of any size in bounded memory
* ``strides``: compression of each axis by itself
* ``wavelet``: the Haar transform at its outer end
* ``residual_noise`` (with ``mark``): the grain that a decoder leaves out, and what it is recognised by
* ``principal_components``: the best linear autoencoder, where training begins
* ``latents``: the scale of the latents, the only place where they are scaled

Diffusion:

* ``process`` (with ``schedules``): how a latent becomes noise, the training targets, and the way back
* ``timesteps``, ``loss_aware_times``: times for training, validation and sampling
* ``samplers``: from noise to a latent with a denoiser

The network that follows conditions:

* ``conditions/``: masks, covariates and further kinds, and what a network sees of them
* ``control``, ``controlnet``: a ControlNet with what it sees of conditions; it starts as a copy of its base network
* ``lean_unet``: MONAI's UNet without its most expensive convolutions
* ``network``: the UNet and all that tells it of conditions, as engine and checkpoint see them
* ``denoiser``: network, process, condition and guidance as the one function that samplers call
* ``low_rank``, ``adapters``: further training by few numbers, and these apart from the network
* ``tokens``: learned tokens of adapters on a network that knew none
* ``activation_checkpointing``: memory for time
* ``precision_check``: layers that bfloat16 gets wrong, and float32 for them
* ``transfer``: tensors to a device that nothing waits for
"""
