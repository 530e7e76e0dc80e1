"""What is measured is what is shipped: figures know their sampling and weights, and a bundle draws as was measured."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigParser

from fibldm.cli import run
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.measured import Measured
from fibldm.delivery.verify import run_checks
from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import MEASUREMENTS, Measurements, evaluate
from fibldm.evaluation.provenance import read_provenance
from fibldm.evaluation.results import Section
from fibldm.files import read_json, write_json
from fibldm.manifest import write_manifest
from fibldm.runs import StageFolder
from fibldm.synthesis import SamplingSettings, Synthesizer, synthesize_files
from fibldm.synthesis.bundle import GENERATOR
from fibldm.synthesis.loading import generating_weights
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import sidecar

CC0 = ExportSettings("CC0-1.0")
OURS, OTHERS = "a1" * 32, "b2" * 32
AS_MEASURED = {"steps": 2, "guidance": 1.5, "guidance_interval": (0.2, 0.8), "residual_noise": 0.5, "seed": 3}

Drawn = Callable[..., Path]


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    """Makes a volume's name and its sidecar: ``drawn("a", guidance=1.5)``."""

    def volume(
        name: str, *, weights: str | None = OURS, said: Mapping[str, Any] | None = None, **sampling: Any
    ) -> Path:
        file = tmp_path / f"{name}_000.nii.gz"
        file.touch()
        if weights is not None:
            settings = SamplingSettings().changed(**sampling).to_dict()
            told = {"synthetic": True, "source": {"weights": weights}, "sampling": settings, "network_calls": 10}
            write_json(sidecar(file), {**told, **(said or {})})
        return file

    return volume


# --- volumes that are measured


def test_volumes_tell_weights_and_sampling(drawn: Drawn) -> None:
    """Seeds may differ: they are draws of one sampling."""
    files = [drawn("a", guidance=1.5, seed=1), drawn("b", guidance=1.5, seed=0)]
    read = read_provenance(files, lambda: {OURS}, of="runs/mine")
    assert (read.volumes, read.weights, read.seeds, read.network_calls) == (2, OURS, (0, 1), 10)
    assert read.sampling is not None and read.sampling["guidance"] == 1.5 and "seed" not in read.sampling
    assert read.text == "2 volumes, drawn by dpmpp_2m in 10 steps at guidance 1.5" and read.notes == []


def test_volumes_of_other_weights_are_refused_by_name(drawn: Drawn) -> None:
    files = [drawn("a"), drawn("b", weights=OTHERS, said={"choice": {"checkpoint": "epoch_0010"}})]
    refusal = (
        "volumes must be made with the weights of runs/mine (a1a1a1a1a1a1); b_000 with others (b2b2b2b2b2b2, "
        "checkpoint epoch_0010); synthesize with the weights that are measured into another folder, or give --weights "
        "b2b2b2b2b2b2 to measure those"
    )
    with pytest.raises(FibldmError, match=re.escape(refusal)):
        read_provenance(files, lambda: {OURS}, of="runs/mine")
    with pytest.raises(FibldmError, match="none is trained to the end"):
        read_provenance(files, set, of="runs/mine")


def test_other_weights_are_measured_where_they_are_named(drawn: Drawn) -> None:
    """Of another checkpoint or strength; the figures say so."""
    other = drawn("a", weights=OTHERS)
    read = read_provenance([other], lambda: {OURS}, of="runs/mine", weights=OTHERS[:12])
    assert read.other and read.notes == ["volumes of other weights (b2b2b2b2b2b2) were measured, as asked."]
    with pytest.raises(FibldmError, match="made with the weights b2b2b2b2b2b2; b_000 with others"):
        read_provenance([other, drawn("b")], lambda: {OURS}, of="runs/mine", weights=OTHERS[:12])
    with pytest.raises(FibldmError, match="at least 8 digits of a fingerprint; got ''"):
        read_provenance([other], lambda: {OURS}, of="runs/mine", weights="")


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"guidance": 1.5}, r"guidance is 1\.0 \(a_000, b_000\), 1\.5 \(c_000\); give"),
        ({"sampler": "ddim", "eta": 0.5}, r"sampler is .*; eta is not said \(a_000, b_000\), 0\.5 \(c_000\)"),
        ({"residual_noise": 0.0}, "residual_noise is"),
        ({"guidance_interval": (0.2, 0.8)}, r"guidance_interval is \[0\.0, 1\.0\] .*, \[0\.2, 0\.8\] \(c_000\)"),
        ({"said": {"follows_mask": False}}, "follows_mask is"),
        ({"weights": OTHERS}, r"weights is a1a1a1a1a1a1 .*, b2b2b2b2b2b2 \(c_000\)"),
    ],
)
def test_volumes_of_several_samplings_are_refused_by_name(drawn: Drawn, other: dict[str, Any], differing: str) -> None:
    files = [drawn("a"), drawn("b"), drawn("c", **other)]
    with pytest.raises(FibldmError, match=f"must be drawn in one way, as a figure is of one sampling; {differing}"):
        read_provenance(files, lambda: {OURS, OTHERS}, of="runs/mine")


def test_the_sampling_of_volumes_without_sidecars_is_unknown(drawn: Drawn) -> None:
    """Nor does a sidecar of another program tell it; whose weights are measured is then not asked."""
    files = [drawn("a", weights=None), drawn("b", said={"sampling": None})]
    read = read_provenance(files, lambda: pytest.fail("asked"), of="runs/mine")
    assert read.to_dict() == {"volumes": 2, "weights": None, "sampling": None, "seeds": [], "network_calls": None}
    assert read.text == "sampling unknown: the volumes have no sidecars of fibldm synthesize."
    with pytest.raises(FibldmError, match="either all volumes of .* or none; a_000, b_000 without; put the sidecars"):
        read_provenance([*files, drawn("c")], lambda: {OURS}, of="runs/mine")


def test_a_sampling_of_another_version_is_refused(drawn: Drawn) -> None:
    file = drawn("a", said={"sampling": {"steps": 10, "temperature": 2}})
    with pytest.raises(FibldmError, match=r"a_000\.json: setting of sampling must be one of .*got 'temperature'"):
        read_provenance([file], lambda: {OURS}, of="runs/mine")


# --- figures that are exported


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Measured]:
    """Figures of sections by name, each with the changes of its sampling, or None where that was not recorded."""

    def figures(**sections: Mapping[str, Any] | None) -> Measured:
        content: dict[str, Any] = {"fibldm": "0.1.0"}
        for name, changes in sections.items():
            content[name] = {"figures": {}}
            if changes is not None:
                given = {"weights": OURS, "seed": 0, **changes}
                weights, seed = given.pop("weights"), given.pop("seed")
                sampling = SamplingSettings().changed(**given).to_dict()
                sampling.pop("seed")
                content[name]["drawn"] = {"weights": weights, "sampling": sampling, "seeds": [seed]}
        write_json(tmp_path / "evaluation" / "metrics.json", content)
        return Measured.read(tmp_path, network=OURS, autoencoder="c3" * 32)

    return figures


def test_the_measured_sampling_is_the_default_and_what_is_chosen_wins(measured: Callable[..., Measured]) -> None:
    figures = measured(faithfulness={"steps": 5, "guidance": 1.5}, realism={"steps": 5, "guidance": 1.5})
    assert figures.default({}) == SamplingSettings(steps=5, guidance=1.5)
    assert figures.default({"guidance": 2}) == SamplingSettings(steps=5, guidance=2)
    assert figures.ways(figures.default({})) == [
        ("faithfulness, realism", "dpmpp_2m in 5 steps at guidance 1.5", False)
    ]
    assert figures.notes(figures.default({})) == []
    assert figures.notes(figures.default({"guidance": 2})) == [
        "the figures of faithfulness, realism were measured with dpmpp_2m in 5 steps at guidance 1.5, which is not the "
        "bundle's default"
    ]
    assert measured().default({}) == SamplingSettings()
    assert measured(copies={"seed": 7}).default({}).seed == 7
    assert measured(copies={"seed": 7}, realism={"seed": 8}).default({}).seed == 0
    by_ddim = measured(copies={"sampler": "ddim", "eta": 0.5})
    assert by_ddim.default({"sampler": "heun"}) == by_ddim.default({}).changed(sampler="heun")
    assert by_ddim.default({"sampler": "heun"}).eta is None and by_ddim.default({"sampler": "ddim"}).eta == 0.5
    with pytest.raises(FibldmError, match="setting of sampling must be one of sampler, .*; got 'step'"):
        measured().default({"step": 5})
    with pytest.raises(FibldmError, match="steps must be a whole number; got 'many'"):
        measured().default({"steps": "many"})


def test_figures_of_several_samplings_need_a_choice(measured: Callable[..., Measured]) -> None:
    figures = measured(faithfulness={"steps": 5, "guidance": 1.5}, realism={"steps": 5})
    with pytest.raises(
        FibldmError, match=r"guidance is 1\.5 in faithfulness, 1\.0 in realism; .* --set guidance=\.\.\."
    ):
        figures.default({})
    chosen = figures.default({"guidance": 1.5})
    assert chosen == SamplingSettings(steps=5, guidance=1.5)
    assert [other for _, _, other in figures.ways(chosen)] == [False, True]


def test_figures_of_before_stay_and_their_sampling_is_unknown(measured: Callable[..., Measured]) -> None:
    figures = measured(faithfulness=None, reconstruction=None)
    assert figures.default({}) == SamplingSettings() and set(figures.figures) == {
        *("fibldm", "faithfulness", "reconstruction")
    }
    (note,) = figures.notes(SamplingSettings())
    assert note.startswith("the sampling of the figures of faithfulness is unknown: it was not recorded; measure again")
    assert measured(faithfulness=None, realism={"steps": 5}).default({}).steps == 5


def test_figures_of_other_weights_are_left_out_and_that_is_said(
    measured: Callable[..., Measured], tmp_path: Path
) -> None:
    """Such as those of a run that was trained further since."""
    figures = measured(faithfulness={"steps": 5, "weights": OTHERS}, realism={"steps": 7})
    assert set(figures.figures) == {"fibldm", "realism"} and figures.default({}).steps == 7
    (note,) = figures.notes(figures.default({}))
    assert note == "the figures of faithfulness are of other weights and were left out; measure again"
    write_json(tmp_path / "evaluation" / "metrics.json", {"reconstruction": {"figures": {}, "autoencoder": OTHERS}})
    assert Measured.read(tmp_path, network=OURS, autoencoder="c3" * 32).others == ["reconstruction"]


def test_an_incomplete_sampling_is_refused(measured: Callable[..., Measured], tmp_path: Path) -> None:
    measured(realism={})
    content = read_json(tmp_path / "evaluation" / "metrics.json")
    del content["realism"]["drawn"]["sampling"]["residual_noise"]
    write_json(tmp_path / "evaluation" / "metrics.json", content)
    with pytest.raises(FibldmError, match="must say how the volumes of realism were drawn; residual_noise is not said"):
        Measured.read(tmp_path, network=OURS, autoencoder="").default({})


# --- from volumes to a bundle


@pytest.fixture(scope="module")
def mask(phantom_work: Path) -> str:
    return str(load_datalist(phantom_work, "test", masks=True)[0]["label"])


@pytest.fixture(scope="module", autouse=True)
def stubbed() -> Iterator[None]:
    """Measurements without a segmenter, whose figures do not matter here."""

    def section(measurements: Measurements) -> Section:
        return Section({}, {"cases_seen": len(measurements.synthetic)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fibldm.evaluation.measurements.MEASUREMENTS", dict.fromkeys(MEASUREMENTS, section))
        yield


@pytest.fixture(scope="module")
def folder(
    tiny_run: Path, phantom_work: Path, mask: str, stubbed: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A ``run``, measured with another sampling than the usual one, its ``synthetic`` volumes and its ``bundle``."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(tiny_run, folder / "run")
    settings = SamplingSettings().changed(**AS_MEASURED)
    synthesize_files(folder / "run", [mask], folder / "synthetic", count=1, settings=settings, device="cpu")
    given = {"run_dir": folder / "run", "work": phantom_work, "synthetic": folder / "synthetic", "say": lambda _: None}
    evaluate(["realism"], **given)
    export(folder / "run", folder / "bundle", CC0)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The bundle, to change."""
    shutil.copytree(folder / "bundle", tmp_path / "copy")
    return tmp_path / "copy"


def test_a_bundle_draws_as_was_measured(folder: Path, mask: str, tmp_path: Path) -> None:
    """By the command, from Python and by MONAI, without an option; the volume is the one that was measured."""
    own_run, bundle = folder / "run", folder / "bundle"
    recorded = read_json(own_run / "evaluation" / "metrics.json")["realism"]
    assert recorded["drawn"]["weights"] == StageFolder(own_run, "controlnet").require()["weights"]
    assert recorded["drawn"]["sampling"]["guidance"] == 1.5 and recorded["drawn"]["seeds"] == [3]
    assert recorded["cases_seen"] == 1 and recorded["drawn"]["network_calls"] == 3
    sampling = read_json(bundle / GENERATOR)["sampling"]
    assert sampling == {**recorded["drawn"]["sampling"], "seed": 3, "shift": None}  # that of training
    assert read_json(bundle / "configs" / "metadata.json")["sampling"] == sampling
    parser = ConfigParser(read_json(bundle / "configs" / "inference.json"))
    made = Synthesizer.from_bundle(bundle)
    assert parser.get_parsed_content("inferer") == made.sampling == replace(made.sampling, **AS_MEASURED)
    (was,) = (folder / "synthetic").glob("*.nii.gz")
    stem = was.name.removesuffix("_000.nii.gz")
    assert run(["synthesize", "--bundle", str(bundle), "--masks", mask, "--out", str(tmp_path / "again")]) == 0
    expected = read_volume(was).array
    assert np.array_equal(read_volume(tmp_path / "again" / was.name).array, expected)
    assert np.array_equal(made(read_volume(mask), name=stem).volume.array, expected)
    other = made(read_volume(mask), steps=1).provenance["sampling"]
    assert json.loads(json.dumps(other)) == {**sampling, "steps": 1, "shift": 1.0}


def test_a_card_says_how_the_bundle_draws_and_what_was_measured(folder: Path) -> None:
    text = (folder / "bundle" / "docs" / "README.md").read_text()
    way = "dpmpp_2m in 2 steps at guidance 1.5, guidance interval 0.2 to 0.8, residual noise 0.5"
    assert f"Where nothing else is asked for, all of these draw by {way}: 3 network calls a volume." in text
    assert f"- realism: of volumes drawn as this bundle draws by default, by {way}." in text


def test_an_option_wins_over_what_was_measured(
    folder: Path, mask: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["synthesize", "--bundle", str(folder / "bundle"), "--masks", mask, "--out", str(tmp_path / "out")]
    assert run([*given, "--guidance", "1", "--guidance-interval", "0,1"]) == 0
    assert "by default" not in capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*_000.json")
    told = json.loads(file.read_text())["sampling"]
    assert (told["steps"], told["guidance"], told["guidance_interval"]) == (2, 1, [0, 1])
    given = ["export", "--run", str(folder / "run"), "--out", str(tmp_path / "other"), "--license", "CC0-1.0"]
    assert run([*given, "--set", "steps=4", "--set", "seed=0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by default it draws by dpmpp_2m in 4 steps at guidance 1.5" in said
    assert "note: the figures of realism were measured with dpmpp_2m in 2 steps" in said
    assert read_json(tmp_path / "other" / "configs" / "inference.json")["inferer"]["steps"] == 4
    assert "**not** as this bundle draws" in (tmp_path / "other" / "docs" / "README.md").read_text()
    assert run([*given, "--set", "dynamic_threshold=0.9"]) == 2
    assert "dynamic_threshold needs a run in pixel space" in " ".join(capsys.readouterr().err.split())


def test_a_bundle_of_before_draws_as_before(copy: Path) -> None:
    facts = read_json(copy / GENERATOR)
    del facts["sampling"]
    write_json(copy / GENERATOR, facts)
    write_manifest(copy)
    made = Synthesizer.from_bundle(copy)
    assert made.sampling == SamplingSettings()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"steps": "many"}, "setting of sampling steps must be a whole number; got 'many'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"temperature": 1}, "must be one of sampler, .*got 'temperature'"),
        ([1], r"sampling must be a mapping; got \[1\]"),
    ],
)
def test_a_default_that_is_none_is_refused(copy: Path, sampling: object, message: str) -> None:
    write_json(copy / GENERATOR, {**read_json(copy / GENERATOR), "sampling": sampling})
    write_manifest(copy)
    with pytest.raises(FibldmError, match=rf"generator\.json: .*{message}"):
        Synthesizer.from_bundle(copy)


def test_two_defaults_in_one_bundle_are_found(copy: Path, tmp_path: Path) -> None:
    file = copy / "configs" / "inference.json"
    content = read_json(file)
    content["inferer"]["guidance"] = 2.0
    write_json(file, content)
    (check,) = run_checks(copy, tmp_path, ["monai.bundle run"])
    assert not check.ok and check.saw.endswith("must be the same; they differ in guidance")


def test_volumes_of_another_run_are_not_measured_as_those_of_a_bundle(
    folder: Path, phantom_work: Path, mask: str, tmp_path: Path
) -> None:
    """Nor are those of another strength of its ControlNet; those of the run that it comes from are."""
    given = {"run_dir": tmp_path / "figures", "work": phantom_work, "bundle": folder / "bundle", "say": lambda _: None}
    evaluate(["realism"], synthetic=folder / "synthetic", **given)
    settings = SamplingSettings(steps=1)
    synthesize_files(folder / "run", [mask], tmp_path / "weak", count=1, settings=settings, strength=0.5, device="cpu")
    with pytest.raises(FibldmError, match=r"made with the weights of .*bundle .* with others \(.*, strength 0\.5\)"):
        evaluate(["realism"], synthetic=tmp_path / "weak", **given)
    (file,) = (tmp_path / "weak").glob("*_000.json")
    weights = json.loads(file.read_text())["source"]["weights"]
    sections = evaluate(["realism"], synthetic=tmp_path / "weak", weights=weights, **given)
    assert sections["realism"].facts["drawn"]["weights"] == weights and sections["realism"].notes


def test_the_weights_of_a_run_are_those_of_its_last_stage_and_of_an_unconditional_one(
    tiny_run: Path, tmp_path: Path
) -> None:
    own_run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    by_stage = {stage: StageFolder(own_run, stage).require()["weights"] for stage in ("diffusion", "controlnet")}
    assert generating_weights(own_run) == set(by_stage.values())  # stage 2 knows no mask
    assert Synthesizer.from_run(own_run).source["weights"] == by_stage["controlnet"]
    assert Synthesizer.from_run(own_run, unconditional=True).source["weights"] == by_stage["diffusion"]
    (own_run / "controlnet" / "done.json").unlink()
    assert generating_weights(own_run) == {by_stage["diffusion"]}
    shutil.rmtree(own_run / "diffusion")
    assert generating_weights(own_run) == set()
