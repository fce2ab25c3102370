#!/usr/bin/env bash
# Makes .venv with this package in it: "run" for the package alone, "dev" with what the checks and tests need.
# The second call is instant; a changed pyproject.toml, Python or place of the checkout makes it run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind=${1:-run}
case $kind in
    run | dev) ;;
    *)
        echo "usage: scripts/setup.sh [run|dev]" >&2
        exit 2
        ;;
esac

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the first Python that is new enough; PYTHON=... comes before all others.
find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
}

# Ends with the names of what is missing, and the line that installs it.
require() {
    local missing=() packages=()
    python=$(find_python)
    if [ -z "$python" ]; then
        missing+=("Python 3.11 or newer") packages+=(python3 python3-venv)
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        missing+=("the venv module of $python") packages+=("python3-venv")
    fi
    command -v git >/dev/null || { missing+=(git) && packages+=(git); }
    command -v make >/dev/null || { missing+=(make) && packages+=(make); }
    command -v "${CC:-cc}" >/dev/null || { missing+=("a C compiler (${CC:-cc})") && packages+=(gcc); }
    command -v "${CXX:-c++}" >/dev/null || { missing+=("a C++ compiler (${CXX:-c++})") && packages+=(g++); }
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'error: missing: %s\n' "$(printf '%s, ' "${missing[@]}" | sed 's/, $//')" >&2
        echo "hint: apt-get install ${packages[*]}" >&2
        exit 3
    fi
}

# Whether the system has the cmake (3.14 is upstream's oldest) and the ninja or make that a build needs.
has_build_tools() {
    local version
    command -v ninja >/dev/null || return 1
    version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
    [ -n "$version" ] && [ "$(printf '%s\n3.14\n' "$version" | sort -V | head -n 1)" = 3.14 ]
}

state() { { pwd && cat pyproject.toml && echo "$1" && .venv/bin/python -V; } 2>/dev/null | sha256sum; }

is_done() { [ -f ".venv/.setup-$1" ] && [ "$(state "$1")" = "$(cat ".venv/.setup-$1")" ]; }

# "dev" has all that "run" needs.
if is_done dev || { [ "$kind" = run ] && is_done run; }; then
    exit 0
fi

require
if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! is_new_enough .venv/bin/python; then
    echo "making .venv with $python ($("$python" -V))" >&2
    rm -rf .venv
    "$python" -m venv .venv
fi

extras=()
[ "$kind" = dev ] && extras+=(dev)
has_build_tools || extras+=(build)
wanted=.
[ ${#extras[@]} -eq 0 ] || wanted=".[$(
    IFS=,
    echo "${extras[*]}"
)]"
echo "installing $wanted into .venv" >&2
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$wanted"; then
    echo "error: pip could not install $wanted into .venv" >&2
    echo "hint: check the network and pip's settings (proxy, mirror, certificate), then run the same command again" >&2
    exit 3
fi
state "$kind" >".venv/.setup-$kind"
