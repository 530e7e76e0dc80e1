"""What a user decides about a preparation, and everything that is settled before a voxel is read (A2, H13)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, unknown_choice
from fibldm.volumes.case_checks import Modality
from fibldm.volumes.datalist import SPLITS, find_subjects, split_cases
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.layouts import Source

CT_WINDOW = (-1000.0, 1000.0)

_MODALITY_NAMES: dict[str, Modality] = {
    "ct": "ct",
    **dict.fromkeys(("mr", "mri", "t1", "t1w", "t1gd", "t1c", "t2", "t2w", "flair", "pd", "adc", "dwi"), "mr"),
}


@dataclass(frozen=True)
class PrepareSettings:
    """What a user may decide about a preparation.

    Args:
        layout: ``auto``, ``decathlon``, ``folders`` or ``csv``.
        modality: ``ct`` or ``mr``; ``None`` takes the one of ``dataset.json``.
        window: HU that become -1 and 1, CT only; ``None`` means -1000 and 1000.
        labels: names by label value; they go before those of ``dataset.json``.
        subject_pattern: regular expression whose first group is the patient, searched in the image's path.
        seed: seed of the split.
    """

    layout: str = "auto"
    modality: str | None = None
    window: tuple[float, float] | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    subject_pattern: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The dataset as found and the decisions about it, without a look at the voxels.

    Attributes:
        source: the dataset as found.
        settings: the settings with layout, modality and window resolved.
        modality: ``ct`` or ``mr``.
        subjects: patient by case name.
        splits: split by case name.
        notes: what has to be said, one sentence each.
    """

    source: Source
    settings: PrepareSettings
    modality: Modality
    subjects: Mapping[str, str]
    splits: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def label_names(self) -> dict[int, str]:
        """Names by label value: the user's before the dataset's."""
        return {**self.source.labels, **self.settings.labels}

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases by split."""
        counted = Counter(self.splits.values())
        return {split: counted[split] for split in SPLITS}

    def decisions(self) -> dict[str, Any]:
        """All that decides a work folder besides the files' content, as JSON: settings, dataset and cases."""
        settings = asdict(self.settings) | {"labels": by_text(self.settings.labels)}
        source = self.source
        return {
            "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            "dataset": {
                "name": source.name,
                "labels": by_text(source.labels),
                "licence": source.licence,
                **source.references,
            },
            "cases": {
                case.name: {"subject": self.subjects[case.name], "split": case.split, **case.covariates}
                for case in source.cases
            },
        }


def make_plan(source: Source, settings: PrepareSettings) -> Plan:
    """Settle modality, window, patients and split.

    Raises:
        FibldmError: a setting does not fit the dataset, or no split by patient can be made.
    """
    modality = _modality(source, settings)
    if settings.window is not None and modality != "ct":
        raise FibldmError("--window is for CT; the modality is mr", "leave the window out")
    window = (settings.window or CT_WINDOW) if modality == "ct" else None
    if window is not None:
        Intensity("window", low=window[0], high=window[1])
    subjects, notes = find_subjects(source.cases, settings.subject_pattern)
    splits = split_cases(source.cases, subjects, settings.seed)
    settled = replace(settings, layout=source.layout, modality=modality, window=window)
    return Plan(source, settled, modality, subjects, splits, (*source.notes, *notes, *_notes(source, modality)))


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


def by_text(values: Mapping[int, Any]) -> dict[str, Any]:
    """The same mapping with the keys that JSON allows."""
    return {str(key): value for key, value in values.items()}


def _modality(source: Source, settings: PrepareSettings) -> Modality:
    if settings.modality is None:
        said = _said_modality(source)
        if said is not None:
            return said
        came = f"dataset.json says {source.modality!r}" if source.modality else "nothing says it"
        raise FibldmError(f"the modality must be ct or mr, one channel; {came}", "give --modality ct or --modality mr")
    if settings.modality not in ("ct", "mr"):
        raise unknown_choice("modality", settings.modality, ("ct", "mr"))
    return "ct" if settings.modality == "ct" else "mr"


def _said_modality(source: Source) -> Modality | None:
    return _MODALITY_NAMES.get((source.modality or "").strip().lower())


def _notes(source: Source, modality: Modality) -> list[str]:
    notes = []
    if _said_modality(source) not in (None, modality):
        notes.append(f"dataset.json says {source.modality}, --modality says {modality} and goes before it")
    if source.licence is None:
        notes.append("the licence of the data is not known; write it into a dataset.json beside the data")
    return notes
