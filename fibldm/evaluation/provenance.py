"""How the synthetic volumes that are measured were drawn, as their sidecars say: a figure is of one sampling."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError, some_of
from fibldm.files import read_json
from fibldm.synthesis import SamplingSettings
from fibldm.typed_settings import counted
from fibldm.volumes.writer import sidecar, volume_stem

_SHORT = 12  # of a fingerprint, in messages
_SHORTEST = 8  # of one that is asked for
_SHOWN = 3  # volumes in one message

_Said = Mapping[str, Any]
"""The content of a sidecar."""


@dataclass(frozen=True)
class Provenance:
    """How some volumes were drawn.

    Attributes:
        volumes: their number.
        weights: fingerprint of the network; None where that is unknown, as they have no sidecars.
        sampling: the settings by name, but for the seed; None where they are unknown.
        seeds: of all of them.
        network_calls: for each of them.
        other: the weights are not those of the run or bundle that is measured.
    """

    volumes: int
    weights: str | None = None
    sampling: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] = ()
    network_calls: int | None = None
    other: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it lies in ``metrics.json``."""
        sampling = None if self.sampling is None else dict(self.sampling)
        told = {"weights": self.weights, "sampling": sampling, "seeds": list(self.seeds)}
        return {"volumes": self.volumes, **told, "network_calls": self.network_calls}

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must not miss."""
        if self.weights is None:
            return ["sampling unknown: the volumes have no sidecars of fibldm synthesize."]
        return [f"volumes of other weights ({self.weights[:_SHORT]}) were measured, as asked."] if self.other else []

    @property
    def text(self) -> str:
        """In words."""
        if self.sampling is None:
            return "; ".join(self.notes)
        drawn = SamplingSettings.from_dict(self.sampling).described
        return "\n".join(
            [f"{counted(self.volumes, 'volume')}, drawn by {drawn}", *(f"note: {note}" for note in self.notes)]
        )


def read_provenance(
    files: Sequence[Path], own: Callable[[], Collection[str]], *, of: str | Path, weights: str | None = None
) -> Provenance:
    """How volumes were drawn.

    Args:
        files: the volumes, at least one.
        own: the fingerprints of what is measured; asked for only where volumes say theirs.
        of: what is measured, for messages.
        weights: the beginning of the fingerprint of other weights, whose volumes are measured instead.

    Raises:
        FibldmError: a volume was made with other weights, they were drawn in several ways, or only some of them have
            a sidecar.
    """
    if weights is not None and len(weights) < _SHORTEST:
        raise FibldmError(
            f"weights must be at least {_SHORTEST} digits of a fingerprint; got {weights!r}",
            "sidecars have it as source, weights",
        )
    said = {file: content for file in files if (content := _content(file)) is not None}
    if not said:
        return Provenance(len(files))
    if unsaid := [file for file in files if file not in said]:
        raise FibldmError(
            f"either all volumes of {files[0].parent} must have the sidecar that fibldm synthesize wrote, or none; "
            f"{_names(unsaid)} without",
            "put the sidecars beside them, or move these volumes away",
        )
    ours = own()
    _check_weights(said, ours, of, weights)
    _check_one_way(said)
    first = said[files[0]]
    try:
        SamplingSettings.from_dict(first["sampling"])
    except FibldmError as error:
        raise FibldmError(
            f"{sidecar(files[0])}: {error.message}", "measure it with the version of FibLDM that wrote it"
        ) from error
    return Provenance(
        len(files),
        first["source"]["weights"],
        {name: value for name, value in first["sampling"].items() if name != "seed"},
        tuple(sorted({content["sampling"].get("seed", 0) for content in said.values()})),
        first.get("network_calls"),
        other=first["source"]["weights"] not in ours,
    )


def _content(file: Path) -> _Said | None:
    """The sidecar of a volume; None where there is none that tells how it was drawn."""
    content = read_json(sidecar(file)) if sidecar(file).exists() else None
    if not isinstance(content, dict) or not isinstance(content.get("sampling"), dict):
        return None
    source = content.get("source")
    return content if isinstance(source, dict) and isinstance(source.get("weights"), str) else None


def _check_weights(said: Mapping[Path, _Said], own: Collection[str], of: str | Path, weights: str | None) -> None:
    def wanted(fingerprint: str) -> bool:
        return fingerprint in own if weights is None else fingerprint.startswith(weights)

    others = [file for file, content in said.items() if not wanted(content["source"]["weights"])]
    if not others:
        return
    ours = ", ".join(fingerprint[:_SHORT] for fingerprint in own) or "none is trained to the end"
    expected = f"with the weights of {of} ({ours})" if weights is None else f"with the weights {weights}"
    theirs = said[others[0]]
    chosen = "".join(f", {name} {value}" for name, value in theirs.get("choice", {}).items())
    raise FibldmError(
        f"volumes must be made {expected}; {_names(others)} with others "
        f"({theirs['source']['weights'][:_SHORT]}{chosen})",
        "synthesize with the weights that are measured into another folder, or give "
        f"--weights {theirs['source']['weights'][:_SHORT]} to measure those",
    )


def _check_one_way(said: Mapping[Path, _Said]) -> None:
    ways = {file: _way(content) for file, content in said.items()}
    differing = []
    for name in dict.fromkeys(name for way in ways.values() for name in way):
        values: dict[str, list[Path]] = {}
        for file, way in ways.items():
            values.setdefault(str(way.get(name, "not said")), []).append(file)
        if len(values) > 1:
            differing.append(f"{name} is " + ", ".join(f"{value} ({_names(own)})" for value, own in values.items()))
    if differing:
        raise FibldmError(
            f"volumes of {next(iter(said)).parent} must be drawn in one way, as a figure is of one sampling; "
            + "; ".join(differing),
            "give each sampling a folder of its own",
        )


def _way(content: _Said) -> dict[str, Any]:
    settings = {name: value for name, value in content["sampling"].items() if name != "seed"}
    return {
        **settings,
        "weights": content["source"]["weights"][:_SHORT],
        "follows_mask": content.get("follows_mask", True),
    }


def _names(files: Sequence[Path]) -> str:
    return some_of(map(volume_stem, files), _SHOWN)
