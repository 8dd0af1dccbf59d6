"""tensorrt_llm/commands/build.py of 1.x: every option of trtllm-build, and how `main` builds each rank."""

from __future__ import annotations

import argparse
import copy
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from tensorrt_llm._utils import local_mpi_rank, local_mpi_size, mpi_barrier, mpi_rank, mpi_world_size
from tensorrt_llm.builder import BuildConfig, Engine, build
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig, SpeculativeDecodingMode
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument

_TEXT = {
    "checkpoint_dir": None,
    "model_config": None,
    "build_config": None,
    "model_cls_file": None,
    "model_cls_name": None,
    "output_dir": "engine_outputs",
    "input_timing_cache": None,
    "output_timing_cache": "model.cache",
    "visualize_network": None,
}
_WHOLE = {
    "max_batch_size": 2048,
    "max_input_len": 1024,
    "max_beam_width": 1,
    "max_num_tokens": 8192,
    "opt_num_tokens": None,
    "max_encoder_input_len": 1024,
    "workers": 1,
    "max_lora_rank": 64,
    "max_draft_len": 0,
}
_SWITCHES = (
    "strip_plan",
    "weight_sparsity",
    "weight_streaming",
    "fast_build",
    "enable_debug_output",
    "dry_run",
)
_SWITCHES += (
    "monitor_memory",
    "gather_context_logits",
    "gather_generation_logits",
    "gather_all_token_logits",
)
_CHOICES = {
    "profiling_verbosity": ("layer_names_only", "layer_names_only detailed none"),
    "log_level": ("info", "internal_error fatal error warning info verbose debug trace"),
    "logits_dtype": (None, "float16 float32"),
    "lora_ckpt_source": ("hf", "hf nemo"),
    "speculative_decoding_mode": (
        None,
        "draft_tokens_external lookahead_decoding medusa explicit_draft_tokens eagle",
    ),
}


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, text in _TEXT.items():
        parser.add_argument("--" + name, type=str, default=text)
    for name, number in _WHOLE.items():
        parser.add_argument("--" + name, type=int, default=number)
    for name in _SWITCHES:
        parser.add_argument("--" + name, action="store_true", default=False)
    for name, (default, choices) in _CHOICES.items():
        parser.add_argument("--" + name, type=str, default=default, choices=choices.split())
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int, default=None)
    parser.add_argument(
        "--max_prompt_embedding_table_size",
        "--max_multimodal_len",
        type=int,
        default=0,
    )
    for name in ("kv_cache_type", "paged_kv_cache"):
        parser.add_argument("--" + name, type=str, default=argparse.SUPPRESS)
    for name in ("lora_dir", "lora_target_modules"):
        parser.add_argument("--" + name, type=str, nargs="+", default=None)
    add_plugin_argument(parser.add_argument_group("Plugin config arguments"))
    return parser


def build_model(
    build_config: BuildConfig,
    rank: int = 0,
    ckpt_dir: str | None = None,
    model_config: Any = None,
    model_cls: Any = None,
    dry_run: bool = False,
    **kwargs: Any,
) -> Engine:
    rank_config = copy.deepcopy(model_config)
    assert rank < model_config.mapping.world_size
    rank_config.set_rank(rank)
    model_cls = model_cls or MODEL_MAP[model_config.architecture]
    model = (
        model_cls(rank_config)
        if ckpt_dir is None
        else model_cls.from_checkpoint(ckpt_dir, config=rank_config)
    )
    return build(model, build_config)


def build_and_save(
    rank: int,
    gpu_id: int,
    ckpt_dir: str | None,
    build_config: BuildConfig,
    output_dir: str,
    log_level: str,
    model_config: Any,
    model_cls: Any,
    **kwargs: Any,
) -> bool:
    engine = build_model(build_config, rank, ckpt_dir, model_config, model_cls=model_cls, **kwargs)
    assert engine is not None
    engine.save(output_dir)
    return True


def parallel_build(
    model_config: Any,
    ckpt_dir: str | None,
    build_config: BuildConfig,
    output_dir: str,
    workers: int = 1,
    log_level: str = "info",
    model_cls: Any = None,
    **kwargs: Any,
) -> None:
    world_size = model_config.mapping.world_size
    rest = (ckpt_dir, build_config, output_dir, log_level, model_config, model_cls)
    if mpi_world_size() > 1:
        for rank in range(world_size):
            if rank % mpi_world_size() == mpi_rank():
                build_and_save(rank, local_mpi_rank() % local_mpi_size(), *rest, **kwargs)
        mpi_barrier()
    elif workers == 1:
        for rank in range(world_size):
            assert build_and_save(rank, rank % workers, *rest, **kwargs)
    else:
        with ProcessPoolExecutor(mp_context=get_context("spawn"), max_workers=workers) as pool:
            futures = [
                pool.submit(build_and_save, rank, rank % workers, *rest, **kwargs)
                for rank in range(world_size)
            ]
            for future in as_completed(futures):
                future.result()


def main() -> None:
    args = parse_arguments().parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    if log := os.environ.get("STAND_IN_ARGUMENTS"):  # what came through, for the tests
        with open(log, "w") as file:
            print(dict(sorted(vars(args).items())), file=file)
    workers = min(int(os.environ.get("STAND_IN_GPUS", "8")), args.workers)  # torch.cuda.device_count()
    plugin_config = PluginConfig.from_arguments(args)
    kwargs = {
        "logits_dtype": args.logits_dtype,
        "use_fused_mlp": args.use_fused_mlp,
        "lora_dir": args.lora_dir,
        "lora_ckpt_source": args.lora_ckpt_source,
        "max_lora_rank": args.max_lora_rank,
        "lora_target_modules": args.lora_target_modules,
        "strip_plan": args.strip_plan,
        "refit": False,
    }
    model_config = PretrainedConfig.from_json_file(os.path.join(args.checkpoint_dir, "config.json"))
    build_config = BuildConfig(
        args.max_batch_size,
        args.max_num_tokens,
        args.max_draft_len,
        SpeculativeDecodingMode.from_arguments(args),
        args.dry_run,
        args.visualize_network,
        plugin_config,
    )
    parallel_build(
        model_config,
        args.checkpoint_dir,
        build_config,
        args.output_dir,
        workers,
        args.log_level,
        None,
        **kwargs,
    )
    print("built")


if __name__ == "__main__":
    main()
