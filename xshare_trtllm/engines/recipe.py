"""`Recipe`: a file of engines/, checked: a model on a GPU generation, and where its settings come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xshare_trtllm.config import RouterSpec, XShareConfig

Generation = Literal["sm_80", "sm_90"]
Origin = Literal["paper", "public report", "own calibration", "shipped models", "extrapolated"]
Weights = Literal["bfloat16", "float16", "int8", "fp8", "mxfp4"]

# Weights that TensorRT-LLM computes with on a generation: its support matrix (docs/source/legacy/reference/
# support-matrix.md) and, for mxfp4, examples/models/core/gpt_oss/README.md.
PRECISIONS: dict[Generation, tuple[Weights, ...]] = {
    "sm_80": ("bfloat16", "float16", "int8"),
    "sm_90": ("bfloat16", "float16", "int8", "fp8", "mxfp4"),
}
USABLE_MEMORY = 0.9  # of a GPU, for weights and KV cache: the rest is activations, CUDA graphs, NCCL


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Setting(_Part):
    """One value of `XShareConfig` and where it comes from.

    origin     `paper` (arXiv 2602.07265), `public report`, `own calibration` (benchmarks/results),
               `shipped models`: measured on those, which says where to start with another; or
               `extrapolated`: one of these, carried over to a model that nobody measured
    reference  which table, address or file, or the arithmetic
    """

    value: int | float | str | list[int]
    origin: Origin
    reference: str = Field(min_length=8)


class Hardware(_Part):
    """gpus: of one instance; per_node: in one machine; memory_gb: of one GPU, in 10^9 bytes."""

    gpus: int = Field(ge=1)
    memory_gb: float = Field(gt=0)
    per_node: int = Field(default=8, ge=1)


class Parallel(_Part):
    """Sizes of the groups; tensor x pipeline is the number of GPUs, the experts of a layer are spread over
    `expert` of the tensor ranks and cut into tensor / expert slices."""

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)


class Limits(_Part):
    """max_batch_size: requests in a step; max_num_tokens: rows in a step; max_seq_len: prompt and output."""

    max_batch_size: int = Field(ge=1)
    max_num_tokens: int = Field(ge=1)
    max_seq_len: int = Field(ge=1)


class Convert(_Part):
    """script: in a checkout of TensorRT-LLM; options: beside folders and parallel sizes, without dashes."""

    script: str = Field(pattern=r"^examples/.+\.py$")
    options: dict[str, str | int | bool] = {}


def _as_router(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("must be num_experts, top_k, scoring and the rest of RouterSpec")
    known = tuple(RouterSpec.model_fields)
    unknown = [repr(key) for key in value if key not in known]
    missing = [key for key in known[:3] if key not in value]
    if unknown or missing:
        problem = f"unknown key {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise ValueError(f"{problem}; known are {', '.join(known)}")
    return RouterSpec(**value)


class Recipe(_Part):
    """How to run one model on one GPU generation.

    model        Hugging Face id of the checkpoint
    gpu          `sm_80` (A100) or `sm_90` (H100, H200)
    path         `engine`: trtllm-build, TensorRT-LLM 1.0 to 1.2; `pytorch`: trtllm-serve, 1.0 on
    weights      what the experts' weights are stored as; weights_gb: all weights, in 10^9 bytes
    router       what `RouterSpec.from_hf_config` reads from the model's config.json
    xshare       fields of `XShareConfig`, each with its origin
    convert      (engine) how the checkpoint is converted; build: (engine) further options of trtllm-build
    options      (pytorch) further options of the PyTorch backend
    note         what a reader must know

    Raises ValueError, naming the field, its value and what is right; `load_recipe` names the file too.
    """

    model: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    gpu: Generation
    path: Literal["engine", "pytorch"]
    weights: Weights
    weights_gb: float = Field(gt=0)
    router: Annotated[RouterSpec, BeforeValidator(_as_router)]
    hardware: Hardware
    parallel: Parallel
    limits: Limits
    xshare: dict[str, Setting]
    convert: Convert | None = None
    build: dict[str, str | int | bool] = {}
    options: dict[str, Any] = {}
    note: str = ""

    @property
    def config(self) -> XShareConfig:
        """The settings without their origins."""
        return XShareConfig.from_dict({name: setting.value for name, setting in self.xshare.items()})

    @property
    def weights_gb_per_gpu(self) -> float:
        """10^9 bytes of weights on each GPU; every parallel mapping here cuts them evenly."""
        return self.weights_gb / self.hardware.gpus

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        self.config.check(self.router)
        self._check_precision()
        self._check_mapping()
        self._check_path()
        return self

    def _check_precision(self) -> None:
        if self.weights not in PRECISIONS[self.gpu]:
            raise ValueError(
                f"weights={self.weights!r}: {self.gpu} computes with {', '.join(PRECISIONS[self.gpu])}"
            )

    def _check_mapping(self) -> None:
        gpus, parallel = self.hardware.gpus, self.parallel
        if parallel.tensor * parallel.pipeline != gpus:
            raise ValueError(f"parallel: tensor x pipeline must be hardware.gpus={gpus}")
        if parallel.tensor % parallel.expert or self.router.num_experts % parallel.expert:
            raise ValueError(
                f"parallel.expert={parallel.expert}: must divide parallel.tensor={parallel.tensor} "
                f"and router.num_experts={self.router.num_experts}"
            )
        if "gpu_budget" in self.xshare and parallel.expert == 1:
            raise ValueError("xshare.gpu_budget: needs parallel.expert above 1")
        usable = USABLE_MEMORY * self.hardware.memory_gb
        if self.weights_gb_per_gpu >= usable:
            raise ValueError(
                f"weights_gb={self.weights_gb}: {self.weights_gb_per_gpu:.1f} GB on each of {gpus} GPUs, "
                f"of which {usable:.1f} GB are usable"
            )

    def _check_path(self) -> None:
        if self.path == "engine" and self.convert is None:
            raise ValueError("convert: is missing, the engine path needs it")
        if self.path == "engine" and self.options:
            raise ValueError("options: are for path pytorch, the engine path has build")
        if self.path == "pytorch" and (self.convert is not None or self.build):
            raise ValueError("convert, build: are for path engine, the PyTorch backend has options")


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file named <model>.<generation>.yaml.

    Raises ValueError, naming the file, the field and what is right; OSError where it cannot be read.
    """
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(values).__name__}")
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}") from None
    if not path.name.endswith(f".{recipe.gpu}.yaml"):
        raise ValueError(f"{path}: gpu={recipe.gpu!r}: the file's name must end in .{recipe.gpu}.yaml")
    return recipe


def _first_problem(error: ValidationError) -> str:
    """`field=value: what is right`, of the first field that is wrong."""
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{field}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field}: is not known"
    if not field:
        return message
    value = problem["input"]
    return f"{field}: {message}" if isinstance(value, dict) else f"{field}={value!r}: {message}"
