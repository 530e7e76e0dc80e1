"""Run folders: what is done is skipped, what changed is refused, what was begun goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import STAGES
from conftest import TinyStage

from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.training.latents import Latents, LoadLatent

TRAINED = ("autoencoder", "diffusion", "controlnet")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


# --- a folder by itself


def begin(folder: Path, *, restart: bool = False, inputs: str = "a", **config: Any) -> str:
    settings = {"epochs": 3, "learning_rate": 0.1, "patch": [4, 4], **config}
    progress = StageFolder(folder, "autoencoder").begin(settings, {"data": inputs}, restart=restart)
    (folder / "autoencoder" / "metrics.csv").touch()  # something was done
    return progress


def test_a_stage_that_was_refused_before_it_did_anything_may_change(tmp_path: Path) -> None:
    """A mistyped option does not take the folder."""
    begin(tmp_path)
    (tmp_path / "autoencoder" / "metrics.csv").unlink()
    (tmp_path / "autoencoder" / "log.txt").touch()
    assert begin(tmp_path, learning_rate=0.2) == "new"
    with pytest.raises(FibldmError, match=r"learning_rate: 0\.2 -> 0\.1"):
        begin(tmp_path)


def test_a_stage_is_new_then_begun_then_done(tmp_path: Path) -> None:
    assert [begin(tmp_path), begin(tmp_path)] == ["new", "resume"]
    StageFolder(tmp_path, "autoencoder").finish(epochs=3, weights="w")
    assert [begin(tmp_path), begin(tmp_path, epochs=2)] == ["done", "done"]
    assert StageFolder(tmp_path, "autoencoder").require()["weights"] == "w"
    assert yaml.safe_load((tmp_path / "autoencoder" / "config.yaml").read_text())["epochs"] == 3


def test_more_epochs_go_on_and_are_not_done_meanwhile(tmp_path: Path) -> None:
    begin(tmp_path)
    StageFolder(tmp_path, "autoencoder").finish(epochs=3)
    assert begin(tmp_path, epochs=4) == "resume"
    assert StageFolder(tmp_path, "autoencoder").done() is None
    assert yaml.safe_load((tmp_path / "autoencoder" / "config.yaml").read_text())["epochs"] == 4


def test_another_device_is_no_other_configuration(tmp_path: Path) -> None:
    begin(tmp_path, patch=(4, 4), work=Path("here"))
    assert begin(tmp_path, device="cuda", num_workers=4, work="elsewhere", checkpoint_every=7) == "resume"


@pytest.mark.parametrize(
    ("key", "as_before", "other"), [("latent_draw", "sample", "mean"), ("masks_only", True, False)]
)
def test_a_run_of_before_a_key_goes_on_with_what_was_done_then(
    tmp_path: Path, key: str, as_before: object, other: object
) -> None:
    begin(tmp_path)
    StageFolder(tmp_path, "autoencoder").finish(epochs=3, weights="w")
    assert begin(tmp_path, **{key: as_before}) == "done"
    with pytest.raises(FibldmError, match=key):
        begin(tmp_path, **{key: other})


def test_a_changed_configuration_is_refused_with_what_changed(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(FibldmError) as raised:
        begin(tmp_path, learning_rate=0.2, patch=[4, 8], inputs="b", extra=True)
    changes = "config::extra: None -> True; config::learning_rate: 0.1 -> 0.2; config::patch::1: 4 -> 8; "
    assert changes + "inputs::data: 'a' -> 'b'" in raised.value.message
    assert "--restart" in raised.value.remedy
    assert begin(tmp_path) == "resume"


def test_many_changes_are_counted(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(FibldmError, match="and 2 more"):
        begin(tmp_path, **{f"key{number}": number for number in range(8)})


def test_restart_puts_back_what_was_there_where_nothing_new_was_kept(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "autoencoder")
    begin(tmp_path)
    stage.checkpoints.mkdir()
    (stage.checkpoints / "last.pt").write_text("old")
    with pytest.raises(KeyError), stage.kept_until_begun(True):
        assert stage.begin({"epochs": 5}, {}, restart=True) == "new"
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    assert (stage.checkpoints / "last.pt").read_text() == "old"
    with pytest.raises(KeyError), stage.kept_until_begun(True):
        begin(tmp_path, restart=True, learning_rate=0.5)
        stage.checkpoints.mkdir()
        (stage.checkpoints / "last.pt").write_text("new")
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "autoencoder.replaced-1"]
    assert (stage.checkpoints / "last.pt").read_text() == "new"


def test_restart_keeps_what_was_there_beside_it(tmp_path: Path) -> None:
    for attempt in range(3):
        assert begin(tmp_path, restart=True, learning_rate=float(attempt)) == "new"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["autoencoder", "autoencoder.replaced-1", "autoencoder.replaced-2"]
    rates = [yaml.safe_load((tmp_path / name / "config.yaml").read_text())["learning_rate"] for name in names]
    assert rates == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_missing_names_its_command(tmp_path: Path, stage: str) -> None:
    command = "fibldm encode" if stage == "latents" else f"fibldm train {stage}"
    with pytest.raises(FibldmError, match=f"stage '{stage}' of .* it was never started; run `{command}`"):
        StageFolder(tmp_path, stage).require()


def test_the_hash_of_weights_sees_names_and_values() -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert hash_weights(state) == hash_weights(dict(reversed(state.items())))
    others = [{"a": torch.ones(2), "c": torch.zeros(3)}, {"a": torch.ones(2) + 1e-7, "b": torch.zeros(3)}]
    assert all(hash_weights(state) != hash_weights(other) for other in others)


# --- stages that were run


@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_leaves_its_files(tiny_run: Path, stage: str) -> None:
    folder = tiny_run / stage
    for name in ("config.yaml", "log.txt", "metrics.csv", "checkpoints/last.pt", "checkpoints/best.pt", "done.json"):
        assert (folder / name).stat().st_size > 0, name
    assert [path.name for path in folder.rglob("tmp*")] == []
    done = read_json(folder / "done.json")
    assert done["epochs"] == done["best_epoch"] == 1
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["epochs"], config["run_dir"], config["size"]) == (1, str(tiny_run), [32, 32, 32])
    header, row = (folder / "metrics.csv").read_text().splitlines()
    watched, terms = ",training_loss,gap", ",validation_loss/t0.25,validation_loss/t0.75"
    if stage == "autoencoder":
        watched, terms = "", ",loss/reconstruction,loss/kl"
    assert header == f"epoch,iteration,loss,validation_loss{watched},learning_rate,gradient_norm{terms},seconds"
    assert "" not in row.split(",")


@pytest.mark.parametrize("stage", TRAINED)
def test_checkpoints_are_tensors_and_numbers_alone(tiny_run: Path, stage: str) -> None:
    last = torch.load(tiny_run / stage / "checkpoints" / "last.pt", weights_only=True)
    also = {"scaler", "loss"} if stage == "autoencoder" else {"scaler"}
    assert set(last["objects"]) == {"network", "ema", "optimizer"} | also
    best = torch.load(tiny_run / stage / "checkpoints" / "best.pt", weights_only=True)
    assert hash_weights(best["model"]) == read_json(tiny_run / stage / "done.json")["weights"]
    network = StageFolder(tiny_run, stage).trained()
    assert not network.training
    assert hash_weights(network.state_dict()) == hash_weights(best["model"])


def test_the_base_of_the_controlnet_is_that_of_stage_2(tiny_run: Path) -> None:
    base = StageFolder(tiny_run, "diffusion").weights()["model"]
    steered = StageFolder(tiny_run, "controlnet").weights()["model"]
    shared = [name for name in steered if name.startswith("unet.")]
    assert len(shared) == len(base)
    assert all(torch.equal(steered[name], base[name]) for name in shared)
    last = StageFolder(tiny_run, "controlnet").weights("last")["objects"]
    assert all(torch.equal(last["network"][name], base[name]) for name in shared)
    trained = len([name for name in steered if name.startswith("controls.0.")])
    assert len(last["optimizer"]["state"]) == trained


def test_a_stage_folder_is_enough_to_have_its_network(tiny_run: Path, tmp_path: Path) -> None:
    """Moved elsewhere, with no configuration beside its own."""
    shutil.copytree(tiny_run / "diffusion", tmp_path / "elsewhere" / "diffusion")
    shutil.copytree(tiny_run / "latents", tmp_path / "elsewhere" / "latents")
    shutil.copytree(tiny_run / "autoencoder", tmp_path / "elsewhere" / "autoencoder")
    moved, here = (StageFolder(run, "diffusion").trained(device="cpu") for run in (tmp_path / "elsewhere", tiny_run))
    assert hash_weights(moved.state_dict()) == hash_weights(here.state_dict()) and not moved.training


def test_the_latents_are_normalised_by_what_was_fitted(tiny_run: Path) -> None:
    latents = Latents.open(tiny_run)
    views = [LoadLatent(latents, {"mask": latents.mask(2)})(item) for item in latents.items("training")]
    means, spreads = (torch.stack([view[key] for view in views]).double() for key in ("mean", "std"))
    assert means.shape[1:] == (latents.channels, 8, 8, 8)
    inside = torch.stack([view["valid"][0] for view in views]) > 0.5
    mean, square = (part.movedim(1, 0)[:, inside].mean(1) for part in (means, means.square() + spreads.square()))
    torch.testing.assert_close(mean, torch.zeros(latents.channels).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(square, torch.ones(latents.channels).double(), atol=1e-4, rtol=0)
    assert latents.mask(1).channels == len(latents.facts["labels"]) + 1
    assert latents.facts["grid"] == {"spacing": [10.0, 10.0, 10.0], "size": [32, 32, 32]}
    assert not {item["subject"] for item in latents.items("training")} & {
        item["subject"] for item in latents.items("validation")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_skipped(
    tiny_stage: TinyStage, run: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(run)
    with caplog.at_level("INFO", logger="fibldm"):
        tiny_stage(stage, run).run()
    assert snapshot(run) == before
    assert f"{stage}: done already" in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_another_configuration_is_refused(tiny_stage: TinyStage, run: Path, stage: str) -> None:
    before = snapshot(run)
    with pytest.raises(FibldmError, match="made with another configuration .config::seed: 0 -> 5"):
        tiny_stage(stage, run, seed=5).run()
    assert snapshot(run) == before


def test_what_was_refused_before_its_first_checkpoint_claims_nothing(tiny_stage: TinyStage, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="must be divisible by 4"):
        tiny_stage("autoencoder", tmp_path / "run", patch=[18, 16, 16]).run()
    tiny_stage("autoencoder", tmp_path / "run").run()
    assert read_json(tmp_path / "run" / "autoencoder" / "done.json")["epochs"] == 1


def test_a_stage_of_no_epochs_is_refused(tiny_stage: TinyStage, tmp_path: Path) -> None:
    """And leaves no folder; an untrained stage has none."""
    with pytest.raises(FibldmError, match="trained needs at least 1 epoch; epochs is 0; .*autoencoder_as_given"):
        tiny_stage("autoencoder", tmp_path / "run", epochs=0).run()
    assert not (tmp_path / "run").exists()
    tiny_stage("autoencoder", tmp_path / "run", "autoencoder_identity", epochs=0).run()
    assert StageFolder(tmp_path / "run", "autoencoder").done()


def test_restart_trains_anew_and_what_was_built_on_it_is_refused(tiny_stage: TinyStage, run: Path) -> None:
    old = read_json(run / "autoencoder" / "done.json")["weights"]
    tiny_stage("autoencoder", run, seed=5, restart=True).run()
    assert read_json(run / "autoencoder.replaced-1" / "done.json")["weights"] == old
    assert read_json(run / "autoencoder" / "done.json")["weights"] != old
    with pytest.raises(FibldmError, match="must come from its autoencoder"):
        tiny_stage("diffusion", run).run()
    with pytest.raises(FibldmError, match="inputs::autoencoder"):
        tiny_stage("latents", run).run()


def test_more_epochs_go_on(tiny_stage: TinyStage, run: Path) -> None:
    tiny_stage("diffusion", run, epochs=3).run()
    rows = (run / "diffusion" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
    assert read_json(run / "diffusion" / "done.json")["epochs"] == 3
    assert "going on after epoch 1 of 3" in (run / "diffusion" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("latents", "fibldm train autoencoder"),
        ("diffusion", "fibldm encode"),
        ("controlnet", "fibldm encode"),
    ],
)
def test_a_stage_without_the_one_before_names_its_command(
    tiny_stage: TinyStage, tmp_path: Path, stage: str, command: str
) -> None:
    with pytest.raises(FibldmError, match=f"must be finished first; it was never started; run `{command}`"):
        tiny_stage(stage, tmp_path / "run").run()


def test_a_controlnet_without_its_base_names_its_command(tiny_stage: TinyStage, run: Path) -> None:
    shutil.rmtree(run / "diffusion")
    shutil.rmtree(run / "controlnet")
    with pytest.raises(FibldmError, match="run `fibldm train diffusion`"):
        tiny_stage("controlnet", run).run()


def another_autoencoder(run: Path, folder: Path) -> Path:
    """A run whose autoencoder has other weights, and latents that say so."""
    other = Path(shutil.copytree(run, folder))
    facts = read_json(other / "latents" / "latents.json")
    facts["space"]["autoencoder"] = "0" * 64
    write_json(other / "latents" / "latents.json", facts)
    return other


def test_latents_of_another_run_are_an_error(tiny_stage: TinyStage, run: Path, tmp_path: Path) -> None:
    other = another_autoencoder(run, tmp_path / "other")
    shutil.rmtree(run / "latents")
    shutil.copytree(other / "latents", run / "latents")
    with pytest.raises(FibldmError, match=r"must come from its autoencoder \(.{12}\); .* another one \(0{12}\)"):
        load_facts(run)
    with pytest.raises(FibldmError, match="run `fibldm encode --restart`"):
        tiny_stage("diffusion", run).run()


def test_a_single_latent_of_another_autoencoder_is_an_error(tiny_stage: TinyStage, run: Path) -> None:
    shutil.rmtree(run / "diffusion")
    file = next((run / "latents" / "training").iterdir())
    content = file.read_bytes()
    own = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["autoencoder"]
    file.write_bytes(content.replace(own.encode(), b"f" * 64))
    with pytest.raises(FibldmError, match=rf"the latents of .*{file.name} must come from the autoencoder"):
        tiny_stage("diffusion", run).run()


def test_another_checkpoint_in_the_place_of_the_best_is_an_error(run: Path) -> None:
    stage = StageFolder(run, "autoencoder")
    weights = stage.weights()
    weights["model"] = {name: value + 1 for name, value in weights["model"].items()}
    torch.save(weights, stage.checkpoints / "best.pt")
    with pytest.raises(FibldmError, match=r"best\.pt must be the one that the stage ended with"):
        stage.trained()


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_checkpoint_that_cannot_be_read_is_said_to_be_one(run: Path, damage: str) -> None:
    stage = StageFolder(run, "autoencoder")
    file = stage.checkpoints / "best.pt"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FibldmError, match=r"best\.pt must (exist|be a readable checkpoint)"):
        stage.trained()
