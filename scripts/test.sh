#!/usr/bin/env bash
# The tests: makes the environment on the first run, then runs the fast suite.
#
#   ./scripts/test.sh [--all] [pytest's arguments; paths are seen from the repository root]
#
# --all adds the slow and the GPU tests (these skip themselves where there is no GPU). Two files are tested at a time;
# pytest's own -n 0 makes it one, as --pdb and -s need it.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

selection=(-m "not slow and not gpu")
arguments=()
for argument in "$@"; do
    if [[ "$argument" == "--all" ]]; then selection=(); else arguments+=("$argument"); fi
done

make_environment
cd "$root"
# in the order of tests/conftest.py
exec "$venv/bin/pytest" -n 2 --dist loadfile --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
