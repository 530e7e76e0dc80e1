"""What a preparation finds wrong and has to say: collected first, and told all at once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fibldm.errors import FibldmError
from fibldm.volumes.scan import Files, Level, Remark

_NAMED = 3  # of the cases that share a warning


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case; an error forbids the dataset, a warning is recorded."""

    case: str
    level: Level
    message: str

    def __str__(self) -> str:
        return f"{self.case}: {self.level}: {self.message}"


@dataclass
class Findings:
    """All complaints about a dataset or a case.

    Attributes:
        case: what they are about; empty: the dataset.
        hidden: files whose names and folders must not be told, as they may tell the patient.
        listed: what is wrong, in the order in which it was found.
        notes: what has to be said about the dataset as a whole, one sentence each.
    """

    case: str = ""
    hidden: Files = ()
    listed: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def error(self, message: str) -> None:
        """Add an error."""
        self.add([("error", message)])

    def add(self, remarks: Iterable[Remark], where: str = "") -> None:
        """Add remarks, each after ``where``, that are not there yet: several masks of one file say the same."""
        for level, message in remarks:
            finding = Finding(self.case, level, self._told(f"{where}{message}"))
            if finding not in self.listed:
                self.listed.append(finding)

    @contextmanager
    def collecting(self, where: str = "") -> Iterator[None]:
        """An error that ends the block is added, after ``where``, instead of raised."""
        try:
            yield
        except FibldmError as error:
            self.error(f"{where}{error}")

    @property
    def bad(self) -> list[str]:
        """Cases with errors, sorted."""
        return sorted({finding.case for finding in self.listed if finding.level == "error"})

    def lines(self) -> str:
        """What is wrong with a dataset, a line each, to stand below a sentence."""
        return "".join(f"\n  {finding.message}" for finding in self.listed)

    def _told(self, message: str) -> str:
        for file in self.hidden:
            message = message.replace(str(file), "a file").replace(file.name, "a file")
        return message


def table(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding; a warning that more than three cases share is one line that counts them."""
    sharing = defaultdict(list)
    for finding in findings:
        sharing[finding.level, finding.message].append(finding.case)
    rows, told = [], set()
    for finding in findings:
        cases, case, message = sharing[finding.level, finding.message], finding.case, finding.message
        if finding.level == "warning" and len(cases) > _NAMED:
            case, message = f"{len(cases)} cases", f"{message} ({', '.join(cases[:_NAMED])}, ...)"
        row = (case, finding.level, message)
        if row not in told:
            told.add(row)
            rows.append(row)
    width = max((len(case) for case, _, _ in rows), default=0)
    return [f"{case:<{width}}  {level:<7}  {message}" for case, level, message in rows]
