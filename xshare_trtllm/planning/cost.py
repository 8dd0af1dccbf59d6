"""What a decode step of a large model costs on a GPU, and what fewer active experts save of it.

A roofline per part of the step: bytes over memory bandwidth or operations over peak, whichever is longer,
times the number of layers; plus what does not depend on bytes. Seconds, bytes and operations throughout.
How many experts a batch activates comes from routers of the model's shape, fitted to the shipped model's and,
for the gpt-oss family, to the choices of the real gpt-oss-20b (`traces`). Nothing here was measured on a GPU
by this project; docs/cost_model.md compares it with public figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from math import ceil, floor

from torch import Tensor

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.traces import ExpertLoad, SyntheticRouters, load_choices, load_fit, simulate
from xshare_trtllm.planning.shapes import ModelShape, shape
from xshare_trtllm.routing import contiguous_placement

VALUE_BYTES = 2  # of an activation or a cached key or value: bf16


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak figures of one GPU, from its data sheet, without sparsity.

    memory            bytes
    memory_bandwidth  bytes per second
    bf16, fp8         tensor-core operations per second; fp8 = bf16 where the GPU has none
    link_bandwidth    bytes per second to other GPUs, one direction
    """

    name: str
    memory: float
    memory_bandwidth: float
    bf16: float
    fp8: float
    link_bandwidth: float


# NVIDIA data sheets: "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "A100 80GB" (SXM). NVLink is
# listed there as the sum of both directions. "HGX B200", "GB200 NVL72", "GeForce RTX 5090", "Jetson Thor"
# (T5000), "DGX Spark" and "Jetson AGX Orin" state operations with sparsity, for 4 bits or 8: without it, and
# for 16 bits, each is half of that. The last three are linked by Ethernet.
GPUS = {
    "h100": Gpu("H100 SXM", 80e9, 3.35e12, 989e12, 1979e12, 450e9),
    "h200": Gpu("H200 SXM", 141e9, 4.8e12, 989e12, 1979e12, 450e9),
    "a100": Gpu("A100 SXM", 80e9, 2.039e12, 312e12, 312e12, 300e9),
    "b200": Gpu("B200", 180e9, 8e12, 2250e12, 4500e12, 900e9),
    "gb200": Gpu("GB200", 186e9, 8e12, 2500e12, 5000e12, 900e9),
    "rtx5090": Gpu("GeForce RTX 5090", 32e9, 1.792e12, 209.5e12, 419e12, 64e9),
    "thor": Gpu("Jetson AGX Thor", 128e9, 273e9, 259e12, 517e12, 12.5e9),
    "spark": Gpu("DGX Spark", 128e9, 273e9, 125e12, 250e12, 25e9),
    "orin": Gpu("Jetson AGX Orin 64GB", 64e9, 204.8e9, 42.5e12, 42.5e12, 1.25e9),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What data sheets do not say. Only `layer_overhead` is fitted, to public step times of plain routing.

    memory          share of the peak bandwidth that reading weights reaches
    compute         share of the peak operations that a matrix product reaches
    link            share of the link bandwidth that a collective reaches
    collective      seconds that a collective takes beyond its bytes
    routing         seconds that XShare adds to a MoE layer: one launch, in place of the router's own top-k
    layer_overhead  seconds of a layer that no byte explains: launches, small kernels, the host's share, and
                    in a server the prefill of other requests
    """

    memory: float = 0.8
    compute: float = 0.6
    link: float = 0.7
    collective: float = 10e-6
    routing: float = 5e-6
    layer_overhead: float = 150e-6


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a model is spread; at most one of the two is above 1.

    tensor  every matrix is split over so many GPUs; an all-reduce after attention and after the experts
    expert  whole experts are spread over so many GPUs, which share the rows (attention data parallelism);
            two all-to-alls per MoE layer
    """

    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.expert) < 1:
            raise ValueError(f"Parallel(tensor={self.tensor}, expert={self.expert}): must be at least 1")
        if min(self.tensor, self.expert) > 1:
            raise ValueError("Parallel: tensor and expert parallelism cannot be combined here")


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one decode step on the slowest GPU.

    experts   weights and products of the active routed experts
    weights   those of attention, shared experts, dense MLPs, routers and the output projection
    kv_cache  reading it
    exchange  all-reduces or all-to-alls
    routing   what XShare adds
    overhead  layers times `layer_overhead`
    """

    experts: float
    weights: float
    kv_cache: float
    exchange: float
    routing: float
    overhead: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def step_cost(
    shape: ModelShape,
    gpu: Gpu,
    batch: int,
    experts: float,
    rows: float,
    *,
    context: int = 1024,
    shares_experts: bool = False,
    parallel: Parallel | None = None,
    assumptions: Assumptions | None = None,
) -> StepCost:
    """One decode step of `batch` rows with `context` tokens each in the cache.

    experts         active routed experts of a MoE layer; with expert parallelism those of the fullest GPU
    rows            row-expert assignments of a MoE layer; with expert parallelism those of the fullest GPU
    shares_experts  XShare is on: its routing time counts
    """
    parallel, assumptions = parallel or Parallel(), assumptions or Assumptions()
    local_rows = batch / parallel.expert
    layer = expert_time(shape, gpu, experts, rows, split=parallel.tensor, assumptions=assumptions)
    kv_bytes = _kv_bytes(shape, local_rows, context, parallel)
    routing = shape.moe_layers * assumptions.routing if shares_experts else 0.0
    if shares_experts and parallel.expert > 1:  # the rows are spread: the sums of the utilities are reduced
        routing += shape.moe_layers * assumptions.collective
    return StepCost(
        experts=shape.moe_layers * layer,
        weights=_weight_time(shape, gpu, local_rows, parallel, assumptions),
        kv_cache=kv_bytes / (gpu.memory_bandwidth * assumptions.memory),
        exchange=_exchange_time(shape, gpu, batch, parallel, assumptions),
        routing=routing,
        overhead=shape.layers * assumptions.layer_overhead,
    )


def _roofline(gpu: Gpu, read: float, operations: float, weight_bytes: float, a: Assumptions) -> float:
    peak = gpu.fp8 if weight_bytes == 1 else gpu.bf16  # 4-bit weights are widened to bf16 before Blackwell
    return max(read / (gpu.memory_bandwidth * a.memory), operations / (peak * a.compute))


def expert_time(
    shape: ModelShape, gpu: Gpu, experts: float, rows: float, *, split: int = 1, assumptions: Assumptions
) -> float:
    """Seconds of the active routed experts of one MoE layer; every matrix is split over `split` GPUs."""
    read = experts * shape.bytes_per_expert / split
    operations = 2 * rows * shape.expert_parameters / split
    return _roofline(gpu, read, operations, shape.expert_bytes, assumptions)


def _weight_time(shape: ModelShape, gpu: Gpu, rows: float, parallel: Parallel, a: Assumptions) -> float:
    """Of all layers: what every row passes through."""
    router = shape.hidden * shape.router.num_experts
    parts = (
        (shape.layers * shape.attention_parameters, shape.other_bytes),
        (shape.dense_layers * shape.dense_parameters, shape.other_bytes),
        (shape.moe_layers * shape.shared_parameters, shape.expert_bytes),
        (shape.moe_layers * router + shape.head_parameters, VALUE_BYTES),
    )
    time = 0.0
    for parameters, weight_bytes in parts:
        local = parameters / parallel.tensor
        time += _roofline(gpu, local * weight_bytes, 2 * rows * local, weight_bytes, a)
    return time


def _kv_bytes(shape: ModelShape, rows: float, context: int, parallel: Parallel) -> float:
    full_layers = shape.layers - shape.windowed_layers
    tokens = full_layers * context + shape.windowed_layers * min(context, shape.window or context)
    split = 1 if shape.has_latent_cache else parallel.tensor  # a latent cache has no heads to split
    return rows * tokens * shape.kv_values * VALUE_BYTES / split


def _exchange_time(shape: ModelShape, gpu: Gpu, batch: int, parallel: Parallel, a: Assumptions) -> float:
    link = gpu.link_bandwidth * a.link
    values = shape.hidden * VALUE_BYTES
    if parallel.tensor > 1:  # ring all-reduces
        sent = 2 * (parallel.tensor - 1) / parallel.tensor * batch * values
        return 2 * shape.layers * (sent / link + a.collective)
    if parallel.expert > 1:  # dispatch and combine, one copy of a row per GPU that it goes to
        copies = min(shape.router.top_k, parallel.expert) * (parallel.expert - 1) / parallel.expert
        return 2 * shape.moe_layers * (batch / parallel.expert * copies * values / link + a.collective)
    return 0.0


def gain(before: StepCost, after: StepCost) -> float:
    """Change of the output tokens per second: 0.1 = 10 % more."""
    return before.total / after.total - 1


# ---- Predictions ------------------------------------------------------------------------------------------

BATCHES = tuple(2**n for n in range(11))  # tried for the break-even


class Loads:
    """Experts in use at each batch size, by routers of the shape `spec` drawn from the shipped model's fit.

    The gpt-oss family chooses as unequally as gpt-oss-20b does; of the others no choices are known. Every row
    is of a document of its own; with `gpus` above 1 each holds a slice of the experts.
    """

    def __init__(self, spec: RouterSpec, gpus: int = 1, seed: int = 0) -> None:
        if gpus > 1 and spec.num_experts % gpus:
            raise ValueError(f"expert parallelism: {spec.num_experts} experts do not split over {gpus} GPUs")
        self.spec, self.gpus = spec, gpus
        moments = load_choices() if spec.scoring == "topk_softmax" else None
        self._routers = SyntheticRouters(load_fit(), spec, seed, moments)
        self._steps: dict[int, Tensor] = {}
        self._placement = contiguous_placement(spec.num_experts, gpus).expand(len(load_fit()), -1)

    def at(self, batch: int, config: XShareConfig) -> ExpertLoad:
        """Means over 4 layers and 4 to 64 steps, fewer the larger the batch."""
        if batch not in self._steps:
            steps = max(4, min(64, 1024 // batch))
            logits = self._routers.logits(batch * steps)
            self._steps[batch] = logits.view(len(logits), steps, batch, -1)
        return simulate(self._steps[batch], self.spec, config, self._placement, self.gpus)

    def config(self, coverage: float | None, budget: int | None, warmup: int) -> XShareConfig:
        """With expert parallelism a coverage limits the fullest GPU, and a budget alone is spread evenly over
        the GPUs. Raises ValueError where it does not fit the router."""
        spread = budget is not None and coverage is None and self.gpus > 1
        per_gpu = ceil(budget / self.gpus) if budget is not None and spread else None
        config = XShareConfig(budget, warmup=warmup, gpu_budget=per_gpu, coverage=coverage)
        config.check(self.spec)
        return config


@dataclass(frozen=True, slots=True)
class Prediction:
    """One batch size: experts in use and the step's cost, with the model's own routing and with XShare."""

    batch: int
    own: ExpertLoad
    shared: ExpertLoad
    before: StepCost
    after: StepCost

    @property
    def gain(self) -> float:
        return gain(self.before, self.after)

    @property
    def gain_without_overhead(self) -> float:
        """What an engine without any overhead would gain: the most that fewer bytes can give."""
        before, after = self.before.total - self.before.overhead, self.after.total - self.after.overhead
        return before / after - 1


@dataclass
class Predictor:
    """Predictions for one model, GPU and configuration."""

    shape: ModelShape
    gpu: Gpu
    context: int = 1024
    parallel: Parallel = Parallel()
    assumptions: Assumptions = Assumptions()

    @cached_property
    def loads(self) -> Loads:
        return Loads(self.shape.router, self.parallel.expert)

    @property
    def weight_bytes(self) -> float:
        """Of the whole model, input embedding included."""
        shape = self.shape
        experts = shape.moe_layers * (
            shape.router.num_experts * shape.expert_parameters + shape.shared_parameters
        )
        others = shape.total_parameters - experts - 2 * shape.head_parameters
        head = 2 * shape.head_parameters * VALUE_BYTES
        return experts * shape.expert_bytes + others * shape.other_bytes + head

    def at(self, batch: int, config: XShareConfig) -> Prediction:
        """`config` is one that `loads.config` gives, or any that fits the router."""
        own = self.loads.at(batch, XShareConfig.off(self.shape.router))
        shared = self.loads.at(batch, config)
        before, after = (self._cost(batch, load, load is shared) for load in (own, shared))
        return Prediction(batch, own, shared, before, after)

    def _cost(self, batch: int, load: ExpertLoad, shares_experts: bool) -> StepCost:
        return step_cost(
            self.shape,
            self.gpu,
            batch,
            load.peak_experts,
            load.peak_rows,
            context=self.context,
            shares_experts=shares_experts,
            parallel=self.parallel,
            assumptions=self.assumptions,
        )

    def break_even(self, config: XShareConfig) -> tuple[int, int | None] | None:
        """The smallest and the largest batch that gain, by `worthwhile` over BATCHES."""
        return worthwhile(lambda batch: self.at(batch, config).gain, BATCHES)


def worthwhile(gain_at: Callable[[int], float], batches: Iterable[int]) -> tuple[int, int | None] | None:
    """The smallest and the largest batch with a gain above 0, linear between `batches`, ascending; the second
    is None where the last of them still gains, and the answer None where none gains."""
    points = [(batch, gain_at(batch)) for batch in batches]
    good = [index for index, (_, value) in enumerate(points) if value > 0]
    if not good:
        return None
    first, last = good[0], good[-1]
    lower = points[0][0] if first == 0 else floor(_root(points[first - 1], points[first])) + 1
    upper = None if last == len(points) - 1 else ceil(_root(points[last], points[last + 1])) - 1
    return lower, upper


def _root(left: tuple[int, float], right: tuple[int, float]) -> float:
    (x, y), (x2, y2) = left, right
    return x + (x2 - x) * y / (y - y2)


# ---- Public figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """Output tokens per second of gpt-oss-120b on one H200 with vLLM, 128 tokens in and 256 out, budget 24
    of 128, no warm-up: vllm-project/vllm pull request 35551, 27 February 2026."""

    batch: int
    own: float
    shared: float

    @property
    def gain(self) -> float:
        return self.shared / self.own - 1


PUBLISHED = (
    Published(4, 530, 559),
    Published(8, 866, 1006),
    Published(16, 1342, 1835),
    Published(32, 1996, 3054),
)
PUBLISHED_CONFIG = XShareConfig(24, warmup=0)
PUBLISHED_CONTEXT = 256  # 128 tokens in and half of the 256 out


def published_setup(assumptions: Assumptions | None = None) -> Predictor:
    """What the public figures were measured on."""
    assumptions = assumptions or Assumptions()
    return Predictor(shape("gpt-oss-120b"), GPUS["h200"], PUBLISHED_CONTEXT, assumptions=assumptions)


def fit_layer_overhead() -> float:
    """The one fitted number, from step times of plain routing alone: the mean, over PUBLISHED, of what
    the other parts do not explain, per layer."""
    predictor = published_setup(Assumptions(layer_overhead=0.0))
    left = []
    for point in PUBLISHED:
        step = predictor.at(point.batch, PUBLISHED_CONFIG).before
        left.append((point.batch / point.own - step.total) / predictor.shape.layers)
    return sum(left) / len(left)


def validate() -> list[tuple[Published, Prediction]]:
    """The public gains and their predictions."""
    predictor = published_setup()
    return [(point, predictor.at(point.batch, PUBLISHED_CONFIG)) for point in PUBLISHED]
