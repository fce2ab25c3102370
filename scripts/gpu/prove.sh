#!/usr/bin/env bash
# A proof of the GPU kernels in ten minutes of somebody else's GPU, without a network there: checks, times, counters, verdicts.
#
#     scripts/gpu/prove.sh prepare --arch 90 [OPTION...]                 # here: compiles and packs, see prove_pack.py
#     scripts/gpu/prove.sh run build/prove/proof.tar.xz [OPTION...]      # there: unpacks and runs, see prove_run.py
#     scripts/gpu/prove.sh                                               # both, on a machine with a GPU and a compiler (make gpu-proof)
#
# "run" needs bash and Python 3.10, and takes 560 seconds. Its results folder (--out, else proof-results) has summary.md, results.jsonl
# and log.txt. Called again, it goes on with what is missing. Exit codes: those of the two Python files.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

prepare() {
    local python=${PYTHON:-}
    if [ -z "$python" ]; then
        (cd "$repository" && scripts/setup.sh run >&2)
        python=$repository/.venv/bin/python
    fi
    PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" "$python" "$repository/scripts/gpu/prove_pack.py" "$@"
}

run() {
    local proof=$1
    shift
    if [ ! -d "$proof" ]; then
        unpacked=$(mktemp -d)
        trap 'rm -rf "$unpacked"' EXIT
        python3 -m tarfile -e "$proof" "$unpacked" # not tar: xz is missing on some machines, Python has its own
        proof=$unpacked/proof
    fi
    local model=$repository/turbo_gguf/data/model/eval-model.gguf # for a proof that was packed without it
    [ ! -e "$model" ] || set -- --model "$model" "$@"
    python3 "$proof/prove_run.py" "$@"
}

case ${1:-} in
    prepare) prepare "${@:2}" ;;
    run)
        [ $# -ge 2 ] || { echo "usage: scripts/gpu/prove.sh run ARCHIVE_OR_FOLDER [OPTION...]" >&2; exit 2; }
        run "${@:2}"
        ;;
    *)
        folder=$(prepare --here "$@")
        run "$folder" --out "$(dirname "$folder")/results" --seconds 1800
        ;;
esac
