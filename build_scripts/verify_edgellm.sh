#!/usr/bin/env bash
# Verifies XShare in TensorRT Edge-LLM on a machine with its runtime and a GPU (Jetson Thor or Orin, DGX Spark, RTX,
# A100, B200): exports a model, puts XShare into a copy of its graph, builds both engines and runs them.
#
#     build_scripts/verify_edgellm.sh CHECKPOINT [FOLDER]       (default: build/verify_edgellm)
#     build_scripts/verify_edgellm.sh --list                    the steps, without running any
#
# CHECKPOINT is a MoE model that TensorRT Edge-LLM takes (Fp16MoePlugin: 128 or 256 experts). Needs llm_build, llm_bench
# and llm_inference of TensorRT Edge-LLM in EDGELLM_BIN (default: PATH), its library in EDGELLM_PLUGIN_PATH, ours from
# build_scripts/build_plugin.sh (XSHARE_PLUGIN names another), and xshare_trtllm and tensorrt-edgellm in PYTHON.
# EXPORT_OPTIONS (--mtp, --eagle-base ...) goes to the exporter, BUILD_OPTIONS (--maxBatchSize 4 --specBase ...) to
# llm_build, INFERENCE_OPTIONS to llm_inference, COVERAGE (0.97) to xshare edge; VERIFY_ROWS (8 16) are the sizes of
# verified drafts to time where the engine was built with --specBase.
#
# One line PASS or FAIL per step; the exit status is the number of failed steps; output in FOLDER/<step>.log.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=(export rewrite no_limit build_plain build_no_limit build_shared same_answers answers bench verify speed)
seconds=${XSHARE_VERIFY_SECONDS:-3600} # a step at most
python=${PYTHON:-python3}
plugin=${XSHARE_PLUGIN:-$root/xshare_trtllm/lib/libnvinfer_plugin_xshare.so}

stop() {
    echo "verify_edgellm.sh: $*" >&2
    exit 2
}

tool() { command "${EDGELLM_BIN:+$EDGELLM_BIN/}$1" "${@:2}"; }
# The library registers itself in the TensorRT of the process; their loader takes none but its own.
shared() { LD_PRELOAD="$plugin${LD_PRELOAD:+:$LD_PRELOAD}" tool "$@"; }

xshare() { "$python" -c 'from xshare_trtllm.cli import main; main()' "$@"; }

step_export() { "$python" -m tensorrt_edgellm.scripts.export "$checkpoint" plain ${EXPORT_OPTIONS:-}; }
step_rewrite() { xshare edge --onnx plain/llm --out shared/llm --coverage "${COVERAGE:-0.97}"; }
step_no_limit() { xshare edge --onnx plain/llm --out no_limit/llm --budget 512; }
step_build_plain() { tool llm_build --onnxDir plain/llm --engineDir engine_plain ${BUILD_OPTIONS:---maxBatchSize 4}; }
step_build_no_limit() { shared llm_build --onnxDir no_limit/llm --engineDir engine_no_limit ${BUILD_OPTIONS:---maxBatchSize 4}; }
step_build_shared() { shared llm_build --onnxDir shared/llm --engineDir engine_shared ${BUILD_OPTIONS:---maxBatchSize 4}; }

# Without limits the answers are the model's own, word by word.
step_same_answers() {
    requests >requests.json
    infer tool plain && infer shared no_limit || return 1
    "$python" - answers_plain.json answers_no_limit.json <<'PYTHON'
import json, sys
plain, shared = ([each["output_text"] for each in json.load(open(name))["responses"]] for name in sys.argv[1:])
sys.exit(0 if plain == shared else f"{sum(a != b for a, b in zip(plain, shared))} of {len(plain)} answers differ")
PYTHON
}
step_answers() { infer shared shared; }

step_bench() {
    local batch
    for batch in 1 4; do
        bench "batch $batch" --mode decode --batchSize "$batch" --pastKVLen 512 || return 1
    done
}
step_verify() {
    [[ " ${BUILD_OPTIONS:-} " == *" --specBase "* ]] || { echo "not asked for: BUILD_OPTIONS has no --specBase"; return; }
    local rows
    for rows in ${VERIFY_ROWS:-8 16}; do
        bench "$rows verified rows" --mode spec_verify --batchSize 1 --verifyTreeSize "$rows" --pastKVLen 512 || return 1
    done
}
# llm_bench decodes made-up tokens, whose rows may all choose alike; real text says what the coverage saves.
step_speed() {
    local own ours
    own=$(rate infer_plain.txt) ours=$(rate infer_shared.txt)
    [[ -n $own && -n $ours ]] || { echo "no tokens per second in infer_plain.txt and infer_shared.txt"; return 1; }
    echo "on real text: $own tokens/s without XShare, $ours with, $(grep -ioE 'accept[a-z ]*length[^0-9]*[0-9.]+' infer_shared.txt | tail -n 1)"
}

# infer WITH ENGINE: the requests through llm_inference; answers and log of ENGINE.
infer() {
    "$1" llm_inference --engineDir "engine_$2" --inputFile requests.json --outputFile "answers_$2.json" \
        --dumpProfile ${INFERENCE_OPTIONS:-} >"infer_$2.txt" 2>&1 || { tail -n 3 "infer_$2.txt"; return 1; }
}
rate() { grep -iE 'generation|decod' "$1" | grep -ioE '[0-9.]+ *tokens?/s(ec)?|tokens?/s(ec)?[^0-9]*[0-9.]+' | grep -oE '[0-9.]+' | tail -n 1; }

# bench WHAT OPTION...: tokens per second without and with XShare.
bench() {
    local own ours
    own=$(tool llm_bench --engineDir engine_plain --warmup 3 --iterations 20 "${@:2}" 2>&1 | tee -a bench.txt | bench_rate)
    ours=$(shared llm_bench --engineDir engine_shared --warmup 3 --iterations 20 "${@:2}" 2>&1 | tee -a bench.txt | bench_rate)
    [[ -n $own && -n $ours ]] || { echo "no 'Tokens/sec (E2E)' in bench.txt"; return 1; }
    echo "$1: $own tokens/s without XShare, $ours with"
}
bench_rate() { sed -nE 's/.*Tokens\/sec \(E2E\): *([0-9.]+).*/\1/p' | tail -n 1; }

requests() {
    "$python" - <<'PYTHON'
import json
from xshare_trtllm.evaluation import held_out
ask = "Continue this text: "
messages = [[{"role": "user", "content": ask + document.text[:600]}] for document in held_out()[:8]]
requests = [{"messages": each} for each in messages]
print(json.dumps({"batch_size": 4, "temperature": 0.0, "top_k": 1, "max_generate_length": 128, "requests": requests}))
PYTHON
}

if [[ ${1:-} == --list ]]; then
    printf '%s\n' "${steps[@]}"
    exit 0
fi
[[ -n ${1:-} && -e $1/config.json ]] || stop "name a folder with a checkpoint: ${1:-none} has no config.json"
checkpoint=$(cd "$1" && pwd)
folder=${2:-build/verify_edgellm}
[[ -f $plugin ]] || stop "$plugin is not there: build_scripts/build_plugin.sh all, or set XSHARE_PLUGIN"
for name in llm_build llm_bench llm_inference; do
    command -v "${EDGELLM_BIN:+$EDGELLM_BIN/}$name" >/dev/null || stop "no $name: set EDGELLM_BIN"
done
[[ -f ${EDGELLM_PLUGIN_PATH:-} ]] || stop "EDGELLM_PLUGIN_PATH does not name TensorRT Edge-LLM's library"
"$python" -c 'import tensorrt_edgellm, xshare_trtllm' 2>/dev/null || stop "needs tensorrt_edgellm and xshare_trtllm in $python"
mkdir -p "$folder" && cd "$folder" || stop "cannot write to $folder"
rm -rf plain shared no_limit engine_* answers_* bench.txt

failed=0
export -f tool shared xshare infer rate bench bench_rate requests
export root python plugin checkpoint
for name in "${steps[@]}"; do
    export -f "step_$name"
    if timeout -k 10 "$seconds" bash -o pipefail -c "step_$name" >"$name.log" 2>&1; then
        echo "PASS $name: $(tail -n 1 "$name.log")"
    else
        echo "FAIL $name: status $?, see $PWD/$name.log"
        failed=$((failed + 1))
    fi
done
echo "$failed steps failed; logs and engines in $PWD"
exit "$failed"
