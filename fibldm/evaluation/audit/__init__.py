"""Are synthetic volumes copies of training scans, even turned or retouched ones? For any folders of volumes."""

from fibldm.evaluation.audit.audit import audit, scans_of_folder, scans_of_work

__all__ = ["audit", "scans_of_folder", "scans_of_work"]
