"""Students of known data against closed forms, and the stage that trains them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyStage
from oracles import MU, STD
from processes import by_monai, run_words
from torch import Tensor, nn

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.delivery.verify import run_checks
from fibldm.editing.editor import Editor, EditRequest
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.importing.bundle_run import run_of_bundle
from fibldm.models.denoiser import Denoiser
from fibldm.models.process import Process, RectifiedFlow, VariancePreserving
from fibldm.models.samplers import ddim
from fibldm.models.timesteps import sampling_times
from fibldm.pipeline import _check as check_recipe
from fibldm.recipe import Recipe
from fibldm.runs import StageFolder, hash_weights
from fibldm.synthesis import SamplingSettings, SynthesisRequest, SynthesisSettings, Synthesizer
from fibldm.synthesis.student import Student, teacher_of
from fibldm.training.distillation import CASE, DistillationPrepareBatch, Teacher, asked_of
from fibldm.training.draws import EpochSampler
from fibldm.training.losses import DenoisingLoss
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import sidecar

PAIRS, STEPS = 96, 800
FLOW = RectifiedFlow()


class Shown:
    """A condition that is one number, of which 0 asks for nothing."""

    dropped_with_all = True

    def chances(self, dropout: Any) -> Tensor:
        return torch.zeros(2)

    def null(self, encoded: Tensor) -> Tensor:
        return torch.zeros_like(encoded)


CONDITIONS: Mapping[str, Any] = {"mask": Shown()}


class Exact(nn.Module):
    """A network of target "sample" that says what is known of the data at ``z_t``."""

    sees = frozenset({"mask"})
    variance = "free"

    def __init__(self, denoise: Any) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, z_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        made: Tensor = self.denoise(z_t, timesteps / 1000, conditions["mask"])
        return made


class Perceptron(nn.Module):
    """A student of latents of one value."""

    sees = frozenset({"mask"})
    variance = "free"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    def forward(self, z_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        known = torch.stack([z_t.flatten(), timesteps / 1000, conditions["mask"].flatten()], dim=1)
        made: Tensor = self.layers(known).view_as(z_t)
        return made


def of_gaussian(z_t: Tensor, t: Tensor, asked: Tensor) -> Tensor:
    """Of N(asked MU, STD^2)."""
    alpha, sigma = (part(t).view(-1, 1, 1, 1, 1) for part in (FLOW.alpha, FLOW.sigma))
    mu = MU * asked.view(-1, 1, 1, 1, 1)
    return mu + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z_t - alpha * mu)


WEIGHTS, CENTRES, SPREADS = (0.35, 0.65), (-1.0, 1.0), (0.3, 0.4)


def of_mixture(z_t: Tensor, t: Tensor, asked: Tensor) -> Tensor:
    """Of two Gaussians, whatever is asked."""
    alpha, sigma = (part(t).view(-1, 1) for part in (FLOW.alpha, FLOW.sigma))
    centre, spread, weight = (torch.tensor(part) for part in (CENTRES, SPREADS, WEIGHTS))
    total = alpha**2 * spread**2 + sigma**2
    residual = z_t.view(-1, 1) - alpha * centre
    share = (weight.log() - total.log() / 2 - residual**2 / total / 2).softmax(dim=1)
    return (share * (centre + alpha * spread**2 / total * residual)).sum(dim=1).view_as(z_t)


def quantile(noise: Tensor) -> Tensor:
    """The value of the mixture below which as much lies as below the noise: where a flow on a line must lead."""
    low, high = torch.full_like(noise, -6.0), torch.full_like(noise, 6.0)
    wanted = torch.special.ndtr(noise)
    for _ in range(60):
        middle = (low + high) / 2
        parts = zip(WEIGHTS, CENTRES, SPREADS, strict=True)
        reached = torch.stack([w * torch.special.ndtr((middle - c) / s) for w, c, s in parts]).sum(dim=0) < wanted
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return middle


def batch(seeds: range, asked: float = 1.0) -> dict[str, Tensor]:
    count = len(seeds)
    return {
        "mean": torch.zeros(count, 1, 1, 1, 1),
        "valid": torch.ones(count, 1, 1, 1, 1),
        "seed": torch.tensor(seeds),
        "view": torch.zeros(count, dtype=torch.long),
        CASE: torch.zeros(count, dtype=torch.long),
        "mask": torch.full((count, 1), asked),
    }


def teacher(denoise: Any, steps: int, guidance: float = 1.0, sampler: str = "heun", **changes: Any) -> Teacher:
    sampling = SamplingSettings(sampler=sampler, steps=steps, guidance=guidance)
    known: dict[str, Any] = {"process": FLOW, "target": "sample", "conditions": CONDITIONS, "sampling": sampling}
    return Teacher(Exact(denoise), **{**known, **changes})  # type: ignore[arg-type]


def student_of(taught_by: Teacher, calls: int) -> Perceptron:
    """Trained for a few hundred steps on all pairs at once."""
    network = Perceptron()
    prepare = DistillationPrepareBatch(taught_by, network, calls=calls, conditions=CONDITIONS)
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=1e-2), DenoisingLoss()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        inputs, target, arguments, _ = prepare(batch(range(PAIRS)), "cpu")
        optimizer.zero_grad()
        loss(network(inputs, *arguments), target).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def drawn(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """By the sampler of students."""
    shown = {"mask": torch.ones(len(noise), 1)}
    denoise = Denoiser(network, FLOW, "sample", shown)  # type: ignore[arg-type]
    return ddim(denoise, noise.view(-1, 1, 1, 1, 1), sampling_times(steps), process=FLOW).flatten()


NOISE = torch.linspace(-1.5, 1.5, 101)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


def line(mean: float, steps: int) -> tuple[float, float]:
    """Where Euler's steps along the flow of N(mean, STD^2) lead from noise 0, and how steeply: by scalars alone."""
    offset, slope = 0.0, 1.0
    for step in range(steps, 0, -1):
        t, s = step / steps, (step - 1) / steps
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        kept, moved = s / t, (1 - s) - (1 - t) * s / t
        offset = kept * offset + moved * (mean + gain * (offset - (1 - t) * mean))
        slope = kept * slope + moved * gain * slope
    return offset, slope


@pytest.mark.parametrize("calls", [1, 2])
def test_the_student_of_a_guided_gaussian_is_its_closed_form(calls: int) -> None:
    """Guidance moves the mean of a Gaussian and leaves its width, so that the teacher's map is a straight line."""
    guidance, many = 1.5, 8
    offset, slope = line(guidance * MU, many)
    network = student_of(teacher(of_gaussian, many, guidance, sampler="ddim"), calls)
    for steps in range(1, calls + 1):
        assert far(drawn(network, NOISE, steps), offset + slope * NOISE) < 0.02
    assert line(MU, 4000) == pytest.approx((MU, STD), abs=1e-3)  # the flow itself
    assert far(drawn(Perceptron(), NOISE, calls), offset + slope * NOISE) > 0.5


@pytest.mark.parametrize("calls", [1, 2])
def test_the_student_of_a_mixture_is_its_closed_form(calls: int) -> None:
    """On a line a flow keeps quantiles; the exact denoiser itself, in as many steps, is far from them."""
    network = student_of(teacher(of_mixture, 24), calls)
    for steps in range(1, calls + 1):
        assert far(drawn(network, NOISE, steps), quantile(NOISE)) < 0.1
    assert far(drawn(Exact(of_mixture), NOISE, calls), quantile(NOISE)) > 0.2


@pytest.mark.parametrize("process", [FLOW, VariancePreserving("cosine")])
def test_what_is_asked_is_what_gives_the_latent_back(process: Process) -> None:
    z_0, z_t, t = torch.randn(3, 2, 1, 1, 1), torch.randn(3, 2, 1, 1, 1), torch.tensor([0.2, 0.6, 1.0])
    for target in process.targets:
        asked = asked_of(process, target, z_0, z_t, t)
        torch.testing.assert_close(process.to_z_0(target, asked, z_t, t), z_0, rtol=1e-3, atol=1e-4)


def test_a_pair_is_the_same_in_any_batch_and_kept() -> None:
    made, alone, anew = (teacher(of_mixture, 3, kept=kept) for kept in (True, True, False))
    network = Perceptron()
    prepared = [DistillationPrepareBatch(part, network, calls=1, conditions=CONDITIONS) for part in (made, alone, anew)]
    together = prepared[0](batch(range(4)), "cpu")[1].value
    one_by_one = torch.cat([prepared[1](batch(range(seed, seed + 1)), "cpu")[1].value for seed in range(4)])
    assert torch.equal(together, one_by_one) and torch.equal(together, prepared[2](batch(range(4)), "cpu")[1].value)
    assert made.pairs is not None and len(made.pairs) == 4 and anew.pairs is None
    made.network.denoise = None  # type: ignore[assignment]  # is not asked again
    assert torch.equal(prepared[0](batch(range(4)), "cpu")[1].value, together)


def test_a_second_call_sees_what_the_first_one_leaves_it() -> None:
    network, made = Perceptron(), teacher(of_gaussian, 2)
    inputs, target, (times, given), _ = DistillationPrepareBatch(made, network, calls=2, conditions=CONDITIONS)(
        batch(range(3)), "cpu"
    )
    assert network.training and len(inputs) == len(given["mask"]) == 6
    assert times.tolist() == [1000.0] * 3 + [500.0] * 3
    denoise = Denoiser(network, FLOW, "sample", {"mask": torch.ones(3, 1)})  # type: ignore[arg-type]
    torch.testing.assert_close(inputs[3:], ddim(denoise, inputs[:3], torch.tensor([1.0, 0.5]), process=FLOW))
    assert torch.equal(target.value[:3], target.value[3:])  # one latent for all calls


def test_a_teacher_must_be_a_function_of_its_noise_and_know_what_guidance_needs() -> None:
    with pytest.raises(FibldmError, match="must draw without noise of its own.*got ancestral"):
        teacher(of_gaussian, 2, sampling=SamplingSettings(sampler="ancestral"))
    with pytest.raises(FibldmError, match=r"mask_dropout was 0.*teacher_guidance 1\.5"):
        teacher(of_gaussian, 2, guidance=1.5, mask_dropout=0.0)
    with pytest.raises(FibldmError, match="1 or 2 network calls; got student_calls 3"):
        DistillationPrepareBatch(teacher(of_gaussian, 2), Perceptron(), calls=3)


def test_seeds_come_again_after_so_many_passes() -> None:
    sampler = EpochSampler(5, seed=1, repeats=2)
    passes = []
    for epoch in range(1, 5):
        sampler.set_epoch(epoch)
        passes.append([(draw.index, draw.seed) for draw in sampler])
    assert passes[0] != passes[2] and sorted(passes[0]) == sorted(passes[2])
    assert not {*passes[0]} & {*passes[1]}
    with pytest.raises(FibldmError, match="whole number of passes, at least 1; got 0"):
        EpochSampler(5, seed=1, repeats=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 10}, "steps 1 or 2; got 10"),
        ({"guidance": 1.5}, r"guidance 1, as its weights hold that of its teacher; got 1\.5"),
        ({"sampler": "ancestral"}, "sampler ddim or dpmpp_2m without eta; got ancestral"),
        ({"eta": 0.5}, r"sampler ddim or dpmpp_2m without eta; got ddim with eta 0\.5"),
        ({"shift": 3.0}, r"shift 1\.0; got 3\.0"),
    ],
)
def test_a_student_is_not_asked_for_what_it_was_not_trained_for(changes: dict[str, Any], expected: str) -> None:
    student = Student(2, "0" * 64, SamplingSettings(guidance=1.5))
    student.check(student.own.changed(steps=1, shift=1.0), 1.0)
    with pytest.raises(FibldmError, match=f"draws as it was trained to: {expected}"):
        student.check(student.own.changed(**changes), 1.0)
    assert Student.from_dict(json.loads(json.dumps(student.to_dict()))) == student


SETTINGS: dict[str, Any] = {"teacher_steps": 2, "student_noises": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def taught(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a ControlNet, which is woken up, as one of a few steps hardly does anything."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    folder.mkdir()
    for stage in ("autoencoder", "latents", "diffusion", "controlnet"):
        shutil.copytree(tiny_run / stage, folder / stage)
    stage = StageFolder(folder, "controlnet")
    best = stage.weights()
    generator = torch.Generator().manual_seed(0)
    for weight in best["model"].values():
        if weight.is_floating_point():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    torch.save(best, stage.checkpoints / "best.pt")
    done = read_json(stage.path / "done.json") | {"weights": hash_weights(best["model"])}
    (stage.path / "done.json").write_text(json.dumps(done))
    return folder


@pytest.fixture(scope="module")
def distilled(taught: Path, tiny_stage: TinyStage) -> Path:
    """The same with a student."""
    folder = taught.parent / "distilled"
    shutil.copytree(taught, folder)
    tiny_stage("distillation", folder, epochs=2, **SETTINGS).run()
    return folder


def test_a_stage_that_broke_off_ends_with_the_same_weights(
    taught: Path, distilled: Path, tiny_stage: TinyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "broken", 0
    shutil.copytree(taught, folder)
    original = DistillationPrepareBatch.__call__

    def break_off(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second epoch
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationPrepareBatch, "__call__", break_off)
        tiny_stage("distillation", folder, epochs=2, **SETTINGS).run()
    assert (folder / "distillation" / "checkpoints" / "last.pt").exists()
    tiny_stage("distillation", folder, epochs=2, **SETTINGS).run()
    ends = [StageFolder(run, "distillation").require() for run in (distilled, folder)]
    assert ends[0]["weights"] == ends[1]["weights"] != StageFolder(taught, "controlnet").require()["weights"]


def test_a_distilled_run_draws_in_the_calls_of_its_student(
    distilled: Path, mask_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "synthesize",
        "--run",
        str(distilled),
        "--masks",
        str(mask_file),
        "--allow-extrapolation",
        "--device",
        "cpu",
    ]
    assert cli([*asked, "--out", str(tmp_path / "two")]) == 0
    assert cli([*asked, "--out", str(tmp_path / "one"), "--steps", "1"]) == 0
    told = [read_json(sidecar(next((tmp_path / name).glob("*.nii.gz")))) for name in ("two", "one")]
    assert [one["network_calls"] for one in told] == [2, 1]
    expected = StageFolder(distilled, "controlnet").require()["weights"]
    for one in told:
        assert one["distilled"]["calls"] == 2 and one["distilled"]["teacher"] == expected
        assert one["distilled"]["sampling"]["guidance"] == 1.5 and one["distilled"]["sampling"]["steps"] == 2
    capsys.readouterr()
    assert cli([*asked, "--out", str(tmp_path / "many"), "--steps", "10", "--guidance", "2"]) == 2
    error = capsys.readouterr().err
    assert "steps 1 or 2; got 10" in error and "guidance 1, as its weights hold" in error
    with pytest.raises(FibldmError, match="at strength 1"):
        Synthesizer.from_run(distilled, strength=0.5)


def test_a_volume_of_a_student_is_the_same_in_any_batch(distilled: Path, mask_file: Path) -> None:
    made = Synthesizer.from_run(distilled)
    mask = read_volume(mask_file)
    requests = [SynthesisRequest(mask, "a", number) for number in range(2)]
    together = made.batch(requests, allow_extrapolation=True)
    alone = [made.batch([request], allow_extrapolation=True)[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.volume.array, other.volume.array, atol=1)  # whole HU
    assert float(np.abs(together[0].volume.array - together[1].volume.array).max()) > 1


def test_a_bundle_of_a_student_says_what_it_is(distilled: Path, mask_file: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(distilled, bundle, ExportSettings("CC0-1.0"))
    ours, theirs = Synthesizer.from_run(distilled), Synthesizer.from_bundle(bundle)
    assert theirs.student == ours.student and theirs.sampling.steps == 2 and theirs.sampling.guidance == 1
    mask = read_volume(mask_file)
    one, other = (made(mask, allow_extrapolation=True, residual_noise=0.0) for made in (ours, theirs))
    np.testing.assert_array_equal(one.volume.array, other.volume.array)
    checks = ("manifest", "layout", "generator", "metadata", "synthesis")
    seen = list(run_checks(bundle, tmp_path, checks))
    assert all(check.ok for check in seen), seen
    teacher_weights = StageFolder(distilled, "controlnet").require()["weights"]
    assert read_json(bundle / "configs/metadata.json")["distilled"]["teacher"] == teacher_weights
    assert f"distilled to 2 network calls from {teacher_weights[:12]}" in (bundle / "docs/README.md").read_text()
    with pytest.raises(FibldmError, match="steps 1 or 2; got 5"):
        export(distilled, tmp_path / "other", ExportSettings("CC0-1.0", sampling={"steps": 5}))


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_monai_trains_the_same_student_of_one_call(
    taught: Path, tiny_stage: TinyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("own", "monai")]
    for folder in folders:
        shutil.copytree(taught, folder)
    settings = {**SETTINGS, "student_calls": 1, "teacher_guidance": 2.0}
    tiny_stage("distillation", folders[0], **settings).run()
    theirs = tiny_stage("distillation", folders[1], **settings)
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [])
        by_monai(*run_words(theirs))
    ends = [StageFolder(folder, "distillation").require()["weights"] for folder in folders]
    assert ends[0] == ends[1]
    student = Synthesizer.from_run(folders[1]).student
    assert student is not None and student.calls == 1 and student.own.steps == 1 and student.sampling.guidance == 2


def test_an_adapter_makes_a_student_of_its_teacher(taught: Path, tiny_stage: TinyStage, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    tiny_stage("distillation", folder, "adapter", **SETTINGS).run()
    student = Synthesizer.from_run(folder)
    made = Synthesizer.from_run(taught, adapters={folder / "distillation/checkpoints/adapter.safetensors": 1.0})
    assert made.source["weights"] == student.source["weights"] != Synthesizer.from_run(taught).source["weights"]


def test_a_student_needs_a_teacher(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    with pytest.raises(FibldmError, match="has none.*run `fibldm train diffusion` or `fibldm train controlnet`"):
        teacher_of(tmp_path)
    assert teacher_of(tiny_run) == "controlnet"


def test_a_recipe_with_a_student_must_draw_in_its_steps(tmp_path: Path) -> None:
    recipe = Recipe.read(None, configs=["data_lung_ct"], overrides={"distillation": {}, "synthesize": {"steps": 5}})
    drawing = SynthesisSettings.of(**recipe.synthesize)
    with pytest.raises(FibldmError, match="draws as it was trained to: steps 1 or 2; got 5"):
        check_recipe(recipe, recipe.stages(), drawing, ExportSettings("CC0-1.0"), tmp_path)


def test_a_region_is_edited_with_the_teacher(distilled: Path, mask_file: Path) -> None:
    mask = read_volume(mask_file)
    with pytest.raises(FibldmError, match="draws whole volumes in 2 calls; edit with its teacher"):
        Editor(Synthesizer.from_run(distilled))(EditRequest(mask, mask, mask, "a"))


def test_a_bundle_begins_a_run_whose_student_is_that_of_the_bundle(
    tiny_run: Path, tiny_stage: TinyStage, mask_file: Path, tmp_path: Path
) -> None:
    source, bundle, run = (tmp_path / name for name in ("source", "bundle", "run"))
    for stage in ("autoencoder", "latents"):
        shutil.copytree(tiny_run / stage, source / stage)
    tiny_stage("diffusion", source, "mask_concat").run()
    export(source, bundle, ExportSettings("CC0-1.0"))
    assert [folder.name for folder in run_of_bundle(bundle, run)] == ["autoencoder", "diffusion"]
    for stage in ("autoencoder", "diffusion"):
        weights = [StageFolder(folder, stage).require()["weights"] for folder in (source, run)]
        assert weights[0] == weights[1]
    tiny_stage("latents", run, latent_space=str(bundle)).run()
    mask, settings = read_volume(mask_file), SamplingSettings(steps=2, guidance=1.5, residual_noise=0.0)
    made = [Synthesizer.from_bundle(bundle), Synthesizer.from_run(run)]
    one, other = (part(mask, settings=settings, allow_extrapolation=True).volume.array for part in made)
    np.testing.assert_array_equal(one, other)
    tiny_stage("distillation", run, **SETTINGS).run()
    student = Synthesizer.from_run(run).student
    assert student is not None and student.teacher == made[0].source["weights"]
    with pytest.raises(FibldmError, match="a bundle begins a new run"):
        run_of_bundle(bundle, run)
    export(run, tmp_path / "student", ExportSettings("CC0-1.0"))
    with pytest.raises(FibldmError, match="has a ControlNet or was distilled"):
        run_of_bundle(tmp_path / "student", tmp_path / "another")
