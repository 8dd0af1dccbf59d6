"""tensorrt_llm/builder.py of 1.x: BuildConfig, Engine, `build` and the order of what it does."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorrt_llm import __version__
from tensorrt_llm.models import SpeculativeDecodingMode
from tensorrt_llm.network import Network, net_guard
from tensorrt_llm.plugin import PluginConfig
from xshare_trtllm.graph import tensorrt_layers


@dataclass
class BuildConfig:
    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_draft_len: int = 0
    speculative_decoding_mode: SpeculativeDecodingMode = SpeculativeDecodingMode.NONE
    dry_run: bool = False
    visualize_network: str | None = None
    plugin_config: PluginConfig = field(default_factory=PluginConfig)


class Engine:
    def __init__(
        self, model_config: Any, build_config: BuildConfig, engine: bytes | None, notes: Any
    ) -> None:
        self.model_config, self.build_config = model_config, build_config
        self.engine, self.notes = engine, notes

    def save(self, engine_dir: str) -> None:
        folder, rank = Path(engine_dir), self.model_config.mapping.rank
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            config = {"version": __version__, "pretrained_config": self.model_config.to_dict()}
            config["build_config"] = {"max_batch_size": self.build_config.max_batch_size}
            (folder / "config.json").write_text(json.dumps(config, indent=4))
        if self.engine is not None:
            (folder / f"rank{rank}.engine").write_bytes(self.engine)
        (folder / f"rank{rank}.json").write_text(json.dumps(self.notes))  # for the tests


def build(model: Any, build_config: BuildConfig) -> Engine:
    network = Network()
    network.plugin_config = build_config.plugin_config
    with net_guard(network):
        mode = build_config.speculative_decoding_mode
        inputs = model.prepare_inputs(
            max_draft_len=build_config.max_draft_len,
            speculative_decoding_draft_tokens_external=mode == SpeculativeDecodingMode.DRAFT_TOKENS_EXTERNAL,
        )
        model(**inputs)
    if build_config.visualize_network is not None:
        with net_guard(network):
            network.to_onnx(build_config.visualize_network)
    engine = None if build_config.dry_run else _build_engine(network.trt_network)
    definition = network.trt_network
    notes = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "plugins": definition.plugins,
        "errors": definition.log.errors,
    }
    notes["layers"] = definition.num_layers
    return Engine(model.config, build_config, engine, notes)


def _build_engine(definition: Any) -> bytes:
    """By TensorRT-RTX for a GPU that need not be there."""
    return tensorrt_layers.build_engine(_rtx(), definition.builder, definition.real, 64, "SM80")


def _rtx() -> Any:
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings
