"""The encode stage: the same latents from any number of processes, and a report that says whether they are fit."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyStage
from monai.bundle import ConfigParser
from monai.transforms import Compose
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.evaluation.spectrum import channel_spectra
from fibldm.files import hash_file, read_json, write_tensors
from fibldm.models.autoencoder import FrozenFirstStage, Posterior
from fibldm.models.latents import LatentSpace
from fibldm.runs import StageFolder, decisive
from fibldm.runs.config_files import read_configuration
from fibldm.runs.renamed import current
from fibldm.shards import Shard
from fibldm.training.encode_stage import EncodeStage
from fibldm.training.gate_ranges import GateRanges
from fibldm.training.latent_report import REMEDY, Channel, LatentReport, draw_interpolation, report_latents
from fibldm.training.latents import Latents, LoadLatent
from fibldm.training.view_cache import ViewCache
from fibldm.volumes.gate import GATE, read_gate

GRID = {"spacing": [1, 1, 1]}


# --- augmented views


@pytest.mark.parametrize(("size", "dimensions"), [((40, 40, 40), 3), ((96, 96, 1), 2)])
def test_augmented_views_are_as_sharp_as_the_scan(size: tuple[int, int, int], dimensions: int) -> None:
    """Linear interpolation takes half of the power at a third of a cycle per voxel."""
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).mul(0.2).clamp(-1, 1)
    labels = (image[:1] > 0).byte()
    config = {"spatial_dims": dimensions, **read_configuration("encode_latents")}
    augment = ConfigParser(config).get_parsed_content("stage::augmentation").set_random_state(1)
    made = augment({"image": image, "label": labels, "valid": torch.ones_like(labels)})
    assert made["image"].shape == image.shape
    assert made["image"].abs().max() <= 1
    assert set(made["label"].unique().tolist()) == {0, 1}
    middle = (slice(None), *(slice(5, -5) if length > 10 else slice(None) for length in size))
    edges = np.linspace(0.05, 0.45, 9)
    spectra = [channel_spectra(part[middle].numpy(), (1, 1, 1), edges=edges) for part in (image, made["image"])]
    assert np.abs(10 * (spectra[1] - spectra[0])).max() < 1.5


# --- sharing the cases


@pytest.fixture
def trained(tiny_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a run folder with the autoencoder and nothing else."""

    def copied(name: str) -> Path:
        shutil.copytree(tiny_run / "autoencoder", tmp_path / name / "autoencoder")
        return tmp_path / name

    return copied


@pytest.fixture
def encode(tiny_stage: TinyStage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Encodes as one rank of several."""

    def run(folder: Path, rank: int, ranks: int, **overrides: Any) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        tiny_stage("latents", folder, **{"views": 2, **overrides}).run()

    return run


def hashes(run: Path) -> dict[str, str]:
    untold = ("inputs.json", "done.json", "budget.json")  # the last one is a time
    files = [path for path in (run / "latents").rglob("*") if path.suffix in (".safetensors", ".json", ".png")]
    return {path.name: hash_file(path) for path in files if path.name not in untold}


def test_ranks_that_come_one_after_the_other_write_what_one_process_writes(
    encode: Callable[..., None], trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """In any order, and none waits: the last one completes the stage."""
    whole, shared = trained("whole"), trained("shared")
    encode(whole, 0, 1)
    with caplog.at_level(logging.INFO, "fibldm"):
        for rank in (2, 0):
            encode(shared, rank, 3)
            assert not (shared / "latents" / "latents.json").exists()
            assert re.search("the last process to end completes them; [1-9] cases are left to others", caplog.text)
    encode(shared, 1, 3)
    assert hashes(shared) == hashes(whole)
    assert {"report.json", "interpolation.png", "latents.json"} < hashes(whole).keys()
    encode(shared, 1, 3)  # a rank that starts late finds it done


def test_what_a_lost_rank_leaves_is_done_by_whoever_comes(
    encode: Callable[..., None], trained: Callable[[str], Path]
) -> None:
    whole, shared = trained("whole"), trained("shared")
    encode(whole, 0, 1)
    encode(shared, 1, 2)
    encode(shared, 0, 1)
    assert hashes(shared) == hashes(whole)


def test_every_rank_encodes_its_own_cases_only(
    encode: Callable[..., None], trained: Callable[[str], Path], tiny_run: Path
) -> None:
    shared, items = trained("shared"), read_json(tiny_run / "latents" / "latents.json")["items"]
    cases = list(dict.fromkeys(item["case"] for split in ("training", "validation") for item in items[split]))
    encode(shared, 0, 2)
    written = {name.rpartition("_view")[0] for name in hashes(shared) if "_view" in name}
    assert written == set(cases[::2])


def test_only_one_of_those_that_find_all_there_completes(
    encode: Callable[..., None], trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained("run")
    encode(run, 0, 2)
    with StageFolder(run, "latents").alone(".last"), caplog.at_level(logging.INFO, "fibldm"):
        encode(run, 1, 2)
    assert "another process completes them" in caplog.text
    assert not (run / "latents" / "latents.json").exists()


@pytest.mark.parametrize("engine", ["processes", "cluster"])
def test_an_engine_writes_what_one_process_writes(
    engine: str, encode: Callable[..., None], trained: Callable[[str], Path]
) -> None:
    from distributed import LocalCluster

    whole, shared = trained("whole"), trained("shared")
    encode(whole, 0, 1)
    if engine == "processes":
        encode(shared, 0, 1, workers=2)
    else:
        options = {"n_workers": 2, "processes": False, "dashboard_address": None, "silence_logs": logging.CRITICAL}
        with LocalCluster(threads_per_worker=1, **options) as made:
            encode(shared, 0, 1, cluster=made.scheduler_address)
    assert hashes(shared) == hashes(whole)
    encode(shared, 0, 1)  # the engine decides nothing


def test_latents_that_are_gone_or_damaged_are_told_and_made_again(
    encode: Callable[..., None], trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted for space, or left out or cut off by a copy; what is built on the others still fits."""
    run = trained("run")
    encode(run, 0, 1)
    before, files = hashes(run), sorted((run / "latents" / "training").iterdir())
    cut_off = files[1].read_bytes()[:-100]
    files[1].write_bytes(cut_off)
    latents = Latents.open(run)
    with pytest.raises(FibldmError, match=f"{files[1]} must be a cached latent; .*; run `fibldm encode`"):
        LoadLatent(latents, {})(latents.items("training")[1])
    files[0].unlink()
    with pytest.raises(FibldmError, match=f"1 of {len(latents.items('training')) + 1} cached latents are gone, the fi"):
        Latents.open(run)
    with caplog.at_level(logging.INFO, "fibldm"):
        encode(run, 0, 1)
    assert "made 2 files again that were gone or damaged" in caplog.text
    assert hashes(run) == before
    with caplog.at_level(logging.INFO, "fibldm"):
        encode(run, 0, 1)
    assert "done already" in caplog.text


def test_a_run_of_before_gets_the_ranges_of_the_gate_and_stays_the_same(
    encode: Callable[..., None], trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Whose latents tell no intensities either; they and their fingerprint are not touched."""
    run = trained("run")
    encode(run, 0, 1)
    before, facts = hashes(run), read_json(run / "latents" / "latents.json")
    gate = read_gate(run, facts)
    assert gate is not None and gate.patients == len({item["subject"] for item in facts["items"]["training"]})
    assert gate.ranges.keys() == set(facts["channels"])
    assert gate.ranges[facts["channels"][0]].keys() == {"volume", *facts["labels"]}
    (run / "latents" / GATE).unlink()
    plain = run / "latents" / facts["items"]["training"][0]["file"]
    tensors = {name: part for name, part in load_file(plain).items() if name != "intensities"}
    write_tensors(plain, tensors, {"autoencoder": facts["space"]["autoencoder"]})
    without = hashes(run)
    encode(run, 1, 2)
    assert not (run / "latents" / GATE).exists(), "that is for the first to do"
    with caplog.at_level(logging.INFO, "fibldm"):
        encode(run, 0, 1)
    assert f"ranges of intensity of {gate.patients} training patients" in caplog.text
    assert hashes(run) == {**without, GATE: before[GATE]}
    caplog.clear()
    encode(run, 0, 1)
    assert "done already" in caplog.text and "ranges of intensity" not in caplog.text


def test_only_one_process_begins_anew(encode: Callable[..., None], trained: Callable[[str], Path]) -> None:
    run = trained("run")
    with pytest.raises(FibldmError, match="begun anew by one process.*WORLD_SIZE=2") as raised:
        encode(run, 0, 2, restart=True)
    assert raised.value.remedy == f"move {run / 'latents'} away and leave --restart out"


def test_every_part_belongs_to_one_rank() -> None:
    parts = list(range(11))
    shares = [Shard(rank, 3).take(parts) for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert Shard().take(parts) == parts
    assert [Shard(rank, 2).is_first for rank in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("rank", "ranks", "message"),
    [
        ("2", "2", "from 0 to one less than their number; got RANK=2, WORLD_SIZE=2"),
        ("x", "2", "must be whole numbers; got 'x' and '2'"),
        ("-1", "2", "must be whole numbers; got '-1' and '2'"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, ranks: str, message: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(FibldmError, match=message):
        Shard.from_environment()


def test_without_ranks_one_process_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.from_environment() == Shard(0, 1)


def test_latents_that_are_not_finite_are_refused(
    encode: Callable[..., None], trained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FrozenFirstStage, "encode", lambda self, volume: Posterior(volume * math.nan, torch.ones_like(volume))
    )
    with pytest.raises(FibldmError, match=r"latents must be finite; those of \S+_view-0 are not"):
        encode(trained("run"), 0, 1)


def test_the_compression_of_an_older_run_counts_for_all_axes() -> None:
    space = LatentSpace((0.0,), (1.0,), "ae").to_dict()
    older, newer = (
        Latents(Path(), {"compression": value, "labels": {"0": "", "1": ""}, "space": space, "grid": GRID}).mask(2)
        for value in (4, [4, 4, 4])
    )
    labels = (torch.arange(8 * 4 * 12).view(1, 1, 8, 4, 12) % 5 == 0).long()
    torch.testing.assert_close(older.encode(labels), newer.encode(labels))


def test_compression_may_differ_by_axis(tiny_run: Path) -> None:
    space = LatentSpace((0.0,), (1.0,), "ae").to_dict()
    mask = Latents(tiny_run, {"compression": [4, 4, 2], "labels": {"0": ""}, "space": space, "grid": GRID}).mask(1)
    assert mask.encode(torch.zeros(1, 1, 8, 12, 8, dtype=torch.long)).shape[2:] == (2, 3, 4)
    assert isinstance(read_json(tiny_run / "latents" / "latents.json")["compression"], list)


# --- the report


def posterior(mean: Tensor, std: float | Tensor) -> Posterior:
    """Of channels ``(C, N)``, as if the cells were ``N x 1 x 1``."""
    spread = torch.full_like(mean, std) if isinstance(std, float) else std
    return Posterior(mean[None, :, :, None, None], spread[None, :, :, None, None])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reported(*parts: Posterior, validation: tuple[Posterior, ...] = ()) -> LatentReport:
    return report_latents(parts, LatentSpace.fit(parts, "ae"), validation)


def test_figures_of_points_are_those_of_scipy() -> None:
    points = torch.stack([normal(5000).exp(), 3 + 2 * normal(5000, seed=1), normal(5000, seed=2) ** 3])
    points[1] += 0.5 * points[0]
    report = reported(posterior(points[:, :1800], 0.0), posterior(points[:, 1800:], 0.0))
    values = points.numpy()
    scaled = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    for number, channel in enumerate(report.channels):
        assert channel.mean == pytest.approx(values[number].mean())
        assert channel.std == pytest.approx(values[number].std())
        assert channel.skewness == pytest.approx(stats.skew(values[number]))
        assert channel.kurtosis == pytest.approx(stats.kurtosis(values[number]))
        assert channel.outside == pytest.approx((np.abs(scaled[number]) > 4).mean())
        assert channel.signal == pytest.approx(1.0)
        assert channel.kl is None  # a point has an infinite divergence
    np.testing.assert_allclose(report.correlation, np.corrcoef(values), atol=1e-12)
    assert report.cells == 5000


def test_figures_of_posteriors_are_those_of_what_is_drawn_from_them() -> None:
    mean, std = normal(2, 400) ** 3, 0.1 + 2 * normal(2, 400, seed=1).abs()
    mean[1] -= 0.8 * mean[0]
    report = reported(posterior(mean, std))
    drawn = (mean[..., None] + std[..., None] * normal(2, 400, 5000, seed=2)).flatten(1).numpy()
    for number, channel in enumerate(report.channels):
        assert channel.mean == pytest.approx(drawn[number].mean(), abs=0.01)
        assert channel.std == pytest.approx(drawn[number].std(), rel=0.005)
        assert channel.skewness == pytest.approx(stats.skew(drawn[number]), abs=0.02)
        assert channel.kurtosis == pytest.approx(stats.kurtosis(drawn[number]), rel=0.02)
        scaled = (drawn[number] - drawn[number].mean()) / drawn[number].std()
        assert channel.outside == pytest.approx((np.abs(scaled) > 4).mean(), rel=0.03)
        assert channel.signal == pytest.approx(mean[number].var(correction=0).item() / drawn[number].var(), rel=0.01)
    assert report.correlation[0][1] == pytest.approx(np.corrcoef(drawn)[0, 1], abs=0.002)
    assert report.correlation[0][0] == 1


def test_the_divergence_is_that_of_torch_in_the_scale_of_the_autoencoder() -> None:
    mean, std = 5 * normal(2, 30), 0.1 + normal(2, 30, seed=1).abs()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    ).mean(1)
    assert [channel.kl for channel in reported(posterior(mean, std)).channels] == pytest.approx(expected.tolist())


def test_a_constant_scale_leaves_what_it_does_not_take_away() -> None:
    points = 7 + 3 * normal(1, 1000)
    report = report_latents([posterior(points, 0.0)], LatentSpace.constant(0.5, 1, "ae"))
    assert report.channels[0].mean == pytest.approx(points.mean().item())
    assert report.channels[0].std == pytest.approx(points.std(correction=0).item())
    assert report.channels[0].kurtosis == pytest.approx(stats.kurtosis(points[0].numpy()))
    assert report.channels[0].outside == pytest.approx((points * 0.5 > 4).double().mean().item())


def test_latents_get_the_scale_that_weights_were_trained_with(
    tiny_stage: TinyStage, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run / "autoencoder", tmp_path / "autoencoder")
    tiny_stage("latents", tmp_path, latent_scale=0.25, views=1).run()
    space = Latents.open(tmp_path).space
    assert set(space.mean) == {0.0} and set(space.std) == {4.0}
    with pytest.raises(FibldmError, match="the scale of latents must be a number above 0; got 0"):
        LatentSpace.constant(0, 4, "ae")


FIT = Channel(mean=0.0, std=1.0, signal=0.99, skewness=0.0, kurtosis=0.0, outside=6e-5, kl=5.0)


@pytest.mark.parametrize(
    ("means", "stds", "warning"),
    [
        ([1.0, 1e-4], [0.1, 1.0], r"channel 1 must carry something of the volume; it is dead \(0.00% is not noise\)"),
        ([1.0, 0.5], [0.1, 1.0], r"channel 1 must be more volume than noise; only 2\d% of its variance is not noise"),
    ],
)
def test_a_channel_of_noise_is_warned_of(means: list[float], stds: list[float], warning: str) -> None:
    scale, spread = (torch.tensor(row, dtype=torch.float64)[:, None] for row in (means, stds))
    report = reported(posterior(scale * normal(2, 500), (spread * torch.ones(2, 500))))
    assert len(report.warnings) == 1
    assert re.search(warning, report.warnings[0])


def test_heavy_tails_are_warned_of_and_those_of_laplace_are_not() -> None:
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    laplace = torch.from_numpy(stats.laplace.ppf(uniform.numpy()))
    assert reported(posterior(laplace[None], 0.0)).warnings == []
    heavy = torch.from_numpy(stats.t(2.2).ppf(uniform.numpy()))
    assert (
        reported(posterior(heavy[None], 0.0)).warnings[0].startswith("latent channel 0 must not have heavy tails; 0.")
    )


def test_channels_that_say_the_same_are_warned_of() -> None:
    points = normal(3, 2000)
    points[2] = 0.02 * points[2] - points[0]
    (warning,) = reported(posterior(points, 0.1)).warnings
    assert warning.startswith("latent channels 0 and 2 must differ; their correlation is -0.99")


@pytest.mark.parametrize(
    ("scale", "shift", "warned"), [(1.0, 0.0, False), (1.0, 1.5, True), (0.3, 0.0, True), (3.0, 0.0, True)]
)
def test_validation_latents_that_lie_elsewhere_are_warned_of(scale: float, shift: float, warned: bool) -> None:
    train, other = normal(1, 2000), shift + scale * normal(1, 2000, seed=1)
    report = reported(posterior(train, 0.1), validation=(posterior(other, 0.1),))
    assert report.channels[0].validation_std == pytest.approx(math.hypot(scale, 0.1), rel=0.05)
    assert [text.startswith("latent channel 0 must be alike in validation") for text in report.warnings] == [
        True
    ] * warned


def test_latents_that_are_fit_are_not_warned_of() -> None:
    report = LatentReport((FIT, FIT), ((1.0, -0.4), (-0.4, 1.0)), cells=10)
    assert report.warnings == []
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["channels"][1]["signal"] == 0.99
    assert [len(line) for line in report.table().splitlines()] == [len(report.table().splitlines()[0])] * 3


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(FibldmError, match="at least one training latent; got none"):
        report_latents([], LatentSpace((0.0,), (1.0,), "ae"))


def test_the_encode_stage_writes_the_report_and_says_the_warnings(
    encode: Callable[..., None], trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained("run")
    with caplog.at_level(logging.INFO, "fibldm"):
        encode(run, 0, 1)
    report = read_json(run / "latents" / "report.json")
    latents = Latents.open(run)
    assert [channel["mean"] for channel in report["channels"]] == pytest.approx(latents.space.mean)
    assert [channel["std"] for channel in report["channels"]] == pytest.approx(latents.space.std)
    said = [record.getMessage() for record in caplog.records if record.name == "fibldm"]
    (warning,) = (text for text in said if text.startswith("warning"))
    assert report["warnings"]  # an epoch makes no autoencoder
    assert warning.splitlines() == ["warning: the latents are not fit for stage 2", *report["warnings"], REMEDY]
    assert "channel      mean" in caplog.text
    assert said[-1].endswith(f"validation views of {latents.channels} channels and 8 x 8 x 8 cells")


# --- what is between two latents


class Enlarging(nn.Module):
    """Stands for a first stage: its decoder repeats every cell, and adds the mask's second channel."""

    def decode(self, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        volume = latent.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
        return volume if mask is None else volume + mask[:, 1:2]


def strip(tmp_path: Path, **settings: Any) -> np.ndarray:
    latents = (torch.full((1, 2, 4, 3), -0.5), torch.full((1, 2, 4, 3), 0.5))
    volumes = (torch.full((1, 8, 16, 12), -1.0), torch.full((1, 8, 16, 12), 1.0))
    first_stage: Any = Enlarging()
    draw_interpolation(tmp_path / "strip.png", first_stage, volumes, latents, spacing=(2.0, 1.0, 3.0), **settings)
    with Image.open(tmp_path / "strip.png") as picture:
        return np.asarray(picture)


def grays(picture: np.ndarray) -> list[int]:
    """The commonest gray of each of seven columns, from left to right, in the last third: a sagittal slice."""
    columns = np.array_split(picture[-picture.shape[0] // 6 :, :, 0], 7, axis=1)
    middle = [part[:, part.shape[1] // 2 - 10 : part.shape[1] // 2 + 10] for part in columns]
    return [int(np.bincount(part[part.shape[0] // 4 : part.shape[0] // 2].ravel()).argmax()) for part in middle]


def test_the_strip_goes_from_one_case_to_the_other(tmp_path: Path) -> None:
    expected = [255 * (value + 1) / 2 for value in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)]
    assert grays(strip(tmp_path)) == pytest.approx(expected, abs=1)


def test_a_mask_that_is_needed_goes_along(tmp_path: Path) -> None:
    empty, full = torch.zeros(2, 8, 16, 12), torch.ones(2, 8, 16, 12)
    expected = [255 * (value + 1) / 2 for value in (-1, -0.5, 0, 0.5, 1, 1, 1)]
    assert grays(strip(tmp_path, masks=(empty, full))) == pytest.approx(expected, abs=1)


def test_one_patient_alone_has_no_strip(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    stage = EncodeStage.__new__(EncodeStage)
    datalist: dict[str, list[dict[str, Any]]] = {"training": [{"case": "a"}], "validation": []}
    made_by = (Compose(), Compose(), 1, "sample", 0, torch.device("cpu"), GateRanges({}))
    stage.cache = ViewCache(tmp_path, datalist, *made_by)
    first_stage: Any = None
    with caplog.at_level(logging.INFO, "fibldm"):
        stage._draw({"training": [{"subject": "a", "file": "a"}], "validation": []}, first_stage)
    assert "no interpolation.png, it takes two patients" in caplog.text


def test_a_run_of_before_has_the_encode_stage_where_it_was() -> None:
    before = {"stage": {"_target_": "fibldm.training.latents.EncodeStage"}}
    assert current(before)["stage"]["_target_"] == read_configuration("encode_latents")["stage"]["_target_"]
    assert getattr(import_module("fibldm.training.latents"), "EncodeStage") is EncodeStage  # noqa: B009


def test_padding_does_not_count_in_the_scale(tiny_run: Path) -> None:
    facts = read_json(tiny_run / "latents" / "latents.json")
    cells, everything = [], []
    for item in facts["items"]["training"]:
        content = load_file(tiny_run / "latents" / item["file"])
        square = content["mean"].double() ** 2 + content["std"].double() ** 2
        both = torch.stack([content["mean"].double(), square], dim=1)
        cells.append(both[:, :, content["valid"][0] > 0.5])
        everything.append(both.flatten(2))

    def scale(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        mean, square = torch.cat(parts, dim=2).mean(dim=2).unbind(1)
        return mean, (square - mean**2).sqrt()

    for part, known in zip(scale(cells), (facts["space"]["mean"], facts["space"]["std"]), strict=True):
        torch.testing.assert_close(part, torch.tensor(known, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert (scale(cells)[0] - scale(everything)[0]).abs().max() > 1e-4  # a hundred times what is tolerated above


# --- means


def test_latents_may_be_means(encode: Callable[..., None], trained: Callable[[str], Path], tiny_run: Path) -> None:
    """What is trained on is the middle of the posterior, every time, and the scale is that of means."""
    run = trained("means")
    encode(run, 0, 1, views=1, latent_draw="mean")
    latents, drawn = Latents.open(run), Latents.open(tiny_run)
    assert latents.facts["draw"] == "mean" and "draw" not in drawn.facts
    means = []
    for one, other in zip(latents.items("training"), drawn.items("training"), strict=True):
        here, there = load_file(one["file"]), load_file(other["file"])
        assert torch.equal(here["mean"], there["mean"]) and not here["std"].any() and there["std"].all()
        inside = here["valid"][0] > 0.5
        means.append(here["mean"][:, inside])
    spread = torch.cat(means, dim=1).double().var(dim=1, correction=0).sqrt()
    torch.testing.assert_close(torch.tensor(latents.space.std, dtype=torch.float64), spread, rtol=1e-5, atol=0)
    encode(run, 0, 1, views=1, latent_draw="mean")
    with pytest.raises(FibldmError, match="latent_draw"):
        encode(run, 0, 1, views=1)
    with pytest.raises(FibldmError, match="latent_draw must be one of sample, mean; got 'median'"):
        encode(trained("wrong"), 0, 1, latent_draw="median")
    assert decisive({"latent_draw": "sample", "views": 1}) == {"views": 1}  # as latents of before it were
