"""What the API tells; pydantic describes it in OpenAPI."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fibldm.serving.store import Job, State


class Refused(BaseModel):
    """Every refusal: what must hold and what came, and what to do."""

    message: str
    remedy: str


class Session(BaseModel):
    """What a browser signs in with."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=512)


class VolumeView(BaseModel):
    """A synthetic volume of a job."""

    number: int
    name: str
    format: Literal["nifti", "dicom"]
    address: str
    sidecar: str


class JobView(BaseModel):
    """A job as it is now; times are seconds since 1970."""

    id: str
    state: Literal["held", "waiting", "running", "done", "refused"]
    asked: dict[str, Any]
    count: int
    made: int
    before: int = Field(description="jobs that are made before this one")
    submitted: float
    changed: float
    error: Refused | None
    volumes: list[VolumeView]
    mask: str | None = Field(description="address of the mask as used, of a job of NIfTI that is done")

    @classmethod
    def of(cls, job: Job, *, count: int, before: int) -> "JobView":
        """A job of the store."""
        outcome, done = dict(job.outcome or {}), job.state is State.DONE
        outputs = [str(name) for name in outcome.get("outputs", [])] if done else []
        return cls(
            id=job.id,
            state=job.state.value,
            asked=dict(job.request),
            count=count,
            made=len(outputs) if done else job.made,
            before=before,
            submitted=job.submitted,
            changed=job.changed,
            error=Refused(**outcome) if job.state is State.REFUSED else None,
            volumes=[_volume(job.id, number, name) for number, name in enumerate(outputs)],
            mask=f"/api/jobs/{job.id}/mask" if outputs and _is_nifti(outputs[0]) else None,
        )


class BundleView(BaseModel):
    """The generator that serves, and what may be asked of it."""

    name: str
    version: str
    modality: str
    licence: str
    data_licence: str
    labels: dict[int, str]
    spacing: list[float]
    size: list[int]
    channels: list[str]
    intensity: dict[str, Any]
    sampling: dict[str, Any]
    conditions: dict[str, dict[str, Any]]
    checks: bool = Field(description="whether volumes can be checked against the intensities of training")
    card: str
    options: list[str]
    limits: dict[str, int]
    examples: list[str]


def _volume(job: str, number: int, name: str) -> VolumeView:
    address = f"/api/jobs/{job}/results/{number}"
    stem = name.removesuffix(".nii.gz")
    kind: Literal["nifti", "dicom"] = "nifti" if _is_nifti(name) else "dicom"
    return VolumeView(number=number, name=stem, format=kind, address=address, sidecar=f"{address}/sidecar")


def _is_nifti(name: str) -> bool:
    return name.endswith(".nii.gz")
