#!/usr/bin/env bash
# safetensors 0.8.0 writes the same tensors with the same metadata as files of different bytes, call by call.
#
# One would guess: a format without pickles, times or compression gives one file for one content, so that the hash of a
# file names what is in it. That holds with no metadata and with one entry. With several, their order in the header is
# drawn anew at every call, in one process too, and with it the hash; the dictionary's own order, a sorted one, and
# PYTHONHASHSEED change nothing. All files read back alike.
#
# It matters wherever hashes of weights or cached tensors stand for their content: in manifests, caches keyed by hash,
# and tests that a stage resumed or shared by several processes writes what one process writes. Such a test passes or
# fails by chance. One entry that holds JSON, or a tensor of its bytes, keeps files equal.
#
# Seen with safetensors 0.8.0 and numpy 2.4.6, 200 calls of one process each:
#   no metadata: 1 file
#   one entry: 1 file
#   three entries: 6 files, all of one length and content
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
PYTHONHASHSEED=0 "$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import numpy
from safetensors.numpy import load, save

tensors = {"weight": numpy.arange(12, dtype=numpy.float32).reshape(3, 4), "bias": numpy.zeros(3)}
found = {}
for name, metadata in {
    "no metadata": None,
    "one entry": {"made_by": "a"},
    "three entries": {"epoch": "3", "licence": "b", "made_by": "a"},
}.items():
    files = {save(tensors, metadata) for _ in range(200)}
    found[name] = len(files)
    lengths = {len(file) for file in files}
    alike = all(numpy.array_equal(load(file)[key], tensors[key]) for file in files for key in tensors)
    print(f"{name}: {len(files)} different files, lengths {sorted(lengths)}, tensors read back alike: {alike}")
    assert len(lengths) == 1 and alike
print("safetensors", importlib.metadata.version("safetensors"))
assert found["no metadata"] == found["one entry"] == 1, found
assert found["three entries"] == 6, found  # all orders of three
PYTHON
echo "as described above"
