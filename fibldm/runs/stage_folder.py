"""Run folders: what a stage was made from, whether it is done, and going on where it stopped."""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import hash_value, read_json, read_yaml, write_json, write_text
from fibldm.locks import alone
from fibldm.runs.fingerprints import decisive, flatten, hash_weights
from fibldm.runs.renamed import current
from fibldm.runs.stages import kind_of
from fibldm.verbatim import verbatim

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

Progress = Literal["new", "resume", "done"]

BUDGET = "budget.json"
_CLAIM = ("config.yaml", "inputs.json", "log.txt", BUDGET)
_EVENTS = "events.out.tfevents"  # of TensorBoard


class StageConflict(FibldmError):
    """A stage lies there that was made with another configuration or from other inputs."""


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run: ``RUN/<name>`` with ``config.yaml``, ``inputs.json``, ``checkpoints/`` and ``done.json``.

    Attributes:
        run_dir: the run folder.
        name: one of the table of stages; "segmenter/<more>" is one of several.
    """

    run_dir: Path
    name: str

    @property
    def path(self) -> Path:
        return Path(self.run_dir) / self.name

    @property
    def command(self) -> str:
        """What makes the stage on the command line."""
        return kind_of(self.name).command

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def alone(self, part: str = "", patience: float = 0.0) -> AbstractContextManager[None]:
        """Keep other processes from writing the stage while a block runs.

        Args:
            part: which one of several that share the stage; each part is for one process.
            patience: seconds to wait for another one.

        Raises:
            FibldmError: another process writes it; says which one.
        """
        file = Path(self.run_dir) / f".{self.name.replace('/', '-')}{part}.lock"
        return alone(
            file, f"{self.path}{part}", "wait until that has ended, or use another run folder", patience=patience
        )

    def begin(self, config: dict[str, Any], inputs: dict[str, str], *, restart: bool = False) -> Progress:
        """Claim the folder for a configuration and what it builds on.

        Args:
            config: the configuration with overrides, as plain values; "epochs" and "minutes", where there are some, are
                numbers.
            inputs: fingerprints of the data and of the stages before.
            restart: move what was made with another configuration aside instead of refusing.

        Returns:
            "done" if the same was finished for as many epochs or minutes, "resume" if it was begun, else "new".

        Raises:
            FibldmError: the folder holds a stage of another configuration or other inputs; names the differences.
        """
        config = json.loads(json.dumps(config, default=str))  # tuples and paths as they are read back
        if self.path.exists() and restart:
            self.path.rename(_free_name(self.path))
        made_from, file = {"config": decisive(config), "inputs": inputs}, self.path / "inputs.json"
        if file.exists() and not self._is_untouched():
            self._refuse_change(_made_from(file), made_from)
            if self._has_enough(config):
                return "done"
            # what goes on is not done: a later stage must not read weights that change
            (self.path / "done.json").unlink(missing_ok=True)
            write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            return "resume"
        if file.exists() and _made_from(file) != made_from:
            (self.path / BUDGET).unlink(missing_ok=True)  # the time was another stage's
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_json(file, made_from)
        return "new"

    @contextmanager
    def kept_until_begun(self, restart: bool) -> Iterator[None]:
        """Put back what a restart moves aside, where the new stage breaks off before it keeps anything."""
        aside = _free_name(self.path) if restart and self.path.exists() else None
        try:
            yield
        except BaseException:
            if aside is not None and aside.exists() and self._is_untouched():
                shutil.rmtree(self.path, ignore_errors=True)
                aside.rename(self.path)
            raise

    def finish(self, *, epochs: int, **facts: Any) -> None:
        """Mark the stage as done with the fingerprint of what it was made from."""
        made_from = read_json(self.path / "inputs.json")
        write_json(self.path / "done.json", {"epochs": epochs, "made_from": hash_value(made_from), **facts})

    def done(self) -> dict[str, Any] | None:
        """The content of ``done.json``, or None while the stage is not finished."""
        file = self.path / "done.json"
        return read_json(file) if file.exists() else None

    def seconds(self) -> float:
        """What the stage has taken so far: as it was counted, or else that of the epochs in ``metrics.csv``."""
        budget, metrics = self.path / BUDGET, self.path / "metrics.csv"
        counted = [content for content in (self.done(), read_json(budget) if budget.exists() else None) if content]
        rows = csv.DictReader(metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else [])
        epochs = sum(float(row["seconds"]) for row in rows)
        return max(epochs, *(float(content.get("seconds", 0.0)) for content in counted), 0.0)

    def require(self) -> dict[str, Any]:
        """The content of ``done.json``.

        Raises:
            FibldmError: the stage is not finished.
        """
        done = self.done()
        if done is None:
            raise FibldmError(
                f"stage {self.name!r} of {self.run_dir} must be finished first; "
                + ("it is not" if self.path.exists() else "it was never started"),
                f"run `{self.command}`",
            )
        return done

    def component(self, key: str, **overrides: Any) -> Any:
        """Build one part of the stage's configuration, such as its network, from ``config.yaml``.

        Raises:
            FibldmError: what it is made from is refused, such as a file that is gone.
        """
        from fibldm.runs.causes import unwrapped

        with unwrapped():
            return self.parser(**overrides).get_parsed_content(key)

    def parser(self, **overrides: Any) -> "ConfigParser":
        """The stage's configuration, from ``config.yaml``."""
        from fibldm.runs.locator import parser_of

        config = current(read_yaml(self.path / "config.yaml"))
        return parser_of({**config, "run_dir": verbatim(str(self.run_dir)), **overrides})

    def trained(self, checkpoint: str = "best", **overrides: Any) -> Any:
        """The stage's network with the weights of a checkpoint, on the CPU and in evaluation mode.

        Args:
            checkpoint: "best", or one that ``keep_every`` kept, such as "epoch_0010".
            overrides: keys of the configuration to build it with.

        Raises:
            FibldmError: the stage is not finished, there is no such checkpoint, or the best weights are not those it
                ended with.
        """
        done, weights = self.require(), self.weights(checkpoint)["model"]
        if checkpoint == "best" and hash_weights(weights) != done["weights"]:
            raise FibldmError(
                f"{self.checkpoints / 'best.pt'} must be the one that the stage ended with; it was replaced",
                f"put it back, or delete {self.path} and run `{self.command}` again",
            )
        network = self.component("network_def", **overrides)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise FibldmError(f"the weights of {self.path} must fit its config.yaml; {error}") from error
        return network.eval()

    def weights(self, name: str = "best") -> dict[str, Any]:
        """The tensors of a checkpoint, on the CPU: all but ``last`` hold ``model`` (EMA weights), ``epoch``, ``loss``.

        Raises:
            FibldmError: the file is missing or cannot be read.
        """
        import torch

        kept = sorted(file.stem for file in self.checkpoints.glob("epoch_*.pt"))
        if name not in ("best", "last", *kept):
            raise unknown_choice("checkpoint", name, ("best", *kept))
        file = self.checkpoints / f"{name}.pt"
        try:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise FibldmError(f"{file} must exist", f"run `{self.command}`") from error
        except Exception as error:
            raise FibldmError(f"{file} must be a readable checkpoint; {error}", "train this stage again") from error
        return content

    def _has_enough(self, config: Mapping[str, Any]) -> bool:
        """Whether the stage is done, and for as long as the configuration asks for."""
        done, epochs, minutes = self.done(), config.get("epochs", 0), config.get("minutes")
        if done is None or minutes is None or not epochs:
            return done is not None and done.get("passes", done["epochs"]) >= epochs
        return done.get("minutes", 0) >= minutes or self.seconds() >= 60 * minutes

    def _is_untouched(self) -> bool:
        """Whether the stage was claimed, and then refused before it kept anything."""
        files = (file.name for file in self.path.rglob("*") if file.is_file())
        return all(name in _CLAIM or name.startswith(_EVENTS) for name in files)

    def _refuse_change(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = flatten(before), flatten(now)
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            shown = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:6])
            more = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise StageConflict(
                f"{self.path} was made with another configuration ({shown}{more})",
                "use another run folder, take the change back, or give --restart to begin this stage anew "
                "(the old one is kept beside it)",
            )


def load_facts(run_dir: str | Path) -> dict[str, Any]:
    """What the latents of a run fix for all later stages: compression, labels, grid, intensity, scale, files.

    Raises:
        FibldmError: the latents are not finished, or were made by another autoencoder than the run's.
    """
    StageFolder(Path(run_dir), "latents").require()
    facts: dict[str, Any] = read_json(Path(run_dir) / "latents" / "latents.json")
    autoencoder = StageFolder(Path(run_dir), "autoencoder").require()["weights"]
    if facts["space"]["autoencoder"] != autoencoder:
        raise FibldmError(
            f"the latents of {run_dir} must come from its autoencoder ({autoencoder[:12]}); "
            f"they were made by another one ({facts['space']['autoencoder'][:12]})",
            "run `fibldm encode --restart`, or put the autoencoder back that they were made with",
        )
    return facts


def _made_from(file: Path) -> dict[str, Any]:
    """The content of ``inputs.json``, in the names of today."""
    content = read_json(file)
    return {**content, "config": current(content["config"])}


def _free_name(path: Path) -> Path:
    return next(name for n in range(1, 10_000) if not (name := path.with_name(f"{path.name}.replaced-{n}")).exists())
