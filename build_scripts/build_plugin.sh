#!/usr/bin/env bash
# Builds libxshare_cuda.so and libnvinfer_plugin_xshare.so into xshare_trtllm/lib, where everything looks for them.
#
#     build_scripts/build_plugin.sh [sm_80|sm_90|...|all] [aarch64]
#
# By default for what most have (plugins/cuda/architectures.cmake); one architecture alone builds faster, `all` is
# every one that the kernels know, Orin (87), Thor (110) and DGX Spark (121) among them, and PTX for what comes.
# `aarch64` builds libnvinfer_plugin_xshare.so for Jetson, DRIVE and DGX Spark on an x86-64 machine, into
# build/plugin-<architectures>-aarch64; it needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu) and CUDA's
# libraries for aarch64 in CUDA_AARCH64, the folder with libcudart_static.a and libcudadevrt.a (of the wheel
# nvidia-cuda-runtime, or targets/sbsa-linux/lib).
#
# Needs cmake, a C++17 compiler, nvcc and TensorRT's headers; no GPU. nvcc is taken from CUDACXX, PATH,
# /usr/local/cuda or the Python packages nvidia-cuda-*; the headers from TENSORRT_ROOT, the system or the Python
# package kernel-lens. PYTHON names the Python whose packages are meant, JOBS how many compilers may run at once.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
    echo "build_plugin.sh: $*" >&2
    exit 2
}

# The compiler of the wheels lies in nvidia/<version>/bin beside the other parts of the toolkit.
find_nvcc() {
    local packages candidate
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for candidate in "${CUDACXX:-}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc "$packages"/nvidia/*/bin/nvcc; do
        if [[ -n $candidate && -x $candidate ]]; then
            echo "$candidate"
            return
        fi
    done
}

list_of() { # the numbers of one line of the one list
    sed -n "s/^set(XSHARE_$1_ARCHITECTURES \(.*\))$/\1/p" plugins/cuda/architectures.cmake
}

read -ra all <<<"$(list_of ALL)"
case ${1:-default} in
    default) architectures=$(list_of DEFAULT | tr ' ' ';') ;;
    all) architectures="$(printf '%s-real;' "${all[@]}")90-virtual" ;;
    sm_*) [[ " ${all[*]} " == *" ${1#sm_} "* ]] && architectures=${1#sm_}-real ;;
esac
[[ -n ${architectures:-} ]] || stop "unknown architecture '$1': give all, or one of ${all[*]/#/sm_}, or nothing"
target=${2:-$HOSTTYPE}
[[ $target == aarch64 || $target == "$HOSTTYPE" ]] || stop "unknown machine '$target': give aarch64, or none"
python=$(command -v "${PYTHON:-python3}") || stop "no Python: set PYTHON"
command -v cmake >/dev/null || stop "no cmake: pip install cmake ninja"
nvcc=$(find_nvcc)
[[ -n $nvcc ]] || stop "no nvcc: install the CUDA toolkit and set CUDACXX, or" \
    "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"

build=build/plugin-${1:-default}
if [[ $target != "$HOSTTYPE" ]]; then build+=-$target; fi
lib=xshare_trtllm/lib
log=$build/build.log
options=(-DXSHARE_CUDA=ON -DXSHARE_TENSORRT=ON "-DCMAKE_CUDA_ARCHITECTURES=$architectures" "-DPython3_EXECUTABLE=$python")
if command -v ninja >/dev/null; then options+=(-G Ninja); fi
for cudart in "$(dirname "$(dirname "$nvcc")")"/lib/libcudart.so.*; do # the wheels have no libcudart.so, which CMake wants
    if [[ $nvcc == */nvidia/*/bin/nvcc && -e $cudart ]]; then options+=("-DCUDA_CUDART=$cudart"); fi
done

# nvcc takes the libraries of another machine from targets/<machine> beside itself: a folder of links is a toolkit too.
cross_toolkit() {
    local root folder=$PWD/$build/toolkit file
    root=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
    rm -rf "$folder" && mkdir -p "$folder/bin" "$folder/targets/sbsa-linux"
    for file in "$root"/bin/*; do ln -s "$file" "$folder/bin/"; done
    for file in nvcc nvcc.profile; do rm "$folder/bin/$file" && cp "$root/bin/$file" "$folder/bin/"; done
    for file in "$root"/nvvm "$root"/targets/*; do
        case $file in */nvvm) ln -s "$file" "$folder/" ;; *) ln -s "$file" "$folder/targets/" ;; esac
    done
    rm -rf "$folder/targets/sbsa-linux" && mkdir "$folder/targets/sbsa-linux"
    ln -s "$root/targets/$HOSTTYPE-linux/include" "$folder/targets/sbsa-linux/include"
    ln -s "$(cd "$CUDA_AARCH64" && pwd)" "$folder/targets/sbsa-linux/lib"
    ln -sfn sbsa-linux "$folder/targets/aarch64-linux"
    nvcc=$folder/bin/nvcc
}

mkdir -p "$build" "$lib"
libraries=(libxshare_cuda.so libnvinfer_plugin_xshare.so)
if [[ $target != "$HOSTTYPE" ]]; then
    cxx=$(command -v aarch64-linux-gnu-g++) || stop "no aarch64-linux-gnu-g++: apt-get install g++-aarch64-linux-gnu"
    [[ -e ${CUDA_AARCH64:-}/libcudart_static.a ]] || stop "no libcudart_static.a in CUDA_AARCH64='${CUDA_AARCH64:-}'"
    cross_toolkit
    options+=(-DCMAKE_SYSTEM_NAME=Linux "-DCMAKE_SYSTEM_PROCESSOR=$target" "-DCMAKE_CXX_COMPILER=$cxx")
    options+=("-DCMAKE_CUDA_HOST_COMPILER=$cxx" "-DCMAKE_CUDA_COMPILER=$nvcc")
    for cudart in "$CUDA_AARCH64"/libcudart.so.*; do options+=("-DCUDA_CUDART=$cudart"); done
    lib=$build/lib libraries=(libnvinfer_plugin_xshare.so)
    mkdir -p "$lib"
fi
rm -rf "$build/CMakeCache.txt" "$build"/CMakeFiles/[0-9]* # or an earlier compiler and headers would stay
echo "== ${architectures//;/ } with $("$nvcc" --version | grep -o 'release.*') ($nvcc)"
CUDACXX=$nvcc cmake -S plugins -B "$build" "${options[@]}" >"$build/configure.log" 2>&1 ||
    { tail -n 30 "$build/configure.log" >&2; stop "not configured, see $build/configure.log"; }
grep -o 'TensorRT [0-9.]* headers from .*' "$build/configure.log"
# The log keeps what ptxas says of every kernel; the terminal sees the steps.
cmake --build "$build" --target xshare_cuda nvinfer_plugin_xshare -j "${JOBS:-$(nproc)}" 2>&1 | tee "$log" |
    grep --line-buffered -E '^\[|error|Error|FAILED' || [[ ${PIPESTATUS[0]} == 0 ]] || stop "not built, see $log"

for library in "${libraries[@]}"; do
    cp "$build/$library" "$lib/.$library.$$"
    mv -f "$lib/.$library.$$" "$lib/$library" # a process that has the old one open keeps it
    echo "== $lib/$library: $(stat -c %s "$lib/$library") bytes"
done
echo "== built in $SECONDS s; next: xshare doctor"
