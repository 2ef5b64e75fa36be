# shellcheck shell=bash
# What every command of the lab starts with: the folders, and a run of its own that leaves nothing behind.

LAB=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAB_ROOT=$(cd "$LAB/../.." && pwd)
LAB_CACHE=${VIOMMU_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/viommu-lab}
LAB_PREBUILT=${VIOMMU_LAB_PREBUILT:-$LAB_ROOT/../shared/lab}
LAB_KEEP=

. "$LAB/lib/say.sh"
. "$LAB/lib/cache.sh"

for tool in apt-get dpkg-deb cargo python3 flock timeout tar; do
    command -v "$tool" >/dev/null || die "$tool is missing. The lab needs a Debian machine with Rust and python3"
done
LAB_ARCHITECTURE=$(dpkg --print-architecture)
LAB_CODENAME=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")

mkdir -p "$LAB_CACHE"/{lock,making}
cache_sweep
LAB_RUN=$(mktemp -d "$LAB_CACHE/making/run.XXXXXX")
LAB_EMULATOR=
leave() {
    if [ -n "$LAB_EMULATOR" ]; then
        kill "$LAB_EMULATOR" || true
        wait "$LAB_EMULATOR" || true
    fi
    if [ -n "$LAB_KEEP" ]; then
        say "this run's folder: $LAB_RUN"
    else
        rm -rf "$LAB_RUN"
    fi
}
trap leave EXIT
export LAB LAB_CACHE LAB_RUN LAB_ARCHITECTURE LAB_CODENAME
