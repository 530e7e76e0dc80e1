"""The configurations of a bundle for ``python -m monai.bundle``, and its metadata."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fibldm.delivery.model_card import CardText
from fibldm.files import read_yaml
from fibldm.runs import StageFolder
from fibldm.runs.renamed import current
from fibldm.synthesis.bundle import GENERATOR
from fibldm.synthesis.definitions import build
from fibldm.typed_settings import counted

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_PACKAGES = ("nibabel", "pytorch-ignite", "safetensors", "einops", "highdicom", "scipy")
_DEVICE = "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"
_OF_EVALUATOR = (
    "synthesizer dataset output_dir inferer batch_size allow_extrapolation covariates conditions conditions_table "
    "own_conditions adapters check reject_copies format template label_codes patient_position mask_format"
).split()


def inference_configuration(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``inference.json``: volumes from masks, or from none where the network sees none."""
    channels = len(facts["space"]["mean"])
    return {
        "imports": [
            "$import torch",
            "$from pathlib import Path",
            "$from fibldm.synthesis import Synthesizer",
            "$from fibldm.synthesis.evaluator import mask_items",
            "$from fibldm.volumes.masks import find_masks",
        ],
        "bundle_root": ".",
        "device": _DEVICE,
        "masks": "masks" if facts["sees_mask"] else None,
        "dataset_dir": "@masks",
        "output_dir": "synthetic",
        "count": 1,
        "batch_size": 1,
        "allow_extrapolation": False,
        "covariates": {},
        "conditions": {},
        "conditions_table": None,
        "own_conditions": None,
        "adapters": {},
        "check": None,
        "reject_copies": None,
        "format": "nifti",
        "template": None,
        "label_codes": None,
        "patient_position": None,
        "mask_format": None,
        "trust": False,
        "inferer": {"_target_": "fibldm.synthesis.SamplingSettings", **facts["sampling"]},
        "network_def": facts["network"],
        "autoencoder_def": facts["autoencoder"],
        "one_tensor_network": {
            "_target_": "fibldm.models.one_tensor.OneTensorNetwork",
            "network": "$@synthesizer.network",
            "channels": channels,
            "conditions": "$@synthesizer.conditions",
        },
        "one_tensor_encoder": {
            "_target_": "fibldm.models.one_tensor.OneTensorEncoder",
            "autoencoder": "$@synthesizer.first_stage.autoencoder",
        },
        "one_tensor_decoder": {
            "_target_": "fibldm.models.one_tensor.OneTensorDecoder",
            "autoencoder": "$@synthesizer.first_stage.autoencoder",
        },
        "synthesizer": "$Synthesizer.from_bundle(@bundle_root, trust=@trust, device=@device)",
        "dataset": {
            "_target_": "monai.data.Dataset",
            "data": "$mask_items(find_masks([Path(@masks)]) if @masks else [None], @count)",
        },
        "evaluator": {
            "_target_": "fibldm.synthesis.evaluator.SynthesisEvaluator",
            **{name: f"@{name}" for name in _OF_EVALUATOR},
        },
        "run": ["$@evaluator.run()"],
        "inference": "@run",
    }


def train_configuration(stage: StageFolder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """``train.json``: the last stage as it was trained, beginning with the weights of the bundle."""
    config: dict[str, Any] = current(read_yaml(stage.path / "config.yaml"))
    own = {"bundle_root": ".", "work": "work", "run_dir": "runs/fine_tuned", "restart": False, "init_trust": False}
    begun = {"init_from": "@bundle_root", "network_def": facts["network"], "training": "@run"}
    if "prior" in config:  # a folder of this machine
        own["prior"] = "@init_from"
    if "text_encoder" in config:  # which the bundle holds
        own["text_encoder"] = "$@bundle_root + '/models/text'"
    return {key: value for key, value in config.items() if key != "_meta_"} | own | begun


def evaluate_configuration(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``evaluate.json``: how good volumes of the bundle are, on the data it was trained on."""
    return {
        "bundle_root": ".",
        "work": "work",
        "synthetic": "synthetic",
        "output_dir": "measured",
        "names": ["faithfulness", "realism", "reconstruction", "audit"],
        "segmenter_settings": {},
        "trust": False,
        "device": "$'cuda' if __import__('torch').cuda.is_available() else 'cpu'",
        "evaluation": {
            "_target_": "fibldm.evaluation.measurements.evaluate",
            "names": "@names",
            "bundle": "@bundle_root",
            "trust": "@trust",
            "work": "@work",
            "synthetic": "@synthetic",
            "run_dir": "@output_dir",
            "segmenter_settings": "@segmenter_settings",
            "device": "@device",
        },
        "run": ["@evaluation"],
        "evaluate": "@run",
    }


def metadata(facts: Mapping[str, Any], words: CardText, figures: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata.json``, with the fields of MONAI's schema."""
    return {
        "schema": SCHEMA,
        "version": facts["version"],
        "changelog": {facts["version"]: "exported by fibldm"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"fibldm": facts["fibldm"]} | {name: version(name) for name in _needed(facts)},
        "name": facts["name"],
        "task": "Synthesis of volumes that follow a mask" if facts["sees_mask"] else "Synthesis of volumes",
        "description": words.description
        or f"Latent diffusion that makes synthetic volumes{' from masks' * facts['sees_mask']}.",
        "authors": words.authors or "not said",
        "copyright": facts["licence"],
        "data_source": words.attribution or "not said",
        "data_type": "nifti",
        "image_classes": f"{facts['modality']} in [-1, 1], {counted(len(facts['channels']), 'channel')}",
        "label_classes": "; ".join(f"{value}: {name}" for value, name in facts["labels"].items()),
        "pred_classes": "the network's output in the terms of its training target, see generator.json",
        "eval_metrics": _values(figures),
        "intended_use": words.intended_use,
        "references": list(words.references),
        "generator": GENERATOR,
        "covariates": facts["covariates"],
        **({"conditions": facts["further"]} if "further" in facts else {}),
        "sampling": facts["sampling"],
        **({"distilled": facts["distilled"]} if "distilled" in facts else {}),
        "network_data_format": _data_format(facts),
    }


def _needed(facts: Mapping[str, Any]) -> list[str]:
    text = facts.get("further", {}).get("text", {"kind": "embeddings"})
    return [*_PACKAGES, *(["transformers"] if text["kind"] != "embeddings" else [])]


def _values(figures: Mapping[str, Any]) -> dict[str, float]:
    sections = {name: part["figures"] for name, part in figures.items() if isinstance(part, Mapping)}
    return {
        f"{section}/{name}": figure["value"]
        for section, part in sections.items()
        for name, figure in part.items()
        if figure["value"] is not None
    }


def _data_format(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``one_tensor_network``: latent, time and mask as channels of one tensor."""
    channels = len(facts["space"]["mean"])
    masks = build(facts["conditions"]["mask"], "mask").channels if facts["sees_mask"] else 0
    compression = facts["conditions"]["mask"]["compression"]
    steps = [compression] * 3 if isinstance(compression, int) else compression
    size = [length // step for length, step in zip(facts["grid"]["size"], steps, strict=True)]
    tensor = {"type": "latent", "format": "vector", "spatial_shape": size, "dtype": "float32", "is_patch_data": False}
    names = [f"latent {number}" for number in range(channels)]
    packed = [*names, "time", *(f"mask {number}" for number in range(masks))]
    return {
        "inputs": {"image": _tensor(tensor, packed, [-1000, 1000])},
        "outputs": {"pred": _tensor(tensor, names, [-1000, 1000])},
    }


def _tensor(tensor: Mapping[str, Any], names: list[str], value_range: list[float]) -> dict[str, Any]:
    channels = {str(number): name for number, name in enumerate(names)}
    return {**tensor, "num_channels": len(names), "value_range": value_range, "channel_def": channels}
