#!/usr/bin/env bash
# Builds what a recipe says, the plugin first where an engine needs it and it is not there yet.
#
#     build_scripts/build_engine.sh engines/RECIPE.yaml [OPTION OF xshare build]...
#
# For example: build_engine.sh engines/Mixtral-8x7B.sm_90.yaml --checkpoint FOLDER --dry-run
# PYTHON names the Python that has TensorRT-LLM and xshare-trtllm.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

stop() {
    echo "build_engine.sh: $*" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || stop "give a recipe: $(cd "$root" && echo engines/*.yaml)"
case $1 in
    *.sm_80.yaml) architecture=sm_80 ;;
    *.sm_90.yaml) architecture=sm_90 ;;
    *) stop "$1: a recipe's name ends in .sm_80.yaml or .sm_90.yaml" ;;
esac
[[ -f $1 ]] || stop "$1: no such file"

python=${PYTHON:-python3}
plugin=${XSHARE_PLUGIN:-$root/xshare_trtllm/lib/libnvinfer_plugin_xshare.so}
if [[ " $* " != *" --dry-run "* && ! -f $plugin ]] && grep -q '^path: engine' "$1"; then
    "$root/build_scripts/build_plugin.sh" "$architecture"
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -c 'from xshare_trtllm.cli import main; main()' \
    build --recipe "$@"
