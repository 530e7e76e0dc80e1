#!/usr/bin/env bash
# The whole pipeline on real MRI: the hippocampus of the Medical Segmentation Decathlon, from scans to a bundle.
#
#   ./scripts/hippocampus.sh DIR
#
# Needs $FIBLDM_DATA/hippocampus_mri, Task04 as it is distributed. Writes DIR/{work,run,synthetic,synthetic_training,
# bundle,curve}; figures are in DIR/run/evaluation/metrics.json. Goes on where it was interrupted.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if (($# != 1)) || [[ ! -d "${FIBLDM_DATA:-}/hippocampus_mri" ]]; then
    say "Usage: FIBLDM_DATA=FOLDER $0 DIR, where FOLDER holds hippocampus_mri."
    exit 2
fi
make_environment
"$venv/bin/fibldm" pipeline "$FIBLDM_DATA/hippocampus_mri" --out "$1" --recipe recipe_hippocampus_mri \
    --license CC-BY-SA-4.0 --half
# what longer training wins and loses
"$venv/bin/python" "$root/scripts/compare_sampling.py" --run "$1/run" --data "$1/work" --out "$1/curve" \
    --steps 5 --guidance 1.5 --checkpoint epoch_00{02,04,06,08,10,12}
