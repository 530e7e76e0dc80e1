#!/usr/bin/env bash
# SimpleITK 2.5.7 places a NIfTI volume by its qform where the sform says "aligned" or "MNI"; nibabel 5.4.2 by its sform.
#
# One would guess: a NIfTI file that holds both transforms is placed the same by both libraries, and by the sform, which
# the standard calls method 3 and most tools prefer. So it is while the sform's code is 1 (scanner). With code 2 (aligned
# to another scan), 3 (Talairach) or 4 (MNI), as registration writes it beside the scanner's qform, SimpleITK takes the
# qform and nibabel the sform: two readers of one file place it apart by the whole registration, and neither says so.
#
# It matters: volumes that were registered, and masks drawn on them, come from one tool moved against the other; and a
# sform with shear, which ITK refuses, opens without a word where its code is not 1 and a qform stands beside it, as
# another grid.
#
# Seen with nibabel 5.4.2 and SimpleITK 2.5.7 (sform shifted by 30 mm against the qform):
#   sform code 1, qform code 1: nibabel sform, SimpleITK sform
#   sform code 2, qform code 1: nibabel sform, SimpleITK qform
#   sform code 3, qform code 1: nibabel sform, SimpleITK qform
#   sform code 4, qform code 1: nibabel sform, SimpleITK qform
#   sform code 4, qform code 0: nibabel sform, SimpleITK sform
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import nibabel
import numpy as np
import SimpleITK as sitk

SHIFT = 30.0
scanner = np.diag([2.0, 2.0, 2.0, 1.0])
registered = scanner.copy()
registered[0, 3] = SHIFT


def placed_by(origin_x):
    """RAS+ x of voxel (0, 0, 0), as the name of the transform that says so."""
    return {0.0: "qform", SHIFT: "sform"}[float(origin_x)]


seen = []
for sform, qform in ((1, 1), (2, 1), (3, 1), (4, 1), (4, 0)):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    image.header.set_qform(scanner, qform)
    image.header.set_sform(registered, sform)
    image.header.set_xyzt_units("mm")
    nibabel.save(nibabel.Nifti1Image(image.dataobj, None, image.header), "volume.nii.gz")
    by_nibabel = placed_by(nibabel.load("volume.nii.gz").affine[0, 3])
    by_itk = placed_by(-sitk.ReadImage("volume.nii.gz").GetOrigin()[0])
    seen.append((sform, qform, by_nibabel, by_itk))
    print(f"sform code {sform}, qform code {qform}: nibabel {by_nibabel}, SimpleITK {by_itk}")

expected = [
    (1, 1, "sform", "sform"),
    (2, 1, "sform", "qform"),
    (3, 1, "sform", "qform"),
    (4, 1, "sform", "qform"),
    (4, 0, "sform", "sform"),
]
raise SystemExit(seen != expected and "another behaviour than the one described")
PYTHON
