"""The training scans that an audit has looked volumes up among, for whoever looks up others by the same measure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json
from fibldm.volumes.grid import Volume
from fibldm.volumes.matching import METHOD, Matcher

AUDIT = "audit.json"
TRAINING = "training.npz"
"""Where an audit has its training scans as they are compared, in its folder."""


@dataclass(frozen=True)
class KnownScans:
    """What is a copy of a training scan, as an audit has it.

    Attributes:
        matcher: looks volumes up.
        threshold: similarity above which a volume is a copy.
        data: fingerprint of the dataset whose training cases these are; None where they came as a folder.
        weights: fingerprint of the network that was audited; None where none was.
    """

    matcher: Matcher
    threshold: float
    data: str | None = None
    weights: str | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "KnownScans":
        """The scans of an audit.

        Args:
            folder: ``--out`` of ``fibldm audit``.

        Raises:
            FibldmError: it is no folder of an audit, one of another version or that was not possible, or files of two.
        """
        told: dict[str, Any] = read_json(Path(folder) / AUDIT)
        facts = told.get("facts", {})
        if told.get("threshold") is None:
            raise FibldmError(
                f"{folder} must hold an audit that found a threshold; it says: {told.get('verdict', 'nothing')}",
                "audit with scans of other patients held out",
            )
        if facts.get("method") != METHOD:
            raise FibldmError(
                f"{folder} must be an audit by this version of FibLDM; it is of another one", "audit again"
            )
        matcher = Matcher.read(Path(folder) / TRAINING)
        if matcher.fingerprint != facts.get("scans"):
            raise FibldmError(
                f"{TRAINING} and {AUDIT} of {folder} must be of one audit; they are not", "run the audit again"
            )
        of = told.get("of", {})
        return cls(matcher, float(told["threshold"]), of.get("data"), of.get("weights"))

    def require(self, *, data: str | None, weights: str) -> None:
        """Refuse a generator that may have learned from other scans.

        The threshold depends on scans and not on weights, so that an audit of the same data will do for all of them.

        Args:
            data: fingerprint of the dataset that it was trained on, and on nothing else; None where that is not known.
            weights: that of its network.

        Raises:
            FibldmError: the audit is of other data, and of other weights.
        """
        if weights == self.weights or (data is not None and data == self.data):
            return
        said = ", ".join(
            f"{what} {_short(own)} and not {_short(other)}"
            for what, own, other in (("data", self.data, data), ("weights", self.weights, weights))
        )
        raise FibldmError(
            f"the audit must be of the data or of the weights of this generator; it is of {said}",
            "audit with --data and the work folder that it was trained on, or with all scans that it learned from as "
            "--train and the generator as --run or --bundle",
        )

    def similarity(self, volume: Volume) -> float:
        """With the training scan that is most similar to a volume, however it is turned; see `Matcher.match`.

        Raises:
            Constant: the volume has next to one value.
        """
        return self.matcher.match(self.matcher.open(volume)).similarity

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what is a copy."""
        return hash_value([self.matcher.fingerprint, self.threshold])


def _short(fingerprint: str | None) -> str:
    return "unknown" if fingerprint is None else fingerprint[:12]
