"""XShare in TensorRT-LLM's PyTorch backend, from 1.0 on.

`enable(model, config)` changes a loaded model in three places, and `disable()` takes all of it back:

- **The routing method.** Each MoE layer's `routing_method` becomes an `XShareMoeRoutingMethod`, which is the
  wrapped method in everything but `apply`. Where a backend routes inside its kernel instead of calling
  `apply`, the method stays and the layer's logits are masked before the kernel sees them.
- **The MoE layer's forward**, wrapped to say where in the step the rows of each `apply` begin: a backend may
  split a large step into chunks.
- **`AttentionMetadata.prepare`**, to note what the rows of a step are (torch_rows.py).

Which versions and backends, and how each was verified: docs/pytorch_backend.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from xshare_trtllm import ops
from xshare_trtllm.config import XShareConfig
from xshare_trtllm.trtllm.dial import Dial
from xshare_trtllm.trtllm.torch_routing import LayerRouting, XShareMoeRoutingMethod
from xshare_trtllm.trtllm.torch_rows import MetadataWatch
from xshare_trtllm.trtllm.torch_support import Plan, layer_plan

# ---- MoE layers --------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """One MoE layer of a model. modules: the layer, then the back end inside it, if it has one; block: the
    module of the model that holds it."""

    modules: list[nn.Module]
    block: nn.Module | None


def _moe_layers(model: nn.Module) -> list[_Found]:
    """The MoE layers in order, without those that draft.

    A block of the model may hold a routing method too (gpt-oss): a MoE module knows its expert parallelism.
    """
    by_name, drafting = dict(model.named_modules()), _drafting(model)
    found: dict[str, _Found] = {}
    outermost = "."
    for name, module in by_name.items():
        if "routing_method" not in module._modules or not hasattr(module, "ep_size"):
            continue
        if name.startswith(outermost):
            found[outermost].modules.append(module)
            continue
        outermost = name + "."
        found[outermost] = _Found([module], by_name.get(name.rpartition(".")[0]))
    end = _num_hidden_layers(model)
    layers = [
        layer
        for layer in found.values()
        if id(layer.modules[0]) not in drafting and not _is_behind(layer.modules[0], end)
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer with a routing_method")
    return layers


def _num_hidden_layers(model: nn.Module) -> int | None:
    """Of the model, or of the language model inside it."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None), getattr(config, "llm_config", None)):
        number = getattr(part, "num_hidden_layers", None)
        if isinstance(number, int):
            return number
    return None


def _drafting(model: nn.Module) -> set[int]:
    """The ids of all modules of a draft model inside the model (`SpecDecOneEngineForCausalLM.draft_model`),
    which the model may have under other names too: MTP heads among its layers, a draft model in its
    epilogue or its spec worker (modeling_speculative.py at 00679c66c3)."""
    names = model.named_modules(remove_duplicate=False)
    return {id(module) for name, module in names if "draft_model" in name.split(".")}


def _is_behind(moe: nn.Module, num_hidden_layers: int | None) -> bool:
    """Behind the model's last layer: multi-token prediction."""
    index = getattr(moe, "layer_idx", None)
    return num_hidden_layers is not None and index is not None and index >= num_hidden_layers


def _expert_gpu(moe: Any, config: XShareConfig, has_dial: bool) -> Tensor | None:
    """[E] int32: the expert-parallel rank of each expert, where `gpu_budget` or a coverage asks for it."""
    experts, ranks = moe.num_experts, moe.ep_size
    moves = getattr(moe, "layer_load_balancer", None) is not None
    is_known = not moves and getattr(moe, "num_slots", experts) == experts and experts % ranks == 0
    may_cover = config.coverage is not None or has_dial
    if config.gpu_budget is None and not (may_cover and ranks > 1 and is_known):
        return None
    if moves or getattr(moe, "num_slots", experts) != experts:
        raise ValueError(
            f"XShareConfig(gpu_budget={config.gpu_budget}): the expert load balancer moves experts between "
            "GPUs, leave gpu_budget out or the load balancer off"
        )
    if experts % ranks:
        raise ValueError(
            f"XShareConfig(gpu_budget={config.gpu_budget}): {experts} experts on {ranks} ranks is uneven"
        )
    gpus = torch.arange(experts, dtype=torch.int32, device=_device(moe))
    return gpus.div(experts // ranks, rounding_mode="floor")


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


class _EnabledLayer:
    """One MoE layer with XShare in it."""

    def __init__(
        self, modules: list[nn.Module], plan: Plan, config: XShareConfig, group: Any, has_dial: bool
    ) -> None:
        moe: Any = modules[0]
        self.plan = plan
        self._modules, self._masks = modules, plan.masks
        self._method: Any = XShareMoeRoutingMethod(
            moe.routing_method,
            moe.num_experts,
            config,
            expert_gpu=_expert_gpu(moe, config, has_dial),
            group=group,
        )

    @property
    def routing(self) -> LayerRouting:
        made: LayerRouting = self._method.layer
        return made

    def install(self) -> None:
        moe, name = self._modules[0], _forward_name(self._modules[0])
        self._own_forward = vars(moe).get(name)  # none but the class's, as a rule
        setattr(moe, name, self._forward(getattr(moe, name)))
        if self._masks:
            return
        for module in self._modules:
            module.routing_method = self._method
            for shortcut in _SHORTCUTS:
                if hasattr(module, shortcut):
                    setattr(module, shortcut, lambda *_, **__: None)  # None = not taken

    def _forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        layer, masks = self.routing, self._masks

        @wraps(own)
        def forward(x: Any, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            with layer.forward(len(router_logits)):
                logits = layer.mask(router_logits) if masks else router_logits
                return own(x, logits, *args, **kwargs)

        vars(forward)["xshare"] = True
        return forward

    def remove(self) -> None:
        moe, name = self._modules[0], _forward_name(self._modules[0])
        del vars(moe)[name]
        if self._own_forward is not None:
            vars(moe)[name] = self._own_forward
        if self._masks:
            return
        for module in self._modules:
            module.routing_method = self._method.wrapped
            for shortcut in _SHORTCUTS:
                vars(module).pop(shortcut, None)


# A kernel that routes past `apply`: for one model after 1.2, of every back end since August 2026.
_SHORTCUTS = ("try_fused_kimi_route_quant", "try_fused_route_quant")


def _forward_name(moe: nn.Module) -> str:
    """`forward` calls it, or an operator that torch.compile does not look into."""
    return "forward_impl" if hasattr(moe, "forward_impl") else "forward"


def _has_xshare(moe: nn.Module) -> bool:
    return hasattr(vars(moe).get(_forward_name(moe)), "xshare")


_watch = MetadataWatch()
_T = TypeVar("_T")

# ---- Models ------------------------------------------------------------------------------------------------


def enable(llm_or_model: Any, config: XShareConfig) -> Enabled:
    """Puts XShare into every MoE layer of a loaded model, until `disable()` or the end of a `with`.

    llm_or_model  a model of the PyTorch backend (torch.nn.Module), or an idle LLM whose model is in this
                  process. An LLM whose workers are other processes needs `use`, before it starts
    config        budgets per layer count the MoE layers of the model, without layers for draft tokens

    Prefill rows keep their own routing, rows that pad a CUDA graph's batch activate nothing. With attention
    data parallelism all ranks must call this, and choose one set for the rows of all.

    Raises ValueError, naming the layer, where a routing method, a backend or the configuration does not fit
    (nothing is changed then), and where XShare is enabled already; RuntimeError where a model on a GPU finds
    no kernels, neither what compiles them nor a library.
    """
    return Enabled(llm_or_model, config)


class Enabled:
    """XShare in one model.

    has_dial  its coverage and budgets can be turned while graphs that were captured with it are replayed
    """

    def __init__(self, llm_or_model: Any, config: XShareConfig, *, has_dial: bool = False) -> None:
        engine, model = _find_model(llm_or_model)
        found = _moe_layers(model)
        if any(_has_xshare(layer.modules[0]) for layer in found):
            raise ValueError("enable: the model has XShare already; disable() it first")
        first: Any = found[0].modules[0]
        mapping = getattr(first, "mapping", None)
        _check_budgets(config, len(found), mapping)
        self._device = _device(first)
        missing = ops.why_no_cuda() if self._device.type == "cuda" else None
        if missing:
            raise RuntimeError(f"XShare: {missing}")
        self._plans = [_named(i, layer_plan, layer.modules[0], layer.block) for i, layer in enumerate(found)]
        _check_compiled(first)
        group = _attention_dp_group(mapping)  # a collective: after what can be refused before it
        self._layers: list[_EnabledLayer] = [
            _named(i, _EnabledLayer, layer.modules, plan, config.for_layer(i), group, has_dial)
            for i, (layer, plan) in enumerate(zip(found, self._plans, strict=True))
        ]
        self.dial = Dial([layer.routing for layer in self._layers], self._device) if has_dial else None
        self.counters = self._count()
        _watch.start()  # before anything is patched: this version may not have what it needs
        for enabled in self._layers:
            enabled.install()
        self._is_enabled = True
        release = getattr(engine, "_release_cuda_graphs", None)
        if release is not None:  # what was captured before knows nothing of XShare
            release()

    def _count(self) -> Tensor:
        """[layers that are not off, 8] int64 on the model's device: what the layers count in."""
        self.counted = [index for index, layer in enumerate(self._layers) if not layer.routing.is_off]
        counting = [self._layers[index].routing for index in self.counted]
        with torch.inference_mode(False):  # or they could only be written to in inference mode
            counters = torch.zeros(len(counting), ops.NUM_STATS, dtype=torch.int64, device=self._device)
        for routing, row in zip(counting, counters, strict=True):
            routing.counters = row
        return counters

    def backends(self) -> dict[str, int]:
        """How many of the layers each back end computes, and those that are handed masked logits."""
        names = [f"{p.backend}{' (masked logits)' if p.masks else ''}" for p in self._plans]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def disable(self) -> None:
        """Gives the model its own routing back; harmless when repeated. CUDA graphs captured in between keep
        XShare until they are captured again."""
        if self._is_enabled:
            self._is_enabled = False
            _watch.stop()
            for layer in self._layers:
                layer.remove()

    def __len__(self) -> int:
        """MoE layers."""
        return len(self._layers)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def _named(index: int, function: Callable[..., _T], *arguments: Any) -> _T:
    """What `function` returns; its refusals name the layer."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"MoE layer {index}: {error}") from error


def _find_model(llm_or_model: Any) -> tuple[Any, nn.Module]:
    """The model engine, if one is known, and the model."""
    if isinstance(llm_or_model, nn.Module):
        return None, llm_or_model
    worker = getattr(llm_or_model, "_executor", None)
    engine: Any = getattr(getattr(worker, "engine", None), "model_engine", None)
    if isinstance(getattr(engine, "model", None), nn.Module):
        return engine, engine.model
    raise ValueError(
        f"enable({type(llm_or_model).__name__}): its model is not in this process; call use(config_path) "
        "before the LLM is made"
    )


def _check_compiled(moe: nn.Module) -> None:
    """Refuses torch.compile where a MoE layer is not one operator (interface.py at 567239fcd4) that it does
    not look into: it would take the rows of the step that it traces for those of every step."""
    is_compiling = getattr(import_module("tensorrt_llm._torch.utils"), "is_torch_compiling", bool)
    if is_compiling() and not getattr(moe, "register_to_config", False):
        raise ValueError(
            "torch.compile looks into the MoE layers of this version of TensorRT-LLM: not supported, leave "
            "torch_compile_config out"
        )


def _check_budgets(config: XShareConfig, num_layers: int, mapping: Any) -> None:
    if not isinstance(config.budget, tuple):
        return
    if getattr(mapping, "pp_size", 1) > 1:
        raise ValueError(
            "XShareConfig(budget=one per layer): not with pipeline parallelism, a rank sees its layers only"
        )
    if len(config.budget) != num_layers:
        raise ValueError(
            f"XShareConfig(budget=): names {len(config.budget)} layers, the model has {num_layers} MoE layers"
        )


def _attention_dp_group(mapping: Any) -> Any:
    """The ranks that the rows of a step are spread over, or None where every rank has all rows."""
    if mapping is None or not mapping.enable_attention_dp or mapping.tp_size == 1:
        return None
    import torch.distributed as dist

    if not dist.is_initialized():
        _init_process_group(mapping)
    return dist.new_group(list(mapping.tp_group), use_local_synchronization=True)


def _init_process_group(mapping: Any) -> None:
    """TensorRT-LLM's ranks talk through MPI; torch.distributed is led there by it."""
    import socket

    import torch.distributed as dist

    address = None
    if mapping.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = f"tcp://{socket.gethostname()}:{probe.getsockname()[1]}"
    address = import_module("tensorrt_llm._utils").mpi_comm().bcast(address, root=0)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=address, rank=mapping.rank, world_size=mapping.world_size)
