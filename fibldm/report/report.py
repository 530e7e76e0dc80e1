"""A report in one HTML file, of a run, a bundle, or what was measured of one; nothing is fetched when it is opened.

Reports travel. By default they hold no real scan; `ReportSettings.with_real` puts those of the work folder in, and the
page says so on top. What lies in a bundle has neither volumes nor names of cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm.delivery.export import Also, Exported
from fibldm.errors import FibldmError
from fibldm.report.cases import Case, cases_of, scans_beside
from fibldm.report.colours import label_colour
from fibldm.report.made import data_part, hashes_part, limits_part, training_part
from fibldm.report.measured import audit_part, measured_parts
from fibldm.report.page import VOLUMES, Page, room_for_volumes
from fibldm.report.parts import Part
from fibldm.report.payload import Payload, payload_of
from fibldm.report.planes import CONVENTION
from fibldm.report.subject import Subject, as_exported, open_subject, sections_of

IN_BUNDLE = "docs/report.html"

_SYNTHETIC = (
    "Volumes called synthetic are generated and marked so in their files. They are not patients. "
    "A mask drawn on a real scan still carries the anatomy of its patient."
)
_WITHOUT_REAL = "This report holds no real scan. Names are those of files."
_PUBLIC = "This report holds neither volumes nor names of cases."
_PATIENT_DATA = (
    "PATIENT DATA: this report holds slices and voxels of real scans (--with-real). Handle it as you handle the scans."
)


@dataclass(frozen=True)
class ReportSettings:
    """What a report shows.

    Attributes:
        synthetic: output of ``fibldm synthesize``; None shows no volumes.
        data: the work folder; None takes that which a run names, where it is still there.
        evaluation: folder of ``fibldm evaluate --bundle``.
        audit: folder of ``fibldm audit``.
        with_real: show real scans, which are patient data.
        cases: how many volumes are shown at most.
        trust: take a bundle that changed since its export.
        title: of the page; empty takes the name of what it is of.
        patients: whether the data are of patients; phantoms are nobody's.
        more: sections at the end.

    Raises:
        FibldmError: no volume may be shown.
    """

    synthetic: Path | None = None
    data: Path | None = None
    evaluation: Path | None = None
    audit: Path | None = None
    with_real: bool = False
    cases: int = 4
    trust: bool = False
    title: str = ""
    patients: bool = True
    more: Sequence[Part] = ()

    def __post_init__(self) -> None:
        if self.cases < 1:
            raise FibldmError(f"a report shows at least one of the volumes; got {self.cases}", "change `cases`")


def write_report(source: Path, out: Path, settings: ReportSettings) -> int:
    """Write the report; its size in bytes.

    Args:
        source: a run, a bundle, or a folder of ``fibldm evaluate`` or ``fibldm audit``.
        out: the HTML file.
        settings: what it shows.

    Raises:
        FibldmError: the source is none of these, volumes are not of it, or the file would be too large.
    """
    subject = open_subject(
        source, data=settings.data, evaluation=settings.evaluation, audit=settings.audit, trust=settings.trust
    )
    return page_of(subject, settings).write(out)


def page_of(subject: Subject, settings: ReportSettings) -> Page:
    """The page of what a report is of."""
    volumes, payload = _volumes(subject, settings)
    real = settings.with_real
    parts = [
        hashes_part(subject),
        volumes,
        *measured_parts(subject, with_real=real),
        audit_part(subject, with_real=real),
        training_part(subject),
        data_part(subject),
        limits_part(subject),
        *settings.more,
    ]
    shows_patients = real and settings.patients
    return Page(
        settings.title or subject.name,
        [_SYNTHETIC, *([] if real else [_WITHOUT_REAL])],
        parts,
        payload,
        [_PATIENT_DATA] if shows_patients else [],
    )


def bundle_report(run: Path) -> Also:
    """What `export` writes beside the card of a bundle: the report of a measured run, fit for anybody's eyes."""

    def write(made: Exported) -> None:
        if not sections_of(made.measured.figures):
            return
        subject = as_exported(open_subject(run), made)
        parts = [
            hashes_part(subject),
            *measured_parts(subject, with_real=False, names=False),
            audit_part(subject, with_real=False, names=False),
            training_part(subject),
            data_part(subject, names=False),
            limits_part(subject),
        ]
        Page(subject.name, [_SYNTHETIC, _PUBLIC], parts).write(made.folder / IN_BUNDLE)

    return write


def _volumes(subject: Subject, settings: ReportSettings) -> tuple[Part, Payload | None]:
    if settings.synthetic is None:
        return Part(VOLUMES, ["Not shown: no synthetic volumes were given (--synthetic)."]), None
    if settings.with_real and subject.work is None:
        raise FibldmError(
            f"real scans are those of the work folder, and {subject.work_missing}",
            "give `data`, or leave `with_real` out",
        )
    real = scans_beside(subject) if settings.with_real else None
    cases, names = cases_of(settings.synthetic, subject, most=settings.cases, real=real)
    payload = payload_of(cases, names, room_for_volumes())
    legend = [(name, label_colour(value)) for value, name in names.items()]
    return Part(
        VOLUMES, _said(cases, settings, payload), pictures=[case.picture() for case in cases], legend=legend
    ), payload


def _said(cases: Sequence[Case], settings: ReportSettings, payload: Payload) -> list[str]:
    lines = [
        CONVENTION,
        "Shown are volumes by what was measured, the worst among them; pictures go through their labels.",
    ]
    if not settings.with_real:
        lines.append("Left out: real scans, which are patient data (--with-real).")
    elif not any(len(case.views) > 2 for case in cases):
        lines.append("Not shown: real scans; nothing says which training scan is nearest (fibldm evaluate audit).")
    if payload.coarsest > 1:
        lines.append(f"For size, up to {payload.coarsest} voxels along each axis are shown as one in the viewer.")
    return lines
