"""What every command shares: help, errors, exit codes and --json; and ``fibldm doctor``."""

import inspect
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fibldm.doctor
from fibldm import __version__
from fibldm.cli import _options as command_options
from fibldm.cli import app, run
from fibldm.cli.edit import edit
from fibldm.cli.output import with_options
from fibldm.cli.synthesize import synthesize
from fibldm.errors import FibldmError

ERRORS = {
    "bad-input": FibldmError("volume size (100, 96, 64) must be divisible by 8", "pad with DivisiblePadd(k=8)"),
    "no-remedy": FibldmError("spacing must be positive; got -1.0"),
    "bug": ValueError("first line\nsecond line"),
    "interrupt": KeyboardInterrupt(),
}


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        print("said before")
        raise error

    return command


@pytest.fixture(autouse=True)
def failing_commands() -> Iterator[None]:
    """One command for each error above, for the length of a test."""
    before = list(app.registered_commands)
    for name, error in ERRORS.items():
        app.command(name)(raising(error))
    yield
    app.registered_commands[:] = before


def test_help_names_the_commands_and_loads_neither_torch_nor_monai() -> None:
    code = (
        "import sys, fibldm.cli; code = fibldm.cli.run(['--help']); loaded = {'torch', 'monai'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "doctor" in done.stdout


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: fibldm" in capsys.readouterr().out


def test_lines_of_a_log_are_there_when_they_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"

    def slow(_: list[str]) -> int:
        print("the first line")
        assert log.read_text() == "the first line\n"
        return 0

    with log.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr("fibldm.cli.run", slow)
        with pytest.raises(SystemExit, match="0"):
            fibldm.cli.main()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fibldm {__version__}\n"


@pytest.mark.parametrize(
    ("command", "code", "paragraph"),
    [
        ("bad-input", 2, "volume size (100, 96, 64) must be divisible by 8; pad with DivisiblePadd(k=8)"),
        ("no-remedy", 2, "spacing must be positive; got -1.0"),
        ("bug", 1, "unexpected error: ValueError: first line; run again with --debug to see the traceback"),
        ("interrupt", 130, "interrupted; run the same command again to go on"),
    ],
)
def test_an_error_is_one_paragraph(capsys: pytest.CaptureFixture[str], command: str, code: int, paragraph: str) -> None:
    assert run([command]) == code
    printed = capsys.readouterr()
    assert printed.err == f"fibldm: {paragraph}\n"
    assert printed.out == "said before\n"


def test_fields_in_an_error_of_the_library_become_options_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in (
        (["--layout", "tiff"], "fibldm: --layout must be one of auto, "),
        (["--labels", "x"], "fibldm: --labels must be VALUE=NAME,... "),
        (["--workers", "0"], "fibldm: --workers must be at least 1; got 0"),
    ):
        assert run(["prepare", str(tmp_path), "--out", str(tmp_path / "work"), *given]) == 2
        assert capsys.readouterr().err.startswith(message)
    given = ["import-weights", str(tmp_path), "--out", str(tmp_path / "out"), "--license", "MIT", "--kind", "gan"]
    assert run(given) == 2
    assert capsys.readouterr().err.startswith("fibldm: --kind must be one of auto, ")
    assert command_options(given)["arguments"] == "--set" and command_options(given)["fixed"] == "--fix"
    options = {"skip_bad": "--skip-bad"}
    text = "leave them out with `skip_bad`, or run `fibldm encode --restart`; `unknown` stays"
    assert with_options(text, options) == text.replace("`skip_bad`", "--skip-bad")


def test_an_error_as_json_is_the_only_line_of_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bad-input", "--json"]) == 2
    printed = capsys.readouterr()
    message, remedy = ERRORS["bad-input"].args[0], "pad with DivisiblePadd(k=8)"
    assert json.loads(printed.out) == {"ok": False, "error": {"message": message, "remedy": remedy}}
    assert printed.err.startswith("said before\n")


@pytest.mark.parametrize("arguments", [["--debug", "bug"], ["bug", "--debug"]])
def test_debug_lets_the_error_through(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="first line"):
        run(arguments)


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctr"]) == 2
    assert "'doctor'" in capsys.readouterr().err


def test_an_unknown_option_is_bad_input_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--jsn", "--json"]) == 2
    assert "--jsn" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_doctor_prints_a_line_per_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fibldm.doctor.diagnose())
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)


def test_every_package_of_every_extra_has_an_exact_version() -> None:
    """One install command gives everybody the same, within the ranges that are promised."""
    root = Path(__file__).parents[2]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"mlflow", "wandb", "onnx", "dicom-codecs"} <= extras.keys()
    for requirement in map(Requirement, [*project["dependencies"], *sum(extras.values(), [])]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "doctor"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] is True
    assert {"FibLDM", "Python", "torch", "monai", "CPU", "memory", "disk"} <= {
        finding["name"] for finding in result["findings"]
    }


@pytest.mark.parametrize("version", [None, "1.5.0", "1.7.0"])
def test_doctor_refuses_a_missing_or_unsupported_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    installed = fibldm.doctor._installed_version
    monkeypatch.setattr(
        fibldm.doctor, "_installed_version", lambda name: version if name == "monai" else installed(name)
    )
    assert run(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    (problem,) = [finding for finding in result["findings"] if finding["level"] == "problem"]
    assert problem["name"] == "monai"
    assert problem["remedy"].startswith('pip install "monai')
    assert (version or "missing") in problem["value"]


@pytest.mark.parametrize(("exists", "level"), [(True, "ok"), (False, "note")])
def test_doctor_looks_for_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exists: bool, level: str) -> None:
    monkeypatch.setenv("FIBLDM_DATA", str(tmp_path if exists else tmp_path / "absent"))
    (finding,) = [finding for finding in fibldm.doctor.diagnose() if finding.name == "FIBLDM_DATA"]
    assert finding.level == level
    assert str(tmp_path) in finding.value


@pytest.mark.parametrize(
    "given",
    [
        ["--spacing", "20,30,40"],
        ["--spacing", "20", "30", "40"],
        ["--spacing=20,30,40"],
        ["--spacing", "20, 30, 40"],
        ["--spacing", "20,", "30,", "40"],
        ["--spacing", "20 30 40"],
        ["--spacing", "[20, 30, 40]"],
    ],
)
def test_several_numbers_come_with_commas_or_spaces(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    asked = []
    monkeypatch.setattr("fibldm.phantoms.phantoms.write_phantoms", lambda out, **options: asked.append(options) or [])
    assert run(["phantoms", *given, "--out", "never", "--seed", "3"]) == 0
    assert (asked[0]["spacing"], asked[0]["seed"]) == ((20.0, 30.0, 40.0), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["phantoms", "--out", "x", "--spacing", "1,2"],
            "--spacing needs 3 numbers, such as 1,2,3 or 1 2 3; got '1,2'",
        ),
        (["prepare", "x", "--out", "y", "--window", "-5,0,5"], "--window needs 2 numbers"),
        (["prepare", "x", "--out", "y", "--window", "low,high"], "valid number"),
        (["phantoms", "--out", "x", "--spacing"], "requires 3 arguments"),
    ],
)
def test_another_count_of_numbers_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_window_that_begins_below_zero_comes_with_a_comma(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prepare(source: Path, out: Path, settings: object, **_: object) -> None:
        asked.append((settings.window, settings.spacing))  # type: ignore[attr-defined]
        raise FibldmError("seen")

    monkeypatch.setattr("fibldm.datasets.preparation.prepare", prepare)
    for window in (["--window", "-1000,300"], ["--window", "-1000", "300"], ["--window=-1000,300"]):
        assert run(["prepare", "x", "--out", "y", *window, "--spacing", "1,1,2.5"]) == 2
    assert asked == [((-1000.0, 300.0), (1.0, 1.0, 2.5))] * 3


def test_memory_that_is_not_enough_is_told_by_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 2.00 GiB for an array")

    monkeypatch.setattr("fibldm.phantoms.phantoms.write_phantoms", write)
    assert run(["phantoms", "--out", "never"]) == 2
    assert "must be enough; 2.15 GB more was asked for" in capsys.readouterr().err


def test_edit_and_synthesize_state_what_they_share_once() -> None:
    edited, synthesized = (inspect.signature(command).parameters for command in (edit, synthesize))
    shared = set(edited) & set(synthesized) - {"out", "count", "strength", "box"}  # these mean other things
    assert {"run", "bundle", "steps", "guidance", "covariate", "device"} < shared
    for name in shared:
        assert edited[name].annotation is synthesized[name].annotation, name
        assert edited[name].default == synthesized[name].default, name


def test_every_measurement_is_a_command_with_the_options_that_it_uses() -> None:
    import fibldm.cli.evaluate as module
    from fibldm.evaluation.measurements import DEFAULT_MEASUREMENTS, MEASUREMENTS

    commands = typer.main.get_command(module.evaluate).commands  # type: ignore[attr-defined]
    assert list(commands) == list(module.COMMANDS) and {*commands} == {*MEASUREMENTS, module.EVERYTHING}
    options = {name: [part.name for part in command.params] for name, command in commands.items()}
    shared = ["data", "synthetic", "run", "bundle", "out", "settings", "device", "trust", "weights"]
    engine = ["workers", "cluster"]
    assert options["faithfulness"] == [*shared, *engine]
    assert options["realism"] == [*shared, "perceptual", *engine] == options["all"]
    assert options["reconstruction"] == [*shared[:1], *shared[2:8], "perceptual"]
    assert options["ct"] == [*shared[:5], "trust", "weights", "lungs"] and options["spread"] == options["ct"][:-1]
    told = commands["all"].help
    assert all(name in told for name in MEASUREMENTS if name not in DEFAULT_MEASUREMENTS)
