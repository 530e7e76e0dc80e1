"""What is settled about a dataset before a voxel is read: modality, window, label values, names and patients."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fibldm.datasets.annotated import with_annotated
from fibldm.datasets.facts import FACTS
from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.segments import numbered_as_asked
from fibldm.datasets.lung import LABELS as LUNGS
from fibldm.datasets.modalities import MODALITIES, stated_modality
from fibldm.datasets.pseudonyms import Pseudonyms, public_cases
from fibldm.datasets.second_image import check_second
from fibldm.datasets.settings import OF_THE_DATASET, PrepareSettings
from fibldm.datasets.source import Source
from fibldm.datasets.split import find_subjects, given_split, split_cases
from fibldm.datasets.texts import with_texts
from fibldm.errors import FibldmError, unknown_choice
from fibldm.volumes.datalist import ANNOTATED, SPLITS

CT_WINDOW = (-1000.0, 1000.0)
PT_WINDOW = (0.0, 20.0)
"""SUV by body weight: nothing is 0, and most tumours lie below 20."""

_WINDOWS = {"ct": CT_WINDOW, "pt": PT_WINDOW}
_LATER = ("facts", "text", "missing_is_unknown", "second_modality", "second_window", "resample_tilt")
_ONLY_FOR = {"window": ("ct", "pt"), "range": ("other",), "derive": ("ct",), "bias_field": ("mr",)}


@dataclass(frozen=True)
class Plan:
    """The dataset as found and the decisions about it, without a look at the voxels.

    Attributes:
        source: the dataset as found, its cases under the names they are written by, each with its patient.
        settings: the settings with layout, modality and window resolved.
        subjects: patient by case name, as a salted hash.
        splits: split by case name; empty until `split` has drawn it, or where there are too few patients for one.
    """

    source: Source
    settings: PrepareSettings
    subjects: Mapping[str, str]
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        """``ct``, ``mr``, ``pt`` or ``other``."""
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
    def case_settings(self) -> PrepareSettings:
        """What is decided about the voxels of every case, with channels and labels as the dataset has them."""
        decided = {key: value for key, value in vars(self.settings).items() if key not in OF_THE_DATASET}
        return PrepareSettings(**decided | {"channels": self.source.channels, "labels": self.label_names})

    def split(self, left_out: Collection[str] = ()) -> "Plan":
        """The same with the split of all cases but those left out.

        It is drawn by the patients as the dataset calls them, so that it does not depend on the salt.

        Raises:
            FibldmError: the dataset's own split does not hold for the cases that are left.
        """
        kept = [case for case in self.source.cases if case.name not in left_out]
        return replace(self, splits=split_cases(kept, self.settings.seed))

    def decisions(self) -> dict[str, Any]:
        """All that decides a work folder besides the files' content, as JSON: settings, dataset and cases."""
        source = self.source
        return {
            "settings": {
                key: list(value) if isinstance(value, tuple) else by_text(value) if isinstance(value, dict) else value
                for key, value in asdict(self.settings).items()
                if key not in _LATER or value  # which came later than the first work folders
            },
            "dataset": {
                "name": source.name,
                "channels": list(source.channels),
                "labels": by_text(source.labels),
                "licence": source.licence,
                **source.references,
            },
            "cases": {
                case.name: {
                    "subject": self.subjects[case.name],
                    "split": case.split,
                    **case.covariates,
                    **({} if case.annotated is None else {ANNOTATED: list(case.annotated)}),
                }
                for case in source.cases
            },
        }


def make_plan(source: Source, settings: PrepareSettings, pseudonyms: Pseudonyms, findings: Findings) -> Plan:
    """Settle modality, window, label values, names and patients.

    Args:
        source: the dataset as found.
        settings: what the user decides.
        pseudonyms: what patients are called in the work folder.
        findings: gets what has to be said.

    Raises:
        FibldmError: a setting does not fit the dataset, or the dataset's own split tears a patient apart.
    """
    source = numbered_as_asked(source, settings.labels)
    modality = _modality(source, settings)
    unknown = {mask.unknown for case in source.cases for mask in case.masks if mask.unknown is not None}
    _check(settings, modality, masked=sum(bool(case.masks) for case in source.cases), unknown=unknown)
    check_second(settings, sum(bool(case.second) for case in source.cases))
    cases = [replace(case, private=case.private or settings.hide_names) for case in source.cases]
    cases = with_annotated(cases, {**source.labels, **settings.labels}, settings.remap)
    if settings.text is not None:
        cases = with_texts(cases, settings.text, findings)
    cases = public_cases(find_subjects(cases, findings, settings.subject_pattern), settings, pseudonyms, findings)
    given_split(cases)
    if stated_modality(source) not in (None, modality):
        findings.notes.append(f"the dataset says {source.modality}, --modality says {modality} and goes before it")
    if source.licence is None:
        findings.notes.append("the licence of the data is not known; write it into a dataset.json beside the data")
    channels = settings.channels if len(settings.channels) > 1 else source.channels
    window = (settings.window or _WINDOWS[modality]) if modality in _WINDOWS else None
    return Plan(
        replace(source, cases=tuple(sorted(cases, key=lambda case: case.name)), channels=channels),
        replace(settings, layout=source.layout, modality=modality, window=window),
        {case.name: pseudonyms.subject(str(case.subject)) for case in cases},
    )


def by_text(values: Mapping[int, Any]) -> dict[str, Any]:
    """The same mapping with the keys that JSON allows."""
    return {str(key): value for key, value in values.items()}


def _modality(source: Source, settings: PrepareSettings) -> str:
    modality = settings.modality or stated_modality(source)
    if modality is None:
        came = f"the dataset says {source.modality!r}" if source.modality else "nothing says it"
        raise FibldmError(
            f"`modality` must be {', '.join(MODALITIES)}; {came}",
            "give `modality`: ct, mr, pt (PET), or other for microscopy, simulations and the like",
        )
    if modality not in MODALITIES:
        raise unknown_choice("`modality`", modality, MODALITIES)
    return modality


def _check(settings: PrepareSettings, modality: str, *, masked: int, unknown: Collection[int]) -> None:
    for name, needed in _ONLY_FOR.items():
        if getattr(settings, name) not in (None, False) and modality not in needed:
            raise FibldmError(f"`{name}` is for the modality {' or '.join(needed)}; it is {modality}", "leave it out")
    if settings.window is not None and not -32768 <= settings.window[0] < settings.window[1] <= 32767:
        units = "SUV" if modality == "pt" else "HU"
        raise FibldmError(
            f"`window` must be two increasing values in {units}; got {settings.window[0]:g} and {settings.window[1]:g}"
        )
    if modality == "other" and settings.range is None:
        raise FibldmError(
            "the modality other needs `range`, what the least and the greatest value of the files mean",
            "for example 0 and 255 for images of 8 bits",
        )
    if settings.range is not None and not -math.inf < settings.range[0] < settings.range[1] < math.inf:
        raise FibldmError("`range` must be two increasing numbers; got {:g} and {:g}".format(*settings.range))
    if settings.derive not in (None, "lung"):
        raise unknown_choice("`derive`", settings.derive, ("lung",))
    if settings.derive and masked:
        raise FibldmError(f"`derive` is for data without masks; {masked} cases have one", "leave it out, or the masks")
    for name in settings.facts:
        if name not in FACTS:
            raise unknown_choice("`facts`", name, FACTS)
    if settings.remap.keys() & unknown:
        listed = ", ".join(map(str, sorted(settings.remap.keys() & unknown)))
        raise FibldmError(
            f"`remap` must leave the label of voxels that were not annotated (ignore) alone; got {listed}",
            "leave it out",
        )
    if settings.missing_is_unknown and not masked:
        raise FibldmError("`missing_is_unknown` is for data with masks; no case has one", "leave it out")
    if settings.spacing is not None and not all(length > 0 for length in settings.spacing):
        raise FibldmError(f"`spacing` must be three lengths above 0 in mm; got {settings.spacing}")
