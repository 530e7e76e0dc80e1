"""What a user decides about a preparation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError

OF_THE_DATASET = {
    *(
        "layout",
        "window",
        "bids_mask",
        "keep_columns",
        "facts",
        "hide_names",
        "skip_bad",
        "subject_pattern",
        "seed",
        "text",
        "missing_is_unknown",
    )
}
"""Settings that change no voxel of a case, so that no case is read again when one of them is changed."""


@dataclass(frozen=True)
class PrepareSettings:
    """What a user may decide about a preparation.

    Attributes:
        layout: one of `fibldm.datasets.layouts.LAYOUTS`.
        modality: ``ct``, ``mr``, ``pt`` (PET, in SUV by body weight) or ``other`` (microscopy, simulations, shapes);
            ``None`` takes what the dataset says.
        window: HU of CT or SUV of PET that become -1 and 1; ``None`` means -1000 and 1000, or 0 and 20.
        range: what becomes -1 and 1, in the units of the files; needed for ``other``, and for that only.
        labels: names by label value; they go before those of the dataset.
        remap: label values to change, as read to as written.
        channels: names of the image channels; where files are named by channel (BIDS), those to take.
        merge_masks: names of binary masks, most important first.
        bids_mask: pattern of the mask files of a BIDS dataset; ``None`` takes the only ones there are.
        spacing: mm, for formats that state none.
        resample_masks: whether masks on another grid are brought to the image's.
        resample_tilt: whether DICOM series under a tilted gantry, or of uneven slice spacing, are brought to a regular
            grid, and their masks with them.
        derive: ``"lung"`` makes lung masks of CT without masks.
        bias_field: whether the bias field of MR is corrected (N4).
        keep_columns: columns of a table that are carried along although they may tell the patient.
        text: column of free text that is carried along as ``text``, or ``beside`` for .txt files beside the images, see
            `with_texts`.
        facts: of `FACTS`, what must be carried along as covariates: ``spacing`` is that of the files, along the RAS+
            axes, as ``spacing_x_mm`` and so on; of the others some case must state each. What files state of
            `ACQUISITION` is carried along in any case, but for the ``body_part``.
        hide_names: whether names of files are replaced by hashes, as those of DICOM always are.
        skip_bad: whether cases with errors are left out, instead of failing.
        subject_pattern: regular expression whose first group is the patient, searched in the image's path.
        seed: seed of the split.
        missing_is_unknown: whether a label that a case does not have was not annotated there, where the case does not
            say by itself what was; otherwise it is absent.
        second_modality: of the second images, where there are some: ``ct``, ``mr``, ``pt`` or ``other``.
        second_window: of second images, what becomes -1 and 1: HU of ``ct`` and SUV of ``pt``, where ``None`` means
            -1000 and 1000, or 0 and 20; units
            of the files of ``other``, which needs it.
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
    resample_tilt: bool = False
    derive: str | None = None
    bias_field: bool = False
    keep_columns: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    text: str | None = None
    hide_names: bool = False
    skip_bad: bool = False
    subject_pattern: str | None = None
    seed: int = 0
    missing_is_unknown: bool = False
    second_modality: str | None = None
    second_window: tuple[float, float] | None = None

    @property
    def scanner(self) -> bool:
        """Whether files are a scanner's, which are in mm and in grey, or wrong."""
        return self.modality != "other"


def parse_label_names(text: str) -> dict[int, str]:
    """Names by label value from ``"1=right lung,2=left lung"``.

    Raises:
        FibldmError: an entry is no ``value=name``, or a value or name stands twice.
    """
    pairs = [entry.strip().partition("=") for entry in text.split(",")]
    names = {int(value): name.strip() for value, _, name in pairs if value.strip().isdecimal()}
    fits = all(0 < value < UNKNOWN_LABEL and name for value, name in names.items())
    if not fits or len(set(names.values())) < len(pairs):
        form = f"VALUE=NAME,... with values 1...{UNKNOWN_LABEL - 1}, each value and name once"
        raise FibldmError(f"`labels` must be {form}; got {text!r}", 'for example "1=right lung,2=left lung"')
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
        form = f"OLD=NEW,... with new values 0...{UNKNOWN_LABEL - 1}, each old value once"
        raise FibldmError(f"`remap` must be {form}; got {text!r}", 'for example "2=1,4=1"')
    return remap
