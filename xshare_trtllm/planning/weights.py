"""Bytes per parameter, from the dtype and the quantisation block of a config.json."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Block = Mapping[str, Any]

_DTYPES = {"bfloat16": 16, "float16": 16, "float32": 32}
_SCALE_BITS = 16  # of a group's scale, where nothing else is said

# The names that checkpoints give to a matrix of each kind: what a block's patterns are tried on.
_LAYERS = ("model.layers", "model.language_model.layers", "language_model.model.layers")
_EXPERT = (
    "mlp.experts.0.up_proj",
    "mlp.experts",
    "block_sparse_moe.experts.0.w3",
    "feed_forward.experts.0.w3",
)
_OTHER = ("self_attn.q_proj", "self_attn.q_a_proj")


class WeightBytes(NamedTuple):
    """Bytes per parameter, scales and zero points included.

    expert  of routed and shared experts
    other   of attention and dense MLPs
    """

    expert: float
    other: float


def weight_bytes(config: Block, weight_bits: float | None = None) -> WeightBytes:
    """What a config.json says of its weights, or `weight_bits` for all of them.

    Reads the blocks of compressed-tensors, awq, gptq, modelopt (FP8, NVFP4, W4A16), fp8 and mxfp4; a matrix
    kind that a block leaves out has 16 bits. Raises ValueError for one that is not known, or not understood.
    """
    if weight_bits is not None:
        return WeightBytes(weight_bits / 8, weight_bits / 8)
    block = config.get("quantization_config") or config.get("compression_config")
    if not block:
        dtype = config.get("dtype") or config.get("torch_dtype")
        if dtype not in _DTYPES:
            raise ValueError(f"config.json: dtype={dtype!r} is not known; known are {', '.join(_DTYPES)}")
        return WeightBytes(_DTYPES[dtype] / 8, _DTYPES[dtype] / 8)
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json: quantization_config must be a block, got {block!r}")
    method = block.get("quant_method")
    bits = _METHODS.get(str(method))
    if bits is None:
        _refuse(f"quant_method={method!r}", f"known are {', '.join(_METHODS)}")
    middle = int(config.get("num_hidden_layers") or 2) // 2
    experts, others = (
        [f"{layers}.{middle}.{name}" for layers in _LAYERS for name in names] for names in (_EXPERT, _OTHER)
    )
    return WeightBytes(bits(block, experts) / 8, bits(block, others) / 8)


def _compressed_tensors(block: Block, names: Sequence[str]) -> float:
    if _matches(block.get("ignore"), names):
        return 16
    for group in dict(block.get("config_groups") or {}).values():
        targets = [target for target in group.get("targets", ()) if target != "Linear"]
        if "Linear" in group.get("targets", ()) or _matches(targets, names):
            return _group_bits(group.get("weights") or {"num_bits": 16, "type": "float"})
    return 16


def _group_bits(weights: Block) -> float:
    bits, group = _number(weights, "num_bits"), weights.get("group_size") or 0
    if group < 1:
        return bits  # one scale per row or matrix is next to nothing
    scale = 8 if weights.get("type") == "float" and bits == 4 else _SCALE_BITS  # FP4 has FP8 scales
    zero = 0 if weights.get("symmetric", True) else bits
    return bits + (scale + zero) / group


def _awq(block: Block, names: Sequence[str]) -> float:
    if _contains(block.get("modules_to_not_convert"), names):
        return 16
    zero = block.get("zero_point", True)
    return _grouped(_number(block, "bits", "w_bit"), block.get("group_size", block.get("q_group_size")), zero)


def _gptq(block: Block, names: Sequence[str]) -> float:
    if _contains(block.get("modules_to_not_convert"), names):
        return 16
    for rule, change in dict(block.get("dynamic") or {}).items():
        pattern = rule[2:] if rule[:2] in ("-:", "+:") else rule
        if any(re.match(pattern, name) for name in names):
            if rule.startswith("-:"):
                return 16
            block = {**block, **change}
            break
    return _grouped(_number(block, "bits"), block.get("group_size"), True)  # zeros are stored in any case


def _grouped(bits: float, group: Any, has_zeros: Any) -> float:
    if not isinstance(group, int) or group < 1:
        return bits
    return bits + (_SCALE_BITS + (bits if has_zeros else 0)) / group


# NVFP4: FP8 scales of groups of 16; the integer algorithms: 16-bit scales of groups of 128.
_MODELOPT = {
    "FP8": 8.0,
    "FP8_PB_WO": 8.0,
    "NVFP4": 4.5,
    "NVFP4_AWQ": 4.5,
    "W4A16_NVFP4": 4.5,
    "W4A16_AWQ": 4.125,
    "W4A8_AWQ": 4.125,
}


def _modelopt(block: Block, names: Sequence[str]) -> float:
    inner = block.get("quantization") if isinstance(block.get("quantization"), Mapping) else block
    assert isinstance(inner, Mapping)
    if _matches(inner.get("exclude_modules") or inner.get("ignore"), names):
        return 16
    algorithm = inner.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = dict(inner.get("quantized_layers") or {})
        algorithm = next((layers[name]["quant_algo"] for name in names if name in layers), None)
        if algorithm is None:
            return 16
    if str(algorithm).upper() not in _MODELOPT:
        _refuse(f"modelopt's quant_algo={algorithm!r}", f"known are {', '.join(_MODELOPT)}")
    return _MODELOPT[str(algorithm).upper()]


def _fp8(block: Block, names: Sequence[str]) -> float:
    """The blocks' scales (one per 128 x 128) are left out."""
    return 16 if _contains(block.get("modules_to_not_convert"), names) else 8


def _mxfp4(block: Block, names: Sequence[str]) -> float:
    """4 bits and one 8-bit scale per 32 values (OCP Microscaling Formats 1.0), experts only."""
    return 4.25 if _contains(["experts"], names) else 16


_METHODS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
}


def _matches(patterns: Any, names: Sequence[str]) -> bool:
    """True where a whole name, `re:` a regular expression or a wildcard stands for one of the names, or for
    a module around it."""
    return any(_stands_for(str(pattern), name) for pattern in patterns or () for name in names)


def _stands_for(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _contains(parts: Any, names: Sequence[str]) -> bool:
    """True where one of the parts, whole modules, is in a name."""
    return any(f"{part}." in f"{name}." for part in parts or () for name in names)


def _number(block: Block, *fields: str) -> float:
    for field in fields:
        value = block.get(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
    raise ValueError(f"config.json: the quantisation block lacks {' or '.join(fields)}; give --weight-bits")


def _refuse(what: str, known: str) -> Any:
    raise ValueError(f"config.json: {what} is not known; {known}; give --weight-bits")
