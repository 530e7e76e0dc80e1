"""Bundles: what is exported is the run, stands alone, says what it is, and is refused when it was tampered with."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy as copy_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
import torch
import yaml
from conftest import TinyStage
from monai.bundle import ConfigParser, create_workflow, load, verify_net_in_out
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fibldm.cli import run
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.resolve import literal, plain
from fibldm.delivery.verify import CHECKS, NOT_TRIED, run_checks
from fibldm.errors import FibldmError
from fibldm.evaluation.audit.section import figures_of as audit_figures
from fibldm.evaluation.audit.section import sentences as audit_sentences
from fibldm.evaluation.cases import Evaluated
from fibldm.evaluation.reconstruction import Reconstructor
from fibldm.evaluation.results import Section
from fibldm.files import hash_file, read_json, write_json
from fibldm.manifest import write_manifest
from fibldm.models.one_tensor import OneTensorDecoder, OneTensorEncoder, OneTensorNetwork
from fibldm.runs import StageFolder, hash_weights
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files
from fibldm.synthesis.bundle import GENERATOR, open_bundle
from fibldm.synthesis.definitions import TARGETS, build
from fibldm.training.initialise import initialise
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume

BUNDLES = Path(__file__).parents[2] / "bundles"
SHIPPED = sorted(file.parents[1].name for file in BUNDLES.glob("*/configs/generator.json"))
QUICK = SamplingSettings(steps=2)
CC0 = ExportSettings("CC0-1.0")

Change = Callable[[Path], object]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    shutil.copytree(bundle, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def mask_file(phantom_work: Path) -> str:
    return str(load_datalist(phantom_work, "test", masks=True)[0]["label"])


@pytest.fixture(scope="module")
def a_mask(mask_file: str) -> Volume:
    return read_volume(mask_file)


# --- what is exported


def test_a_bundle_makes_what_its_run_makes(tiny_run: Path, bundle: Path, a_mask: Volume) -> None:
    """To the bit, from weights, scale, conditions, intensity, grid and grain."""
    one, other = Synthesizer.from_run(tiny_run), Synthesizer.from_bundle(bundle)
    assert np.array_equal(one(a_mask, settings=QUICK).volume.array, other(a_mask, settings=QUICK).volume.array)
    assert (one.mask, one.grid, one.envelope, one.names) == (other.mask, other.grid, other.envelope, other.names)
    assert one.source["weights"] == other.source["weights"]
    assert one.sampling == other.sampling == SamplingSettings()  # it was not measured
    assert other.source["bundle"] == "tiny 0.1.0" and other.source["licence"] == "CC0-1.0"


def test_sampling_is_chosen_on_the_call(tiny_run: Path, a_mask: Volume) -> None:
    """By the names of `SamplingSettings`, on top of those that are given as a whole."""
    made = Synthesizer.from_run(tiny_run)
    wanted = made(a_mask, settings=SamplingSettings(seed=1, steps=2, guidance=1.5))
    assert np.array_equal(made(a_mask, seed=1, steps=2, guidance=1.5).volume.array, wanted.volume.array)
    again = made(a_mask, seed=1, settings=SamplingSettings(steps=2, guidance=1.5))
    assert again.provenance["sampling"] == wanted.provenance["sampling"]
    with pytest.raises(FibldmError, match="a setting of sampling must be one of sampler, steps, .*; got 'step'"):
        made(a_mask, step=2)
    with pytest.raises(FibldmError, match="steps must be at least 1"):
        made(a_mask, steps=0)


def test_a_bundle_has_the_layout_of_monai_and_no_paths_of_this_machine(bundle: Path, tiny_run: Path) -> None:
    names = sorted(str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file())
    assert names == [
        "LICENSE",
        *(f"configs/{name}.json" for name in ("evaluate", "generator", "inference", "metadata", "train")),
        "docs/README.md",
        "manifest.json",
        *(f"models/{name}" for name in ("autoencoder.safetensors", "model.pt", "network.safetensors")),
        "models/residual_noise.safetensors",
    ]
    texts = [(bundle / name).read_text() for name in names if not name.startswith("models/")]
    assert not any(str(tiny_run.parent) in text for text in texts)


def test_exports_of_one_run_are_the_same_bytes(tiny_run: Path, bundle: Path, tmp_path: Path) -> None:
    export(tiny_run, tmp_path / "tiny", CC0)
    for file in bundle.rglob("*"):
        if file.is_file():
            assert hash_file(tmp_path / "tiny" / file.relative_to(bundle)) == hash_file(file), file


def test_half_precision_halves_the_weights_and_changes_little(
    tiny_run: Path, bundle: Path, tmp_path: Path, a_mask: Volume
) -> None:
    export(tiny_run, tmp_path / "half", ExportSettings("CC0-1.0", half=True))
    size, whole = ((folder / "models" / "network.safetensors").stat().st_size for folder in (tmp_path / "half", bundle))
    assert 0.45 < size / whole < 0.6
    volumes = [
        Synthesizer.from_bundle(path)(a_mask, settings=QUICK).volume.array for path in (tmp_path / "half", bundle)
    ]
    difference = np.abs(volumes[0].astype(float) - volumes[1])
    assert difference.max() > 0 and difference.mean() < 0.02 * volumes[1].std()


def test_the_words_of_a_person_are_in_the_card(tiny_run: Path, tmp_path: Path) -> None:
    """The front matter is what Hugging Face reads; what was not measured is said to be."""
    words = {
        "title": "Lungs that never were",
        "attribution": "Phantoms, made by FibLDM",
        "references": ["Someone 2020"],
        "tags": ["ct", "lung", "Lung", "medical"],
    }
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "export.yaml").write_text(yaml.safe_dump(words))
    export(tiny_run, tmp_path / "tiny", ExportSettings("CC-BY-SA-4.0"))
    text = (tmp_path / "tiny" / "docs" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-sa-4.0" and yaml.safe_load(front)["library_name"] == "monai"
    assert yaml.safe_load(front)["tags"] == ["medical", "synthetic", "3d", "latent-diffusion", "ct", "lung"]
    for part in (
        "# Lungs that never were",
        "Phantoms, made by FibLDM",
        "- Someone 2020",
        "Not measured",
        "Not for diag",
    ):
        assert part in body
    licence = (tmp_path / "tiny" / "LICENSE").read_text()
    assert licence.startswith("SPDX-License-Identifier: CC-BY-SA-4.0") and "Phantoms, made by FibLDM" in licence
    assert (tmp_path / "tiny" / "export.yaml").exists()


def test_figures_of_the_run_are_in_the_card_and_the_metadata(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    dice = {"value": 0.91234, "low": 0.9, "high": 0.92, "n": 9, "real_vs_real": 0.95}
    copies = {"value": 0.05, "low": None, "high": None, "n": 9, "real_vs_real": 0.04}
    few = {"value": 0.0, "low": None, "high": None, "n": 2, "real_vs_real": 0.0, "note": "too few to say"}
    sections = {"faithfulness": {"dice": dice}, "copies": {"closer_than_any_real": copies, "named": few}}
    recorded = {name: {"figures": figures} for name, figures in sections.items()}
    write_json(tmp_path / "run" / "evaluation" / "metrics.json", {"fibldm": "0", **recorded})
    export(tmp_path / "run", tmp_path / "tiny", CC0)
    text = (tmp_path / "tiny" / "docs" / "README.md").read_text()
    assert "| faithfulness: dice | 0.9123 [0.9, 0.92] | 0.95 |" in text
    assert "| copies: closer_than_any_real | 0.05 | 0.04 |" in text and "Not measured" not in text
    assert "| copies: named | 0 (too few to say: n = 2) | 0 |" in text
    metrics = read_json(tmp_path / "tiny" / "configs" / "metadata.json")["eval_metrics"]
    assert metrics == {"faithfulness/dice": 0.91234, "copies/closer_than_any_real": 0.05, "copies/named": 0.0}


def test_the_audit_of_the_run_is_in_the_card_in_its_own_words(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    for part in tiny_run.iterdir():
        if part.name != "evaluation":
            (tmp_path / "run" / part.name).symlink_to(part)
    result = {
        "verdict": "no evidence of copying at this threshold",
        "threshold": 0.75,
        "copy_rate": {"value": 0.0, "low": 0.0, "high": 0.06, "count": 0, "of": 60},
        "held_out_named": {"value": 0.0, "low": 0.0, "high": 0.12, "count": 0, "of": 30},
        "membership": {
            "auc": 0.49, "low": 0.4, "high": 0.57, "tpr_at_1_percent_fpr": 0.007, "training": 140, "held_out": 60
        },
        "figures": {},
    }  # fmt: skip
    section = Section(audit_figures(result), notes=audit_sentences(result))
    for whole in (True, False):
        impossible = {
            "verdict": "audit not possible: too few",
            "copy_rate": None,
            "membership": "membership not measured",
        }
        told = section if whole else Section({}, notes=audit_sentences(impossible))
        write_json(tmp_path / "run" / "evaluation" / "metrics.json", {"audit": told.to_dict()})
        export(tmp_path / "run", tmp_path / "tiny", CC0)
        text = (
            (tmp_path / "tiny" / "docs" / "README.md").read_text().partition("## Audit")[2].partition("## Weights")[0]
        )
        assert "Not measured" not in text and "anonym" not in text.lower()
        assert ("| audit: copy_rate | 0 [0, 0.06] | 0 |" in text) == whole
        assert ("| audit: membership_auc | 0.49 [0.4, 0.57] |" in text) == whole
        if whole:
            assert "No evidence of copying at this threshold. The threshold, similarity 0.750," in text
            assert "it names 0 of 30 scans [0, 0.12]" in text and "area under the curve of 0.49" in text
        else:
            assert "Audit not possible: too few. Membership not measured." in text


@pytest.mark.parametrize(("licence", "is_said"), [("CC0-1.0", False), ("CC-BY-4.0", True)])
def test_another_licence_than_that_of_the_data_is_pointed_out(
    tiny_run: Path, tmp_path: Path, licence: str, is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "--run", str(tiny_run), "--out", str(tmp_path / "tiny"), "--license", licence]) == 0
    expected = f"the dataset says it is under CC0-1.0; make sure that allows weights under {licence}"
    assert (expected in capsys.readouterr().out) is is_said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--license'"),
        (["--license", "mine"], "--license must be the SPDX identifier of the weights' licence; got 'mine'"),
        (["--license", "mine", "--license-file", "absent.txt"], "--license-file must be a text that can be read"),
    ],
)
def test_without_a_licence_nothing_is_exported(
    tiny_run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "--run", str(tiny_run), "--out", str(tmp_path / "tiny"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_run_that_is_not_finished_leaves_nothing_behind(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "controlnet" / "done.json").unlink()
    with pytest.raises(FibldmError, match="stage 'controlnet' of .* must be finished first"):
        export(tmp_path / "run", tmp_path / "tiny", CC0)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_words_that_are_none_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "export.yaml").write_text("titel: wrong")
    with pytest.raises(FibldmError, match="must hold some of title .*; it holds"):
        export(tiny_run, tmp_path, CC0)


def test_an_export_replaces_the_bundle_and_keeps_what_else_lies_there(
    tiny_run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "configs" / "old.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    before = hash_file(copy / "LICENSE")
    with monkeypatch.context() as patch:
        patch.setattr("fibldm.delivery.export.card", None)  # fails at the last moment
        with pytest.raises(TypeError):
            export(tiny_run, copy, ExportSettings("MIT"))
    assert hash_file(copy / "LICENSE") == before and (copy / "configs" / "old.json").exists()
    export(tiny_run, copy, ExportSettings("MIT"))
    assert "MIT" in (copy / "LICENSE").read_text() and not (copy / "configs" / "old.json").exists()
    assert (copy / "notes.txt").read_text() == "mine" and not list(copy.glob(".writing-*"))


# --- definitions


def test_expressions_of_a_configuration_come_to_values() -> None:
    content = {
        "size": 4,
        "net": {
            "_target_": "torch.nn.Linear",
            "in_features": "@size",
            "out_features": "$@size * 2",
            "bias": "$@size > 9",
        },
        "off": {"_target_": "torch.nn.Linear", "_disabled_": "$@size == 4"},
        "either": "$@net if @size else None",
        "all": ["@off", "@net::in_features", {"deep": "$[1, @size]"}],
    }
    parser = ConfigParser(content)
    net = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 8, "bias": False}
    assert literal(parser, "net") == literal(parser, "either") == net
    assert literal(parser, "all") == [None, 4, {"deep": [1, 4]}]
    assert literal(parser, "either", known={"net": "known"}) == "known"
    with pytest.raises(FibldmError, match="where must come to plain values to be exported; it is a Linear"):
        plain(torch.nn.Linear(1, 1), "where")


def test_every_class_that_may_be_named_exists() -> None:
    for name in TARGETS:
        with pytest.raises(FibldmError, match="must describe a"):
            build({"_target_": name, "no_such_argument": 1}, "test")


def test_definitions_of_the_run_make_its_networks(tiny_run: Path, bundle: Path) -> None:
    facts = read_json(bundle / GENERATOR)
    for key, stage in (("network", "controlnet"), ("autoencoder", "autoencoder")):
        wanted = StageFolder(tiny_run, stage).trained(device="cpu").state_dict()
        made = build(facts[key], key).state_dict()
        assert {name: tensor.shape for name, tensor in made.items()} == {
            name: part.shape for name, part in wanted.items()
        }


# --- by MONAI

says_that_it_is_code = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


@says_that_it_is_code
def test_inference_by_monai_from_another_folder(
    bundle: Path, mask_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same volume as by FibLDM's own command."""
    monkeypatch.chdir(tmp_path)
    configuration = str(bundle / "configs" / "inference.json")
    given = {"masks": mask_file, "output_dir": str(tmp_path / "monai"), "inferer::steps": 2, "device": "cpu"}
    monai.bundle.run(config_file=configuration, bundle_root=str(bundle), **given)
    (own,) = synthesize_files(None, [mask_file], tmp_path / "own", count=1, settings=QUICK, bundle=bundle, device="cpu")
    by_monai, by_fibldm = (read_volume(tmp_path / name / own.name).array.astype(int) for name in ("monai", "own"))
    assert np.array_equal(by_monai, by_fibldm)


@says_that_it_is_code
@pytest.mark.parametrize("kind", ["inference", "train"])
def test_monai_misses_no_property(bundle: Path, tiny_run: Path, phantom_work: Path, mask_file: str, kind: str) -> None:
    workflow = create_workflow(
        config_file=str(bundle / "configs" / f"{kind}.json"),
        workflow_type=kind,
        bundle_root=str(bundle),
        masks=mask_file,
        work=str(phantom_work),
        run_dir=str(tiny_run),
        device="cpu",
    )
    assert workflow.check_properties() == []


@says_that_it_is_code
def test_monai_loads_the_network(bundle: Path) -> None:
    network = load("tiny", bundle_dir=str(bundle.parent), device="cpu")
    assert isinstance(network, torch.nn.Module)
    kept = load_file(bundle / "models" / "network.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())


@says_that_it_is_code
def test_monai_verifies_what_goes_in_and_out(bundle: Path) -> None:
    configs = bundle / "configs"
    verify_net_in_out(
        net_id="one_tensor_network",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        bundle_root=str(bundle),
    )


def test_one_tensor_is_enough(bundle: Path) -> None:
    """Latent, time, mask as one tensor are the network's own answer; encoder and decoder are the autoencoder's."""
    made = Synthesizer.from_bundle(bundle)
    channels, masks = len(made.space.mean), made.mask.channels
    z, mask, time = torch.randn(2, channels, 8, 8, 8), torch.rand(2, masks, 8, 8, 8), torch.tensor([30.0, 700.0])
    packed = torch.cat([z, time.view(2, 1, 1, 1, 1).expand(2, 1, 8, 8, 8), mask], dim=1)
    autoencoder = made.first_stage.autoencoder
    with torch.no_grad():
        assert torch.equal(OneTensorNetwork(made.network, channels)(packed), made.network(z, time, {"mask": mask}))
        volume = torch.rand(1, 1, 16, 16, 16)
        latent = OneTensorEncoder(autoencoder)(volume)
        assert torch.equal(latent, autoencoder.encode(volume).mean)
        assert torch.equal(OneTensorDecoder(autoencoder)(latent), autoencoder.decode(latent))


@pytest.mark.slow
def test_a_program_of_torch_export_takes_other_sizes(bundle: Path, tmp_path: Path) -> None:
    made = Synthesizer.from_bundle(bundle, device="cpu")
    channels = len(made.space.mean)
    network = OneTensorNetwork(made.network, channels).eval()
    masks = made.mask.channels
    example, packed = (torch.rand(1, channels + 1 + masks, *shape) for shape in ((8, 8, 8), (12, 16, 8)))
    size = dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes={"packed": size}, strict=False)
        torch.export.save(program, tmp_path / "network.pt2")
        again = torch.export.load(tmp_path / "network.pt2").module()
        torch.testing.assert_close(again(packed), network(packed))


# --- by FibLDM


def test_an_archive_is_a_bundle(bundle: Path, tmp_path: Path, a_mask: Volume) -> None:
    archive = shutil.make_archive(str(tmp_path / "tiny"), "zip", bundle.parent, "tiny")
    flat = shutil.make_archive(str(tmp_path / "flat"), "zip", bundle)
    volumes = [Synthesizer.from_bundle(path)(a_mask, settings=QUICK).volume.array for path in (bundle, archive, flat)]
    assert np.array_equal(volumes[0], volumes[1]) and np.array_equal(volumes[0], volumes[2])


def test_the_command_takes_a_bundle(
    bundle: Path, tiny_run: Path, mask_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["synthesize", "--masks", mask_file, "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert run([*given, "--bundle", str(bundle), "--bids", "ct", "--json"]) == 0
    said = capsys.readouterr()
    (volume,) = json.loads(said.out.splitlines()[-1])["outputs"]
    assert (
        "1 synthetic volume in " in said.err and "(dpmpp_2m in 1 step at guidance 1; 1 network call each)" in said.err
    )
    assert read_json(Path(volume.replace(".nii.gz", ".json")))["source"]["bundle"] == "tiny 0.1.0"
    assert run([*given, "--bundle", str(bundle), "--run", str(tiny_run)]) == 2
    assert "either a run or a bundle must be given" in capsys.readouterr().err
    assert run([*given, "--bundle", str(bundle), "--strength", "0.5"]) == 2
    assert "a bundle has one set of weights" in capsys.readouterr().err


def facts_changed(**changes: Any) -> Change:
    def change(root: Path) -> None:
        write_json(root / GENERATOR, {**read_json(root / GENERATOR), **changes})

    return change


def definition_changed(key: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(root: Path) -> None:
        facts = read_json(root / GENERATOR)
        change(facts[key])
        write_json(root / GENERATOR, facts)

    return changed


def weights_changed(change: Callable[[dict[str, torch.Tensor]], object], key: str = "network") -> Change:
    """Other tensors under a right hash, as one who tampers would leave them."""

    def changed(root: Path) -> None:
        file = root / "models" / f"{key}.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        hashed(root, key, f"models/{key}.safetensors")

    return changed


def hashed(root: Path, key: str, name: str) -> None:
    facts = read_json(root / GENERATOR)
    digest = hash_file(root / name) if (root / name).is_file() else "0" * 64
    facts["weights"][key] = {"file": name, "sha256": digest}
    write_json(root / GENERATOR, facts)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)


def _set_first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[_first(tensors)] = change(tensors[_first(tensors)]).contiguous()


def _linked(root: Path) -> None:
    file = root / "models" / "network.safetensors"
    file.rename(root.parent / "elsewhere.safetensors")
    file.symlink_to(root.parent / "elsewhere.safetensors")


def _truncated(root: Path) -> None:
    file = root / "models" / "network.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    hashed(root, "network", "models/network.safetensors")


def _pickled(root: Path) -> None:
    hashed(root, "network", "models/model.pt")


def _nested(definition: dict[str, Any]) -> None:
    inner: dict[str, Any] = {}
    definition["deep"] = inner
    for _ in range(40):
        inner["deep"] = {}
        inner = inner["deep"]


PLANTED = "$__import__('pathlib').Path('planted').touch()"
TAMPERED: dict[str, tuple[Change, str]] = {
    "no description": (lambda root: (root / GENERATOR).unlink(), "must hold configs/generator.json"),
    "no JSON": (lambda root: (root / GENERATOR).write_text("{"), "generator.json must be JSON"),
    "another format": (facts_changed(format=3), "must have format 2; it has 3"),
    "a part is missing": (
        lambda root: write_json(root / GENERATOR, {"format": 2, "network": {}}),
        "must hold autoencoder, channels, conditions, data, .* as well",
    ),
    "an expression": (
        definition_changed("network", lambda network: network.update(labels=PLANTED)),
        "must hold plain values, without references and expressions; it holds .*__import__",
    ),
    "a reference": (facts_changed(process="@network"), "it holds '@network'"),
    "another class": (
        facts_changed(autoencoder={"_target_": "os.system", "command": "touch planted"}),
        "must be made of networks that FibLDM knows; 'os.system' is none of them; give `trust`",
    ),
    "another class inside": (
        definition_changed(
            "network", lambda network: network.update(encoder={"_target_": "subprocess.run", "args": "x"})
        ),
        "'subprocess.run' is none of them",
    ),
    "too deep": (definition_changed("network", _nested), "must be nested at most 32 deep"),
    "too many values": (
        definition_changed("conditions", lambda conditions: conditions["mask"].update(labels=[1] * 20_000)),
        "at most 10000 values",
    ),
    "too large a number": (
        definition_changed("conditions", lambda conditions: conditions["mask"].update(detail=10**12)),
        "must hold numbers of at most 1048576; it holds 1000000000000",
    ),
    "another argument": (
        definition_changed("network", lambda network: network.update(no_such=1)),
        "must describe a fibldm.models.network.steered; TypeError",
    ),
    "weights are missing": (
        lambda root: (root / "models" / "network.safetensors").unlink(),
        "network.safetensors must exist; it does not",
    ),
    "another hash": (
        lambda root: (root / "models" / "network.safetensors").write_bytes(b"other"),
        "must have the SHA-256 [0-9a-f]{12}; it has d9298a10d1b0",
    ),
    "a path that leads out": (
        lambda root: hashed(root, "network", "../elsewhere.safetensors"),
        "must lie in its folder; '../elsewhere.safetensors' leads out of it",
    ),
    "an absolute path": (
        lambda root: hashed(root, "network", "/etc/elsewhere.safetensors"),
        "must lie in its folder; '/etc/elsewhere.safetensors' leads out of it",
    ),
    "a link that leads out": (_linked, "must lie in its folder; .* is a link to"),
    "a pickle": (_pickled, "weights must be safetensors, which hold nothing but tensors; got models/model.pt"),
    "truncated weights": (_truncated, "must be a whole safetensors file"),
    "a tensor is missing": (weights_changed(lambda tensors: tensors.pop(_first(tensors))), "it lacks "),
    "a tensor too many": (
        weights_changed(lambda tensors: tensors.update(more=torch.zeros(3))),
        "it holds also more",
    ),
    "another shape": (
        weights_changed(lambda tensors: _set_first(tensors, lambda tensor: torch.cat([tensor, tensor]))),
        r"must have the shape \(.*\); it has \(",
    ),
    "another type": (
        weights_changed(lambda tensors: _set_first(tensors, torch.Tensor.int)),
        "must be one of F32, F16, BF16; it is I32",
    ),
    "not finite": (
        weights_changed(lambda tensors: _set_first(tensors, lambda tensor: tensor / 0)),
        "weights must be finite; ",
    ),
    "another autoencoder": (
        weights_changed(lambda tensors: _set_first(tensors, lambda tensor: tensor + 1), "autoencoder"),
        "the latents of .* must come from the autoencoder",
    ),
    "no scale": (
        definition_changed("space", lambda space: space.update(std=[0.0] * len(space["std"]))),
        "needs one std above 0 per channel",
    ),
    "no grid": (facts_changed(grid={"size": [8, 8, 8]}), "must describe a generator; KeyError: 'spacing'"),
    "other noise": (
        lambda root: (
            save_file({"levels": torch.zeros(1, 16, 7)}, root / "models" / "residual_noise.safetensors"),
            hashed(root, "residual_noise", "models/residual_noise.safetensors"),
        ),
        "must hold levels, kernel and spread",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_is_refused(
    copy: Path,
    mask_file: str,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each by its own message and exit code 2, before anything was run; one who tampers writes the manifest as well."""
    change, message = TAMPERED[name]
    change(copy)
    write_manifest(copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FibldmError, match=message):
        Synthesizer.from_bundle(copy)
    assert run(["synthesize", "--bundle", str(copy), "--masks", mask_file, "--out", "out", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("fibldm: ")
    assert not (tmp_path / "planted").exists() and not (tmp_path / "out").exists()


def zipped(tmp_path: Path, name: str, content: bytes = b"", *, mode: int = 0o100644, method: int = 0) -> Path:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w", method) as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr, member.compress_type = mode << 16, method
        archive.writestr(member, content)
    return tmp_path / "archive.zip"


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (lambda folder: zipped(folder, "../planted"), "an archive must stay in its folder; .* holds '../planted'"),
        (lambda folder: zipped(folder, "/planted"), "an archive must stay in its folder; .* holds '/planted'"),
        (lambda folder: zipped(folder, "link", b"/etc", mode=0o120777), "must hold no links; .* has 'link'"),
        (
            lambda folder: zipped(folder, "zeros", b"0" * 10_000_000, method=zipfile.ZIP_DEFLATED),
            "must unpack to at most 16 GiB and 200 times its size",
        ),
        (lambda folder: zipped(folder, "readme"), "must hold configs/generator.json"),
        (lambda folder: folder / "absent", "a bundle must be a folder or a zip archive; .* is neither"),
    ],
)
def test_archives_that_are_refused(archive: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(FibldmError, match=message), open_bundle(archive(tmp_path / "inner")):
        pass
    assert not (tmp_path / "planted").exists()


def test_trust_takes_what_else_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_json(copy / GENERATOR)
    known = frozenset(TARGETS - {facts["network"]["_target_"]})
    monkeypatch.setattr("fibldm.synthesis.definitions.TARGETS", known)
    with pytest.raises(FibldmError, match="give `trust`"):
        Synthesizer.from_bundle(copy)
    assert Synthesizer.from_bundle(copy, trust=True).source["bundle"] == "tiny 0.1.0"


def test_a_bundle_that_cannot_be_written_to_is_enough(copy: Path, a_mask: Volume) -> None:
    for part in (copy, *copy.rglob("*")):
        os.chmod(part, part.stat().st_mode & ~0o222)
    try:
        Synthesizer.from_bundle(copy)(a_mask, settings=QUICK)
    finally:
        for part in (copy, *copy.rglob("*")):
            os.chmod(part, part.stat().st_mode | 0o200)


# --- verification, further training, measurement


@pytest.mark.slow
def test_a_bundle_is_verified_in_a_fresh_process(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every check holds, and says what it saw; MONAI takes the folder's name for nothing else."""
    copy = shutil.copytree(bundle, tmp_path / "trial #1" / "@home")
    assert run(["verify", str(copy), "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])
    assert told["ok"] and list(told["checks"]) == list(CHECKS)
    assert all(check["ok"] and check["saw"] for check in told["checks"].values())
    tried = [check for check in told["checks"].values() if not check["saw"].startswith(NOT_TRIED)]
    assert len(tried) >= len(CHECKS) - 1 and said.err.count("ok  ") == len(tried)


def test_onnx_is_tried_out_where_it_is_installed(bundle: Path, tmp_path: Path) -> None:
    (check,) = run_checks(bundle, tmp_path, ["ONNX"])
    there = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    assert check.ok and check.saw.startswith("network, encoder, decoder at 3 sizes" if there else NOT_TRIED)


def test_one_tensor_takes_the_weights_of_the_network_inside(bundle: Path) -> None:
    """As MONAI's exporters load them; a name that belongs nowhere is still an error."""
    made = Synthesizer.from_bundle(bundle)
    empty = OneTensorNetwork(copy_of(made.network), len(made.space.mean))
    state = load_file(bundle / "models" / "network.safetensors")
    for weight in empty.parameters():
        torch.nn.init.zeros_(weight)
    empty.load_state_dict(state)
    assert hash_weights(empty.network.state_dict()) == hash_weights(made.network.state_dict())
    empty.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match=r"network\.other"):
        empty.load_state_dict({**state, "other": torch.zeros(1)})


def test_a_check_that_fails_says_why_and_the_others_go_on(copy: Path, tmp_path: Path) -> None:
    network = copy / "models" / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-1])
    (copy / "LICENSE").write_text("none")
    write_manifest(copy)
    quick = ("layout", "generator", "metadata", "train properties")
    checks = {check.name: check for check in run_checks(copy, tmp_path, [name for name in CHECKS if name in quick])}
    assert [name for name, check in checks.items() if check.ok] == ["metadata", "train properties"]
    assert "must have the SHA-256" in checks["generator"].saw
    assert checks["layout"].saw == "LICENSE must begin with SPDX-License-Identifier"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("task"), "'task' is a required property"),
        (lambda content: content.update(version="new"), "'new' does not match"),
        (lambda content: content["network_data_format"].pop("inputs"), "'inputs' is a required property"),
    ],
)
def test_metadata_that_are_none_are_seen(
    copy: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = read_json(copy / "configs" / "metadata.json")
    change(content)
    write_json(copy / "configs" / "metadata.json", content)
    (check,) = run_checks(copy, tmp_path, ["metadata"])
    assert not check.ok and message in check.saw


def test_what_is_no_folder_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(tmp_path / "absent")]) == 2
    assert "a bundle must be a folder to be verified" in capsys.readouterr().err
    assert run(["verify", str(tmp_path)]) == 2
    assert "must be a bundle, with a folder configs" in capsys.readouterr().err


def test_training_begins_with_a_bundle(bundle: Path, tiny_run: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    """The autoencoder as it is; the network as the beginning of one more epoch."""
    tiny_stage("autoencoder", tmp_path, "autoencoder_as_given", init_from=str(bundle)).run()
    done = read_json(tmp_path / "autoencoder" / "done.json")
    assert done["weights"] == read_json(tiny_run / "autoencoder" / "done.json")["weights"] and done["epochs"] == 0
    network = StageFolder(tiny_run, "controlnet").component("network_def", device="cpu")
    report = initialise(network, bundle, stage="controlnet")
    assert report.complete and hash_weights(network.state_dict()) == Synthesizer.from_bundle(bundle).source["weights"]


@pytest.mark.slow
def test_what_went_through_a_bundle_and_training_is_exported_the_same(
    bundle: Path, tiny_stage: TinyStage, tmp_path: Path
) -> None:
    """All stages begin with the bundle and learn nothing; the same tensors leave."""
    run_dir = tmp_path / "run"
    tiny_stage("autoencoder", run_dir, "autoencoder_as_given", init_from=str(bundle)).run()
    tiny_stage("latents", run_dir).run()
    still = {"init_from": str(bundle), "learning_rate": 0.0}
    tiny_stage("diffusion", run_dir, **still, init_strict=False).run()
    tiny_stage("controlnet", run_dir, **still).run()
    export(run_dir, tmp_path / "tiny", CC0)
    first, second = (read_json(folder / GENERATOR) for folder in (bundle, tmp_path / "tiny"))
    assert first["weights"] == second["weights"] and all(part["sha256"] for part in first["weights"].values())
    assert first == second


@pytest.mark.slow
def test_the_command_measures_a_bundle(
    bundle: Path, phantom_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no run at hand."""
    given = ["--data", str(phantom_work), "--out", str(tmp_path), "--bundle", str(bundle)]
    small = ["--set", "steps=2", "--set", "segmenter_channels=[4, 8, 8]"]
    assert run(["evaluate", "reconstruction", *given, *small]) == 0
    assert "reconstruction" in capsys.readouterr().out
    assert read_json(tmp_path / "evaluation" / "metrics.json")["reconstruction"]["figures"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"either a run \(--run\) or a bundle \(--bundle\) must be named; got none of them"),
        (["--run", "r", "--bundle", "b"], "must be named; got both"),
        (["--bundle", "b"], "figures of a bundle need a folder; got no --out; give --out with --bundle"),
        (["--run", "r", "--out", "o"], "figures of a run lie in it; got --out"),
    ],
)
def test_what_is_measured_is_a_run_or_a_bundle(
    folders: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "reconstruction", "--data", "w", *folders]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_bundle_is_measured_on_its_data(bundle: Path, tiny_run: Path, phantom_work: Path, tmp_path: Path) -> None:
    """Like the run it came from; figures go to a folder of their own."""
    one, other = Evaluated.open(tiny_run, phantom_work), Evaluated.open_bundle(bundle, phantom_work, out=tmp_path)
    for part in ("grid", "intensity", "labels", "channels"):
        assert getattr(one, part) == getattr(other, part)
    assert other.folder == tmp_path / "evaluation"
    image = one.read(one.real("test")[0]).image
    by_run, by_bundle = Reconstructor.from_run(tiny_run), Reconstructor.from_bundle(bundle)
    assert np.array_equal(by_run(image), by_bundle(image)) and by_run.fingerprint == by_bundle.fingerprint


def test_figures_of_a_bundle_do_not_go_into_a_run(bundle: Path, tiny_run: Path, phantom_work: Path) -> None:
    """Whose export would take them for its own."""
    with pytest.raises(
        FibldmError, match="figures of a bundle need a folder of their own; .* is a run with autoencoder"
    ):
        Evaluated.open_bundle(bundle, phantom_work, out=tiny_run)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_bundle_that_comes_along_is_whole(name: str, tmp_path: Path) -> None:
    """Its files are those that were exported, and it draws a volume."""
    quick = ("manifest", "layout", "generator", "metadata", "train properties", "synthesis")
    checks = list(run_checks(BUNDLES / name, tmp_path, quick))
    assert [check.saw for check in checks if not check.ok] == []


def test_bundles_that_come_along_are_small() -> None:
    for name in SHIPPED:
        assert sum(file.stat().st_size for file in (BUNDLES / name).rglob("*") if file.is_file()) < 30_000_000


def test_a_full_disk_leaves_the_bundle_as_it_was(tiny_run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = hash_file(copy / GENERATOR)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        FibldmError, match="cannot write .*network.safetensors: .*No space left on device.*; check the fr"
    ):
        export(tiny_run, copy, ExportSettings("MIT"))
    assert hash_file(copy / GENERATOR) == before and not list(copy.glob(".writing-*"))


def test_noise_that_is_another_one_is_not_exported(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "latents" / "residual_noise.safetensors").write_bytes(b"other")
    with pytest.raises(FibldmError, match="must be as the encode stage wrote it; it is not"):
        export(tmp_path / "run", tmp_path / "tiny", CC0)
