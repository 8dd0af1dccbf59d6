#!/usr/bin/env bash
# Builds libxshare_cuda.so and libnvinfer_plugin_xshare.so into xshare_trtllm/lib, where everything looks for them.
#
#     build_scripts/build_plugin.sh [sm_80|sm_90a|both]       (default: both)
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

case ${1:-both} in
    sm_80) architectures=80-real ;;
    sm_90a) architectures=90a-real ;;
    both) architectures='80-real;90a-real' ;;
    *) stop "unknown architecture '$1': give sm_80 (A100), sm_90a (H100, H200) or both" ;;
esac
python=$(command -v "${PYTHON:-python3}") || stop "no Python: set PYTHON"
command -v cmake >/dev/null || stop "no cmake: pip install cmake ninja"
nvcc=$(find_nvcc)
[[ -n $nvcc ]] || stop "no nvcc: install the CUDA toolkit and set CUDACXX, or" \
    "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"

build=build/plugin-${1:-both}
lib=xshare_trtllm/lib
log=$build/build.log
options=(-DXSHARE_CUDA=ON -DXSHARE_TENSORRT=ON "-DCMAKE_CUDA_ARCHITECTURES=$architectures" "-DPython3_EXECUTABLE=$python")
if command -v ninja >/dev/null; then options+=(-G Ninja); fi
for cudart in "$(dirname "$(dirname "$nvcc")")"/lib/libcudart.so.*; do # the wheels have no libcudart.so, which CMake wants
    if [[ $nvcc == */nvidia/*/bin/nvcc && -e $cudart ]]; then options+=("-DCUDA_CUDART=$cudart"); fi
done

mkdir -p "$build" "$lib"
rm -rf "$build/CMakeCache.txt" "$build"/CMakeFiles/[0-9]* # or an earlier compiler and headers would stay
echo "== ${1:-both} with $("$nvcc" --version | grep -o 'release.*') ($nvcc)"
CUDACXX=$nvcc cmake -S plugins -B "$build" "${options[@]}" >"$build/configure.log" 2>&1 ||
    { tail -n 30 "$build/configure.log" >&2; stop "not configured, see $build/configure.log"; }
grep -o 'TensorRT [0-9.]* headers from .*' "$build/configure.log"
# The log keeps what ptxas says of every kernel; the terminal sees the steps.
cmake --build "$build" --target xshare_cuda nvinfer_plugin_xshare -j "${JOBS:-$(nproc)}" 2>&1 | tee "$log" |
    grep --line-buffered -E '^\[|error|Error|FAILED' || [[ ${PIPESTATUS[0]} == 0 ]] || stop "not built, see $log"

for library in libxshare_cuda.so libnvinfer_plugin_xshare.so; do
    cp "$build/$library" "$lib/.$library.$$"
    mv -f "$lib/.$library.$$" "$lib/$library" # a process that has the old one open keeps it
    echo "== $lib/$library: $(stat -c %s "$lib/$library") bytes"
done
echo "== built in $SECONDS s; next: xshare doctor"
