#!/usr/bin/env bash
# `python -m monai.bundle run … --key false` (MONAI 1.6.1, Fire 0.7.1) switches the key on.
#
# One would guess: YAML's words for no, which the configuration file itself takes, are taken on the command line too, as
# an override replaces what stands in that file. In the file, `key: false` is the boolean. On the command line Fire reads
# values as Python literals, so that only `False` and `0` are what they look like; `false`, `no` and `off` arrive as texts,
# MONAI puts the text into the configuration as it is, and every expression that asks for its truth goes on with true.
#
# It matters: safety switches of a bundle (stop on a mask unlike the training data, do not overwrite, no mixed precision)
# are turned on or off by the very command that says the opposite, without a warning. What takes such values has to check
# their type, and commands have to say `False`.
#
# Seen with MONAI 1.6.1, Fire 0.7.1, torch 2.13.0:
#   in the file, false: off
#   --key False: False is off
#   --key false: 'false' is on
#   --key no: 'no' is on
#   --key 0: 0 is off
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 monai==1.6.1 fire==0.7.1 pyyaml==6.0.3
cd "$folder"
printf '%s\n' 'key: true' 'run:' "- \"\$print('seen:', repr(@key), 'is', 'on' if @key else 'off')\"" >true.yaml
sed 's/true/false/' true.yaml >false.yaml

check() {
    local expected="$1" file="$2" seen
    shift 2
    seen="$(venv/bin/python -m monai.bundle run --config_file "$file" "$@" 2>/dev/null | sed -n 's/^seen: //p')"
    printf '%-12s %-14s %s\n' "$file" "$*" "$seen"
    [[ "$seen" == "$expected" ]] || { echo "expected $expected" >&2; exit 1; }
}

check "False is off" false.yaml
check "False is off" true.yaml --key False
check "'false' is on" true.yaml --key false
check "'no' is on" true.yaml --key no
check "0 is off" true.yaml --key 0
echo "as described"
