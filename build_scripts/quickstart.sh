#!/usr/bin/env bash
# From nothing to something that runs, in one command.
#
#     build_scripts/quickstart.sh
#
# Without a GPU: sets up .venv and runs the demo on the CPU (make demo). With one: sets up .venv, says what would run
# (xshare doctor), and prints the next command. PYTHON names the Python to start from.
set -euo pipefail
cd "$(dirname "$0")/.."

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 || true)
case $capability in
    "")
        echo "== no GPU here: the demo on the CPU"
        exec make demo
        ;;
    8.*) recipe=engines/Qwen3-30B-A3B.sm_80.yaml ;;
    [0-7].*)
        echo "== no kernels for compute capability $capability (they are for 8.0 and newer): the demo on the CPU"
        exec make demo
        ;;
    9.0) recipe=engines/gpt-oss-20b.sm_90.yaml ;;
    *) recipe="a recipe of your own (none is for this GPU yet)" ;;
esac

echo "== a GPU of compute capability $capability"
make .venv/ready
export PATH=$PWD/.venv/bin:$PATH
xshare doctor || true
echo "== next, where TensorRT-LLM is installed: build_scripts/build_engine.sh $recipe"
