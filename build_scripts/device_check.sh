#!/usr/bin/env bash
# Is everything right on this GPU, and fast enough? The verdict comes first; what is left of the time goes to
# everything else. Written ahead of a run on a GPU.
#
#     build_scripts/device_check.sh [RESULTS_FOLDER]       (default: build/device_check)
#
# Ends within XSHARE_CHECK_SECONDS (default 350) by its own clock; what was measured until then is in the folder,
# whole. Needs nvcc, cmake and a Python (PYTHON, default python3) with torch and pytest; no network. What else is
# missing is installed for this check alone, from build/wheels where device_wheels.sh has filled it; otherwise
# the steps that are skipped for it are named. The exit status is the number of steps that failed, that of the
# missed targets among them. A step that the clock cut off after the verdict has not failed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-build/device_check}
python=${PYTHON:-python3}
[[ ${XSHARE_CHECK_SECONDS:-350} =~ ^[0-9]+$ ]] || { echo "XSHARE_CHECK_SECONDS must be a number of seconds" >&2; exit 2; }
grace=3 # between asking a step to end and killing it
deadline=$((SECONDS + ${XSHARE_CHECK_SECONDS:-350} - grace - 2))
site=build/device_site
failed=() cut=() skipped=()
is_decided=0
mkdir -p "$results" build/cuda
rm -f "$results"/{route_gpu.json,moe_layer_gpu.json,targets.txt} build/cuda/libxshare_cuda.so # of an earlier run
rows_json=$results/route_gpu.json
export python results rows_json
export XSHARE_CUDA_LIBRARY=$PWD/build/cuda/libxshare_cuda.so
export PYTHONPATH=$PWD:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:/usr/local/cuda/bin
if command -v ninja >/dev/null; then export CMAKE_GENERATOR=Ninja; fi

# bounded SECONDS COMMAND...: at most SECONDS, and no longer than what is left.
bounded() {
    local limit=$1 left=$((deadline - SECONDS))
    shift
    if ((left < 1)); then return 124; fi
    timeout -k $grace $((limit < left ? limit : left)) "$@"
}

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status=0 is_late=0
    shift 2
    if ((left < 2)); then
        late "$name (not begun)"
        return 1
    fi
    echo "== $name"
    bounded "$limit" "$@" || status=$?
    if ((status == 124 || status == 137)); then is_late=1; fi
    if ((status == 0)); then
        echo "== $name: passed in $((SECONDS - start)) s"
    elif ((is_late && (limit >= left || ${is_cut_at_limit:-0}))); then
        echo "== $name: cut off after $((SECONDS - start)) s"
        late "$name (cut off)"
    else
        if ((is_late)); then status="no end within $limit s"; fi
        echo "== $name: FAILED ($status) after $((SECONDS - start)) s"
        failed+=("$name")
    fi
    [[ $status == 0 ]]
}

# What the clock takes has failed as long as there is no verdict.
late() {
    if ((is_decided)); then cut+=("$1"); else failed+=("$1"); fi
}

# A benchmark keeps each row that it has: where its share of the time ends it is cut off, and has not failed.
measure() { is_cut_at_limit=1 step "$@"; }

run_test() { step "$1" "$2" "$python" -m pytest -q -rs -p no:cacheprovider "tests/gpu/test_$1.py"; }

skip() {
    echo "== $1: skipped, $2"
    skipped+=("$1 ($2)")
}

has() {
    "$python" -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' "$@" 2>/dev/null
}

finish() {
    echo "== skipped:"
    for each in "${skipped[@]:-nothing}"; do echo "     $each"; done
    echo "== cut off by the clock: $(join "${cut[@]:-nothing}")"
    echo "== failed: $(join "${failed[@]:-nothing}")"
    cat "$results/verdict.txt"
    echo "== $SECONDS s in all, results in $results"
    exit ${#failed[@]}
}

join() {
    local text
    text=$(printf ', %s' "$@")
    echo "${text:2}"
}

# What the steps need and this Python has not, for the CUDA version of torch.
install_wheels() {
    local each missing=() log=$results/wheels.log
    local pip=("$python" -m pip install --quiet --no-index --find-links build/wheels --target $site --upgrade)
    for each in pytest=pytest numpy=numpy yaml=pyyaml pydantic=pydantic click=click rich=rich \
        safetensors=safetensors cuda.bindings="cuda-bindings==$1.*" cuda.core=cuda-core kernel_lens=kernel-lens; do
        has "${each%%=*}" || missing+=("${each#*=}")
    done
    if ((${#missing[@]} == 0)); then return; fi
    if [[ ! -d build/wheels ]]; then
        skip packages "no $(join "${missing[@]}") and no build/wheels: see build_scripts/device_wheels.sh"
        return
    fi
    : >"$log"
    if [[ ${missing[-1]} == kernel-lens ]]; then # TensorRT's headers alone, not what it would run with
        bounded 20 "${pip[@]}" --no-deps kernel-lens >>"$log" 2>&1
        unset 'missing[-1]'
    fi
    if ((${#missing[@]} == 0)) || bounded 40 "${pip[@]}" "${missing[@]}" >>"$log" 2>&1; then return; fi
    for each in "${missing[@]}"; do # one by one: a wheel that does not fit costs no other
        bounded 20 "${pip[@]}" "$each" >>"$log" 2>&1 || skip "$each" "not installed from build/wheels: see $log"
    done
}

# Of the device that torch takes, as CMake names it, and the CUDA version of torch.
find_device() {
    bounded 60 "$python" -c '
import torch
print("%d%d-real" % torch.cuda.get_device_capability(), torch.version.cuda.split(".")[0])' 2>"$results/device.log"
}

build() {
    rm -rf build/cuda/CMakeCache.txt build/cuda/CMakeFiles/[0-9]* # one that was cut off may say that there is no nvcc
    cmake -S plugins -B build/cuda -DXSHARE_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$1" \
        >build/cuda/configure.log 2>&1 &&
        cmake --build build/cuda --target xshare xshare_cuda -j "$(nproc)" >build/cuda/build.log 2>&1 || {
        tail -n 40 build/cuda/configure.log build/cuda/build.log
        return 1
    }
    mkdir -p xshare_trtllm/lib && cp build/cuda/libxshare.so xshare_trtllm/lib/
}
export -f build

no_spills() {
    if grep 'bytes stack frame' build/cuda/build.log | grep -vq ' 0 bytes stack frame, 0 bytes spill'; then
        echo "a kernel spills: see build/cuda/build.log"
        return 1
    fi
}
export -f no_spills

judge() {
    "$python" benchmarks/route_targets.py "$rows_json" "$@" | tee "$results/targets.txt"
    return "${PIPESTATUS[0]}"
}
export -f judge

# A subset under the sanitizer, which slows every launch down a hundredfold: one block, clusters of 8 and 16,
# rows of a request after each other, many rows. sanitize TOOL PATTERN OPTION...
sanitize() {
    local tool=$1 pattern=$2 log=$results/$1.log status=0
    shift 2
    compute-sanitizer --tool "$tool" "$@" --error-exitcode 99 "$python" -m pytest -q -x -p no:cacheprovider \
        tests/gpu/test_route_cuda.py -k "$pattern" >"$log" 2>&1 || status=$?
    tail -n 25 "$log"
    return $status
}
export -f sanitize

verdict() {
    local text=PASS
    if ((${#failed[@]})); then text="FAIL: $(join "${failed[@]}")"; fi
    is_decided=1
    echo "VERDICT: $text" >"$results/verdict.txt"
    if [[ -s $results/targets.txt ]]; then cat "$results/targets.txt" >>"$results/verdict.txt"; fi
    head -n 1 "$results/verdict.txt"
}

# ---- The verdict: is it built, right and fast enough ------------------------------------------------------
if ! device=$(find_device); then
    echo "== torch has no GPU: $(tail -n 1 "$results/device.log")"
    failed+=(device)
else
    read -r architecture cuda <<<"$device"
    has pytest || install_wheels "$cuda"
    step "build for ${architecture%-real}" 150 bash -c "build $architecture"
fi
if [[ ! -e $XSHARE_CUDA_LIBRARY ]]; then
    verdict
    finish
fi
run_test route_cuda 100 || step bisect 100 "$python" tests/gpu/switches.py
step deciding_rows 90 "$python" benchmarks/route_gpu.py --rows deciding --json "$rows_json"
step targets 20 bash -c judge
verdict

# ---- Everything else, as far as the time goes --------------------------------------------------------------
step no_spills 5 bash -c no_spills
install_wheels "$cuda"
measure other_rows 70 "$python" benchmarks/route_gpu.py --rows rest --json "$rows_json"
if [[ ${architecture%-real} -ge 90 ]]; then
    measure moe_layer 45 "$python" benchmarks/moe_layer_gpu.py --json "$results/moe_layer_gpu.json"
else
    skip moe_layer "needs compute capability 9.0"
fi
if [[ " ${failed[*]} " == *" route_cuda"* ]]; then
    skip route_switches "bisect was the same"
else
    run_test route_switches 100
fi
if has pydantic click rich yaml safetensors; then
    run_test ops_cuda 90
else
    skip ops_cuda "needs pydantic, click, rich, pyyaml and safetensors"
fi
if command -v compute-sanitizer >/dev/null; then
    rows='equals_the_host and ((gpt-oss or v3) and (-16] or -33] or -100] or -257]) or largest-256])'
    step memcheck 45 bash -c "sanitize memcheck '$rows' --report-api-errors no"
    step racecheck 45 bash -c "sanitize racecheck '$rows'"
    step synccheck 45 bash -c "sanitize synccheck 'equals_the_host and v3 and (-16] or -100])'"
else
    skip "memcheck, racecheck, synccheck" "needs compute-sanitizer"
fi
measure compiled_pytorch 90 "$python" benchmarks/route_gpu.py --compiled --rows deciding --json "$rows_json"
if has pydantic numpy; then run_test aot_engine 150; else skip aot_engine "needs pydantic and numpy"; fi
if has pydantic && { has kernel_lens || [[ -n ${TENSORRT_ROOT:-} ]]; }; then
    run_test plugin_enqueue 150 # builds the plugin
else
    skip plugin_enqueue "needs pydantic, and TensorRT's headers in TENSORRT_ROOT or kernel-lens"
fi
has tensorrt || skip "the engine of aot_engine" "needs tensorrt"
finish
