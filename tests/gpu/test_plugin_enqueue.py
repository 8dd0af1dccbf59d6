"""The plugin's enqueue on device memory, called through TensorRT's interface, against the host's routing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tensorrt"))

import plugin_build  # noqa: E402
from plugin_probe import BF16, FLOAT, HALF, Plugin, Probe  # noqa: E402

from xshare_trtllm import RouterSpec, Routing, XShareConfig, route  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

EXPERTS, TOP_K = 64, 6
SPEC = RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", 8, 4, 2.5)
CONFIG = XShareConfig(20, request_budget=12, gpu_budget=6, coverage=0.95, max_rows=400)
FIELDS = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "scoring": "sigmoid_bias",
    "num_groups": 8,
    "top_k_groups": 4,
    "routed_scaling_factor": 2.5,
    "budget": 20,
    "request_budget": 12,
    "gpu_budget": 6,
    "coverage": 0.95,
    "max_rows": 400,
    "has_correction_bias": 1,
    "has_request_ids": 1,
    "has_exempt": 1,
    "has_expert_gpu": 1,
    "has_active_experts": 1,
}
DTYPES = {torch.float32: FLOAT, torch.float16: HALF, torch.bfloat16: BF16}


@pytest.fixture(scope="module")
def plugin() -> Iterator[Plugin]:
    built = plugin_build.build()
    probe = Probe(str(built.probe))
    made = probe.create(probe.offered_creator(str(built.library)), FIELDS)
    assert made is not None
    probe.record_messages_of(str(built.library))
    yield made
    assert probe.messages() == ""
    made.destroy()


class Call:
    """One batch on the device, its outputs poisoned, and what the host makes of it."""

    def __init__(self, plugin: Plugin, rows: int, dtype: torch.dtype, seed: int) -> None:
        self.plugin, self.rows, self.dtype = plugin, rows, DTYPES[dtype]
        random = torch.Generator().manual_seed(seed)
        self.inputs = [
            (torch.randn(rows, EXPERTS, generator=random) * 2).to(dtype),
            torch.randn(EXPERTS, generator=random) * 0.1,
            torch.randint(-1, max(1, rows // 3), (rows,), generator=random, dtype=torch.int32),
            torch.rand(rows, generator=random) < 0.1,
            torch.randint(0, 8, (EXPERTS,), generator=random, dtype=torch.int32),
        ]
        self.on_device = [tensor.cuda() for tensor in self.inputs]
        self.outputs = [
            torch.full((rows, TOP_K), -7, dtype=torch.int32, device="cuda"),
            torch.full((rows, TOP_K), -7.0, device="cuda"),
            torch.ones(EXPERTS, dtype=torch.bool, device="cuda"),
        ]
        size = plugin.workspace(self.dtype, rows, EXPERTS)
        self.workspace = torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda")

    def enqueue(self, stream: torch.cuda.Stream) -> None:
        addresses = ([tensor.data_ptr() for tensor in group] for group in (self.on_device, self.outputs))
        workspace = self.workspace.data_ptr()
        code = self.plugin.enqueue(
            self.dtype, self.rows, EXPERTS, *addresses, workspace=workspace, stream=stream.cuda_stream
        )
        assert code == 0

    def check(self) -> None:
        logits, bias, ids, exempt, gpu = self.inputs
        expected: Routing = route(
            logits, SPEC, CONFIG, correction_bias=bias, request_ids=ids, exempt=exempt, expert_gpu=gpu
        )
        wanted = (expected.expert_ids, expected.expert_weights, expected.active_experts)
        for tensor, right in zip(self.outputs, wanted, strict=True):
            assert torch.equal(tensor.cpu(), right)


@pytest.mark.parametrize("rows", (1, 16, 300))
@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        (
            {"scoring": "softmax_renorm", "output": "masked_logits"},
            RouterSpec(EXPERTS, TOP_K, "softmax_renorm"),
        ),
        ({"scoring": "sigmoid_bias", "output": "step_bias"}, RouterSpec(EXPERTS, TOP_K, "sigmoid_bias")),
    ],
    ids=("masked_logits", "step_bias"),
)
def test_outputs_for_a_layer_that_routes(fields: dict[str, str], spec: RouterSpec, rows: int) -> None:
    built = plugin_build.build()
    probe = Probe(str(built.probe))
    given = fields | {"num_experts": EXPERTS, "top_k": TOP_K, "coverage": 0.9, "mask_value": -1e30}
    made = probe.create(probe.offered_creator(str(built.library)), given)
    assert made is not None
    logits = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(rows)) * 2
    active = route(logits, spec, XShareConfig(coverage=0.9)).active_experts
    outside = torch.full((EXPERTS,), -1e30)
    if fields["output"] == "masked_logits":
        wanted = torch.where(active, logits, outside)
    else:
        wanted = torch.where(active, torch.zeros(EXPERTS), outside)
    output, on_device = torch.full_like(wanted, -7.0).cuda(), logits.cuda()
    workspace = torch.empty(made.workspace(FLOAT, rows, EXPERTS), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [on_device.data_ptr()], [output.data_ptr()]
    assert made.enqueue(FLOAT, rows, EXPERTS, *addresses, workspace=workspace.data_ptr(), stream=stream) == 0
    torch.cuda.synchronize()
    assert torch.equal(output.cpu(), wanted)
    made.destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (0, 1, 2, 16, 33, 256, 257, 399, 2000))
def test_enqueue(plugin: Plugin, rows: int, dtype: torch.dtype) -> None:
    call = Call(plugin, rows, dtype, seed=rows)
    torch.cuda.synchronize()
    call.enqueue(torch.cuda.current_stream())
    torch.cuda.synchronize()
    call.check()


def test_two_streams_at_once(plugin: Plugin) -> None:
    """Each with a plugin of its own, as TensorRT does for execution contexts, on threads of their own."""
    contexts = [plugin.attach() for _ in range(2)]
    batches = [[Call(own, 16 + n, torch.bfloat16, n) for n in range(64)] for own in contexts]
    torch.cuda.synchronize()

    def work(calls: list[Call]) -> None:
        stream = torch.cuda.Stream()
        for call in calls:
            call.enqueue(stream)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(calls,)) for calls in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call in (*batches[0], *batches[1]):
        call.check()
    for own in contexts:
        own.destroy()


@pytest.mark.parametrize("rows", (32, 300))
def test_graph_capture(plugin: Plugin, rows: int) -> None:
    """Captured once, replayed over new contents of the same buffers."""
    call = Call(plugin, rows, torch.bfloat16, seed=1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        call.enqueue(stream)
    for seed in (2, 3):
        fresh = Call(plugin, rows, torch.bfloat16, seed)
        for old, new in zip(call.on_device, fresh.on_device, strict=True):
            old.copy_(new)
        call.inputs = fresh.inputs
        graph.replay()
        torch.cuda.synchronize()
        call.check()
