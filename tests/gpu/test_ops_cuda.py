"""`torch.ops.xshare` on CUDA tensors against the host's library, bit for bit, and in CUDA graphs: with
the kernels that are compiled at first use, and with those of libxshare_cuda.so.

Written ahead of a run on a GPU; tests/trtllm/test_torch_backend_ops.py runs the wrapper's code without one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, ops, route, warm_up  # noqa: E402
from xshare_trtllm.kernels import launch, store  # noqa: E402
from xshare_trtllm.kernels.compile import why_not  # noqa: E402

if not ops.available():
    pytest.skip("needs libxshare.so: pip install .", allow_module_level=True)

MODELS = {
    "gpt-oss": (RouterSpec(128, 4, "topk_softmax"), XShareConfig(coverage=0.97)),
    "qwen3": (RouterSpec(128, 8, "softmax_renorm"), XShareConfig(32, warmup=2, coverage=0.9)),
    "deepseek-v3": (
        RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
        XShareConfig(64, request_budget=24, gpu_budget=10),
    ),
}
Arguments = dict[str, Any]


@pytest.fixture(params=("compiled", "library"), autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    missing = why_not() if request.param == "compiled" else None
    if request.param == "library" and ops._load_cuda() is None:
        missing = "libxshare_cuda.so: XSHARE_CUDA=1 pip install ."
    if missing:
        pytest.skip(f"needs {missing}")
    monkeypatch.setattr(ops, "_prebuilt", ops._load_cuda if request.param == "library" else lambda: None)
    return str(request.param)


@pytest.mark.parametrize("is_kept", (False, True))
def test_first_call_compiles(
    is_kept: bool, kernels: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds with an empty folder of kernels, at once with a filled one, and not in a capture."""
    if kernels == "library":
        pytest.skip("needs no first call")
    folder = tmp_path_factory.getbasetemp() / "first_call"
    monkeypatch.setenv("XSHARE_CACHE", str(folder))
    spec, config = RouterSpec(96, 5, "softmax_renorm"), XShareConfig(coverage=0.93, warmup=2)
    for known in (launch._loaded, launch._calls):
        known.clear()
    logits = torch.zeros(4, 96, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="is being captured"), torch.cuda.graph(graph):
        route(logits, spec, config)
    start = time.perf_counter()
    warm_up(logits, spec, config)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(
        f"{'kept' if is_kept else 'compiled'}: {seconds:.2f} s, {len(list(store.folder().iterdir()))} kernels"
    )
    assert seconds < (0.5 if is_kept else 10)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        route(torch.zeros(300, 96, device="cuda"), spec, config)


def arguments(rows: int, spec: RouterSpec, dtype: Any = torch.bfloat16, seed: int = 0) -> Arguments:
    """On the host."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "router_logits": torch.randn(rows, spec.num_experts, generator=generator).to(dtype),
        "request_ids": torch.randint(-1, 8, (rows,), generator=generator, dtype=torch.int32),
        "exempt": torch.rand(rows, generator=generator) < 0.1,
        "expert_gpu": torch.arange(spec.num_experts, dtype=torch.int32) * 8 // spec.num_experts,
    }
    if spec.scoring == "sigmoid_bias":
        made["correction_bias"] = 0.1 * torch.randn(spec.num_experts, generator=generator)
    return made


def on_gpu(made: Arguments) -> Arguments:
    return {name: tensor.cuda() for name, tensor in made.items()}


def assert_equal(got: Any, expected: Any) -> None:
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.is_cuda and mine.dtype == wanted.dtype and torch.equal(mine.cpu(), wanted)


def raw(routing: Any) -> tuple[Any, ...]:
    return routing.expert_ids, routing.expert_weights, routing.active_experts, routing.raw_stats


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", (1, 16, 256, 1000, 5000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_same_bits_as_on_the_host(model: str, rows: int, dtype: Any) -> None:
    spec, config = MODELS[model]
    host = arguments(rows, spec, dtype, seed=rows)
    device = on_gpu(host)
    warm_up(**device, spec=spec, config=config)
    with no_synchronisation():
        routing = route(**device, spec=spec, config=config)
        masked = mask_logits(**device, spec=spec, config=config)
    assert_equal(raw(routing), raw(route(**host, spec=spec, config=config)))
    assert torch.equal(masked.cpu(), mask_logits(**host, spec=spec, config=config))
    assert routing.stats == route(**host, spec=spec, config=config).stats


def test_auto_is_native_and_int64_ids_work() -> None:
    spec, config = MODELS["deepseek-v3"]
    host = arguments(64, spec)
    device = on_gpu(host)
    device["request_ids"] = device["request_ids"].long()
    expected = raw(route(**host, spec=spec, config=config))
    for backend in ("auto", "native"):
        assert_equal(raw(route(**device, spec=spec, config=config, backend=backend)), expected)
    with pytest.raises(ValueError, match="request_ids: must be on cuda:0"):
        ops.route(**(device | {"request_ids": host["request_ids"]}), spec=spec, config=config)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", (16, 1000))
def test_captured_in_a_graph(model: str, rows: int) -> None:
    """Outputs and workspace come from the graph's pool; a replay reads the inputs of its step."""
    spec, config = MODELS[model]
    static = on_gpu(arguments(rows, spec))
    warm_up(**static, spec=spec, config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route(**static, spec=spec, config=config)
        masked = mask_logits(**static, spec=spec, config=config)
    for seed in range(1, 4):
        host = arguments(rows, spec, seed=seed)
        for name, tensor in host.items():
            static[name].copy_(tensor)
        graph.replay()
        assert_equal(raw(routing), raw(route(**host, spec=spec, config=config)))
        assert torch.equal(masked.cpu(), mask_logits(**host, spec=spec, config=config))


def test_on_the_current_stream() -> None:
    """Nothing orders the two streams but the wait: a call on another stream would route old logits."""
    spec, config = MODELS["gpt-oss"]
    host = arguments(256, spec)
    logits = torch.zeros(256, 128, dtype=torch.bfloat16, device="cuda")
    rest = on_gpu({name: tensor for name, tensor in host.items() if name != "router_logits"})
    route(logits, spec, config, **rest)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        logits.copy_(host["router_logits"])
        routing = route(logits, spec, config, **rest)
    stream.synchronize()
    assert_equal(raw(routing), raw(route(**host, spec=spec, config=config)))


def test_compiled() -> None:
    spec, config = MODELS["qwen3"]
    host = arguments(32, spec)
    compiled = torch.compile(lambda logits: route(logits, spec, config).expert_ids + 0, fullgraph=True)
    expected = route(host["router_logits"], spec, config).expert_ids
    assert torch.equal(compiled(host["router_logits"].cuda()).cpu(), expected)


def test_rows_of_a_step_reach_a_captured_graph() -> None:
    """What the PyTorch backend does (xshare_trtllm/trtllm/torch_rows.py): rows noted before each replay."""
    from xshare_trtllm.trtllm.torch_rows import StepRows

    spec, config = RouterSpec(128, 4, "topk_softmax"), XShareConfig(24)
    rows, logits = StepRows(64, torch.device("cuda")), torch.zeros(8, 128, device="cuda")
    dummy = 2**64 - 1

    def metadata(requests: list[int]) -> Any:
        lengths = torch.ones(8, dtype=torch.int)
        return SimpleNamespace(seq_lens=lengths, request_ids=requests, num_contexts=0, mapping=None)

    rows.update(metadata([dummy] * 8))
    route(logits, spec, config, **rows.slice(0, 8))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route(logits, spec, config, **rows.slice(0, 8))
    for real in (3, 8, 1):
        host = torch.randn(8, 128, generator=torch.Generator().manual_seed(real))
        logits.copy_(host)
        with no_synchronisation():
            rows.update(metadata([*range(70, 70 + real), *[dummy] * (8 - real)]))
            graph.replay()
        requests = torch.tensor([*range(real), *[-1] * (8 - real)], dtype=torch.int32)
        assert_equal(raw(routing), raw(route(host, spec, config, request_ids=requests)))
