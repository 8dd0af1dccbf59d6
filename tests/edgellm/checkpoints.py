"""Tiny random checkpoints of the MoE classes that TensorRT Edge-LLM exports, and its exporter."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

SHIPPED = Path(__file__).parents[2] / "xshare_trtllm/evaluation/models/xshare-moe-14m"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def export(checkpoint: Path, out: Path, *arguments: str, **environment: str) -> Path:
    """Runs `tensorrt-edgellm-export` in this process; returns `out`."""
    from tensorrt_edgellm.scripts.export import main

    logging.disable(logging.WARNING)  # it logs every step of the tracer
    try:
        with (
            mock.patch.object(sys, "argv", ["export", str(checkpoint), str(out), *arguments]),
            mock.patch.dict(os.environ, environment),
        ):
            main()
    finally:
        logging.disable(logging.NOTSET)
    return out


def shipped(folder: Path) -> Path:
    """The shipped model with a chat template, without which the exporter stops half way."""
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy2(SHIPPED / name, folder)
    return _tokenizer(folder)


def qwen3_moe(folder: Path) -> Path:
    """128 experts, 8 of them per token: what Fp16MoePlugin takes."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_SMALL,
        num_hidden_layers=2,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM(config), folder)


def qwen3_5_moe(folder: Path) -> Path:
    """A layer of linear attention and one of full attention, with shared experts; says that it has MTP."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(
        **_SMALL,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )
    _save(Qwen3_5MoeForCausalLM(config), folder)
    return _edit(folder, mtp_num_hidden_layers=1)


def gemma4_moe(folder: Path) -> Path:
    """Experts in bfloat16, as in the checkpoints that the exporter quantises to 4 bits itself."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **_SMALL,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=2,
        moe_intermediate_size=128,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=256,
    )
    _save(Gemma4ForCausalLM(config), folder)
    return _edit(folder, global_head_dim=512)  # transformers writes it per layer, the exporter wants it here


def nemotron_h(folder: Path, algorithm: str = "NVFP4", experts: int = 16, layers: str = "M*EE") -> Path:
    """Sigmoid routers with a bias; experts of 4-bit floats, drawn at random."""
    hidden, width, head = 256, 128, 64
    config = {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "hybrid_override_pattern": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "intermediate_size": width,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": width,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 128,
        "torch_dtype": "float16",
    }
    draw = _Draw()
    tensors = {
        "backbone.embeddings.weight": draw(256, hidden),
        "backbone.norm_f.weight": torch.ones(hidden, dtype=torch.float16),
        "lm_head.weight": draw(256, hidden),
    }
    quantised = {}
    for number, kind in enumerate(layers):
        prefix = f"backbone.layers.{number}"
        tensors[f"{prefix}.norm.weight"] = torch.ones(hidden, dtype=torch.float16)
        if kind == "M":
            tensors |= draw.mamba(f"{prefix}.mixer", hidden)
            continue
        if kind == "*":
            for name, out in (("q", 2 * head), ("k", head), ("v", head)):
                tensors[f"{prefix}.mixer.{name}_proj.weight"] = draw(out, hidden)
            tensors[f"{prefix}.mixer.o_proj.weight"] = draw(hidden, 2 * head)
            continue
        tensors[f"{prefix}.mixer.gate.weight"] = draw(experts, hidden) * 8
        tensors[f"{prefix}.mixer.gate.e_score_correction_bias"] = draw(experts)
        tensors |= draw.expert(f"{prefix}.mixer.shared_experts", hidden, width)
        for expert in range(experts):
            name = f"{prefix}.mixer.experts.{expert}"
            tensors |= draw.packed_expert(name, hidden, width)
            quantised |= {f"{name}.{side}_proj": {"quant_algo": algorithm} for side in ("up", "down")}
    folder.mkdir(parents=True)
    quantisation = {"quant_algo": "MIXED_PRECISION", "quantized_layers": quantised, "exclude_modules": []}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantisation}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return _tokenizer(folder)


_SMALL: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


class _Draw:
    """Random weights in float16."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.random) * 0.05).half()

    def mamba(self, name: str, hidden: int) -> dict[str, Tensor]:
        heads, inner, state = 4, 128, 32
        return {
            f"{name}.in_proj.weight": self(2 * inner + 2 * state + heads, hidden),
            f"{name}.conv1d.weight": self(inner + 2 * state, 1, 4),
            f"{name}.conv1d.bias": self(inner + 2 * state),
            f"{name}.A_log": self(heads),
            f"{name}.D": self(heads),
            f"{name}.dt_bias": self(heads),
            f"{name}.norm.weight": torch.ones(inner, dtype=torch.float16),
            f"{name}.out_proj.weight": self(hidden, inner),
        }

    def expert(self, name: str, hidden: int, width: int) -> dict[str, Tensor]:
        return {
            f"{name}.up_proj.weight": self(width, hidden),
            f"{name}.down_proj.weight": self(hidden, width),
        }

    def packed_expert(self, name: str, hidden: int, width: int) -> dict[str, Tensor]:
        """As ModelOpt writes it: two values per byte, a scale per 16 of them, and one per matrix."""
        made = {}
        for side, (out, into) in {"up": (width, hidden), "down": (hidden, width)}.items():
            packed = torch.randint(0, 256, (out, into // 2), generator=self.random, dtype=torch.uint8)
            made[f"{name}.{side}_proj.weight"] = packed
            made[f"{name}.{side}_proj.weight_scale"] = torch.ones(out, into // 16).to(torch.float8_e4m3fn)
            made[f"{name}.{side}_proj.weight_scale_2"] = torch.tensor(0.01)
            made[f"{name}.{side}_proj.input_scale"] = torch.tensor(1.0)
        return made


def _save(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith(("router.proj.weight", "mlp.gate.weight")):
            torch.nn.init.normal_(parameter, std=0.5)  # opinions, not ties
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    model.half().save_pretrained(folder)
    return _tokenizer(folder)


def _edit(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def _tokenizer(folder: Path) -> Path:
    shutil.copy2(SHIPPED / "tokenizer.json", folder)
    config = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder
