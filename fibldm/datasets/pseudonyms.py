"""Names that tell no patient: salted hashes, and the key that leads back, kept outside of the work folder."""

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fibldm.datasets.source import Case
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json

SALT_FILE = "salt.txt"
_LENGTH = 10


@dataclass(frozen=True)
class Pseudonyms:
    """Salted hashes in place of names (SHA-256 of salt and name, its first 10 digits).

    Attributes:
        salt: who has it can tell whether a guessed name is right; so it lies in the key, beside the work folder.
    """

    salt: str = field(default_factory=lambda: secrets.token_hex(16))

    def of(self, name: str) -> str:
        """The hash of a name."""
        return hashlib.sha256(f"{self.salt}/{name}".encode()).hexdigest()[:_LENGTH]

    def subject(self, name: str) -> str:
        """What a patient is called in the work folder."""
        return f"sub-{self.of(name)}"

    def case(self, case: Case) -> str:
        """What a case is called in the work folder: its own name, unless that may tell the patient."""
        return f"case-{self.of(case.name)}" if case.private else case.name


def key_path(work: Path) -> Path:
    """``WORK.key.json``, beside the work folder."""
    return _beside(work, "key")


def pending_path(work: Path) -> Path:
    """``WORK.pending.json``, the key of a preparation that has not ended well."""
    return _beside(work, "pending")


def read_pseudonyms(work: Path) -> Pseudonyms | None:
    """Those of an earlier preparation, by its key or the salt kept in ``work``; ``None`` where there is none.

    Raises:
        FibldmError: the key is damaged.
    """
    if (work / SALT_FILE).is_file():
        return Pseudonyms((work / SALT_FILE).read_text(encoding="utf-8").strip())
    path = next((path for path in (key_path(work), pending_path(work)) if path.is_file()), None)
    if path is None:
        return None
    salt = read_json(path).get("salt")
    if not isinstance(salt, str) or not salt:
        raise FibldmError(f"{path} must hold the salt of {work}; it does not", "put the right file back, or remove it")
    return Pseudonyms(salt)


@contextmanager
def key_of(work: Path, pseudonyms: Pseudonyms, cases: Iterable[Case]) -> Iterator[None]:
    """Write the key: the salt, and where each case lies, by its name in the work folder; readable by its owner only.

    It is a pending one until the block ends without an error, and only then takes the place of an earlier key.

    Raises:
        FibldmError: it cannot be written.
    """
    pending = pending_path(work)
    about = "leads from the names in the work folder back to the patients; keep it where the source data lie"
    sources = {case.name: str(_origin(case)) for case in cases}
    write_json(pending, {"about": about, "salt": pseudonyms.salt, "cases": sources})
    pending.chmod(0o600)
    yield
    pending.replace(key_path(work))


def _beside(work: Path, what: str) -> Path:
    return work.resolve().with_name(f"{work.resolve().name}.{what}.json")


def _origin(case: Case) -> Path:
    first = case.images[0]
    return first[0] if len(first) == 1 else first[0].parent
