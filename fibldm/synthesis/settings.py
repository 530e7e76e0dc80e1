"""What is asked of a synthesis: how volumes are drawn, in which files they are written, and how many of which patients.

The commands, recipes and configurations fill `SynthesisSettings` by the names of its options; nothing else lists them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.adapters import check_strengths
from fibldm.models.conditions.condition import Condition
from fibldm.models.denoiser import guided
from fibldm.models.process import Prediction, Process
from fibldm.models.samplers import Denoise, Sampler, calls, sampler
from fibldm.models.timesteps import check_shift, sampling_times
from fibldm.synthesis.asked import ConditionsTable, Table, known_cases, laid_over, own, together
from fibldm.typed_settings import checked_values, counted, settings_of
from fibldm.volumes.known_scans import KnownScans

if TYPE_CHECKING:
    from fibldm.volumes.dicom.output import DicomOutput

FORMATS = ("nifti", "dicom")
_OF_DICOM = ("template", "label_codes", "patient_position", "mask_format")

TOLD_IF_GIVEN = {"eta": None, "tiles": False}


@dataclass(frozen=True)
class SamplingSettings:
    """How volumes are drawn.

    Attributes:
        sampler: one of `fibldm.models.samplers.SAMPLERS`.
        steps: of the sampler, from noise to data.
        guidance: 1 is none; above 5 medical volumes turn into caricatures.
        seed: with the mask's name and the number of the volume, decides its noise.
        guidance_rescale: holds back the contrast that guidance adds, in [0, 1], see `fibldm.models.denoiser.guided`.
        guidance_interval: times (low, high) in [0, 1], 1 is noise, between which there is guidance.
        shift: moves the sampling times towards noise, see `fibldm.models.timesteps.shifted`; None as in training.
        eta: of the sampler "ddim", in [0, 1]: 0 is deterministic, 1 is ancestral; None is 0.
        dynamic_threshold: share of the voxels, in (0, 1], see `fibldm.models.denoiser.thresholded`; for runs in pixel
            space only. None leaves it out.
        residual_noise: of what the decoder leaves out, see `fibldm.models.residual_noise`; 1 is as measured, 0 gives
            the middle of what a volume may be, smoother than any real one.
        tiles: draw a latent larger than those of training in overlapping tiles of their size, as one, see
            `fibldm.models.joint_tiles`; False draws it whole.

    Raises:
        FibldmError: a value is out of range.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    shift: float | None = None
    dynamic_threshold: float | None = None
    residual_noise: float = 1.0
    eta: float | None = None
    tiles: bool = False

    def __post_init__(self) -> None:
        sampler(self.sampler, self.eta)
        if self.steps < 1:
            raise FibldmError(f"steps must be at least 1; got {self.steps}")
        if not 0 <= self.guidance < math.inf:
            raise FibldmError(f"guidance must be a number of at least 0; got {self.guidance}")
        if not 0 <= self.guidance_rescale <= 1:
            raise FibldmError(f"guidance_rescale must lie in [0, 1]; got {self.guidance_rescale}", "0.7 is usual")
        match self.guidance_interval:
            case [low, high] if 0 <= low < high <= 1:
                object.__setattr__(self, "guidance_interval", (low, high))
            case _:
                raise FibldmError(
                    f"guidance_interval must be two times 0 <= low < high <= 1; got {self.guidance_interval}",
                    "0 and 1 guide always",
                )
        if self.shift is not None:
            check_shift(self.shift)
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold <= 1:
            raise FibldmError(
                f"dynamic_threshold must lie in (0, 1]; got {self.dynamic_threshold}", "0.995 is usual, null is none"
            )
        if not 0 <= self.residual_noise < math.inf:
            raise FibldmError(
                f"residual_noise must be a number of at least 0; got {self.residual_noise}", "1 is as measured"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingSettings":
        """Settings from plain values by name, such as those of a bundle.

        Raises:
            FibldmError: there is no such setting, or a value has another type or is out of range.
        """
        return settings_of(cls, values, "setting of sampling")

    def changed(self, **values: Any) -> "SamplingSettings":
        """The same with other values by name; with another sampler, `eta` is unset unless it is given as well.

        Raises:
            FibldmError: there is no such setting, or a value is out of range.
        """
        names = [field.name for field in fields(self)]
        if unknown := [name for name in values if name not in names]:
            raise unknown_choice("a setting of sampling", unknown[0], names)
        if values.get("sampler", self.sampler) != self.sampler:
            values = {"eta": None, **values}
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """As sidecars tell them; some only where they are given, so that volumes from before them are not made anew."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in TOLD_IF_GIVEN or value != TOLD_IF_GIVEN[name]
        }

    def as_trained(self, *, shift: float, latents: bool, residual_noise: bool) -> "SamplingSettings":
        """The settings as a generator follows them.

        Args:
            shift: of its training times, taken where the settings give none.
            latents: it has an autoencoder, and does not work on voxels.
            residual_noise: it knows what its decoder leaves out; otherwise none is drawn.

        Raises:
            FibldmError: a dynamic threshold is asked of latents.
        """
        if self.dynamic_threshold is not None and latents:
            raise FibldmError(
                "dynamic_threshold needs a run in pixel space, where z_0 is a volume in [-1, 1]; this one has latents",
                "leave it out; guidance_rescale holds guidance back in any space",
            )
        followed = replace(self, shift=shift if self.shift is None else self.shift)
        return followed if residual_noise else replace(followed, residual_noise=0.0)

    @property
    def described(self) -> str:
        """In words, without the seed: "dpmpp_2m in 5 steps at guidance 1.5"; what else is not usual comes after."""
        shown = replace(self, shift=None) if self.shift == 1 else self
        usual = replace(SamplingSettings(), sampler=self.sampler, steps=self.steps, guidance=self.guidance)
        more = [
            f", {name.replace('_', ' ')} {' to '.join(f'{part:g}' for part in _listed(value))}"
            for name, value in shown.to_dict().items()
            if name != "seed" and value != getattr(usual, name)
        ]
        return f"{self.sampler} in {counted(self.steps, 'step')} at guidance {self.guidance:g}{''.join(more)}"

    def times(self, process: Process) -> Tensor:
        """The times that the sampler visits on a process, float64, shape (steps + 1,); ``shift`` None counts as 1."""
        shift = 1.0 if self.shift is None else self.shift
        return sampling_times(self.steps, spacing=process.sampling_spacing, shift=shift)

    @property
    def draw(self) -> Sampler:
        """The sampler, with its ``eta``."""
        return sampler(self.sampler, self.eta)

    def guide(self, conditional: Denoise, unconditional: Denoise, both: Denoise | None = None) -> Denoise:
        """The denoiser with guidance as these settings want it, see `guided`."""
        return guided(
            conditional,
            unconditional,
            self.guidance,
            rescale=self.guidance_rescale,
            interval=self.guidance_interval,
            both=both,
        )

    @property
    def network_calls(self) -> int:
        """UNet passes per volume, each with its ControlNets, where guidance, which counts two, is always on."""
        return calls(self.sampler, self.steps) * (1 if self.guidance == 1 else 2)

    def calls_on(self, process: Process) -> int:
        """UNet passes per volume, guidance only where it is on: counted in a rehearsal on two numbers."""
        counted = 0

        def count(z_t: Tensor, t: Tensor) -> Prediction:
            nonlocal counted
            counted += 1
            return Prediction(z_t)

        denoise, z = self.guide(count, count), torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1, 1)
        self.draw(denoise, z, self.times(process), process=process, generators=[torch.Generator()])
        return counted


@dataclass(frozen=True)
class FileFormat:
    """In which files volumes are written.

    Attributes:
        format: "nifti", or "dicom": a series ``<mask stem>_<number:03d>/``, and the mask as objects of its own.
        template: of DICOM: folder of the series that gives technical tags, never those of a patient.
        label_codes: of DICOM: CSV of coded meanings for labels that the shipped table lacks.
        patient_position: of DICOM: HFS, FFS, ..., see `fibldm.volumes.dicom.output.PATIENT_POSITIONS`; None takes that
            of the template, or leaves it empty.
        mask_format: of DICOM: "seg", a segmentation, "rtstruct", an RT structure set, or "both"; None is "seg".

    Raises:
        FibldmError: there is no such format, or options of DICOM are given for another one.
    """

    format: str = "nifti"
    template: str | Path | None = None
    label_codes: str | Path | None = None
    patient_position: str | None = None
    mask_format: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown_choice("format", self.format, FORMATS)
        given = [name for name in _OF_DICOM if getattr(self, name) is not None]
        if self.format == "nifti" and given:
            raise FibldmError(f"format nifti takes no {' and no '.join(given)}", "change or leave out one of them")

    @cached_property
    def dicom(self) -> "DicomOutput | None":
        """Writes DICOM; None is NIfTI. Template and table are read once.

        Raises:
            FibldmError: one of them, the position or the format of masks is refused.
        """
        if self.format == "nifti":
            return None
        from fibldm.volumes.dicom.output import DicomOutput

        template, codes = (path and Path(path) for path in (self.template, self.label_codes))
        return DicomOutput.read(template or None, codes or None, self.patient_position, self.mask_format or "seg")


@dataclass(frozen=True)
class SynthesisSettings:
    """All that is asked of a generator beside its masks; usually made by `of`.

    Attributes:
        sampling: how volumes are drawn.
        files: in which files they are written.
        count: volumes of every mask.
        batch_size: volumes that are sampled together.
        allow_extrapolation: go on, and say so, where masks or conditions lie outside what the training data covered.
        covariates: what is asked of all patients beside the masks, such as ``{"age": 63, "sex": "F"}``; all else is
            unknown.
        conditions: what is asked of further conditions that the network was trained with, by their names.
        conditions_table: covariates and further conditions of each mask by itself, which go before those of all: a CSV
            or JSON file, or its content, see `fibldm.synthesis.asked.ConditionsTable`.
        own_conditions: work folder whose cases the masks are of; of each is asked what the data say of its case, where
            nothing else is.
        adapters: files that are put on the network, with their strengths, see `Synthesizer.adapted`.
        check: how often a volume whose intensities lie outside of the ranges of training is drawn again before it is
            left out, see `Synthesizer.draw`; 0 draws none again, None looks at none.
        reject_copies: folder of an audit of the same data (`fibldm.volumes.known_scans`); a volume that it would name
            a copy of a training scan is drawn again, too, at most ``check`` times, or 10 times without that.

    Raises:
        FibldmError: a number is below 1, a check or a strength below 0, or covariates are among the further conditions.
    """

    sampling: SamplingSettings = SamplingSettings()
    files: FileFormat = FileFormat()
    count: int = 1
    batch_size: int = 1
    allow_extrapolation: bool = False
    covariates: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    conditions_table: Table | None = None
    own_conditions: str | Path | None = None
    adapters: Mapping[str | Path, float] = field(default_factory=dict)
    check: int | None = None
    reject_copies: str | Path | None = None

    def __post_init__(self) -> None:
        check_strengths(self.adapters)
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise FibldmError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.check is not None and self.check < 0:
            raise FibldmError(f"check must be at least 0; got {self.check}", "null or leaving it out checks nothing")
        _ = self.asked

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked of all masks, by condition."""
        return together(self.covariates, self.conditions)

    @cached_property
    def table(self) -> ConditionsTable | None:
        """What is asked of each mask by itself; its file is read once.

        Raises:
            FibldmError: it is no such table.
        """
        return None if self.conditions_table is None else ConditionsTable.read(self.conditions_table)

    @cached_property
    def cases(self) -> Mapping[Path, Mapping[str, Any]] | None:
        """What the data say of the cases of `own_conditions`, by the files of their masks; read once.

        Raises:
            FibldmError: that is no work folder.
        """
        return None if self.own_conditions is None else known_cases(self.own_conditions)

    @cached_property
    def known_scans(self) -> KnownScans | None:
        """The training scans of `reject_copies`; read once.

        Raises:
            FibldmError: that is no folder of an audit, see `KnownScans.read`.
        """
        return None if self.reject_copies is None else KnownScans.read(self.reject_copies)

    @property
    def each_its_own(self) -> bool:
        """Whether masks differ in what is asked of them."""
        return self.conditions_table is not None or self.own_conditions is not None

    def check_masks(self, masks: Sequence[Path]) -> None:
        """Refuse, before a generator is loaded, masks that lack the conditions of their own that they are to have.

        Raises:
            FibldmError: see `ConditionsTable.check_masks` and `known_cases`; or there are no masks.
        """
        if self.each_its_own and not masks:
            raise FibldmError("conditions of each mask by itself need masks; there are none", "give `masks` or `data`")
        if self.table is not None:
            self.table.check_masks(masks)
        _ = self.cases

    def asked_of(self, mask: Path | None, kinds: Mapping[str, Condition]) -> dict[str, Any]:
        """What is asked of a mask, by condition: by the data, over that of all masks, over that by the table.

        Args:
            mask: its file; None for volumes that follow no mask.
            kinds: the conditions beside the mask, by name.

        Raises:
            FibldmError: table or data do not tell.
        """
        asked = self.asked
        if mask is not None and self.table is not None:
            asked = laid_over(asked, self.table.of(mask, kinds))
        if mask is not None and self.cases is not None:
            asked = laid_over(own(kinds, self.cases, mask, asked), asked)
        return asked

    @classmethod
    def of(
        cls,
        base: "SynthesisSettings | SamplingSettings | None" = None,
        *,
        what: str = "option of synthesis",
        **options: Any,
    ) -> "SynthesisSettings":
        """Settings with options by their names, such as ``of(steps=5, count=4, format="dicom")``.

        Args:
            base: what the options are laid over; None for the defaults.
            what: how an error calls an option.
            **options: names of `OPTIONS`.

        Raises:
            FibldmError: there is no such option, or its value has another type or is out of range.
        """
        if unknown := [name for name in options if name not in OPTIONS]:
            raise unknown_choice(what, unknown[0], OPTIONS)
        made = base if isinstance(base, cls) else cls(base or SamplingSettings())  # type: ignore[arg-type]

        def among(kind: type[Any]) -> dict[str, Any]:
            names = [part.name for part in fields(kind)]
            return checked_values(kind, {name: options[name] for name in names if name in options}, what)

        sampling, files = made.sampling.changed(**among(SamplingSettings)), among(FileFormat)
        # the same object where nothing changes, as it may have read a template
        kept = replace(made.files, **files) if files else made.files
        return replace(made, sampling=sampling, files=kept, **among(cls))


OPTIONS = tuple(
    part.name
    for kind in (SamplingSettings, FileFormat, SynthesisSettings)
    for part in fields(kind)
    if part.name not in ("sampling", "files")
)
"""The names of all that may be asked, as `SynthesisSettings.of` takes them."""

OF_SAMPLING = tuple(part.name for part in fields(SamplingSettings))
"""Those of them that say how volumes are drawn, for which a bundle has defaults of its own."""


def _listed(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value,)
