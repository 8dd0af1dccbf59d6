"""tensorrt_llm/models of 1.x: PretrainedConfig, SpeculativeDecodingMode (modeling_utils.py), the inputs of a
network (generation_mixin.py, `prepare_basic_inputs`), and a model of MoE layers after some dense ones."""

from __future__ import annotations

import argparse
import json
from enum import IntFlag, auto
from typing import Any

import numpy as np
import tensorrt as trt

from tensorrt_llm._common import default_net
from tensorrt_llm.functional import Tensor, constant, gather
from tensorrt_llm.layers.moe import MOE, MoeConfig, SharedMoE
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.module import Module

HIDDEN, VOCABULARY = 16, 32


class SpeculativeDecodingMode(IntFlag):
    NONE = auto()
    DRAFT_TOKENS_EXTERNAL = auto()
    MEDUSA = auto()
    LOOKAHEAD_DECODING = auto()
    EXPLICIT_DRAFT_TOKENS = auto()
    EAGLE = auto()

    @staticmethod
    def from_arguments(args: argparse.Namespace) -> SpeculativeDecodingMode:
        name = args.speculative_decoding_mode
        return SpeculativeDecodingMode[name.upper()] if name else SpeculativeDecodingMode.NONE


class PretrainedConfig:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.architecture = values["architecture"]
        self.num_hidden_layers = values["num_hidden_layers"]
        self.num_dense_layers = values.get("num_dense_layers", 0)
        self.static_routing = values.get("static_routing", False)
        self.moe = MoeConfig.from_dict(values["moe"])
        self.mapping = Mapping(**values.get("mapping", {}))

    @classmethod
    def from_json_file(cls, config_file: str) -> PretrainedConfig:
        with open(config_file) as file:
            return cls(json.load(file))

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        return self.values


class MoeModel(Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        moe_class = SharedMoE if config.moe.shared_expert_intermediate_size else MOE
        local = config.mapping.pp_layers(config.num_hidden_layers)
        self.layers = [
            moe_class(
                config.moe, HIDDEN, 2 * HIDDEN, "swiglu", config.mapping, static_routing=config.static_routing
            )
            for layer in local
            if layer >= config.num_dense_layers
        ]

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str, config: PretrainedConfig) -> MoeModel:
        return cls(config)

    def prepare_inputs(self, max_draft_len: int, speculative_decoding_draft_tokens_external: bool) -> Any:
        def vector(name: str, *shape: int) -> Tensor:
            return Tensor(name=name, dtype=trt.int32, shape=shape or (-1,))

        plugins = default_net().plugin_config
        tokens = vector("input_ids", *((-1,) if plugins.remove_input_padding else (-1, -1)))
        vector("last_token_ids")
        if max_draft_len > 0 and not speculative_decoding_draft_tokens_external:
            vector("spec_decoding_generation_lengths")
            vector("spec_decoding_position_offsets", -1, -1)
            vector("spec_decoding_packed_mask", -1, -1)
            vector("spec_decoding_use", 1)
        if plugins.gpt_attention_plugin:
            for name in ("sequence_length", "host_request_types", "host_past_key_value_lengths"):
                vector(name)
            vector("context_lengths")
            if plugins.remove_input_padding:
                vector("host_context_lengths")
        return {"input_ids": tokens}

    def forward(self, input_ids: Tensor) -> None:
        table = np.random.default_rng(1).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
        hidden_states = gather(constant(table), 0, input_ids)
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        hidden_states.mark_output("logits")


MODEL_MAP = {"MixtralForCausalLM": MoeModel, "QWenForCausalLM": MoeModel, "DeepseekV2ForCausalLM": MoeModel}
