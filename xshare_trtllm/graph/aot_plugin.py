"""The routing of a decode step as a TensorRT ahead-of-time plugin: the compiled kernel lies in the engine.

Running such an engine needs no plugin library and no Python. TensorRT launches one kernel, so a layer takes
at most 256 rows (`MAX_ROWS`); for more, take the plugin library (plugins/tensorrt/). The kernel is
plugins/cuda/aot.cu, built by nvcc once per configuration of a layer, with the settings as constants.

The interface is `tensorrt.plugin` (`register`, `autotune`, `aot_impl`) of TensorRT 10.9 on; what it was
read from and what has been verified is in docs/aot_plugin.md.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Any

from xshare_trtllm import __version__
from xshare_trtllm.config import NO_LIMIT, SCORINGS, UTILITIES, RouterSpec, XShareConfig
from xshare_trtllm.graph.inputs import GraphInputs
from xshare_trtllm.graph.routing import INPUT_NAMES, Outputs
from xshare_trtllm.kernels.compile import source_folder
from xshare_trtllm.kernels.setting import experts_per_lane, step_threads

NAMESPACE = "xshare"
MAX_ROWS = 256  # kStepRows of plugins/cuda/args.h: what one launch can take
COMPUTE_CAPABILITIES = {"SM80": 80, "SM90": 90}  # and what is newer; SM90 with clusters

_MAX_CLUSTER = 8  # kPortableTeamSize of plugins/cuda/args.h
_TEAM_ROWS = 8  # kTeamRows of plugins/cuda/args.h
_LOGITS_TYPES = ("FLOAT", "BF16", "HALF")  # names in tensorrt.DataType, in the order of xshare_dtype
_INPUT_TYPES = {"correction_bias": "FLOAT", "request_ids": "INT32", "exempt": "BOOL", "expert_gpu": "INT32"}
_OUTPUT_TYPES = ("INT32", "FLOAT", "BOOL")
_TUNER_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}  # where AutoTuneCombination has a name of its own


def add_aot_routing(
    trt: Any,
    network: Any,
    spec: RouterSpec,
    config: XShareConfig,
    tensors: Mapping[str, Any],
    *,
    max_rows: int,
    compute_capability: str,
) -> Outputs:
    """Adds one layer's routing to a network, as a plugin whose kernel TensorRT puts into the engine.

    trt                 the module `tensorrt`
    tensors             router_logits [T, E] (any float) and the optional inputs by name, as in `GraphInputs`
    max_rows            the most rows that the engine's profiles allow, 1 to 256; the build fails with more
    compute_capability  of the GPU that runs the engine: `SM80`, or `SM90` for that and newer

    Returns expert_ids [T, k] int32, expert_weights [T, k] float32 and active_experts [E] bool. Raises
    ValueError for what does not fit together, RuntimeError where TensorRT, nvcc or the sources are missing.
    """
    kernel = StepKernel.of_tensors(spec, config, tensors, max_rows, compute_capability)
    plugin = _plugin_module(trt)
    operation = _operation(trt, plugin, kernel, kernel.compile())
    layer = network.add_plugin(operation(*(tensors[name] for name in kernel.input_names)), aot=True)
    if layer is None:
        raise RuntimeError("TensorRT refused the routing's ahead-of-time plugin; its log says why")
    return Outputs(*(layer.get_output(place) for place in range(len(_OUTPUT_TYPES))))


# ---- The kernel -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepKernel:
    """The kernel of one layer's configuration: what it is built from, and how it is launched.

    logits_type is a name in `tensorrt.DataType`; the other fields are as in `add_aot_routing`.
    """

    spec: RouterSpec
    config: XShareConfig
    inputs: GraphInputs
    logits_type: str
    max_rows: int
    compute_capability: str

    def __post_init__(self) -> None:
        self.inputs.check(self.spec, self.config)
        if not 1 <= self.max_rows <= MAX_ROWS:
            raise ValueError(
                f"max_rows={self.max_rows}: an ahead-of-time plugin takes 1 to {MAX_ROWS} rows; for more, "
                "use the plugin library libnvinfer_plugin_xshare.so"
            )
        if self.compute_capability not in COMPUTE_CAPABILITIES:
            known = " or ".join(COMPUTE_CAPABILITIES)
            raise ValueError(f"compute_capability={self.compute_capability!r} must be {known}")
        if self.logits_type not in _LOGITS_TYPES:
            raise ValueError(
                f"router_logits: the type must be one of {', '.join(_LOGITS_TYPES)}, not {self.logits_type}"
            )

    @classmethod
    def of_tensors(
        cls,
        spec: RouterSpec,
        config: XShareConfig,
        tensors: Mapping[str, Any],
        max_rows: int,
        compute_capability: str,
    ) -> StepKernel:
        """For these tensors of a network. Raises ValueError where a name, a type or a shape is not right."""
        unknown = sorted(set(tensors) - set(INPUT_NAMES))
        if unknown or "router_logits" not in tensors:
            raise ValueError(f"tensors must be router_logits and any of {INPUT_NAMES[1:]}, not {[*tensors]}")
        for name, right in _INPUT_TYPES.items():
            if name in tensors and tensors[name].dtype.name != right:
                raise ValueError(f"{name}: the type must be {right}, not {tensors[name].dtype.name}")
        logits = tensors["router_logits"]
        shape = tuple(logits.shape)
        if len(shape) != 2 or shape[1] != spec.num_experts or shape[0] > max_rows:
            raise ValueError(
                f"router_logits: the shape must be [up to max_rows={max_rows}, {spec.num_experts}], "
                f"not {list(shape)}"
            )
        inputs = GraphInputs(**{name: name in tensors for name in INPUT_NAMES[1:]})
        return cls(spec, config, inputs, logits.dtype.name, max_rows, compute_capability)

    @property
    def input_names(self) -> list[str]:
        return ["router_logits", *self.inputs.names()]

    @property
    def experts_per_lane(self) -> int:
        return experts_per_lane(self.spec.num_experts)

    @property
    def max_threads(self) -> int:
        return step_threads(self.experts_per_lane)

    @property
    def num_blocks(self) -> int:
        """As plan_step in plugins/cuda/plan.h: one, or on SM90 the cluster for `max_rows` rows."""
        blocks = 1
        if self.compute_capability == "SM90" and self.max_rows > self.max_threads // 32:
            while blocks < _MAX_CLUSTER and self.max_rows > blocks * _TEAM_ROWS:
                blocks *= 2
        return blocks

    @property
    def min_threads(self) -> int:
        """A thread per expert, as in plugins/cuda/plan.h."""
        return max(64, -(-self.spec.num_experts // 32) * 32)

    def settings(self) -> dict[str, str]:
        """The macros of plugins/cuda/aot.cu, without the prefix XSHARE_AOT_ and without NAME."""
        spec, config = self.spec, self.config
        scaling = struct.unpack("f", struct.pack("f", spec.routed_scaling_factor))[0]
        numbers: dict[str, int] = {
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "scoring": SCORINGS.index(spec.scoring),
            "num_groups": spec.num_groups,
            "top_k_groups": spec.top_k_groups,
            "logits_dtype": _LOGITS_TYPES.index(self.logits_type),
            "budget": config.layer_budget,
            "warmup": config.warmup,
            "request_budget": min(config.request_budget or 0, NO_LIMIT),
            "gpu_budget": min(config.gpu_budget or 0, NO_LIMIT),
            "max_rows": -1 if config.max_rows is None else min(config.max_rows, NO_LIMIT),
            "utility": UTILITIES.index(config.utility),
            **{f"has_{name}": int(getattr(self.inputs, name)) for name in INPUT_NAMES[1:]},
            "experts_per_lane": self.experts_per_lane,
            "blocks": self.num_blocks,
            "threads": self.max_threads,
        }
        return {name.upper(): str(number) for name, number in numbers.items()} | {
            "ROUTED_SCALING_FACTOR": f"{scaling.hex()}f",
            "COVERAGE": (config.coverage or 0.0).hex(),
        }

    @property
    def name(self) -> str:
        """Of the kernel and of the plugin: another one for every configuration."""
        identity = repr((__version__, self.compute_capability, self.max_rows, self.settings()))
        return f"xshare_route_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def macros(self) -> tuple[str, ...]:
        """The compiler's options that define all macros."""
        settings = {"NAME": self.name, **self.settings()}
        return tuple(f"-DXSHARE_AOT_{name}={value}" for name, value in settings.items())

    def compile(self) -> str:
        """PTX for the compute capability and what is newer, from nvcc. Raises RuntimeError."""
        return compile_ptx(self.macros(), COMPUTE_CAPABILITIES[self.compute_capability])


def find_nvcc() -> str | None:
    """From CUDACXX, PATH, /usr/local/cuda, or the Python packages nvidia-cuda-*."""
    packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc")
    candidates = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc", *map(str, packages))
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


@cache
def compile_ptx(macros: tuple[str, ...], architecture: int) -> str:
    """plugins/cuda/aot.cu as PTX for `compute_<architecture>`."""
    sources = source_folder()
    source = sources / "cuda" / "aot.cu"
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            "no nvcc for the ahead-of-time plugin: install the CUDA toolkit and set CUDACXX, or "
            "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"
        )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "aot.ptx")
        options = ("-std=c++17", "-O3", "--fmad=false", "-ptx", f"-arch=compute_{architecture}", *macros)
        includes = (f"-I{sources}", f"-I{sources / 'include'}")
        command = [nvcc, *options, *includes, str(source), "-o", str(ptx)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc did not build the ahead-of-time plugin:\n{done.stdout}{done.stderr}")
        return ptx.read_text(encoding="utf-8")


# ---- The plugin -------------------------------------------------------------------------------------------


def _plugin_module(trt: Any) -> Any:
    try:
        plugin = importlib.import_module(f"{trt.__name__}.plugin")
    except (ImportError, AttributeError) as missing:  # AttributeError: a lean runtime has it, but no builder
        raise RuntimeError(f"{trt.__name__} has no Python plugins; a full TensorRT has: {missing}") from None
    if not hasattr(plugin, "KernelLaunchParams"):
        raise RuntimeError(f"TensorRT {trt.__version__} has no ahead-of-time plugins; 10.9 has")
    return plugin


def _operation(trt: Any, plugin: Any, kernel: StepKernel, ptx: str) -> Callable[..., Any]:
    """`tensorrt.plugin.op.xshare.<name>`, registered when it is first asked for."""
    if not hasattr(getattr(plugin.op, NAMESPACE, None), kernel.name):
        _register(trt, plugin, kernel, ptx)
    operation: Callable[..., Any] = getattr(getattr(plugin.op, NAMESPACE), kernel.name)
    return operation


def _register(trt: Any, plugin: Any, kernel: StepKernel, ptx: str) -> None:
    spec = kernel.spec
    types = (kernel.logits_type, *(_INPUT_TYPES[name] for name in kernel.inputs.names()), *_OUTPUT_TYPES)

    def describe(router_logits: Any, *_: Any) -> Any:
        rows = router_logits.shape_expr[0]
        shapes = ((rows, spec.top_k), (rows, spec.top_k), (spec.num_experts,))
        return tuple(
            plugin.from_shape_expr(shape, getattr(trt.DataType, dtype))
            for shape, dtype in zip(shapes, _OUTPUT_TYPES, strict=True)
        )

    def tune(*_: Any) -> Any:
        return [plugin.AutoTuneCombination(", ".join(_TUNER_NAMES.get(dtype, dtype) for dtype in types))]

    def implement(router_logits: Any, *_: Any) -> Any:
        _check_rows(kernel, router_logits.shape)
        rows = router_logits.shape_expr[0]
        threads = plugin.cdiv(rows, kernel.num_blocks) * 32  # a warp per row, as plan_step in plan.h
        launch = plugin.KernelLaunchParams()
        launch.grid_x = kernel.num_blocks
        launch.block_x = plugin.min(plugin.max(threads, kernel.min_threads), kernel.max_threads)
        scalars = plugin.SymIntExprs(1)
        scalars[0] = plugin.SymInt32(rows)
        return kernel.name, ptx, launch, scalars

    inputs = dict.fromkeys(kernel.input_names, plugin.TensorDesc)
    outputs = GenericAlias(tuple, (plugin.TensorDesc,) * len(_OUTPUT_TYPES))
    compiled = tuple[str, str, plugin.KernelLaunchParams, plugin.SymExprs]
    plugin_id = f"{NAMESPACE}::{kernel.name}"
    plugin.register(plugin_id)(_signed(describe, inputs, outputs))
    tuned = list[plugin.AutoTuneCombination]
    plugin.autotune(plugin_id)(_signed(tune, inputs | {"outputs": outputs}, tuned))
    plugin.aot_impl(plugin_id)(_signed(implement, inputs | {"outputs": outputs, "tactic": int}, compiled))


def _check_rows(kernel: StepKernel, shape: Any) -> None:
    most = shape.max[0] if shape.is_dynamic else shape[0]
    if most > kernel.max_rows:
        raise ValueError(
            f"router_logits: the engine's profile allows {most} rows, but add_aot_routing was told "
            f"max_rows={kernel.max_rows} (at most {MAX_ROWS})"
        )


def _signed(function: Any, parameters: Mapping[str, Any], returns: Any) -> Any:
    """With the annotated signature that `tensorrt.plugin` reads the plugin's inputs from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )
    return function
