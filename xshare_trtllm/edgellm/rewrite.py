"""A graph of `tensorrt-edgellm-export` with one XShareRouting node before every MoE plugin.

Only the input of each MoE plugin that says how to route changes, to an output of that node; all else stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.edgellm.moe import BIAS_INPUT, Limit, MoeRouter, check_config, moe_router, plugin_fields
from xshare_trtllm.edgellm.plugin import NODE, OURS, PLUGIN_VERSION
from xshare_trtllm.edgellm.rows import INPUTS, PREFIX, Rows, add_rows

THEIRS = "trt_edgellm"
_FIELDS = {
    "plugin_version": str,
    "plugin_namespace": str,
    "num_experts": int,
    "top_k": int,
    "scoring": str,
    "routed_scaling_factor": float,
    "warmup": int,
    "utility": str,
    "output": str,
    "mask_value": float,
    "has_correction_bias": int,
    "has_request_ids": int,
    "has_exempt": int,
    "budget": int,
    "coverage": float,
    "request_budget": int,
    "max_rows": int,
}


def rewrite(model: onnx.ModelProto, config: XShareConfig, folder: Path) -> list[RouterSpec]:
    """Puts XShare into the model, in place; returns the routers, by MoE layer.

    folder  where the model's external data lies, of which only the biases of routers are read

    Raises ValueError where that cannot be done exactly, with the node's name, and leaves the model as it is.
    """
    graph = model.graph
    layers = _moe_nodes(model)
    _check_graph(graph)
    if isinstance(config.budget, tuple) and len(config.budget) != len(layers):
        raise ValueError(
            f"XShareConfig(budget=): names {len(config.budget)} MoE layers, the graph has {len(layers)}"
        )
    if config.gpu_budget is not None:
        raise ValueError(f"XShareConfig(gpu_budget={config.gpu_budget}): a graph has one GPU; leave it off")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    rows = add_rows(layers[0].input[0])
    made: dict[str, onnx.NodeProto] = {}
    specs = []
    for number, node in enumerate(layers):
        router = _router(node, constants, folder)
        layer_config = config.for_layer(number)
        check_config(node.name, layer_config, router)
        made[node.name] = _routing_node(node, router, layer_config, rows)
        specs.append(router.spec)
    _insert(graph, layers, made, rows)
    model.opset_import.append(helper.make_opsetid(OURS, 1))
    return specs


def _moe_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    layers = []
    for node, is_inside in _all_nodes(model.graph):
        if node.domain == OURS:
            raise ValueError(f"{node.name}: the graph has XShare already; --undo gives the original back")
        if node.domain != THEIRS or "moe" not in node.op_type.lower():
            continue
        if node.op_type not in BIAS_INPUT:
            known = ", ".join(BIAS_INPUT)
            raise ValueError(f"{node.name}: the MoE plugin {node.op_type} is not known; known are {known}")
        if is_inside:
            raise ValueError(f"{node.name}: a MoE plugin inside an If or a Loop is not supported")
        layers.append(node)
    if not layers:
        raise ValueError(
            f"the graph has no MoE plugin of {THEIRS}: no experts, or experts computed without a plugin"
        )
    if any(not node.name for node in layers) or len({node.name for node in layers}) < len(layers):
        raise ValueError("the graph's MoE nodes have no names of their own")
    return layers


def _all_nodes(graph: onnx.GraphProto, is_inside: bool = False) -> Iterator[tuple[onnx.NodeProto, bool]]:
    for node in graph.node:
        yield node, is_inside
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g, True)


def _check_graph(graph: onnx.GraphProto) -> None:
    """Raises ValueError where the graph's inputs do not say what its rows are."""
    inputs = {value.name for value in graph.input}
    if "canvas_ids" in inputs:
        raise ValueError("canvas_ids: a diffusion model denoises its rows again and again; not supported")
    for name in INPUTS:
        if name not in inputs:
            raise ValueError(
                f"the graph has no input {name}, which says what its rows are; tensorrt-edgellm 0.11 has it"
            )


def _router(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], folder: Path) -> MoeRouter:
    place = BIAS_INPUT[node.op_type]
    has_bias = place is not None and place < len(node.input) and node.input[place] != ""
    bias = constants.get(node.input[place]) if has_bias and place is not None else None
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    values = None if bias is None else _read(bias, folder)
    return moe_router(node.name, attributes, has_bias=has_bias, bias=values)


def _read(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if uses_external_data(copy):
        try:
            load_external_data_for_tensor(copy, str(folder))
        except onnx.checker.ValidationError as error:
            raise OSError(str(error)) from None
    return numpy_helper.to_array(copy)


def _routing_node(
    node: onnx.NodeProto, router: MoeRouter, config: XShareConfig, rows: Rows
) -> onnx.NodeProto:
    """The node that goes before a MoE plugin; its output limits the plugin's rows."""
    inputs = [node.input[0], rows.request_ids, rows.exempt]
    if router.limit is Limit.BIAS:
        inputs.insert(1, node.input[_bias_place(node)])
    name = f"{PREFIX}{node.name}"
    output = f"{name}/{router.limit.value}"
    fields: dict[str, Any] = plugin_fields(router, config)
    return helper.make_node(
        NODE,
        inputs,
        [output],
        name=name,
        domain=OURS,
        plugin_version=PLUGIN_VERSION,
        plugin_namespace=OURS,
        **fields,
    )


def _bias_place(node: onnx.NodeProto) -> int:
    place = BIAS_INPUT[node.op_type]
    assert place is not None  # moe_router has refused a plugin without
    return place


def _insert(
    graph: onnx.GraphProto, layers: list[onnx.NodeProto], made: dict[str, onnx.NodeProto], rows: Rows
) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        added = made.get(node.name) if node.domain == THEIRS else None
        if added is not None:
            nodes += [*rows.nodes, added] if node is layers[0] else [added]
        nodes.append(node)
    for node in layers:
        added = made[node.name]
        limits_bias = added.output[0].endswith(Limit.BIAS.value)
        node.input[_bias_place(node) if limits_bias else 0] = added.output[0]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def register_schema() -> None:
    """Makes `onnx.checker` know the node. More than once is fine."""
    if onnx.defs.has(NODE, OURS):
        return
    schema = onnx.defs.OpSchema
    any_type = ("T", [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32", "bool")], "")
    more = schema.FormalParameterOption.Variadic
    kinds = {str: schema.AttrType.STRING, int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
    onnx.defs.register_schema(
        schema(
            NODE,
            OURS,
            1,
            doc="One shared set of experts for the rows of a step: plugins/tensorrt/README.md.",
            inputs=[schema.FormalParameter("inputs", "T", param_option=more, is_homogeneous=False)],
            outputs=[schema.FormalParameter("output", "tensor(float)")],
            type_constraints=[any_type],
            attributes=[
                schema.Attribute(name, kinds[kind], required=False) for name, kind in _FIELDS.items()
            ],
        )
    )
