#!/usr/bin/env bash
# Downloads what device_check.sh may lack on a GPU machine without network, as wheels into build/wheels.
#
#     build_scripts/device_wheels.sh [PYTHON_VERSION] [MACHINE]       (default: 3.12 x86_64)
#
# Needs a Python (PYTHON, default python3) with pip, and network. Copy build/wheels to the same place there.
# CUDA's own libraries are not among them: torch brings these.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
machine=${2:-x86_64}
python=${PYTHON:-python3}
folder=build/wheels

stop() {
    echo "device_wheels.sh: $*" >&2
    exit 2
}

[[ $version =~ ^3\.[1-9][0-9]+$ ]] || stop "unknown Python version '$version': give 3.10 or newer"
[[ $machine == x86_64 || $machine == aarch64 ]] || stop "unknown machine '$machine': give x86_64 or aarch64"
"$python" -m pip --version >/dev/null 2>&1 || stop "$python has no pip"

aside=$folder.$$
trap 'rm -rf "$aside"' EXIT
fit=(--quiet --disable-pip-version-check --dest "$aside")
fit+=(--only-binary=:all: --implementation cp --python-version "$version")
for glibc in 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do fit+=(--platform "manylinux_${glibc}_$machine"); done
fit+=(--platform "manylinux2014_$machine")
packages=(pytest numpy pyyaml 'pydantic>=2' click rich safetensors ninja)
if [[ $version == 3.10 ]]; then packages+=(exceptiongroup tomli); fi # of pytest; pip asks the Python that runs it
"$python" -m pip download "${fit[@]}" "${packages[@]}" ||
    stop "not everything is there for Python $version on $machine"
# For drivers of CUDA 12 and of CUDA 13; device_check.sh takes the one that fits torch.
for more in 'cuda-bindings>=12.9,<13' 'cuda-bindings>=13,<14' cuda-core cuda-pathfinder kernel-lens==2.0.1; do
    "$python" -m pip download "${fit[@]}" --no-deps "$more" || stop "no $more for Python $version on $machine"
done
rm -rf "$folder"
mv "$aside" "$folder"
count=$(find "$folder" -name '*.whl' | wc -l)
echo "== $folder: $count wheels for Python $version on $machine, $(du -sm "$folder" | cut -f1) MB"
