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

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from xshare_trtllm import ops
from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.report import write_aside
from xshare_trtllm.routing import mask_logits, route
from xshare_trtllm.trtllm.torch_rows import MetadataWatch, rows_of_this_step

# ---- Routing methods ---------------------------------------------------------------------------------------

# By class and not by routing_method_type: a model's own subclass may share the type and compute otherwise.
_SCORING = {
    "DefaultMoeRoutingMethod": "softmax",
    "RenormalizeMoeRoutingMethod": "topk_softmax",
    "RenormalizeNaiveMoeRoutingMethod": "topk_softmax",  # its apply() is a softmax over the chosen logits too
    "DeepSeekV3MoeRoutingMethod": "sigmoid_bias",
    "DeepseekV3Gate": "sigmoid_bias",  # a gate that is its own routing method, in 1.0
    "MiniMaxM2MoeRoutingMethod": "sigmoid_bias",
}
_REFUSED = {
    "Llama4RenormalizeMoeRoutingMethod": "it weighs by sigmoids of the logits",
    "SparseMixerMoeRoutingMethod": "it chooses one expert after the other, each with a softmax of its own",
}
_RENORMALIZING = ("RenormalizeMoeRoutingMethod", "RenormalizeNaiveMoeRoutingMethod")


def router_spec(routing_method: Any, num_experts: int) -> RouterSpec:
    """What a routing method of TensorRT-LLM computes over `num_experts` experts.

    Raises ValueError, by the name of its class, for a method that no scoring function here expresses.
    """
    name = type(routing_method).__name__
    scoring = _SCORING.get(name)
    if scoring is None:
        why = _REFUSED.get(name, "it is not known")
        raise ValueError(f"{name}: not supported, {why}; supported are {', '.join(sorted(_SCORING))}")
    if not name.startswith(("DeepSeek", "Deepseek")):
        return RouterSpec(num_experts, int(routing_method.experts_per_token), scoring)
    groups = getattr(routing_method, "routing_impl", None)
    if groups is None:
        raise ValueError(f"{name}: not supported before TensorRT-LLM 1.0, it does not say its groups")
    return RouterSpec(
        num_experts, groups.top_k, scoring, groups.n_group, groups.topk_group, groups.routed_scaling_factor
    )


class _Layer:
    """One MoE layer's routing under XShare."""

    def __init__(
        self,
        routing_method: Any,
        num_experts: int,
        config: XShareConfig,
        expert_gpu: Tensor | None,
        group: Any,
    ) -> None:
        self.method = routing_method
        self.spec = router_spec(routing_method, num_experts)
        config.check(self.spec)
        self.config, self.expert_gpu, self.group = config, expert_gpu, group
        self.is_off = config.is_off(self.spec)
        self._step_rows: int | None = None  # of the forward pass under way
        self._first_row = 0

    @contextmanager
    def forward(self, num_rows: int) -> Iterator[None]:
        """The layer's forward pass over `num_rows` rows: what is routed in it follows on one another."""
        self._step_rows = num_rows
        try:
            yield
        finally:
            self._step_rows, self._first_row = None, 0

    def route(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int32 [T, k] and weights fp32 [T, k] of the next T rows."""
        arguments = self._arguments(router_logits)
        if self.group is None:
            routing = route(router_logits, self.spec, self.config, **arguments)
        else:
            from xshare_trtllm import distributed

            routing = distributed.route(
                router_logits, self.spec, self.config, group=self.group, whole_batch_stats=False, **arguments
            )
        return routing.expert_ids, routing.expert_weights

    def mask(self, router_logits: Tensor) -> Tensor:
        """The logits of the whole step, `-inf` where a row may not go."""
        if self.is_off:
            return router_logits
        return mask_logits(router_logits, self.spec, self.config, **self._arguments(router_logits))

    def _arguments(self, router_logits: Tensor) -> dict[str, Any]:
        first, count = self._first_row, len(router_logits)
        if self._step_rows is not None:
            self._first_row += count
        bias = self.method.e_score_correction_bias if self.spec.scoring == "sigmoid_bias" else None
        arguments = {"correction_bias": bias, "expert_gpu": self.expert_gpu}
        rows = rows_of_this_step()
        if rows is None:
            return arguments
        if self._step_rows is not None and self._step_rows < rows.num_rows:  # the model left rows out: which?
            exempt = torch.ones(count, dtype=torch.bool, device=router_logits.device)
            return arguments | {"exempt": exempt, "request_ids": torch.zeros_like(exempt, dtype=torch.int32)}
        return arguments | rows.slice(first, count)


class XShareMoeRoutingMethod:
    """A routing method of TensorRT-LLM that routes by XShare.

    An instance is also one of the wrapped method's class and shares its state, so that `experts_per_token`,
    `routing_method_type`, `top_k`, parameters and every isinstance check are the wrapped method's.

    wrapped      a BaseMoeRoutingMethod
    num_experts  routed experts of the layer
    config       of this layer (`XShareConfig.for_layer`)
    expert_gpu   [E] int32 on the model's device, for `gpu_budget`
    group        torch.distributed ranks that the rows of a step are spread over (attention data parallelism)

    Raises ValueError where the method or the configuration does not fit.
    """

    wrapped: Any
    layer: _Layer

    def __new__(cls, wrapped: Any, *_: Any, **__: Any) -> XShareMoeRoutingMethod:
        kind = type(cls.__name__, (cls, type(wrapped)), {})
        made: XShareMoeRoutingMethod = object.__new__(kind)
        return made

    def __init__(
        self,
        wrapped: Any,
        num_experts: int,
        config: XShareConfig,
        *,
        expert_gpu: Tensor | None = None,
        group: Any = None,
    ) -> None:
        layer = _Layer(wrapped, num_experts, config, expert_gpu, group)
        # Not through nn.Module: `wrapped` is no child, or its parameters would be found twice.
        vars(self).update(vars(wrapped), wrapped=wrapped, layer=layer)

    def apply(self, router_logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """token_selected_experts int32 [T, k] and token_final_scales [T, k] (fp32, or what the wrapped method
        gives) of router_logits [T, E]."""
        if self.layer.is_off:
            own: tuple[Tensor, Tensor] = self.wrapped.apply(router_logits, *args, **kwargs)
            return own
        ids, weights = self.layer.route(router_logits)
        return ids, weights.to(getattr(self.wrapped, "output_dtype", torch.float32))

    @property
    def requires_separated_routing(self) -> bool:
        """Asks TRTLLM-gen (where the version looks for it) to call `apply` instead of routing by itself."""
        return True


# ---- MoE layers --------------------------------------------------------------------------------------------

_CALLS_APPLY = ("CuteDslFusedMoE", "CutlassFusedMoE", "DeepGemmFusedMoE", "VanillaMoE", "WideEPMoE")
_BACKENDS = (*_CALLS_APPLY, "TRTLLMGenFusedMoE", "TritonFusedMoE")


def _masks_logits(moe: Any) -> bool:
    """Whether the layer's backend has to be handed masked logits, because it routes inside its kernel.

    Raises ValueError for a backend that is not known, and where masked logits would not give this routing.
    """
    backend, method = type(getattr(moe, "backend", moe)).__name__, type(moe.routing_method).__name__
    spread = moe.use_dp and moe.parallel_size > 1
    if backend in _CALLS_APPLY:
        return False
    if backend == "TRTLLMGenFusedMoE":
        if spread or hasattr(moe.routing_method, "requires_separated_routing"):
            return False
    elif backend != "TritonFusedMoE":
        raise ValueError(f"MoE backend {backend}: not supported; supported are {', '.join(_BACKENDS)}")
    elif spread:
        raise ValueError("TritonFusedMoE with attention data parallelism: not supported, use CUTLASS")
    if method not in _RENORMALIZING:
        raise ValueError(
            f"{backend} routes inside its kernel, where masked logits would not do for {method}: set "
            "moe_config.backend to CUTLASS or DEEPGEMM"
        )
    return True


def _moe_layers(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each MoE layer in order: the layer first, then the backend inside it, if it has one.

    Layers for draft tokens behind the model's last (multi-token prediction) keep their own routing.
    """
    end = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    layers: list[list[nn.Module]] = []
    outermost = ""
    for name, module in model.named_modules():
        if "routing_method" not in module._modules or not hasattr(module, "num_experts"):
            continue
        if layers and name.startswith(outermost):
            layers[-1].append(module)
        else:
            layers.append([module])
            outermost = name + "."
    decoder = [modules for modules in layers if end is None or (_index(modules[0]) or 0) < end]
    if not decoder:
        raise ValueError(f"{type(model).__name__} has no MoE layer with a routing_method")
    return decoder


def _index(moe: nn.Module) -> int | None:
    index: int | None = getattr(moe, "layer_idx", None)
    return index


def _expert_gpu(moe: Any, config: XShareConfig) -> Tensor | None:
    """[E] int32: the expert-parallel rank of each expert, where a budget per GPU asks for it."""
    if config.gpu_budget is None:
        return None
    experts, ranks = moe.num_experts, moe.ep_size
    moves = getattr(moe, "layer_load_balancer", None) is not None
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

    def __init__(self, modules: list[nn.Module], config: XShareConfig, group: Any) -> None:
        moe: Any = modules[0]
        self._modules, self._masks = modules, _masks_logits(moe)
        self._method: Any = XShareMoeRoutingMethod(
            moe.routing_method, moe.num_experts, config, expert_gpu=_expert_gpu(moe, config), group=group
        )

    def install(self) -> None:
        moe, name = self._modules[0], _forward_name(self._modules[0])
        self._own_forward = vars(moe).get(name)  # none but the class's, as a rule
        setattr(moe, name, self._forward(getattr(moe, name)))
        if self._masks:
            return
        for module in self._modules:
            module.routing_method = self._method
            if hasattr(module, _SHORTCUT):
                setattr(module, _SHORTCUT, lambda *_, **__: None)  # None = not taken

    def _forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        layer: _Layer = self._method.layer
        masks = self._masks

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
            vars(module).pop(_SHORTCUT, None)


# A kernel that routes past `apply`, for one model (fused_moe_trtllm_gen.py, after 1.2).
_SHORTCUT = "try_fused_kimi_route_quant"


def _forward_name(moe: nn.Module) -> str:
    """`forward` calls it, or an operator that torch.compile does not look into."""
    return "forward_impl" if hasattr(moe, "forward_impl") else "forward"


def _has_xshare(moe: nn.Module) -> bool:
    return hasattr(vars(moe).get(_forward_name(moe)), "xshare")


_watch = MetadataWatch()

# ---- Models ------------------------------------------------------------------------------------------------


def enable(llm_or_model: Any, config: XShareConfig) -> Enabled:
    """Puts XShare into every MoE layer of a loaded model, until `disable()` or the end of a `with`.

    llm_or_model  a model of the PyTorch backend (torch.nn.Module), or an idle LLM whose model is in this
                  process. An LLM whose workers are other processes needs `write_options`, before it starts
    config        budgets per layer count the MoE layers of the model, without layers for draft tokens

    Prefill rows keep their own routing, rows that pad a CUDA graph's batch activate nothing. With attention
    data parallelism all ranks must call this, and choose one set for the rows of all.

    Raises ValueError, naming the layer, where a routing method, a backend or the configuration does not fit
    (nothing is changed then), and where XShare is enabled already; RuntimeError where a model on a GPU finds
    no libxshare_cuda.so.
    """
    return Enabled(llm_or_model, config)


class Enabled:
    """XShare in one model."""

    def __init__(self, llm_or_model: Any, config: XShareConfig) -> None:
        engine, model = _find_model(llm_or_model)
        found = _moe_layers(model)
        if any(_has_xshare(moe) for moe, *_ in found):
            raise ValueError("enable: the model has XShare already; disable() it first")
        first: Any = found[0][0]
        mapping = getattr(first, "mapping", None)
        _check_budgets(config, len(found), mapping)
        if _device(first).type == "cuda" and not ops.cuda_available():
            raise RuntimeError(f"XShare: libxshare_cuda.so {ops.HOW_TO_BUILD_CUDA}")
        group = _attention_dp_group(mapping)
        self._layers = []
        for index, modules in enumerate(found):
            try:
                self._layers.append(_EnabledLayer(modules, config.for_layer(index), group))
            except ValueError as error:
                raise ValueError(f"MoE layer {index}: {error}") from error
        for layer in self._layers:
            layer.install()
        _watch.start()
        self._is_enabled = True
        release = getattr(engine, "_release_cuda_graphs", None)
        if release is not None:  # what was captured before knows nothing of XShare
            release()

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


def _find_model(llm_or_model: Any) -> tuple[Any, nn.Module]:
    """The model engine, if one is known, and the model."""
    if isinstance(llm_or_model, nn.Module):
        return None, llm_or_model
    worker = getattr(llm_or_model, "_executor", None)
    engine: Any = getattr(getattr(worker, "engine", None), "model_engine", None)
    if isinstance(getattr(engine, "model", None), nn.Module):
        return engine, engine.model
    raise ValueError(
        f"enable({type(llm_or_model).__name__}): its model is not in this process; use write_options(path, "
        "config) and import that folder before the LLM starts"
    )


def _check_budgets(config: XShareConfig, num_layers: int, mapping: Any) -> None:
    if isinstance(config.budget, int):
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


# ---- Worker processes --------------------------------------------------------------------------------------


def enable_when_loaded(config: XShareConfig) -> None:
    """From now on, puts XShare into every model that TensorRT-LLM loads in this process, before it is warmed
    up and its CUDA graphs are captured. Draft models keep their own routing.

    Raises ValueError where another configuration is waiting already.
    """
    engine = import_module("tensorrt_llm._torch.pyexecutor.model_engine").PyTorchModelEngine
    logger = import_module("tensorrt_llm.logger").logger
    own = engine.__init__
    waiting = getattr(own, "xshare_config", None)
    if waiting is not None:
        if waiting != config:
            raise ValueError(f"enable_when_loaded: {waiting} is waiting already, {config} cannot too")
        return

    @wraps(own)
    def load_and_enable(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if not getattr(self, "is_draft_model", False):
            self.xshare = enable(self.model, config)
            logger.info(f"XShare: {len(self.xshare)} MoE layers, {config.to_dict()}")

    load_and_enable.xshare_config = config  # type: ignore[attr-defined]
    engine.__init__ = load_and_enable


_INIT = '''"""XShare for TensorRT-LLM's PyTorch backend, as xshare.yaml beside this file says.

    trtllm-serve MODEL --custom_module_dirs FOLDER/{name}
    trtllm-bench --model MODEL throughput --custom_module_dirs FOLDER/{name}
    PYTHONPATH=FOLDER python -m {name} trtllm-serve MODEL       where there is no --custom_module_dirs

In Python: import this package before tensorrt_llm.LLM is made.
"""

from pathlib import Path

from tensorrt_llm._torch.models.modeling_utils import register_auto_model

from xshare_trtllm.config import XShareConfig
from xshare_trtllm.trtllm import enable_when_loaded

enable_when_loaded(XShareConfig.from_yaml(Path(__file__).with_name("xshare.yaml")))


@register_auto_model("XShareHook")
class XShareHook:
    """No model: TensorRT-LLM imports the module of every registered class in all of its worker processes."""
'''

_MAIN = '''"""`python -m {name} COMMAND [ARGUMENT]...`: a command of TensorRT-LLM, with XShare."""

from xshare_trtllm.trtllm import run_console_script

if __name__ == "__main__":
    run_console_script()
'''


def write_options(path: str | Path, config: XShareConfig) -> list[str]:
    """Writes a folder that takes `config` into every process of trtllm-serve, trtllm-bench or LLM(...).

    The folder is a Python package (`xshare.yaml` with the configuration, and a few lines that read it), for
    TensorRT-LLM's own way of importing code: `--custom_module_dirs FOLDER`. It registers a class, and the
    modules of registered classes are imported in every worker. Where the workers are started by mpirun or
    trtllm-llmapi-launch, the folder's parent has to be on PYTHONPATH.

    Returns the arguments for the command line: ["--custom_module_dirs", FOLDER].

    Raises ValueError for a folder whose name cannot be imported.
    """
    folder = Path(path).resolve()
    if not folder.name.isidentifier():
        raise ValueError(f"write_options({str(path)!r}): the folder's name must be a Python identifier")
    files = {
        "xshare.yaml": config.to_yaml(),
        "__main__.py": _MAIN.format(name=folder.name),
        "__init__.py": _INIT.format(name=folder.name),
    }
    for file, text in files.items():
        with write_aside(folder / file) as aside:
            aside.write_text(text, encoding="utf-8")
    return ["--custom_module_dirs", str(folder)]


def run_console_script() -> None:
    """Runs the console script that the first command-line argument names, with the rest of the arguments."""
    from importlib.metadata import entry_points

    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m FOLDER COMMAND [ARGUMENT]..., for example trtllm-serve MODEL")
    sys.argv = sys.argv[1:]
    found = list(entry_points(group="console_scripts", name=sys.argv[0]))
    if not found:
        raise SystemExit(f"{sys.argv[0]}: no such command in this Python environment")
    sys.exit(found[0].load()())
