"""Minutes for all stages together: how they are shared, and what an interruption or an overrun changes."""

from pathlib import Path
from typing import Any

import pytest
from builders import STAGES

from fibldm.cli import run as fibldm
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.pipeline import train_steps
from fibldm.planning.timing import encoding_seconds
from fibldm.recipe import Recipe, TrainingStep
from fibldm.runs import BUDGET, StageFolder
from fibldm.runs.configuration import stage_configuration
from fibldm.training.shares import TotalBudget, note_encoding, shares_of

STEPS = [TrainingStep(stage, (), {}) for stage in STAGES]


def used(run: Path, stage: str, seconds: float, *, minutes: float | None = None) -> None:
    """A stage that has taken so long; finished if ``minutes`` are given."""
    StageFolder(run, stage).begin({"epochs": 1}, {})
    write_json(run / stage / BUDGET, {"seconds": seconds})
    if minutes is not None:
        write_json(run / stage / "done.json", {"epochs": 3, "minutes": minutes, "seconds": seconds})


def total(run: Path, minutes: float = 10.0, *, encoding: float = 60.0) -> TotalBudget:
    return TotalBudget(run, minutes, shares_of(STAGES), encoding)


def test_shares_are_those_of_the_stages_that_are_trained() -> None:
    assert shares_of(STAGES) == {"autoencoder": 0.3, "diffusion": 0.5, "controlnet": 0.2}
    assert shares_of(STAGES[:3]) == {"autoencoder": 0.35, "diffusion": 0.65}
    assert list(shares_of(STAGES[:3], {"diffusion": 3, "autoencoder": 1}).items()) == [
        ("autoencoder", 1.0),
        ("diffusion", 3.0),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"autoencoder": 0.5}, "every stage that is trained must have a share of the minutes; diffusion has none"),
        (
            {"autoencoder": 1, "diffusion": 1, "latents": 1},
            "share of the minutes .* autoencoder, diffusion; got 'latents'",
        ),
        ({"autoencoder": 1, "diffusion": 0}, "shares of the minutes must be numbers above 0"),
    ],
)
def test_other_shares_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        shares_of(STAGES[:3], given)


def test_what_a_stage_leaves_is_shared_among_those_after_it(tmp_path: Path) -> None:
    """10 minutes, of which the latents are expected to take one and then take two."""
    assert total(tmp_path).minutes_of("autoencoder") == pytest.approx(0.3 * 9)
    used(tmp_path, "autoencoder", 180.0, minutes=2.7)
    used(tmp_path, "latents", 120.0)
    assert total(tmp_path).minutes_of("diffusion") == pytest.approx((10 - 5) * 0.5 / 0.7, abs=1e-4)
    used(tmp_path, "diffusion", 300.0, minutes=3.6)
    assert total(tmp_path, 12.0).minutes_of("controlnet") == pytest.approx(2.0)
    assert total(tmp_path).seconds == 600.0


def test_a_stage_that_is_interrupted_keeps_its_minutes(tmp_path: Path) -> None:
    """What it used itself counts in its own budget."""
    before = total(tmp_path).minutes_of("autoencoder")
    used(tmp_path, "autoencoder", 100.0)
    assert total(tmp_path).minutes_of("autoencoder") == before
    used(tmp_path, "autoencoder", 150.0, minutes=before)
    used(tmp_path, "latents", 30.0)
    assert total(tmp_path).minutes_of("autoencoder") == before
    used(tmp_path, "diffusion", 20.0)
    assert total(tmp_path).minutes_of("diffusion") == pytest.approx(7 * 0.5 / 0.7, abs=1e-4)


def test_more_minutes_go_to_stages_that_nothing_was_made_from(tmp_path: Path) -> None:
    used(tmp_path, "autoencoder", 150.0, minutes=2.7)
    assert total(tmp_path, 20.0).minutes_of("autoencoder") == pytest.approx(0.3 * 19)
    used(tmp_path, "latents", 30.0, minutes=0.0)
    assert total(tmp_path, 20.0).minutes_of("autoencoder") == 2.7
    write_json(tmp_path / "autoencoder" / "done.json", {"epochs": 50})  # by epochs
    assert total(tmp_path, 20.0).minutes_of("autoencoder") == 2.5
    assert StageFolder(tmp_path, "autoencoder").begin({"epochs": 100, "minutes": 2.5}, {}) == "done"
    assert total(tmp_path, 20.0).minutes_of("diffusion") == pytest.approx(17 * 0.5 / 0.7, abs=1e-4)


def test_no_time_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="time for autoencoder; .* used 0, and making the latents takes about 700 s"):
        total(tmp_path, encoding=700.0).minutes_of("autoencoder")
    used(tmp_path, "autoencoder", 400.0, minutes=2.7)
    used(tmp_path, "latents", 200.0)
    with pytest.raises(FibldmError, match="of 10 minutes the stages before used 10; give more minutes"):
        total(tmp_path).minutes_of("diffusion")


def test_steps_are_trained_with_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And say how much of the minutes was used; what was expected of the latents is kept for the next time."""
    given: dict[str, float | None] = {}

    def run(step: TrainingStep, work: Path, run: Path, *, minutes: float | None = None) -> str:
        given[step.name] = minutes
        used(run, step.name, 60 * minutes if minutes else 30.0, minutes=minutes or 0.0)
        return step.name

    monkeypatch.setattr(TrainingStep, "run", run)
    monkeypatch.setattr("fibldm.pipeline.encoding_seconds", lambda *_: 60.0)
    monkeypatch.setattr(TrainingStep, "configuration", lambda *_: Recipe())
    monkeypatch.setattr(Recipe, "parser", lambda _: None, raising=False)
    said: list[str] = []
    assert train_steps(STEPS, tmp_path, tmp_path, minutes=10.0, say=said.append) == list(STAGES)
    assert given == {
        "autoencoder": pytest.approx(2.7),
        "latents": None,
        "diffusion": pytest.approx(6.8 * 5 / 7, abs=1e-3),
        "controlnet": pytest.approx(6.8 * 2 / 7, abs=1e-3),
    }
    assert said[0] == "autoencoder: 2.7 of 10 minutes" and said[1] == "latents"
    assert said[-1] == "training took 10.0 of 10 minutes"
    assert read_json(tmp_path / BUDGET) == {"encoding_seconds": 60.0}
    before = dict(given)
    monkeypatch.setattr("fibldm.pipeline.encoding_seconds", lambda *_: pytest.fail("it is known"))
    train_steps(STEPS, tmp_path, tmp_path, minutes=10.0, say=said.append)
    assert given == before
    assert train_steps(STEPS, tmp_path, tmp_path, say=said.append) == list(STAGES)
    assert set(given.values()) == {None}


def test_a_run_that_stopped_before_its_latents_shares_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder is done, and must not be given what was kept for the latents."""
    given: dict[str, float | None] = {}

    def run(step: TrainingStep, work: Path, run: Path, *, minutes: float | None = None) -> str:
        given.setdefault(step.name, minutes)
        if step.name == "latents":
            raise KeyboardInterrupt
        return step.name

    monkeypatch.setattr(TrainingStep, "run", run)
    note_encoding(tmp_path, 60.0)
    for _ in range(2):
        given.clear()
        with pytest.raises(KeyboardInterrupt):
            train_steps(STEPS, tmp_path, tmp_path, minutes=10.0)
        assert given == {"autoencoder": pytest.approx(2.7), "latents": None}
        used(tmp_path, "autoencoder", 150.0, minutes=2.7)


def test_latents_take_about_what_their_first_case_says(phantom_work: Path, tiny_data: Path, tiny_run: Path) -> None:
    """More views are more of them; the second time a run took is counted with the first."""
    parsers = [
        stage_configuration(
            stage, work=phantom_work, run_dir=Path("none"), configs=[str(tiny_data), "tiny"], overrides=more
        ).parser()
        for stage, more in [("autoencoder", {}), ("latents", {}), ("latents", {"views": 50})]
    ]
    few, many = (encoding_seconds(parsers[0], latents) for latents in parsers[1:])
    assert 0 < few < many
    assert StageFolder(tiny_run, "latents").seconds() > 0


# --- recipes


def test_minutes_of_a_recipe_take_the_place_of_its_epochs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("configs: [data_lung_ct]\ndiffusion: {epochs: 3, mask_detail: 4}\nshares: {diffusion: 0.8}\n")
    recipe = Recipe.read(str(file), overrides={"minutes": 30, "shares::autoencoder": 0.2, "controlnet": None})
    assert recipe.minutes == 30 and shares_of(STAGES[:3], recipe.shares) == {"autoencoder": 0.2, "diffusion": 0.8}
    assert [dict(step.overrides) for step in recipe.stages()] == [{}, {}, {"mask_detail": 4}]
    assert dict(Recipe.read(str(file), overrides={}).stages()[2].overrides) == {"epochs": 3, "mask_detail": 4}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"minutes": 5, "diffusion::epochs": 3},
            "so many epochs; got minutes 5 and epochs 3 of diffusion",
        ),
        ({"minutes": 0}, "minutes must be a number above 0; got 0"),
        ({"minutes": "soon"}, "step of a recipe minutes must be a number or null"),
        ({"shares": {"autoencoder": "half"}}, "step of a recipe shares must be a mapping from a text to a number"),
    ],
)
def test_mistakes_with_minutes_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        Recipe.read(None, configs=["data_chest_phantom"], overrides=overrides)


def test_the_pipeline_takes_minutes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["pipeline", str(tmp_path), "--out", str(tmp_path / "out"), "--license", "CC0-1.0"]
    given += ["--config", "data_chest_phantom", "--minutes", "5"]
    assert fibldm([*given, "--set", "diffusion::epochs=3"]) == 2
    assert "got minutes 5.0 and epochs 3 of diffusion" in " ".join(capsys.readouterr().err.split())
    assert fibldm([*given, "--set", "shares::latents=1"]) == 2
    assert "stage with a share of the minutes must be one of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
