"""The stages of a run."""

STAGES = ("autoencoder", "latents", "diffusion", "controlnet")


COMMANDS = {
    "autoencoder": "fibldm train autoencoder",
    "latents": "fibldm encode",
    "diffusion": "fibldm train diffusion",
    "controlnet": "fibldm train controlnet",
    "segmenter": "fibldm evaluate",
}
