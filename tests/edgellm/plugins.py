"""The plugins that a graph of TensorRT Edge-LLM needs, as numpy operators of ONNX's ReferenceEvaluator.

AttentionPlugin and Fp16MoePlugin compute what the plugins' sources say. The experts of quantised plugins and
the recurrent layers are stand-ins with the right shapes: their routing is exact, what an expert computes is
not. XShareRouting calls `xshare_trtllm.route` and `mask_logits`. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference.op_run import OpRun

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, route
from xshare_trtllm.edgellm.moe import BIAS_INPUT

Array = npt.NDArray[Any]
PAGE = 128  # tokens of a page of the cache


@dataclass
class Log:
    """What the last step did, by MoE layer."""

    logits: list[Array] = field(default_factory=list)  # [T, E], of the router
    chosen: list[Array] = field(default_factory=list)  # [T, k], by the MoE plugin
    weights: list[Array] = field(default_factory=list)  # [T, k], of the MoE plugin
    rows: list[tuple[Array, Array]] = field(default_factory=list)  # request ids and exempt, of XShareRouting
    bias: list[Array | None] = field(default_factory=list)  # of the router, where it has one

    def clear(self) -> None:
        for values in vars(self).values():
            values.clear()


def operators(log: Log) -> list[type[OpRun]]:
    """Operator classes that write to `log`."""

    class AttentionPlugin(OpRun):
        op_domain = "trt_edgellm"

        def _run(self, *inputs: Array, **_: Any) -> tuple[Array, ...]:
            return attention(inputs, _attributes(self.onnx_node))

    class XShareRouting(OpRun):
        op_domain = "xshare"
        # OpRun sets an attribute of the node as one of its own, and `output` is taken.
        output = property(lambda self: self.onnx_node.output, lambda self, _: None)

        def _run(self, *inputs: Array, **_: Any) -> tuple[Array, ...]:
            return _xshare(inputs, _attributes(self.onnx_node), log)

    class Gemm(OpRun):  # ONNX's own multiplies float16 in float16, one by one
        op_domain = ""

        def _run(self, a: Array, b: Array, c: Array | None = None, **_: Any) -> tuple[Array, ...]:
            transposed = _attributes(self.onnx_node).get("transB", 0)
            product = _product(a, b if transposed else b.T)
            return ((product if c is None else product + c.astype(np.float32)).astype(a.dtype),)

    moe_classes = [
        type(name, (OpRun,), {"op_domain": "trt_edgellm", "_run": _moe_run(name, log)}) for name in BIAS_INPUT
    ]
    stand_ins = [
        type(name, (OpRun,), {"op_domain": domain, "_run": run}) for name, (domain, run) in _STAND_INS.items()
    ]
    return [AttentionPlugin, XShareRouting, Gemm, *moe_classes, *stand_ins]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


# ---- Attention ---------------------------------------------------------------------------------------------


def attention(inputs: tuple[Array, ...], attributes: Mapping[str, Any]) -> tuple[Array, Array]:
    """Over a paged cache [2, pages, 128, heads, size]: K pages are numbered from 0, V pages after them."""
    qkv, cache, lengths, rope, past, table, *rest = inputs
    offsets, _, phase, contexts = rest[-4:]
    heads, kv_heads, size = (attributes[name] for name in ("num_q_heads", "num_kv_heads", "head_size"))
    values = qkv.reshape(len(qkv), heads + 2 * kv_heads, size).astype(np.float32)
    q, k, v = np.split(values, (heads, heads + kv_heads), axis=1)
    if attributes["enable_qk_norm"]:
        q, k = (_norm(x, gamma, attributes["rms_norm_eps"]) for x, gamma in zip((q, k), rest, strict=False))
    q, k = _rotate(q, rope), _rotate(k, rope)
    mask = rest[2 * attributes["enable_qk_norm"]] if attributes["enable_tree_attention"] else None
    is_tree = mask is not None and len(phase) == 5
    pool = cache.reshape(-1, PAGE, kv_heads, size).copy()
    out = np.zeros((len(qkv), heads, size), np.float32)
    for sequence, length in enumerate(lengths):
        rows = slice(offsets[sequence], offsets[sequence] + length)
        slots = np.arange(past[sequence] + length)
        for part, new in enumerate((k, v)):
            pages = table[sequence, part, slots // PAGE]
            pool[pages[past[sequence] :], slots[past[sequence] :] % PAGE] = new[rows]
        keys, seen = (
            pool[table[sequence, part, slots // PAGE], slots % PAGE].astype(np.float32) for part in (0, 1)
        )
        visible = slots <= past[sequence] + np.arange(length)[:, None]
        if is_tree and sequence >= len(contexts):
            bits = mask[rows, :, None] >> np.arange(32) & 1
            visible[:, past[sequence] :] = bits.reshape(length, -1)[:, :length]
        out[rows] = _attend(q[rows], keys, seen, visible, attributes["attention_scale"])
    return out.reshape(len(qkv), heads, size).astype(qkv.dtype), pool.reshape(cache.shape)


def _attend(q: Array, k: Array, v: Array, visible: Array, scale: float) -> Array:
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("thd,shd->hts", q, k.repeat(group, 1)) * scale
    scores = np.where(visible[None], scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v.repeat(group, 1))


def _norm(x: Array, gamma: Array, epsilon: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gamma.astype(np.float32)


def _rotate(x: Array, rope: Array) -> Array:
    """rope [T, R]: cosines and sines of R / 2 frequencies."""
    half = rope.shape[1] // 2
    cos, sin = rope[:, None, :half], rope[:, None, half:]
    a, b, rest = np.split(x, (half, 2 * half), axis=2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], 2)


# ---- Experts -----------------------------------------------------------------------------------------------


def choose(logits: Array, attributes: Mapping[str, Any], bias: Array | None) -> tuple[Array, Array]:
    """Ids and weights [T, k] as the plugins' top-k kernels find them: of equals the lower id."""
    k, mode = attributes["top_k"], attributes.get("routing_mode", 0)
    if mode == 1:
        assert attributes.get("n_group", 1) <= 1 and bias is not None
        score = 1 / (1 + np.exp(-logits))
        ranked, is_normalised = score + bias, attributes["norm_topk_prob"]
    else:
        shifted = logits if mode == 2 or bias is None else logits + bias
        score = np.exp(shifted - shifted.max(-1, keepdims=True))
        ranked = score = score / score.sum(-1, keepdims=True)
        is_normalised = attributes.get("norm_topk_prob", 1)
    ids = np.argsort(-ranked, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(score, ids, -1)
    if is_normalised:
        weights = weights / weights.sum(-1, keepdims=True)
    if mode == 1:
        weights = weights * attributes.get("routed_scaling_factor", 1.0)
    if mode == 2 and bias is not None:
        weights = weights * bias[ids]
    return ids, weights


def _moe_run(name: str, log: Log) -> Any:
    place = BIAS_INPUT[name]

    def run(self: OpRun, *inputs: Array, **_: Any) -> tuple[Array]:
        attributes = _attributes(self.onnx_node)
        bias = inputs[place] if place is not None and place < len(inputs) else None
        ids, weights = choose(inputs[0], attributes, bias)
        log.chosen.append(ids)
        log.weights.append(weights)
        if not any(node_input.startswith("xshare/") for node_input in self.onnx_node.input):
            log.logits.append(inputs[0])
        hidden = inputs[1].astype(np.float32)
        out = np.zeros_like(hidden)
        for expert in np.unique(ids):
            rows, slots = np.nonzero(ids == expert)
            made = _expert(name, inputs, attributes, expert, hidden[rows])
            out[rows] += weights[rows, slots, None] * made  # a row has an expert once
        return (out.astype(inputs[1].dtype),)

    return run


def _expert(name: str, inputs: tuple[Array, ...], attributes: Mapping[str, Any], e: int, x: Array) -> Array:
    if name != "Fp16MoePlugin":  # a stand-in for an expert of packed weights
        own = np.random.default_rng(int(e)).normal(size=x.shape[1]).astype(np.float32)
        return np.tanh(x * own)
    first, second = (inputs[place][e] for place in (2, 3))
    made = _product(x, first)
    if attributes["activation_type"] == 4:
        return _product(np.maximum(made, 0) ** 2, second)
    up, gate = made.reshape(len(x), -1, 2, 64).transpose(2, 0, 1, 3).reshape(2, len(x), -1)
    return _product(gate / (1 + np.exp(-gate)) * up, second)


def _product(a: Array, b: Array) -> Array:
    """a [n, i] times b [m, i] transposed, in float32; not by BLAS, whose threads only wait for each other."""
    return np.einsum("ni,mi->nm", a.astype(np.float32), b.astype(np.float32))


# ---- XShare ------------------------------------------------------------------------------------------------


def layer_of(attributes: Mapping[str, Any]) -> tuple[RouterSpec, XShareConfig]:
    """What the attributes of an XShareRouting node say."""
    text = {name: attributes[name].decode() for name in ("scoring", "utility")}
    scale = float(attributes["routed_scaling_factor"])
    spec = RouterSpec(
        attributes["num_experts"], attributes["top_k"], text["scoring"], routed_scaling_factor=scale
    )
    limits = {
        name: attributes[name]
        for name in ("budget", "coverage", "request_budget", "max_rows")
        if name in attributes
    }
    return spec, XShareConfig(warmup=attributes["warmup"], utility=text["utility"], **limits)


def _xshare(inputs: tuple[Array, ...], attributes: Mapping[str, Any], log: Log) -> tuple[Array, ...]:
    spec, config = layer_of(attributes)
    names = ["router_logits"] + [
        name for name in ("correction_bias", "request_ids", "exempt") if attributes.get(f"has_{name}")
    ]
    arrays = dict(zip(names, inputs, strict=True))
    log.logits.append(arrays["router_logits"])
    log.rows.append((arrays["request_ids"], arrays["exempt"]))
    log.bias.append(arrays.get("correction_bias"))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    logits = tensors.pop("router_logits")
    banned = np.float32(attributes["mask_value"])
    if attributes["output"] == b"masked_logits":
        masked = mask_logits(logits, spec, config, **tensors).numpy()
        return (np.where(np.isneginf(masked), banned, masked),)
    made = route(logits, spec, config, **tensors)
    exempt = np.any(arrays["exempt"] & (arrays["request_ids"] >= 0))
    if exempt or made.stats.stood_aside:  # as plugins/tensorrt/README.md says of the step bias
        return (arrays["correction_bias"],)
    return (np.where(made.active_experts.numpy(), arrays["correction_bias"], banned),)


# ---- Recurrent layers: stand-ins ---------------------------------------------------------------------------


def _stand_in(value: int, state: int) -> Any:
    """Of the places of the values and of the state among the inputs."""

    def run(self: OpRun, *inputs: Array, **_: Any) -> tuple[Array, ...]:
        made, kept = np.tanh(inputs[value].astype(np.float32)).astype(inputs[value].dtype), inputs[state]
        snapshots = np.zeros((len(made), *kept.shape[1:]), kept.dtype)
        return (made, kept, snapshots)[: len(self.onnx_node.output)]

    return run


_STAND_INS: dict[str, tuple[str, Any]] = {
    "causal_conv1d": ("trt_edgellm", _stand_in(0, 3)),
    "gated_delta_net": ("trt_edgellm", _stand_in(2, 7)),
    "update_ssm_state": ("trt_edgellm", _stand_in(0, 7)),
}
