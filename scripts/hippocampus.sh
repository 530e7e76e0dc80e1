#!/usr/bin/env bash
# The whole pipeline on real MRI: the hippocampus of the Medical Segmentation Decathlon, from scans to figures.
#
#   ./scripts/hippocampus.sh DIR
#
# Needs $FIBLDM_DATA/hippocampus_mri, Task04 as it is distributed. Writes DIR/{work,run,synthetic,synthetic_training,curve};
# figures are in DIR/run/evaluation/metrics.json. Goes on where it was interrupted.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if (($# != 1)) || [[ ! -d "${FIBLDM_DATA:-}/hippocampus_mri" ]]; then
    say "Usage: FIBLDM_DATA=FOLDER $0 DIR, where FOLDER holds hippocampus_mri."
    exit 2
fi
make_environment
work="$1/work" run="$1/run"
fibldm() { "$venv/bin/fibldm" "$@"; }
stage() { fibldm "$@" --data "$work" --run "$run" --config data_hippocampus_mri; }

sampling=(--steps 5 --guidance 1.5 --batch-size 8)
[[ -d "$work" ]] || fibldm prepare "$FIBLDM_DATA/hippocampus_mri" --out "$work"
stage train autoencoder --set epochs=50 --set val_interval=5 --set spectral_weight=1
stage encode --set views=8
# 45 epochs: later, the gap to the training patients grows and validation no longer falls
stage train diffusion --config mask_concat --set mask_detail=4 --set epochs=45 --set val_interval=3 --set keep_every=5
fibldm synthesize --run "$run" --data "$work" --split test --out "$1/synthetic" "${sampling[@]}"
fibldm evaluate all --data "$work" --run "$run" --synthetic "$1/synthetic"
fibldm synthesize --run "$run" --data "$work" --split training --out "$1/synthetic_training" "${sampling[@]}"
fibldm evaluate utility --data "$work" --run "$run" --synthetic "$1/synthetic_training"
# what longer training wins and loses
"$venv/bin/python" "$root/scripts/compare_sampling.py" --run "$run" --data "$work" --out "$1/curve" \
    --steps 5 --guidance 1.5 --checkpoint epoch_00{05,10,15,20,25,30,35,40,45}
