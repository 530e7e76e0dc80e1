# Sourced by the other scripts: makes .venv in the repository root, once, with FibLDM (editable) and its dev extra.
#
# Sets `root` (the repository) and `venv`. Uses $PYTHON where it is set, else the first Python >= 3.11 found, and options
# for pip in the array `install_options`, where there are some.
# A stamp in .venv says what it was made of; while that holds, nothing is installed. Needs no root rights.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
install_log="$venv/install.log"
stamp="$venv/stamp"

say() { printf '%s\n' "$*" >&2; }

# "3.11.7" for a Python that runs, nothing for one that does not (a name on PATH is no proof).
python_version() { "$1" -I -c 'import platform; print(platform.python_version())' 2>/dev/null; }

is_recent() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

can_make_venvs() { "$1" -I -c 'import venv, ensurepip' 2>/dev/null; }

# Prints the path of the Python to use, or says what is missing.
find_python() {
    local candidate version found="" without_venv=""
    local candidates=(python3.11 python3.12 python3.13 python3)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version="$(python_version "$candidate")" || continue
        found+=" $candidate ($version)"
        is_recent "$candidate" || continue
        if can_make_venvs "$candidate"; then
            command -v "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    if [[ -n "$without_venv" ]]; then
        say "FibLDM needs Python's modules venv and ensurepip, and $without_venv comes without them." \
            "Install them (Debian, Ubuntu: the package python3-venv or python3.11-venv), or name another" \
            "Python: PYTHON=/path/to/python $0"
    else
        say "FibLDM needs Python 3.11 or later; found:${found:- none that runs among ${candidates[*]}}." \
            "Install one (for example with the system's packages, pyenv, uv or conda), or name it:" \
            "PYTHON=/path/to/python $0"
    fi
    return 1
}

# What .venv is made of: the place it stands in, its Python, and the two files that name the packages.
fingerprint() {
    "$venv/bin/python" -I - "$root" 2>/dev/null <<'PYTHON'
import hashlib, pathlib, platform, sys
root = pathlib.Path(sys.argv[1])
parts = [str(root).encode(), platform.python_version().encode()]
parts += [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest())
PYTHON
}

no_network='[Nn]ame resolution|NameResolutionError|NewConnectionError|ConnectTimeout|Network is unreachable'
no_network+='|Connection (refused|broken|reset)|Max retries|ProxyError|SSLError|timed out'

explain_failure() {
    say ""
    if grep -qiE 'no space left|disk quota' "$install_log"; then
        say "The installation ran out of disk space: FibLDM and its packages need about 3 GB, 8 GB with a CUDA build" \
            "of torch. Free some space and run $0 again; it starts afresh."
    elif grep -qE "$no_network" "$install_log"; then
        say "The packages could not be fetched: the first run needs the network (later runs need none)." \
            "Connect, or tell pip about your proxy or mirror (HTTPS_PROXY, PIP_INDEX_URL), and run $0 again."
    elif grep -q 'Operation cancelled by user' "$install_log"; then
        say "The installation was interrupted; run $0 again, it starts afresh."
    else
        say "pip could not install FibLDM. The last lines below say why; the remedy is often another Python" \
            "(PYTHON=/path/to/python3.11 $0), since constraints.txt holds for Python 3.11 to 3.13."
    fi
    say "The whole log is $install_log; it ends with:"
    grep -v '^WARNING' "$install_log" | tail -n 8 | sed 's/^/    /' >&2
}

# Whether .venv was installed to its end, here, and with the Python asked for.
is_whole() {
    [[ -f "$stamp" && "$(sed -n 2p "$stamp")" == "$root" ]] || return 1
    [[ -n "$(python_version "$venv/bin/python")" ]] || return 1
    [[ -z "${PYTHON:-}" || "$(python_version "$PYTHON")" == "$(python_version "$venv/bin/python")" ]]
}

is_current() { is_whole && [[ "$(fingerprint)" == "$(sed -n 1p "$stamp")" ]]; }

# An empty .venv. What an interrupted installation left is thrown away; a folder of somebody else's is not.
make_venv() {
    local python
    if [[ -d "$venv" && ! -f "$install_log" ]]; then
        say "$venv exists and was not made by this script; move or delete it, and run $0 again."
        return 1
    fi
    python="$(find_python)" || return 1
    say "Making $venv with $python ($(python_version "$python"))."
    if ! { rm -rf "$venv" && mkdir "$venv" && : >"$install_log"; }; then
        say "$venv cannot be written; check the permissions of $root and the free disk space, and run $0 again."
        return 1
    fi
    "$python" -m venv "$venv" >>"$install_log" 2>&1 || { explain_failure; return 1; }
}

install_packages() {
    rm -f "$stamp"
    say "Installing FibLDM and its packages, about 1 to 3 minutes (longer on a slow line)."
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        ${install_options[@]+"${install_options[@]}"} --constraint "$root/constraints.txt" \
        --editable "${root}[dev]" >"$install_log" 2>&1; then
        explain_failure
        return 1
    fi
    printf '%s\n%s\n' "$(fingerprint)" "$root" >"$stamp"
    say "Installed; later runs start at once."
}

# The one entry: after it, .venv holds the environment. Two scripts started at once wait for each other.
make_environment() {
    (
        if command -v flock >/dev/null; then flock 9 || true; fi
        is_current && exit 0
        is_whole || make_venv || exit 1
        install_packages
    ) 9<"$root/pyproject.toml"
}
