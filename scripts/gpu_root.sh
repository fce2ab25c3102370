#!/usr/bin/env bash
# A Debian sid root for GPU work without a GPU, for contributors and CI. Clang and HIP compile ggml's HIP backend, which runs on the
# emulator (dev/emulator). glslc and Mesa's lavapipe, a Vulkan driver for the CPU, compile and run the Vulkan backend.
# Slim: rocBLAS and hipBLAS are headers and stub libraries in place of 4 GB of kernels.
#
#     scripts/gpu_root.sh make             # make it, or mend it; prints its folder (again: instant)
#     scripts/gpu_root.sh run COMMAND...   # run a command in it, in this folder
#     scripts/gpu_root.sh path             # print its folder; ends with 3 when it is not made
#
# Environment: TURBO_GGUF_GPU_ROOT (folder of the root; default: gpu-root below TURBO_GGUF_HOME, which is build/ here),
# TURBO_GGUF_DEBIAN_MIRROR (default: the mirror of this machine's apt, else deb.debian.org).
# Needs root rights, debootstrap and a Debian mirror; what is missing is named, with exit code 3.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$(realpath -m "${TURBO_GGUF_HOME:-$checkout/build}")
root=$(realpath -m "${TURBO_GGUF_GPU_ROOT:-$home/gpu-root}")
part=$root.part
log=$home/logs/gpu-root.log

# What is in the root. A change here, or in a function whose name begins with recipe_, makes a new one.
suite=sid # Debian 12 and 13 have a HIP older than 6.1, which upstream refuses, and a glslc that lacks half of its extensions
packages=(hipcc libamdhip64-dev lld cmake ninja-build ccache git python3-dev python3-numpy python3-msgspec
    glslc libvulkan-dev spirv-headers mesa-vulkan-drivers vulkan-tools vulkan-validationlayers mesa-drm-shim spirv-tools)
headers_only=(librocblas-dev libhipblas-dev libhipblas-common-dev)

fail() {
    echo "error: $1" >&2
    [ -z "${2:-}" ] || echo "hint: $2" >&2
    exit 3
}

note() { printf '[%4d s] %s\n' "$SECONDS" "$1" >&2; }

stamp() { { echo "$suite ${packages[*]} ${headers_only[*]}" && declare -f recipe_base recipe_packages recipe_stubs; } | sha256sum | cut -c 1-16; }

is_made() { [ -f "$root/.turbo-gguf" ] && [ "$(cat "$root/.turbo-gguf")" = "$(stamp)" ]; }

# The first Debian archive in apt's configuration (not its security or derivative archives), else Debian's own.
mirror() {
    local found=${TURBO_GGUF_DEBIAN_MIRROR:-}
    if [ -z "$found" ] && command -v apt-get >/dev/null; then
        # shellcheck disable=SC2016  # apt-get fills these in
        found=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
            sed -n 's/^Debian //p' | grep -E '^https?://' | head -n 1 || true)
        # The same without apt's package lists, as before the first apt-get update.
        [ -n "$found" ] || found=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 || true)
    fi
    echo "${found:-http://deb.debian.org/debian}" | sed 's/[ /]*$//'
}

# apt's proxy, in the form that debootstrap's wget and the apt in the root take.
use_apt_proxy() {
    local proxy
    proxy=$(apt-config shell p Acquire::http::Proxy 2>/dev/null | sed -n "s/^p='\(.*\)'$/\1/p" || true)
    case $proxy in
        '' | DIRECT | false) ;;
        *) export http_proxy=${http_proxy:-$proxy} ;;
    esac
}

require_root_rights() {
    [ "$(id -u)" -eq 0 ] || fail "$1 needs root rights (chroot and mount)" "sudo $0 $2"
    command -v unshare >/dev/null || fail "unshare is not installed" "apt-get install util-linux"
    unshare --mount --propagation private true 2>/dev/null ||
        fail "this machine does not let root mount anything (a container without CAP_SYS_ADMIN)" "run it where mounts are allowed"
}

# Runs a command in a root: proc, dev, /tmp, the checkout and the home at their own paths, in a mount namespace that ends with it.
enter() {
    local in=$1
    shift
    GPU_ROOT=$in GPU_BIND="/tmp
$checkout
$home
${GPU_ROOT_BIND:-}" GPU_CWD=${GPU_ROOT_CWD:-/} unshare --mount --propagation private -- bash -euc '
        mount -t proc proc "$GPU_ROOT/proc"
        mount --rbind /dev "$GPU_ROOT/dev"
        while read -r folder; do
            [ -n "$folder" ] || continue
            mkdir -p "$GPU_ROOT$folder"
            mount --bind "$folder" "$GPU_ROOT$folder"
        done <<<"$GPU_BIND"
        cp -L /etc/resolv.conf "$GPU_ROOT/etc/resolv.conf" 2>/dev/null || true
        cwd=$GPU_CWD root=$GPU_ROOT
        unset GPU_ROOT GPU_BIND GPU_CWD GPU_ROOT_BIND GPU_ROOT_CWD
        exec chroot "$root" /usr/bin/env -C "$cwd" "$@"
    ' bash "$@"
}

# Steps are called in a condition, where "set -e" does nothing.
recipe_base() {
    rm -rf "$part" && mkdir -p "$part" &&
        debootstrap --variant=minbase --include=ca-certificates "$suite" "$part" "$1" &&
        printf 'path-exclude=/usr/share/%s/*\n' doc man locale info >"$part/etc/dpkg/dpkg.cfg.d/slim" &&
        # A mirror's copy of sid's Release file may be older than its validity of a week.
        echo 'Acquire::Check-Valid-Until "false"; APT::Install-Recommends "false"; Acquire::Retries "3";' >"$part/etc/apt/apt.conf.d/90turbo-gguf"
}

recipe_packages() {
    enter "$part" bash -euc '
        export DEBIAN_FRONTEND=noninteractive LC_ALL=C
        dpkg --configure -a
        apt-get update -q
        apt-get install -y -q $1
        mkdir -p /tmp/headers && cd /tmp/headers
        apt-get download -q $2
        for file in *.deb; do dpkg -x "$file" /; done
        cd / && rm -rf /tmp/headers /var/lib/apt/lists/*
        apt-get clean
    ' bash "${packages[*]}" "${headers_only[*]}"
}

# Libraries with the names and symbols that ggml-hip links; every call returns "not supported".
recipe_stubs() {
    enter "$part" bash -euc '
        cd /usr/lib/x86_64-linux-gnu
        clang=$(hipconfig -l)/clang
        for name in Create Destroy SetStream GemmEx GemmBatchedEx GemmStridedBatchedEx Sgemm SgemmBatched SgemmStridedBatched StrsmBatched; do
            echo "int hipblas$name(void) { return 7; }"
        done >/tmp/hipblas.c
        echo >/tmp/rocblas.c
        for name in hipblas rocblas; do
            # The CMake files of the development package name the library and its soname.
            files=$(cat cmake/$name/$name-targets-*.cmake)
            library=$(echo "$files" | grep -oE "lib$name\.so\.[0-9.]+[0-9]" | sort | tail -n 1)
            soname=$(echo "$files" | sed -nE "s/.*IMPORTED_SONAME_.* \"(.*)\"/\1/p")
            "$clang" -shared -fPIC "/tmp/$name.c" -Wl,-soname,"$soname" -o "$library"
            [ "$soname" = "$library" ] || ln -sf "$library" "$soname"
        done
        rm /tmp/hipblas.c /tmp/rocblas.c
        echo "int main() {}" | "$clang" -x hip --offload-arch=gfx1100 --cuda-device-only -c - -o /tmp/empty.o
        rm /tmp/empty.o
    '
}

# One finished step leaves a mark, so that the next call goes on behind it.
step() {
    local mark=$part/.done-$1
    [ -f "$mark" ] && return
    note "$2"
    if ! "recipe_$1" "${@:3}" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "step $1 of making $root failed; whole log: $log" "check the network and the mirror ($(mirror)), then run the same command again"
    fi
    touch "$mark"
}

make_root() {
    if is_made; then
        echo "$root"
        return
    fi
    require_root_rights "making the GPU root" make
    command -v debootstrap >/dev/null || fail "debootstrap is not installed" "apt-get install debootstrap"
    mkdir -p "$(dirname "$log")" "$(dirname "$root")"
    exec 9>"$root.lock"
    flock 9
    if ! is_made; then
        [ "$(cat "$part/.turbo-gguf" 2>/dev/null)" = "$(stamp)" ] || rm -rf "$part"
        : >"$log"
        use_apt_proxy
        step base "Debian $suite from $(mirror)" "$(mirror)"
        stamp >"$part/.turbo-gguf"
        step packages "clang, HIP, glslc, Mesa, cmake, Python (about 1.3 GB)"
        step stubs "stub libraries of hipBLAS and rocBLAS"
        rm -rf "$root" "$part"/.done-*
        mv "$part" "$root"
        note "done: $(du -sxh "$root" | cut -f 1)"
    fi
    echo "$root"
}

run_in_root() {
    is_made || fail "there is no GPU root in $root" "scripts/gpu_root.sh make"
    require_root_rights "the GPU root" "run $*"
    local ccache=${CCACHE_DIR:-$home/ccache-gpu}
    mkdir -p "$ccache"
    GPU_ROOT_CWD=$PWD GPU_ROOT_BIND="$PWD
$ccache
${GPU_ROOT_BIND:-}" CCACHE_DIR=$ccache PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 enter "$root" "$@"
}

case ${1:-make} in
    make) make_root ;;
    path) is_made || fail "there is no GPU root in $root" "scripts/gpu_root.sh make" && echo "$root" ;;
    run) run_in_root "${@:2}" ;;
    *)
        echo "usage: scripts/gpu_root.sh make | path | run COMMAND..." >&2
        exit 2
        ;;
esac
