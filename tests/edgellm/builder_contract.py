"""What test_builder_contract.py runs in a process of its own, with a stand-in as `tensorrt`: CHECK"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

import numpy as np
import tensorrt as trt
from experimental.builder.ops import backend
from experimental.builder.ops import functional as F
from experimental.builder.ops.ragged import add_ragged_decoder_inputs
from experimental.builder.ops.scope import build_scope
from experimental.builder.ops.tensor import Tensor

from xshare_trtllm import XShareConfig
from xshare_trtllm.edgellm import builder
from xshare_trtllm.edgellm.plugin import NODE, OURS, PLUGIN_VERSION

EXPERTS, TOP_K, HIDDEN = 128, 8, 256
CONFIG = XShareConfig(coverage=0.97, request_budget=24)


class Build:
    """A network as the direct builder begins it, with router logits and hidden states."""

    def __init__(self, ragged: bool = True) -> None:
        self.network = trt.NetworkDefinition()
        self.net = backend.Net(self.network.builder, self.network)
        if ragged:
            add_ragged_decoder_inputs(self.net.add_input)
        self.logits = Tensor(self.net.add_input("logits", trt.float32, (-1, EXPERTS)))
        self.hidden = Tensor(self.net.add_input("hidden", trt.float16, (-1, HIDDEN)))

    def run(self, config: XShareConfig, *layers: Any) -> list[Any]:
        """The plugins' (plugin, inputs, output) of a build of these layers."""
        creator = trt.get_plugin_registry().get_creator(NODE, PLUGIN_VERSION, OURS)
        with (
            builder.installed(config, creator),
            build_scope(SimpleNamespace(net=self.net)),
        ):
            for layer in layers:
                layer(self)
        return self.network.plugins


def fp16(build: Build, **options: Any) -> Tensor:
    weights = {name: np.zeros((EXPERTS, 128, HIDDEN), np.float16) for name in ("fc1_weights", "fc2_weights")}
    bindings = dict.fromkeys(weights)
    sizes = (EXPERTS, TOP_K, HIDDEN, 64)
    return F.fp16_moe(
        build.logits, build.hidden, weights, *sizes, weight_prefix="moe", weight_bindings=bindings, **options
    )


def nvfp4(build: Build, mode: int, bias: float = 0.0, normalised: int = 1) -> Tensor:
    names = ("fc1_qweights", "fc1_blocks_scale", "fc2_qweights", "fc2_blocks_scale")
    weights = {name: np.zeros((EXPERTS, 4), np.int8) for name in names}
    more = ("fc1_alpha", "fc2_alpha", "input_global_scale", "down_input_scale")
    weights |= {name: np.ones(EXPERTS, np.float32) for name in more}
    weights["e_score_correction_bias"] = np.full(EXPERTS, bias, np.float32)
    routing = (F.MoeActivation.RELU2, 1, 1, normalised, 2.5, F.MoeRouting(mode), False)
    sizes = (EXPERTS, TOP_K, HIDDEN, 64)
    return F.nvfp4_moe(build.logits, build.hidden, weights, *sizes, *routing, weight_prefix="moe")


def softmax_layers() -> None:
    build = Build()
    plugins = build.run(CONFIG, fp16, fp16)
    assert [plugin.name for plugin, *_ in plugins] == ["XShareRouting", "Fp16MoePlugin"] * 2
    for (ours, inputs, output), (_, theirs, _) in zip(plugins[::2], plugins[1::2], strict=True):
        assert ours.fields == {
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "scoring": "softmax_renorm",
            "routed_scaling_factor": 1.0,
            "warmup": 1,
            "utility": "squared_weight",
            "output": "masked_logits",
            "mask_value": -1e30,
            "has_request_ids": 1,
            "has_exempt": 1,
            "coverage": 0.97,
            "request_budget": 24,
        }
        assert inputs[0] is build.logits._as_trt() and theirs[0] is output
        assert [tensor.dtype for tensor in inputs[1:]] == [trt.int32, trt.bool]
        assert [tuple(tensor.shape) for tensor in inputs[1:]] == [(-1,), (-1,)]
    assert plugins[0][1][1:] == plugins[2][1][1:], "the rows are worked out once"


def sigmoid_layers() -> None:
    build = Build()
    (ours, inputs, output), (_, theirs, _) = build.run(CONFIG, lambda b: nvfp4(b, 1, bias=0.1))
    assert (ours.fields["scoring"], ours.fields["output"]) == ("sigmoid_bias", "step_bias")
    assert ours.fields["routed_scaling_factor"] == 2.5 and ours.fields["has_correction_bias"] == 1
    assert theirs[0] is build.logits._as_trt() and theirs[10] is output
    assert tuple(inputs[1].shape) == (EXPERTS,) and inputs[1].dtype == trt.float32


def budgets_per_layer() -> None:
    plugins = Build().run(XShareConfig((16, 24)), fp16, lambda b: nvfp4(b, 0))
    assert [plugin.fields.get("budget") for plugin, *_ in plugins] == [16, None, 24, None]


def refusals() -> None:
    for config, layers, message in (
        (CONFIG, [lambda b: nvfp4(b, 0, bias=1.0)], "nvfp4_moe of MoE layer 0: e_score_correction_bias"),
        (CONFIG, [lambda b: nvfp4(b, 0, normalised=0)], "nvfp4_moe of MoE layer 0: norm_topk_prob is 0"),
        (CONFIG, [], "the build made no MoE layer"),
        (XShareConfig((16, 24)), [fp16], "names 2 MoE layers, built 1"),
        (XShareConfig(4), [fp16], "fp16_moe of MoE layer 0: XShareConfig(budget=4)"),
    ):
        _refuses(Build(), config, layers, message)
    _refuses(Build(ragged=False), CONFIG, [fp16], "no input query_start_offsets")


def _refuses(build: Build, config: XShareConfig, layers: list[Any], message: str) -> None:
    try:
        build.run(config, *layers)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


def untouched_afterwards() -> None:
    build = Build()
    build.run(CONFIG, fp16)
    with build_scope(SimpleNamespace(net=build.net)):
        fp16(build)
    assert [plugin.name for plugin, *_ in build.network.plugins] == ["XShareRouting", *["Fp16MoePlugin"] * 2]


def names() -> None:
    theirs = {name: creator for name, creator in backend._OPERATION_CREATORS.items() if "moe" in name}
    assert theirs == builder.PLUGINS


if __name__ == "__main__":
    globals()[sys.argv[1]]()
