"""How much may be sent, and how much may become of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a studio.

    Attributes:
        upload: bytes of a request.
        options: bytes of the options in it.
        inflated: bytes that a compressed file may become.
        voxels: of a mask or scan.
        dicom: bytes of a DICOM file, also once it is inflated; its elements take many times as much memory.
        objects: of a request of DICOMweb.
        series: bytes of the images that wait for a structure set.
        waiting: jobs that wait.
        readers: requests whose files are taken in at the same time; others are told to come again.
        listeners: event streams that are open at the same time.
        seconds: in which the next part of a request must come.
    """

    upload: int = 2**28
    options: int = 2**16
    inflated: int = 2**30
    voxels: int = 2**28
    dicom: int = 2**27
    objects: int = 4096
    series: int = 2**32
    waiting: int = 32
    readers: int = 2
    listeners: int = 32
    seconds: float = 20.0
