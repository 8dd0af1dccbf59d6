"""The engine path of TensorRT-LLM 1.0 to 1.2: MoE layers that route through the XShare plugin.

`XShareBuild` stands where `tensorrt_llm.commands.build.build_and_save` stood. While one engine is built the
class `tensorrt_llm.layers.moe.MixtureOfExperts` has another `forward`: it lets TensorRT-LLM's own run in the
mode RENORMALIZE, the one that calls `renormalize(logits)` for expert ids and weights, and makes these two
tensors with the plugin, for whatever mode the layer has. Nothing else of the layer is touched: router, LoRA,
expert GEMMs, shared experts, side stream and all-reduce are TensorRT-LLM's.

Names and signatures: TensorRT-LLM 1.x, commands/build.py, builder.py, network.py, layers/moe.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xshare_trtllm import __version__
from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.graph.inputs import GraphInputs
from xshare_trtllm.graph.tensorrt_layers import TensorRTOps
from xshare_trtllm.report import write_aside
from xshare_trtllm.trtllm.engine_rows import Rows, packed_rows, padded_rows

PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "XShareRouting", "2", "xshare"
BUILD_MODULE = "tensorrt_llm.commands.build"
INT32_MAX = 2**31 - 1

# How a mode scores: TensorRT-LLM 1.x, layers/moe.py, `forward` and the methods that it calls.
_SCORINGS = {
    "NONE": "softmax",
    "RENORMALIZE": "topk_softmax",
    "DEVICE_LIMITED": "softmax",
    "DEVICE_LIMITED_RENORM": "softmax_renorm",
}


class Settings(NamedTuple):
    """What a build needs to know; travels to the worker processes."""

    config: XShareConfig
    library: Path


class XShareBuild:
    """TensorRT-LLM's `build_and_save` with XShare, same arguments.

    Pickled by reference to this class: a worker that is spawned gets it with the module that it is in,
    installs the hook there and calls the `build_and_save` of its own, untouched copy of TensorRT-LLM.
    """

    def __init__(self, settings: Settings, own: Callable[..., bool] | None = None) -> None:
        self.settings, self.own = settings, own

    def __reduce__(self) -> tuple[type[XShareBuild], tuple[Settings]]:
        return XShareBuild, (self.settings,)

    def __call__(
        self,
        rank: int,
        gpu_id: int,
        ckpt_dir: str | None,
        build_config: Any,
        output_dir: str,
        log_level: str,
        model_config: Any,
        model_cls: Any,
        **kwargs: Any,
    ) -> bool:
        """Raises ValueError for a model or an option that XShare cannot serve, by name, before the engine is
        built."""
        theirs = import_module(BUILD_MODULE)
        own = self.own or theirs.build_and_save
        routing = EngineRouting(self.settings, build_config, model_config, rank)
        with routing.installed(theirs):
            done: bool = own(
                rank, gpu_id, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs
            )
        if rank == 0:  # whose engine brings config.json
            record(Path(output_dir) / "config.json", self.settings)
        return done


class EngineRouting:
    """The routing of one engine: a plugin layer per MoE layer, and the rows that all of them share."""

    def __init__(self, settings: Settings, build_config: Any, model_config: Any, rank: int) -> None:
        self.config = settings.config
        check_build(self.config, build_config)
        self.first_layer, self.expected_layers = _local_layers(self.config, model_config, rank)
        self.layers = 0
        self._library = settings.library
        self._creator: Any = None
        self._network: Any = None
        self._ops: Any = None
        self._rows = Rows(None, None)

    @contextmanager
    def installed(self, theirs: Any) -> Iterator[None]:
        """XShare in this process' TensorRT-LLM, until the end of the `with`. `theirs`: its build module."""
        moe_class = import_module("tensorrt_llm.layers.moe").MixtureOfExperts
        own_forward, own_build_model = moe_class.forward, theirs.build_model

        def forward(moe: Any, *args: Any, **kwargs: Any) -> Any:
            with self._routed(moe):
                return own_forward(moe, *args, **kwargs)

        def build_model(*args: Any, **kwargs: Any) -> Any:
            engine = own_build_model(*args, **kwargs)
            self._check_layers()
            return engine

        self._creator = load_plugin(import_module("tensorrt"), self._library)
        with ExitStack() as stack:
            stack.enter_context(replaced(moe_class, "forward", forward))
            stack.enter_context(replaced(theirs, "build_model", build_model))
            yield

    @contextmanager
    def _routed(self, moe: Any) -> Iterator[None]:
        spec = router_spec(moe)
        config = self.config.for_layer(self.first_layer + self.layers)
        config.check(spec)
        self.layers += 1
        own = moe.moe_config
        modes = type(own).ExpertScaleNormalizationMode
        moe.moe_config = replace(own, normalization_mode=modes.RENORMALIZE)
        moe.renormalize = partial(self._route, moe, spec, config)
        try:
            yield
        finally:
            del moe.renormalize  # the instance's, which hid the class'
            moe.moe_config = own

    def _check_layers(self) -> None:
        if self.layers == 0:
            raise ValueError("--plugin xshare: this model has no MixtureOfExperts layer")
        if self.expected_layers not in (None, self.layers):
            raise ValueError(
                f"XShareConfig(budget=): one budget per MoE layer means {self.expected_layers} here, "
                f"the model has {self.layers}"
            )

    def _route(self, moe: Any, spec: RouterSpec, config: XShareConfig, logits: Any) -> tuple[Any, Any]:
        """In place of `renormalize`: expert ids int32 and weights fp32, [T, k] ([B, L, k] with padding)."""
        trt: Any = import_module("tensorrt")
        functional: Any = import_module("tensorrt_llm.functional")
        network = import_module("tensorrt_llm._common").default_net()
        if network is not self._network:
            self._begin(trt, network, logits)
        ops, is_packed = self._ops, network.plugin_config.remove_input_padding
        flat = logits.trt_tensor if is_packed else ops.reshape(logits.trt_tensor, (-1, spec.num_experts))
        tensors = {"request_ids": self._rows.request_ids, "exempt": self._rows.exempt}
        if config.gpu_budget is not None or (config.coverage is not None and moe.mapping.moe_ep_size > 1):
            tensors["expert_gpu"] = ops.constant(expert_gpu(moe))
        layer = add_plugin_layer(trt, network.trt_network, self._creator, spec, config, flat, tensors)
        made = [functional._create_tensor(layer.get_output(i), layer) for i in range(2)]
        if not is_packed:
            sizes = [functional.shape(logits, 0), functional.shape(logits, 1), spec.top_k]
            made = [functional.view(tensor, functional.concat(sizes)) for tensor in made]
        return made[0], made[1]

    def _begin(self, trt: Any, network: Any, logits: Any) -> None:
        """The rows of a network, from its own inputs; its first MoE layer's logits say how many there are."""
        inputs = {tensor.name: tensor.trt_tensor for tensor in network.get_inputs()}
        lengths = inputs.get("context_lengths")
        if lengths is None:
            raise ValueError(
                "--plugin xshare: the network has no input context_lengths, which tells context rows from "
                "generation rows; it comes with --gpt_attention_plugin"
            )
        generation_lengths = inputs.get("spec_decoding_generation_lengths")
        self._network, self._ops = network, _RowLayers(trt, network.trt_network)
        if network.plugin_config.remove_input_padding:
            wanted = self.config.request_budget is not None
            self._rows = packed_rows(
                self._ops, logits.trt_tensor, lengths, generation_lengths, request_ids=wanted
            )
        elif generation_lengths is None:
            self._rows = padded_rows(self._ops, logits.trt_tensor, lengths)
        else:
            raise ValueError("--plugin xshare: speculative decoding needs --remove_input_padding enable")


class _RowLayers(TensorRTOps):
    """The operators of `engine_rows` as layers of a network."""

    def __init__(self, trt: Any, network: Any) -> None:
        super().__init__(trt, network)
        self._arrays: list[npt.NDArray[np.generic]] = []  # TensorRT reads them when the engine is built
        self._number = count()

    def _out(self, layer: Any, output: int = 0) -> Any:
        tensor = super()._out(layer, output)
        layer.name = f"xshare/{next(self._number)}"
        return tensor

    def constant(self, value: npt.NDArray[np.generic]) -> Any:
        self._arrays.append(value)
        return super().constant(value)

    def size(self, a: Any, axis: int) -> Any:
        shape = self._out(self.network.add_shape(a))
        return self.cast(self._out(self.network.add_slice(shape, (axis,), (1,), (1,))), "int32")

    def arange(self, length: Any) -> Any:
        layer = self.network.add_fill((0,), self.trt.FillOperation.LINSPACE, self.trt.DataType.INT32)
        start, step = (self.constant(np.array(value, np.int32)) for value in (0, [1]))
        for place, tensor in enumerate((length, start, step)):
            layer.set_input(place, tensor)
        return self._out(layer)


def check_build(config: XShareConfig, build_config: Any) -> None:
    """Raises ValueError for options of trtllm-build that do not go with XShare, by name."""
    mode = build_config.speculative_decoding_mode.name
    if mode == "EAGLE":
        raise ValueError(
            "--plugin xshare with --speculative_decoding_mode eagle: its draft layers have other rows than "
            "the model's, which no input of the network describes; use medusa, lookahead_decoding or "
            "explicit_draft_tokens"
        )
    if mode == "DRAFT_TOKENS_EXTERNAL" and config.request_budget is not None:
        raise ValueError(
            f"XShareConfig(request_budget={config.request_budget}) with --speculative_decoding_mode "
            "draft_tokens_external: draft tokens come as context rows there, which keep their own experts; "
            "leave request_budget off"
        )


def _local_layers(config: XShareConfig, model_config: Any, rank: int) -> tuple[int, int | None]:
    """Of a budget per MoE layer: the first that this rank's pipeline stage has, and how many. Layers without
    experts come first in a model, as in DeepSeek's."""
    if not isinstance(config.budget, tuple):
        return 0, None
    local = copy.deepcopy(model_config)
    local.set_rank(rank)
    dense = local.num_hidden_layers - len(config.budget)
    if dense < 0:
        raise ValueError(
            f"XShareConfig(budget=): names {len(config.budget)} layers, "
            f"the model has {local.num_hidden_layers}"
        )
    layers = local.mapping.pp_layers(local.num_hidden_layers)
    return max(0, layers[0] - dense), sum(layer >= dense for layer in layers)


def router_spec(moe: Any) -> RouterSpec:
    """The router of a `MixtureOfExperts` layer.

    Raises ValueError for static routing and for a mode without a scoring here (SPARSE_MIXER), by name.
    """
    if moe.static_routing:
        raise ValueError(
            "--plugin xshare: a MixtureOfExperts layer with static_routing has no router to change"
        )
    own = moe.moe_config
    mode = type(own).ExpertScaleNormalizationMode(own.normalization_mode).name
    scoring = _SCORINGS.get(mode)
    if scoring is None:
        raise ValueError(
            f"--plugin xshare: MixtureOfExperts with normalization_mode {mode} is not supported, "
            f"only {', '.join(_SCORINGS)}"
        )
    if not mode.startswith("DEVICE_LIMITED"):
        return RouterSpec(own.num_experts, own.top_k, scoring)
    groups = own.device_limited_n_group, own.device_limited_topk_group
    scale = own.device_limited_routed_scaling_factor if mode == "DEVICE_LIMITED" else 1.0  # else it cancels
    return RouterSpec(own.num_experts, own.top_k, scoring, *groups, float(scale))


def expert_gpu(moe: Any) -> npt.NDArray[np.int32]:
    """[E], the expert-parallel rank that holds each expert: a contiguous slice per rank."""
    num_experts, ep_size = moe.moe_config.num_experts, moe.mapping.moe_ep_size
    if ep_size < 2:
        raise ValueError(
            "XShareConfig(gpu_budget=): the checkpoint has no expert parallelism (moe_ep_size is 1)"
        )
    return np.repeat(np.arange(ep_size, dtype=np.int32), num_experts // ep_size)


def load_plugin(trt: Any, library: Path) -> Any:
    """The plugin's creator in TensorRT's registry, from `library`; raises RuntimeError where it fails."""
    registry = trt.get_plugin_registry()
    name = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    if registry.get_creator(*name) is None:
        registry.load_library(str(library))
    creator = registry.get_creator(*name)
    if creator is None:
        raise RuntimeError(f"{library}: TensorRT did not load the XShare plugin; its log says why")
    if str(library.resolve()) not in Path("/proc/self/maps").read_text():
        raise RuntimeError(
            f"XShareRouting is registered by another library than {library}; is one in LD_PRELOAD? "
            "XSHARE_PLUGIN names the one to use"
        )
    return creator


def add_plugin_layer(
    trt: Any,
    network: Any,
    creator: Any,
    spec: RouterSpec,
    config: XShareConfig,
    logits: Any,
    tensors: dict[str, Any],
) -> Any:
    """A plugin layer for logits [T, E] and those of the optional inputs that are not None, by name."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    inputs = GraphInputs(**dict.fromkeys(given, True))
    inputs.check(spec, config)
    plugin = make_plugin(trt, creator, spec, config, inputs)
    return network.add_plugin_v3([logits, *(given[name] for name in inputs.names())], [], plugin)


def make_plugin(trt: Any, creator: Any, spec: RouterSpec, config: XShareConfig, inputs: GraphInputs) -> Any:
    """A plugin object; raises RuntimeError where the plugin refuses its fields."""
    values = plugin_fields(spec, config, inputs)
    fields = [
        trt.PluginField(name, value, getattr(trt.PluginFieldType, _FIELD_TYPES[value.dtype.char]))
        for name, value in values.items()
    ]
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin("xshare_routing", collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise RuntimeError("the XShare plugin refused its fields; TensorRT's log says which")
    return plugin


_FIELD_TYPES = {"i": "INT32", "f": "FLOAT32", "d": "FLOAT64", "b": "CHAR"}


def plugin_fields(
    spec: RouterSpec, config: XShareConfig, inputs: GraphInputs
) -> dict[str, npt.NDArray[np.generic]]:
    """The fields of the plugin by name, as plugins/tensorrt/README.md lists them."""
    whole = {
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "num_groups": spec.num_groups,
        "top_k_groups": spec.top_k_groups,
        "warmup": config.warmup,
    }
    for name in ("budget", "request_budget", "gpu_budget", "max_rows"):
        if (value := getattr(config, name)) is not None:
            whole[name] = value
    whole |= {f"has_{name}": 1 for name in inputs.names()}
    fields: dict[str, npt.NDArray[np.generic]] = {
        name: np.array([min(value, INT32_MAX)], np.int32) for name, value in whole.items()
    }
    fields["scoring"] = np.frombuffer(spec.scoring.encode(), np.int8)
    fields["utility"] = np.frombuffer(config.utility.encode(), np.int8)
    fields["routed_scaling_factor"] = np.array([spec.routed_scaling_factor], np.float32)
    if config.coverage is not None:
        fields["coverage"] = np.array([config.coverage], np.float64)
    return fields


def record(path: Path, settings: Settings) -> None:
    """Adds the key `xshare` to an engine's config.json, which TensorRT-LLM reads by its own keys."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["xshare"] = {
        "version": __version__,
        "config": settings.config.to_dict(),
        "plugin": f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}",
        "plugin_version": PLUGIN_VERSION,
        "library": settings.library.name,
        "library_sha256": hashlib.sha256(settings.library.read_bytes()).hexdigest(),
    }
    with write_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")


def check_version(version: str) -> None:
    """Raises ValueError for a TensorRT-LLM without the engine path that is served here."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not (1, 0) <= (int(numbers[1]), int(numbers[2])) <= (1, 2):
        raise ValueError(
            f"TensorRT-LLM {version}: --plugin xshare serves the engines of 1.0 to 1.2; "
            "later versions have the PyTorch backend only, see xshare_trtllm.trtllm.enable"
        )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` until the end of the `with`."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
