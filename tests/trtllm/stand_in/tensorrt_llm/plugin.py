"""tensorrt_llm/plugin/plugin.py of 1.x: PluginConfig and the options of trtllm-build that are made of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_GEMM_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")
_SWITCH = ("enable", "disable")
# In the order of cli_plugin_args: default, choices.
CLI_PLUGIN_ARGS: dict[str, tuple[object, tuple[str, ...] | None]] = {
    "bert_attention_plugin": ("auto", _DTYPES),
    "gpt_attention_plugin": ("auto", _DTYPES),
    "gemm_plugin": (None, _GEMM_DTYPES),
    "gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "fp8_rowwise_gemm_plugin": ("disable", _DTYPES),
    "lora_plugin": ("disable", _DTYPES),
    "dora_plugin": ("disable", _SWITCH),
    "moe_plugin": ("auto", _DTYPES),
    "mamba_conv1d_plugin": ("auto", _DTYPES),
    "nccl_plugin": ("auto", _DTYPES),
    "low_latency_gemm_plugin": ("disable", ("fp8", "disable")),
    "low_latency_gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "gemm_allreduce_plugin": ("disable", ("float16", "bfloat16", "disable")),
    "context_fmha": ("enable", _SWITCH),
    "bert_context_fmha_fp32_acc": ("disable", _SWITCH),
    "remove_input_padding": ("enable", _SWITCH),
    "tokens_per_block": (32, None),
    "use_paged_context_fmha": ("enable", _SWITCH),
    "use_fp8_context_fmha": ("enable", _SWITCH),
    "fuse_fp4_quant": ("disable", _SWITCH),
    "multiple_profiles": ("disable", _SWITCH),
    "paged_state": ("enable", _SWITCH),
    "streamingllm": ("disable", _SWITCH),
    "norm_quant_fusion": ("disable", _SWITCH),
    "reduce_fusion": ("disable", _SWITCH),
    "user_buffer": ("disable", _SWITCH),
    "use_fused_mlp": ("enable", _SWITCH),
    "pp_reduce_scatter": ("disable", _SWITCH),
}


@dataclass
class PluginConfig:
    """Only what the stand-in's layers and inputs ask for."""

    remove_input_padding: bool = True
    gpt_attention_plugin: str | None = "auto"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> PluginConfig:
        attention = args.gpt_attention_plugin
        return cls(args.remove_input_padding == "enable", None if attention == "disable" else attention)


def add_plugin_argument(parser: argparse._ArgumentGroup) -> None:
    for name, (default, choices) in CLI_PLUGIN_ARGS.items():
        kind = int if choices is None else str
        parser.add_argument("--" + name, type=kind, default=default, choices=choices)
