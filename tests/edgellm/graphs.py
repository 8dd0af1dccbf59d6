"""One MoE layer as a graph, with the inputs that a graph of TensorRT Edge-LLM has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from xshare_trtllm.edgellm.moe import BIAS_INPUT

EXPERTS, HIDDEN = 32, 64
ROWS = ("query_start_offsets", "query_lengths", "context_sequence_count_carrier")
SOFTMAX = {"num_experts": EXPERTS, "top_k": 4, "norm_topk_prob": 1, "routing_mode": 0}


def moe_graph(
    plugin: str = "Fp16MoePlugin",
    *,
    layers: int = 1,
    inputs: tuple[str, ...] = ROWS,
    bias: Any = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """`layers` MoE layers after each other; `bias` [E] for those that take one."""
    values = SOFTMAX | attributes
    if plugin == "Int4MoePlugin":
        values = {name: values[name] for name in ("num_experts", "top_k")}
    weights = [numpy_helper.from_array(np.zeros((HIDDEN, EXPERTS), np.float16), "router")]
    place = BIAS_INPUT.get(plugin)
    others = ["weights"] * ((place or 6) - 2)
    weights.append(numpy_helper.from_array(np.zeros(1, np.float16), "weights"))
    if bias is not None:
        weights.append(numpy_helper.from_array(np.asarray(bias, np.float32), "bias"))
        others.append("bias")
    nodes, hidden = [], "inputs_embeds"
    for layer in range(layers):
        logits, made = f"logits_{layer}", f"hidden_{layer}"
        nodes.append(helper.make_node("MatMul", [hidden, "router"], [f"half_{layer}"], f"matmul_{layer}"))
        cast = helper.make_node("Cast", [f"half_{layer}"], [logits], f"cast_{layer}", to=TensorProto.FLOAT)
        nodes.append(cast)
        nodes.append(
            helper.make_node(
                plugin, [logits, hidden, *others], [made], f"moe_{layer}", domain="trt_edgellm", **values
            )
        )
        hidden = made
    rows = [helper.make_tensor_value_info(name, TensorProto.INT32, [None]) for name in inputs]
    embeds = helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT16, ["rows", HIDDEN])
    out = helper.make_tensor_value_info(hidden, TensorProto.FLOAT16, ["rows", HIDDEN])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("trt_edgellm", 1)]
    graph = helper.make_graph(nodes, "model", [embeds, *rows], [out], weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def save(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder
