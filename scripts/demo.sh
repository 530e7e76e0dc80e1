#!/usr/bin/env bash
# FibLDM from nothing, on phantoms: makes the environment on the first run, then runs `fibldm demo` with your arguments.
#
#   ./scripts/demo.sh [--out DIR] [--seed S] [--minutes M]
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
exec "$venv/bin/fibldm" demo "$@"
