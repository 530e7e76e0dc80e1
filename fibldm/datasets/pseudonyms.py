"""What tells no patient: salted hashes for names, the key that leads back, and columns without what identifies."""

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case
from fibldm.datasets.texts import TEXT
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.volumes.scan import ACQUISITION, Covariate

SALT_FILE = "salt.txt"
_LENGTH = 10
_PRIVATE_COLUMN = re.compile(
    r"name|patient|subject|participant|\bpat\b|\bpid\b|mrn|uid|accession|initials|birth|dob|date|time|phone|addr"
    r"|comment|note|number|nummer|pat_?id|\bid\b|_id$",
    re.IGNORECASE,
)
_LONG_NUMBER = 99999
"""Whole numbers above it are identifiers or dates rather than measurements."""


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


def public_cases(
    cases: Sequence[Case], settings: PrepareSettings, pseudonyms: Pseudonyms, findings: Findings
) -> list[Case]:
    """The cases under the names they are written by, without covariates that may tell the patient, which is noted."""
    columns: dict[str, list[tuple[str | None, Covariate]]] = {}
    for case in cases:
        for name, value in case.covariates.items():
            columns.setdefault(name, []).append((case.subject, value))
    kept = (*settings.keep_columns, *([TEXT] if settings.text is not None else []))
    hidden = sorted(name for name, values in columns.items() if name not in kept and _tells_patient(name, values))
    if hidden:
        listed = ", ".join(hidden)
        findings.notes.append(
            f"columns that may tell the patient are left out (--keep-columns takes them along): {listed}"
        )
    return [
        replace(
            case,
            name=pseudonyms.case(case),
            path="" if case.private else case.path,
            covariates={name: value for name, value in case.covariates.items() if name not in hidden},
        )
        for case in cases
    ]


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


def _tells_patient(name: str, values: Sequence[tuple[str | None, Covariate]]) -> bool:
    """By its name, by numbers as long as identifiers, or by texts of which half the patients have their own."""
    if name in ACQUISITION:
        return False
    numbers = [value for _, value in values if isinstance(value, float)]
    texts = {value for _, value in values if isinstance(value, str)}
    patients = {subject for subject, value in values if value is not None}
    long = any(value.is_integer() and abs(value) > _LONG_NUMBER for value in numbers)
    return bool(_PRIVATE_COLUMN.search(name)) or long or len(texts) > max(1, (len(patients) + 1) // 2)


def _beside(work: Path, what: str) -> Path:
    return work.resolve().with_name(f"{work.resolve().name}.{what}.json")


def _origin(case: Case) -> Path:
    first = case.images[0]
    return first[0] if len(first) == 1 else first[0].parent
