#!/usr/bin/env bash
# The whole GPU check in one run of at most 8 minutes: build, correctness on fresh random input,
# compute-sanitizer, benchmarks. Written ahead of a run on a GPU.
#
#     build_scripts/device_check.sh [RESULTS_FOLDER]       (default: benchmarks/results)
#
# Needs nvcc, cmake and a Python with torch, triton and pytest; no network, nothing is installed. A step that
# fails does not stop the later ones; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${XSHARE_CHECK_SECONDS:-480}))
failed=0
mkdir -p "$results" build/cuda
export XSHARE_CUDA_LIBRARY=$PWD/build/cuda/libxshare_cuda.so
export PATH=$PATH:/usr/local/cuda/bin
if command -v ninja >/dev/null; then export CMAKE_GENERATOR=Ninja; fi

# step NAME SECONDS COMMAND...: at most SECONDS, and no longer than what is left.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS))
    shift 2
    if ((left < 5)); then
        echo "== $name: no time left"
        failed=$((failed + 1))
        return
    fi
    echo "== $name"
    if timeout -k 5 $((limit < left ? limit : left)) "$@"; then
        echo "== $name: passed in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED ($?) after $((SECONDS - start)) s"
        failed=$((failed + 1))
    fi
}

build() {
    cmake -S plugins -B build/cuda -DXSHARE_CUDA=ON >build/cuda/configure.log &&
        cmake --build build/cuda --target xshare xshare_cuda -j "$(nproc)" >build/cuda/build.log 2>&1 || {
        tail -40 build/cuda/configure.log build/cuda/build.log
        return 1
    }
    mkdir -p xshare_trtllm/lib && cp build/cuda/libxshare.so xshare_trtllm/lib/
    if grep 'bytes stack frame' build/cuda/build.log | grep -vq ' 0 bytes stack frame, 0 bytes spill'; then
        echo "a kernel spills: see build/cuda/build.log"
        return 1
    fi
}
export -f build

# A subset under the sanitizer, which slows every launch down a hundredfold: one block, clusters of 8 and 16,
# rows of a request after each other, many rows. sanitize TOOL PATTERN OPTION...
sanitize() {
    local tool=$1 pattern=$2 log=build/cuda/$1.log status=0
    shift 2
    compute-sanitizer --tool "$tool" "$@" --error-exitcode 99 "$python" -m pytest -q -x -p no:cacheprovider \
        tests/gpu/test_route_cuda.py -k "$pattern" >"$log" 2>&1 || status=$?
    tail -25 "$log"
    return $status
}
export -f sanitize
export python

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "needs a GPU"; exit 1; }
# By value: what comes first is there even if the time runs out.
step build 150 bash -c build
step correctness 90 "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_route_cuda.py
step route_gpu 150 "$python" benchmarks/route_gpu.py --quick --json "$results/route_gpu.json"
step moe_layer_gpu 60 "$python" benchmarks/moe_layer_gpu.py --json "$results/moe_layer_gpu.json"
if command -v compute-sanitizer >/dev/null; then
    rows='(gpt-oss or v3) and (-16] or -33] or -100] or -257]) or largest-256]'
    step memcheck 45 bash -c "sanitize memcheck '$rows' --report-api-errors no"
    step racecheck 45 bash -c "sanitize racecheck '$rows'"
    step synccheck 45 bash -c "sanitize synccheck 'v3 and (-16] or -100])'"
else
    echo "== compute-sanitizer is not there: its steps are skipped"
fi
if "$python" -c 'import pydantic' 2>/dev/null; then
    for name in ops_cuda aot_engine plugin_enqueue; do # the last one builds the plugin
        step "$name" 150 env PYTHONPATH="$PWD" "$python" -m pytest -q -rs -p no:cacheprovider "tests/gpu/test_$name.py"
    done
else
    echo "== pydantic is not there: the torch operators, the plugin and the ahead-of-time kernels are skipped"
fi
echo "== $failed steps failed, $SECONDS s in all, results in $results"
exit "$failed"
