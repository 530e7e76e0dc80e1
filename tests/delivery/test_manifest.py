"""The manifest: what changed in a bundle since its export is named before anything that it holds is run."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fibldm.cli import run
from fibldm.delivery.verify import CHECKS, run_checks, verify
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Evaluated
from fibldm.files import read_json, write_json
from fibldm.importing.import_weights import ImportSettings, import_weights
from fibldm.manifest import MANIFEST, check_manifest, differences, write_manifest
from fibldm.synthesis import Synthesizer
from fibldm.synthesis.bundle import open_bundle
from fibldm.training.initialise import initialise

BUNDLES = Path(__file__).parents[2] / "bundles"
SHIPPED = BUNDLES / "hippocampus_mri"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """What lies in a bundle's folder, and nothing that could be run."""
    root = tmp_path / "small"
    for name in (
        "LICENSE",
        "configs/a.json",
        "docs/README.md",
        "models/w.safetensors",
        "export.yaml",
        "masks/m.nii.gz",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    write_manifest(root)
    return root


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A bundle with an expression in ``inference.json`` that was not there when it was exported."""
    root = tmp_path / "bundle"
    shutil.copytree(SHIPPED, root)
    file = root / "configs" / "inference.json"
    content = read_json(file)
    content["count"] = f"$1 + bool(__import__('pathlib').Path({str(tmp_path / 'planted')!r}).touch())"
    write_json(file, content)
    return root


def test_the_files_of_a_bundle_have_their_hashes(small: Path) -> None:
    told = read_json(small / MANIFEST)["sha256"]
    assert list(told) == ["LICENSE", "configs/a.json", "docs/README.md", "models/w.safetensors"]
    assert told["LICENSE"] == hashlib.sha256(b"LICENSE").hexdigest()
    assert differences(small) == [] and check_manifest(small) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "configs/a.json").write_text("other"), "changed: configs/a.json"),
        (lambda root: (root / "docs/README.md").write_text("other"), "changed: docs/README.md"),
        (lambda root: (root / "configs/b.yaml").write_text(""), "added: configs/b.yaml"),
        (lambda root: (root / "scipy.py").write_text(""), "added: scipy.py"),
        (lambda root: (root / "masks/highdicom.SO").write_text(""), "added: masks/highdicom.SO"),
        (lambda root: (root / "LICENSE").unlink(), "missing: LICENSE"),
        (lambda root: (root / "models/w.safetensors").rename(root / "models/v"), "added: models/v"),
        (lambda root: (root / "models/link").symlink_to(root.parent), "added: models/link"),
        (lambda root: (root / "masks/n.nii.gz").write_text(""), None),
        (lambda root: (root / "export.yaml").write_text("title: other"), None),
        (lambda root: (root / "configs/.DS_Store").write_text(""), None),
    ],
)
def test_what_changed_was_added_or_is_missing_is_named(
    small: Path, change: Callable[[Path], object], message: str | None
) -> None:
    """But not what people keep beside a bundle: masks, volumes, words for the next export."""
    change(small)
    if message is None:
        assert check_manifest(small) == []
        return
    with pytest.raises(FibldmError, match=f"must be those that were exported; .*{message}.*--trust to go on"):
        check_manifest(small)
    assert message in check_manifest(small, trust=True)


def test_without_a_manifest_it_is_said_that_nobody_can_tell(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bundles of before, and of others; one that says that it had a manifest is refused."""
    (small / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert check_manifest(small) == []
    assert "has no manifest.json: whether files changed since its export cannot be told" in caplog.text
    with pytest.raises(FibldmError, match=r"missing: manifest\.json"):
        check_manifest(small, named=True)
    (small / MANIFEST).write_text('{"sha256": [1]}')
    with pytest.raises(FibldmError, match="must hold the SHA-256 of files by name"):
        check_manifest(small)


def test_every_door_refuses_a_bundle_that_was_changed(planted: Path, tmp_path: Path) -> None:
    """Before anything is run, and with the name of what changed; `--trust` lifts it."""
    doors: dict[str, Callable[[], object]] = {
        "verify": lambda: list(verify(planted)),
        "synthesize": lambda: Synthesizer.from_bundle(planted),
        "evaluate": lambda: Evaluated.open_bundle(planted, tmp_path, out=tmp_path / "out"),
        "import": lambda: import_weights(planted, tmp_path / "imported", ImportSettings("CC0-1.0")),
        "fine-tuning": lambda: initialise(torch.nn.Linear(1, 1), planted),
        "one of its files": lambda: initialise(torch.nn.Linear(1, 1), planted / "models" / "network.safetensors"),
        "an archive": lambda: Synthesizer.from_bundle(shutil.make_archive(str(tmp_path / "a"), "zip", planted)),
    }
    for name, door in doors.items():
        with pytest.raises(FibldmError, match=r"must be those that were exported; changed: configs/inference\.json"):
            door()
            pytest.fail(name)  # of the door that lets it in
    assert not (tmp_path / "planted").exists() and not (tmp_path / "imported").exists()
    with open_bundle(planted, trust=True) as opened:
        assert opened.changed == ["changed: configs/inference.json"]
    with pytest.raises(FibldmError, match="the weights of .* must fit the network"):
        initialise(torch.nn.Linear(1, 1), planted, trust=True)


def test_what_was_trusted_stands_in_the_sidecar(planted: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = Synthesizer.from_bundle(planted, trust=True)
    assert made.source["changed"] == ["changed: configs/inference.json"]
    assert "--trust: files of" in caplog.text and "changed: configs/inference.json" in caplog.text
    assert "changed" not in Synthesizer.from_bundle(SHIPPED).source


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_trust_runs_what_was_planted_and_says_so(planted: Path, tmp_path: Path) -> None:
    checks = {
        check.name: check
        for check in run_checks(planted, tmp_path / "trial", ("manifest", "inference properties"), trust=True)
    }
    assert checks["manifest"].saw == "trusted nevertheless: changed: configs/inference.json"
    assert checks["inference properties"].ok and (tmp_path / "planted").exists()
    (untrusted,) = run_checks(planted, tmp_path / "trial", ("manifest",))
    assert not untrusted.ok and "changed: configs/inference.json" in untrusted.saw


class AllWell:
    """Stands for the process of the checks."""

    returncode = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.stdout = [json.dumps({"name": name, "ok": True, "saw": "it"}) for name in CHECKS]

    def __enter__(self) -> "AllWell":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_command_says_by_name_what_changed_and_takes_what_was_meant(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fibldm.delivery.verify.subprocess.Popen", AllWell)
    assert run(["verify", str(planted)]) == 2
    assert "changed: configs/inference.json" in capsys.readouterr().err and not (tmp_path / "planted").exists()
    assert run(["verify", str(planted), "--trust"]) == 0
    assert "changed: configs/inference.json" in capsys.readouterr().err
    assert run(["verify", str(planted), "--update-manifest"]) == 0
    assert "manifest.json is written\n  changed: configs/inference.json" in capsys.readouterr().out
    assert differences(planted) == []


@pytest.mark.parametrize("name", sorted(file.parent.name for file in BUNDLES.glob("*/configs")))
def test_bundles_that_come_along_are_as_exported(name: str) -> None:
    assert differences(BUNDLES / name) == []
    assert "configs/inference.json" in json.dumps(read_json(BUNDLES / name / MANIFEST))


def test_an_export_writes_it(tiny_run: Path, tmp_path: Path) -> None:
    """Weights of either precision, and the code that a person put beside them."""
    from fibldm.delivery.export import ExportSettings, export

    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "mine.py").write_text("")
    written = export(tiny_run, tmp_path / "half", ExportSettings("CC0-1.0", half=True))
    assert MANIFEST in written["files"]
    told = read_json(tmp_path / "half" / MANIFEST)["sha256"]
    assert {"LICENSE", "mine.py", "models/model.pt", "models/network.safetensors", "docs/README.md"} <= told.keys()
    assert differences(tmp_path / "half") == []
