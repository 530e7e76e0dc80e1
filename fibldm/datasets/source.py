"""A dataset as the layouts find it: its cases, and where the labels of each come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fibldm.volumes.scan import Covariate, Files


@dataclass(frozen=True)
class Mask:
    """Where the labels of a case come from.

    Attributes:
        files: of the mask.
        value: what the voxels of a binary mask become; ``None`` for a label map or a DICOM mask.
        names: of a mask whose segments have names (DICOM, 3D Slicer's NRRD), values by these; others are left out.
        elsewhere: of such a mask, segments that other masks of the case take.
        item: which one of a pack; ``None`` of a file that holds one mask.
        unknown: the value of voxels that were not annotated (nnU-Net's ignore label); ``None`` where there is none.
        legend: of a label map, what its values become; no others may occur. Empty: they stay as they are.
    """

    files: Files
    value: int | None = None
    names: Mapping[str, int] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    item: str | None = None
    unknown: int | None = None
    legend: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One case as found.

    Attributes:
        name: unique name, also the stem of the written files.
        images: files of every channel; one entry where one file holds all of them.
        masks: none, one label map, or several binary masks of which an earlier one wins.
        path: the image's path as the dataset gives it (POSIX), searched for the patient.
        subject: patient, or ``None`` where the dataset does not say.
        split: ``training``, ``validation`` or ``test``, or ``None`` where the dataset does not say.
        covariates: what else the dataset says; ``None`` for a missing value.
        private: whether name and path may tell the patient (DICOM); they are then written nowhere.
        item: which image of a pack; ``None`` of a file that holds one case.
        second: files of another image of the patient, see `fibldm.datasets.second_image`; none where there is none.
        annotated: the labels that were annotated, as they are written; ``None`` where the dataset does not say.
    """

    name: str
    images: tuple[Files, ...]
    masks: tuple[Mask, ...]
    path: str
    subject: str | None = None
    split: str | None = None
    covariates: Mapping[str, Covariate] = field(default_factory=dict)
    private: bool = False
    item: str | None = None
    second: Files = ()
    annotated: tuple[int, ...] | None = None

    @property
    def files(self) -> Files:
        """All files of the case."""
        images = [file for channel in self.images for file in channel]
        return (*images, *(file for mask in self.masks for file in mask.files), *self.second)


@dataclass(frozen=True)
class Source:
    """A dataset as found: its cases, and what it says about itself.

    Attributes:
        layout: its name, one of `fibldm.datasets.layouts.LAYOUTS`.
        name: of the dataset.
        cases: sorted by name.
        channels: names of the image channels, in order.
        modality: as the dataset writes it, or ``None``.
        labels: label names by value, without background.
        licence: as the dataset writes it, or ``None``.
        references: the description, reference and attribution that the dataset gives.
        notes: what was left out, one sentence each.
    """

    layout: str
    name: str
    cases: tuple[Case, ...]
    channels: tuple[str, ...] = ("image",)
    modality: str | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    licence: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
