#!/usr/bin/env bash
# Verifies XShare in TensorRT-LLM on a machine with a GPU, on small random-weight Mixtral and Qwen3-MoE
# checkpoints that it makes itself: part `engine` (trtllm-build --plugin xshare, TensorRT-LLM 1.0 to 1.2) and part
# `pytorch` (enable in one process, and worker processes, 1.0 on).
#
#     build_scripts/verify_trtllm.sh [engine|pytorch|all] [FOLDER]     (default: all, build/verify_trtllm)
#     build_scripts/verify_trtllm.sh --list                            the steps, without running any
#
# Needs tensorrt_llm, transformers and xshare_trtllm in PYTHON (default: python3), and for part engine the plugin
# that build_scripts/build_plugin.sh makes. Ends with one table of what passed and failed, with the versions, to be
# pasted into an issue; the exit status is 1 where a step failed. A step's output is in FOLDER/<step>.log.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
models=(mixtral qwen3_moe)
engine_steps=(checkpoint build_plain build_full build_small dry_run identical_tokens fewer_experts time)
pytorch_steps=(
    torch_inspect torch_identical_tokens torch_fewer_experts torch_dial torch_counted_in_python torch_workers
)
seconds=${XSHARE_VERIFY_SECONDS:-900} # a step at most

stop() {
    echo "verify_trtllm.sh: $*" >&2
    exit 2
}

list() {
    local step
    for step in "${engine_steps[@]}"; do echo "engine $step"; done
    for step in checkpoint "${pytorch_steps[@]}"; do echo "pytorch $step"; done
}

failed=0
rows=()
# What a log says: its result, else its last error, else its last line. TensorRT-LLM may write more at exit.
said() {
    local found
    found=$(grep -a '^RESULT: ' "$1" | tail -n 1 | cut -c 9-)
    [[ -n $found ]] || found=$(grep -aE '^[A-Za-z_.]+(Error|Exception|Exit)\b' "$1" | tail -n 1)
    [[ -n $found ]] || found=$(tail -n 1 "$1")
    tr '|' '/' <<<"$found" | cut -c 1-160
}

# step MODEL NAME: in a process of its own, since a failed engine can end the process.
step() {
    local log=$folder/$1.$2.log status word=PASS
    timeout -k 10 "$seconds" "$python" "$here/verify_trtllm.py" "$2" "$1" "$folder" >"$log" 2>&1
    status=$?
    if ((status != 0)); then
        word="FAIL ($status)"
        failed=$((failed + 1))
    fi
    ((status != 124 && status != 137)) || echo "TimeoutError: more than $seconds s" >>"$log"
    echo "$word $1 $2, see $log"
    rows+=("| $1 | $2 | $word | $(said "$log") |")
}

table() {
    echo
    "$python" - <<'END'
from importlib.metadata import PackageNotFoundError, version

import torch


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} (not installed as a package)"


names = ("xshare-trtllm", "tensorrt_llm", "torch", "transformers")
print(", ".join(map(installed, names)), "on", torch.cuda.get_device_name(), "with CUDA", torch.version.cuda)
END
    printf '\n| model | step | result | what |\n| --- | --- | --- | --- |\n'
    ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
    echo
}

# TensorRT-LLM 1.3 has no engines any more.
has_engines() {
    "$python" -c '
import sys
from importlib.metadata import version

major, minor = version("tensorrt_llm").split(".")[:2]
sys.exit((int(major), int(minor)) > (1, 2))'
}

part_engine() {
    local model name
    for model in "${models[@]}"; do
        for name in "${engine_steps[@]}"; do step "$model" "$name"; done
    done
}

part_pytorch() {
    local model name
    for model in "${models[@]}"; do
        for name in checkpoint "${pytorch_steps[@]}"; do step "$model" "$name"; done
    done
}

if [[ ${1:-} == --list ]]; then
    list
    exit 0
fi
part=${1:-all}
[[ $part == engine || $part == pytorch || $part == all ]] || stop "unknown part '$part': give engine, pytorch or all"
folder=${2:-build/verify_trtllm}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || stop "cannot write to $folder"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || stop "needs a GPU and torch in $python"
for module in tensorrt_llm transformers xshare_trtllm; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
        stop "needs $module in $python"
done
cd "$folder" || stop "cannot enter $folder"
if [[ $part != pytorch ]]; then
    if has_engines; then
        part_engine
    else
        [[ $part == all ]] || stop "this TensorRT-LLM has no trtllm-build: engines end with 1.2"
        rows+=("| all | engine | SKIP | engines end with TensorRT-LLM 1.2 |")
    fi
fi
[[ $part == engine ]] || part_pytorch
table
echo "$failed steps failed; logs and engines in $folder"
exit $((failed > 0))
