"""What a user decides about a preparation, and everything that is settled before a voxel is read."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.case import Rules
from fibldm.datasets.layouts import LayoutOptions
from fibldm.datasets.layouts.segments import numbered_as_asked
from fibldm.datasets.lung import LABELS as LUNGS
from fibldm.datasets.pseudonyms import Pseudonyms
from fibldm.datasets.source import Case, Source
from fibldm.datasets.split import find_subjects, split_cases
from fibldm.datasets.texts import TEXT, with_texts
from fibldm.errors import FibldmError, unknown_choice
from fibldm.volumes.datalist import SPLITS
from fibldm.volumes.scan import ACQUISITION, Covariate

MODALITIES = ("ct", "mr", "other")
FACTS = ("spacing",)
CT_WINDOW = (-1000.0, 1000.0)

_MODALITY_NAMES = {
    "ct": "ct",
    **dict.fromkeys(("mr", "mri", "t1", "t1w", "t1gd", "t1c", "t2", "t2w", "flair", "pd", "adc", "dwi"), "mr"),
}
_PRIVATE_COLUMN = re.compile(
    r"name|patient|subject|participant|\bpat\b|\bpid\b|mrn|uid|accession|initials|birth|dob|date|time|phone|addr"
    r"|comment|note|number|nummer|pat_?id|\bid\b|_id$",
    re.IGNORECASE,
)
_LONG_NUMBER = 99999
"""Whole numbers above it are identifiers or dates rather than measurements."""
_MANY_WORDS = 6
"""A value of as many words is free text, which may hold a name."""


@dataclass(frozen=True)
class PrepareSettings:
    """What a user may decide about a preparation.

    Attributes:
        layout: one of `fibldm.datasets.layouts.LAYOUTS`.
        modality: ``ct``, ``mr`` or ``other`` (microscopy, simulations, shapes); ``None`` takes what the dataset says.
        window: HU that become -1 and 1, CT only; ``None`` means -1000 and 1000.
        range: what becomes -1 and 1, in the units of the files; needed for ``other``, and for that only.
        labels: names by label value; they go before those of the dataset.
        remap: label values to change, as read to as written.
        channels: names of the image channels; where files are named by channel (BIDS), those to take.
        merge_masks: names of binary masks, most important first.
        bids_mask: pattern of the mask files of a BIDS dataset; ``None`` takes the only ones there are.
        spacing: mm, for formats that state none.
        resample_masks: whether masks on another grid are brought to the image's.
        derive: ``"lung"`` makes lung masks of CT without masks.
        bias_field: whether the bias field of MR is corrected (N4).
        keep_columns: columns of a table that are carried along although they may tell the patient.
        text: column of free text that is carried along as ``text``, or ``beside`` for .txt files beside the images, see
            `with_texts`.
        facts: of `FACTS`, what is carried along as covariates: ``spacing`` is that of the files, along the RAS+ axes,
            as ``spacing_x_mm`` and so on. What files state of `ACQUISITION` is carried along in any case.
        hide_names: whether names of files are replaced by hashes, as those of DICOM always are.
        skip_bad: whether cases with errors are left out, instead of failing.
        subject_pattern: regular expression whose first group is the patient, searched in the image's path.
        seed: seed of the split.
    """

    layout: str = "auto"
    modality: str | None = None
    window: tuple[float, float] | None = None
    range: tuple[float, float] | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    remap: Mapping[int, int] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    merge_masks: tuple[str, ...] = ()
    bids_mask: str | None = None
    spacing: tuple[float, float, float] | None = None
    resample_masks: bool = False
    derive: str | None = None
    bias_field: bool = False
    keep_columns: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    text: str | None = None
    hide_names: bool = False
    skip_bad: bool = False
    subject_pattern: str | None = None
    seed: int = 0

    @property
    def layout_options(self) -> LayoutOptions:
        """What of it the layouts need."""
        return LayoutOptions(
            merge_masks=self.merge_masks, bids_mask=self.bids_mask, channels=self.channels, text=self.text
        )


@dataclass(frozen=True)
class Plan:
    """The dataset as found and the decisions about it, without a look at the voxels.

    Attributes:
        source: the dataset as found, its cases under the names they are written by.
        settings: the settings with layout, modality and window resolved.
        subjects: patient by case name, as a salted hash.
        splits: split by case name; empty where there are too few patients for one, which is said after all else.
        notes: what has to be said, one sentence each.
    """

    source: Source
    settings: PrepareSettings
    subjects: Mapping[str, str]
    splits: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def modality(self) -> str:
        """``ct``, ``mr`` or ``other``."""
        return str(self.settings.modality)

    @property
    def label_names(self) -> dict[int, str]:
        """Names by label value: the user's before the dataset's."""
        names = {**self.source.labels, **self.settings.labels}
        return names or (LUNGS if self.settings.derive == "lung" else {})

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases by split."""
        counted = Counter(self.splits.values())
        return {split: counted[split] for split in SPLITS}

    @property
    def rules(self) -> Rules:
        """What is decided about the voxels of every case."""
        settings = self.settings
        return Rules(
            modality=self.modality,
            limits=settings.range,
            channels=self.source.channels,
            labels=tuple(sorted(self.label_names)),
            spacing=settings.spacing,
            remap=settings.remap,
            ordered=bool(settings.merge_masks),
            resample_masks=settings.resample_masks,
            derive=settings.derive,
            bias_field=settings.bias_field,
        )

    def decisions(self) -> dict[str, Any]:
        """All that decides a work folder besides the files' content, as JSON: settings, dataset and cases."""
        settings = self.settings
        source = self.source
        return {
            "settings": {
                key: list(value) if isinstance(value, tuple) else by_text(value) if isinstance(value, dict) else value
                for key, value in asdict(settings).items()
                if key not in ("facts", "text") or value  # which came later than the first work folders
            },
            "dataset": {
                "name": source.name,
                "channels": list(source.channels),
                "labels": by_text(source.labels),
                "licence": source.licence,
                **source.references,
            },
            "cases": {
                case.name: {"subject": self.subjects[case.name], "split": case.split, **case.covariates}
                for case in source.cases
            },
        }


def make_plan(
    source: Source, settings: PrepareSettings, pseudonyms: Pseudonyms, left_out: Collection[str] = ()
) -> Plan:
    """Settle modality, window, label values, names, patients and split.

    The split is drawn by the patients as the dataset calls them, so that it does not depend on the salt.

    Args:
        source: the dataset as found.
        settings: what the user decides.
        pseudonyms: what patients are called in the work folder.
        left_out: cases, as they are written, that are not split.

    Raises:
        FibldmError: a setting does not fit the dataset, or no split by patient can be made.
    """
    source = numbered_as_asked(source, settings.labels)
    modality = _modality(source, settings)
    window = _window(settings, modality)
    _check_range(settings, modality)
    _check_settings(settings, modality, masked=sum(bool(case.masks) for case in source.cases))
    cases = [replace(case, private=case.private or settings.hide_names) for case in source.cases]
    cases, told = with_texts(cases, settings.text) if settings.text is not None else (cases, "")
    known, notes = find_subjects(cases, settings.subject_pattern)
    public, dropped = _public(cases, known, settings, pseudonyms)
    subjects = {new.name: known[case.name] for case, new in zip(cases, public, strict=True)}
    kept = [case for case in public if case.name not in left_out]
    enough = any(case.split for case in kept) or len({subjects[case.name] for case in kept}) >= len(SPLITS)
    splits = split_cases(kept, subjects, settings.seed) if enough else {}
    channels = settings.channels if len(settings.channels) > 1 else source.channels
    return Plan(
        replace(source, cases=tuple(sorted(public, key=lambda case: case.name)), channels=channels),
        replace(settings, layout=source.layout, modality=modality, window=window),
        {name: pseudonyms.subject(subject) for name, subject in subjects.items()},
        splits,
        (*source.notes, *notes, *dropped, *([told] if told else []), *_notes(source, modality)),
    )


def parse_label_names(text: str) -> dict[int, str]:
    """Names by label value from ``"1=right lung,2=left lung"``.

    Raises:
        FibldmError: an entry is no ``value=name``, or a value or name stands twice.
    """
    pairs = [entry.strip().partition("=") for entry in text.split(",")]
    names = {int(value): name.strip() for value, _, name in pairs if value.strip().isdecimal()}
    fits = all(0 < value < UNKNOWN_LABEL and name for value, name in names.items())
    if not fits or len(set(names.values())) < len(pairs):
        raise FibldmError(
            f"--labels must be VALUE=NAME,... with values 1...{UNKNOWN_LABEL - 1}, each value and name "
            f"once; got {text!r}",
            'for example --labels "1=right lung,2=left lung"',
        )
    return names


def parse_remap(text: str) -> dict[int, int]:
    """Label values to change from ``"2=1,4=1"``; 0 takes a label away.

    Raises:
        FibldmError: an entry is no ``value=value``, or a value stands twice.
    """
    pairs = [entry.strip().partition("=") for entry in text.split(",")]
    values = [(old.strip(), new.strip()) for old, _, new in pairs]
    remap = {int(old): int(new) for old, new in values if old.isdecimal() and new.isdecimal()}
    if len(remap) < len(pairs) or any(not 0 <= new < UNKNOWN_LABEL for new in remap.values()):
        raise FibldmError(
            f"--remap must be OLD=NEW,... with new values 0...{UNKNOWN_LABEL - 1}, each old value once; got {text!r}",
            'for example --remap "2=1,4=1"',
        )
    return remap


def by_text(values: Mapping[int, Any]) -> dict[str, Any]:
    """The same mapping with the keys that JSON allows."""
    return {str(key): value for key, value in values.items()}


def _public(
    cases: list[Case], subjects: Mapping[str, str], settings: PrepareSettings, pseudonyms: Pseudonyms
) -> tuple[list[Case], list[str]]:
    """The cases under the names they are written by, without covariates that may tell the patient, and a note."""
    columns = sorted({name for case in cases for name in case.covariates})
    values = {
        name: [(subjects[case.name], case.covariates[name]) for case in cases if name in case.covariates]
        for name in columns
    }
    kept = (*settings.keep_columns, *([TEXT] if settings.text is not None else []))
    hidden = [name for name in columns if name not in kept and _tells_patient(name, values[name])]
    renamed = [
        replace(
            case,
            name=pseudonyms.case(case),
            path="" if case.private else case.path,
            covariates={name: value for name, value in case.covariates.items() if name not in hidden},
        )
        for case in cases
    ]
    note = f"columns that may tell the patient are left out (--keep-columns takes them along): {', '.join(hidden)}"
    return renamed, [note] if hidden else []


def _tells_patient(name: str, values: Sequence[tuple[str, Covariate]]) -> bool:
    """By its name, by numbers as long as identifiers, free text, or texts of which half the patients have their own."""
    if name in ACQUISITION:
        return False
    numbers = [value for _, value in values if isinstance(value, float)]
    texts = {value for _, value in values if isinstance(value, str)}
    patients = {subject for subject, value in values if value is not None}
    long = any(value.is_integer() and abs(value) > _LONG_NUMBER for value in numbers)
    long |= any(len(text.split()) >= _MANY_WORDS for text in texts)
    return bool(_PRIVATE_COLUMN.search(name)) or long or len(texts) > max(1, (len(patients) + 1) // 2)


def _window(settings: PrepareSettings, modality: str) -> tuple[float, float] | None:
    if modality != "ct":
        if settings.window is not None:
            remedy = "give --range" if modality == "other" else "leave the window out"
            raise FibldmError(f"--window is for CT; the modality is {modality}", remedy)
        return None
    low, high = settings.window or CT_WINDOW
    if not -32768 <= low < high <= 32767:
        raise FibldmError(f"--window must be two increasing values in HU; got {low:g} and {high:g}")
    return low, high


def _check_range(settings: PrepareSettings, modality: str) -> None:
    if modality != "other":
        if settings.range is not None:
            raise FibldmError(f"--range is for --modality other; the modality is {modality}", "leave it out")
        return
    if settings.range is None:
        raise FibldmError(
            "--modality other needs --range LOW HIGH, what the least and the greatest value of the files mean",
            "for example --range 0 255 for images of 8 bits",
        )
    low, high = settings.range
    if not -math.inf < low < high < math.inf:
        raise FibldmError(f"--range must be two increasing numbers; got {low:g} and {high:g}")


def _check_settings(settings: PrepareSettings, modality: str, *, masked: int) -> None:
    if settings.derive not in (None, "lung"):
        raise unknown_choice("--derive", settings.derive, ("lung",))
    if settings.derive and modality != "ct":
        raise FibldmError(f"--derive lung is for CT; the modality is {modality}", "leave it out")
    if settings.derive and masked:
        raise FibldmError(
            f"--derive lung is for data without masks; {masked} cases have one", "leave it out, or the masks"
        )
    if settings.bias_field and modality != "mr":
        raise FibldmError(f"--bias-field is for MR; the modality is {modality}", "leave it out")
    for name in settings.facts:
        if name not in FACTS:
            raise unknown_choice("--facts", name, FACTS)
    if settings.spacing is not None and not all(length > 0 for length in settings.spacing):
        raise FibldmError(f"--spacing must be three lengths above 0 in mm; got {settings.spacing}")


def _modality(source: Source, settings: PrepareSettings) -> str:
    if settings.modality is None:
        said = _said_modality(source)
        if said is not None:
            return said
        came = f"the dataset says {source.modality!r}" if source.modality else "nothing says it"
        raise FibldmError(
            f"the modality must be ct or mr; {came}",
            "give --modality ct or --modality mr, or for microscopy, simulations and the like --modality other",
        )
    if settings.modality not in MODALITIES:
        raise unknown_choice("modality", settings.modality, MODALITIES)
    return settings.modality


def _said_modality(source: Source) -> str | None:
    """``ct`` or ``mr`` where all channels say the same."""
    said = {_MODALITY_NAMES.get(name.strip().lower()) for name in (source.modality or "").split(",")}
    return said.pop() if len(said) == 1 else None


def _notes(source: Source, modality: str) -> list[str]:
    notes = []
    if _said_modality(source) not in (None, modality):
        notes.append(f"the dataset says {source.modality}, --modality says {modality} and goes before it")
    if source.licence is None:
        notes.append("the licence of the data is not known; write it into a dataset.json beside the data")
    return notes
