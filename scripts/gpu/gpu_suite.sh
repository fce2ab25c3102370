#!/usr/bin/env bash
# Builds for the GPU of this machine and checks and measures everything on it, in one call.
#
#     scripts/gpu/gpu_suite.sh prepare [--python 3.12] [--without "numpy cmake"]   # on a machine with a network
#     scripts/gpu/gpu_suite.sh [STAGE...] [--seconds 580] [--out FOLDER]           # on the machine with the GPU
#
# "prepare" fills build/gpu-suite with what the other call would fetch: llama.cpp and Python wheels for the Python that it names. Take the
# checkout and that folder to a machine without a network. "--without" leaves out wheels that the other machine has already.
# Stages that ended are not repeated, so two or three calls can share the work; gpu_suite.py --help has the rest.
#
# Results: build/report/gpu-suite (summary.md first). Exit codes: see gpu_suite.py; 3 when a Python module or the GPU is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

home=$(realpath -m "${TURBO_GGUF_HOME:-build}")
kit=$home/gpu-suite

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 3
}

# The names of what the package needs, from pyproject.toml; its optional build tools too.
requirements() {
    "$1" - <<'EOF'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["build"]]))
EOF
}

prepare() {
    local version=3.12 without="" platforms=() python=.venv/bin/python
    while [ $# -gt 0 ]; do
        case $1 in
            --python) version=$2 ;;
            --without) without=$2 ;;
            *)
                echo "usage: scripts/gpu/gpu_suite.sh prepare [--python VERSION] [--without NAMES]" >&2
                exit 2
                ;;
        esac
        shift 2
    done
    [ -n "${PYTHON:-}" ] && python=$PYTHON
    [ -n "${PYTHON:-}" ] || scripts/setup.sh run
    local tree minor
    tree=$("$python" -c 'from turbo_gguf.cli import main; main()' upstream fetch)
    rm -rf "$kit" && mkdir -p "$kit/wheels"
    tar -C "$(dirname "$(dirname "$tree")")" -cJf "$kit/upstream.tar.xz" "upstream/$(basename "$tree")" "upstream/$(basename "$tree").json"
    platforms=(--platform linux_x86_64 --platform manylinux1_x86_64 --platform manylinux2014_x86_64)
    for minor in 12 17 24 26 27 28 31 34; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    requirements "$python" >"$kit/requirements.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp --python-version "$version" \
        "${platforms[@]}" --dest "$kit/wheels" -r "$kit/requirements.txt"
    local name
    for name in $without; do rm -f "$kit/wheels/${name//-/_}"-*; done
    echo "$kit holds $(du -sm "$kit" | cut -f 1) MB: llama.cpp and $(find "$kit/wheels" -name '*.whl' | wc -l) wheels for Python $version" >&2
}

# Modules that the driver imports, and that are missing.
missing() {
    "$python" - <<'EOF'
import importlib.util as find
modules = "click filelock gguf huggingface_hub matplotlib msgspec numpy unidiff".split()
print(" ".join(name for name in modules if find.find_spec(name) is None))
EOF
}

# Picks the Python, and gives it what it lacks from the prepared wheels, into a folder of its own: nothing is installed on the machine.
use_python() {
    python=${PYTHON:-}
    [ -n "$python" ] || { [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null && python=.venv/bin/python; } || python=python3
    export PYTHONPATH="$PWD:$PWD/scripts:$PWD/scripts/bench:$kit/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    [ -n "$(missing)" ] || return 0
    if [ -d "$kit/wheels" ]; then
        local wheels=() wheel name
        for wheel in "$kit"/wheels/*.whl; do
            name=$(basename "$wheel" | cut -d - -f 1)
            # what the machine has stays as it is: another numpy or matplotlib could break its other packages
            "$python" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || wheels+=("$wheel")
        done
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade --target "$kit/site" "${wheels[@]}"
    fi
    local lacking
    lacking=$(missing)
    [ -z "$lacking" ] || fail "$python lacks $lacking" "scripts/gpu/gpu_suite.sh prepare on a machine with a network, or make setup here"
}

use_kit() {
    if [ -f "$kit/upstream.tar.xz" ] && [ ! -d "$home/upstream" ]; then
        tar -C "$home" -xJf "$kit/upstream.tar.xz"
    fi
    export PATH="$kit/site/bin:$PATH" # cmake and ninja of the wheels
    # CUDA without cuBLAS: that of a PyTorch installation does
    if [ -z "${CUBLAS_ROOT:-}" ]; then
        local folder
        folder=$("$python" -c 'import nvidia, glob; print(next((f[:-20] for p in nvidia.__path__ for f in glob.glob(p + "/*/include/cublas_v2.h")), ""))' \
            2>/dev/null || true)
        [ -z "$folder" ] || export CUBLAS_ROOT=$folder
    fi
}

if [ "${1:-}" = prepare ]; then
    prepare "${@:2}"
    exit
fi
use_python
use_kit
exec "$python" scripts/gpu/gpu_suite.py "$@"
