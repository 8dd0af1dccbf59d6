"""xshare_route_cuda against xshare_route_cpu on a GPU: every output bit for bit, on fresh random input.

Written ahead of a run on a GPU; the same kernels run on the host in tests/test_cuda_kernel.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

import chain  # noqa: E402
from device_routing import BIASED, DTYPES, SCORINGS, Call, Inputs, Outputs, Settings, library_path  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if not library_path().exists():
    pytest.skip(f"needs {library_path()}: run build_scripts/device_check.sh", allow_module_level=True)

SEED = int(os.environ.get("XSHARE_SEED", random.SystemRandom().randrange(2**31)))
MODELS = {
    "gpt-oss": (128, Settings(4, "topk_softmax")),
    "olmoe": (64, Settings(8, "softmax")),
    "mixtral-like": (32, Settings(4, "softmax_renorm")),
    "qwen3": (128, Settings(8, "softmax_renorm")),
    "deepseek-v2": (160, Settings(6, "softmax", 8, 3, 16.0)),
    "deepseek-v3": (256, Settings(8, "sigmoid_bias", 8, 4, 2.5)),
    "kimi-k2": (384, Settings(8, "sigmoid_bias", 1, 1, 2.827)),
    "largest": (512, Settings(16, "softmax")),
    "odd": (67, Settings(5, "softmax")),
    "ernie-4.5": (64, Settings(6, "softmax_bias_renorm")),
    "kolibri-1": (384, Settings(6, "topk_sigmoid")),
    "deepseek-v4": (256, Settings(6, "sqrt_softplus_bias", 1, 1, 1.5)),
}
ROWS = (0, 1, 2, 16, 17, 33, 64, 65, 100, 128, 255, 256, 257, 700, 5000, 16384)


def budgets(settings: Settings, num_experts: int) -> list[Settings]:
    """The stages switched on one after another, and all together."""
    k, change = settings.top_k, settings.__class__
    base = settings.__dict__
    quarter = max(k, num_experts // 4)
    by_score = "squared_weight" if settings.scoring == "sqrt_softplus_bias" else "affinity"
    return [
        change(**base | {"budget": num_experts}),
        change(**base | {"budget": quarter}),
        change(**base | {"budget": quarter, "request_budget": k + 4}),
        change(**base | {"budget": 2 * quarter, "gpu_budget": max(1, num_experts // 16), "warmup": 2}),
        change(**base | {"coverage": 0.97}),
        change(**base | {"coverage": 0.7, "utility": by_score, "mask_value": -1024.0}),
        change(
            **base
            | {
                "budget": num_experts,
                "request_budget": 20,
                "gpu_budget": 12,
                "coverage": 0.6,
                "max_rows": 300,
            }
        ),
    ]


def make_inputs(num_tokens: int, num_experts: int, settings: Settings, generator: random.Random) -> Inputs:
    device = torch.Generator().manual_seed(generator.randrange(2**62))
    scale = generator.choice((0.0, 1.0, 1.0, 2.0, 60.0))
    logits = torch.randn(num_tokens, num_experts, generator=device) * scale
    if generator.random() < 0.3:
        logits = logits.round()  # ties
    if num_tokens > 3 and generator.random() < 0.5:
        logits[generator.randrange(num_tokens), generator.randrange(num_experts)] = torch.nan
    if generator.random() < 0.3:
        logits[torch.rand(logits.shape, generator=device) < generator.choice((0.1, 0.9))] = -torch.inf
    inputs = Inputs(logits.to(generator.choice(DTYPES)))
    if settings.scoring in BIASED and generator.random() < 0.8:
        inputs.correction_bias = 0.1 * torch.randn(num_experts, generator=device)
    if settings.request_budget or generator.random() < 0.5:
        most = generator.choice((1, 8, max(2, num_tokens // 4), 2**31 - 1))
        inputs.request_ids = torch.randint(-1, most, (num_tokens,), generator=device, dtype=torch.int32)
    if generator.random() < 0.5:
        inputs.exempt = torch.rand(num_tokens, generator=device) < 0.1
    if settings.gpu_budget or generator.random() < 0.5:
        inputs.expert_gpu = torch.randint(0, 8, (num_experts,), generator=device, dtype=torch.int32)
    return inputs


def on_both(settings: Settings, inputs: Inputs) -> tuple[Call, Call]:
    """The call on the host, run, and the same call on the device, not yet."""
    names = Outputs.NAMES if settings.takes_step_bias() else Outputs.USUAL
    host = Call(settings, inputs, Outputs(inputs.router_logits, settings.top_k, names))
    host.run_on_host()
    on_device = inputs.to("cuda")
    return host, Call(settings, on_device, Outputs(on_device.router_logits, settings.top_k, names))


@pytest.mark.parametrize("num_tokens", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_host(model: str, num_tokens: int) -> None:
    num_experts, plain = MODELS[model]
    generator = random.Random(f"{SEED} {model} {num_tokens}")
    for settings in budgets(plain, num_experts):
        host, device = on_both(settings, make_inputs(num_tokens, num_experts, settings, generator))
        device.enqueue()
        torch.cuda.synchronize()
        assert device.outputs.differences(host.outputs) == [], (SEED, settings)


def test_equals_the_host_on_random_settings() -> None:
    generator = random.Random(SEED)
    for _ in range(400):
        num_experts, plain = generator.choice(list(MODELS.values()))
        scoring = plain.scoring if plain.num_groups > 1 else generator.choice(SCORINGS)
        settings = generator.choice(budgets(Settings(**plain.__dict__ | {"scoring": scoring}), num_experts))
        num_tokens = generator.choice((generator.randrange(1, 64), generator.randrange(1, 600)))
        host, device = on_both(settings, make_inputs(num_tokens, num_experts, settings, generator))
        device.enqueue()
        torch.cuda.synchronize()
        assert device.outputs.differences(host.outputs) == [], (SEED, num_tokens, settings)


def test_repeats_exactly() -> None:
    settings = Settings(8, "softmax_renorm", budget=32, request_budget=12)
    inputs = make_inputs(3000, 128, settings, random.Random(SEED))
    host, device = on_both(settings, inputs)
    for _ in range(50):
        device.outputs.poison()
        device.enqueue()
        torch.cuda.synchronize()
        assert device.outputs.differences(host.outputs) == []


@pytest.mark.parametrize("num_tokens", (16, 100, 1000))
def test_captured_graph_follows_new_contents(num_tokens: int) -> None:
    settings = Settings(8, "sigmoid_bias", 8, 4, 2.5, budget=64, request_budget=16)
    generator = random.Random(SEED)
    inputs = Inputs(
        torch.randn(num_tokens, 256), torch.randn(256), torch.zeros(num_tokens, dtype=torch.int32)
    )
    _, device = on_both(settings, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.enqueue()
    for _ in range(5):
        fresh = Inputs(torch.randn(num_tokens, 256), torch.randn(256))
        fresh.request_ids = torch.randint(-1, generator.choice((2, 9, 200)), (num_tokens,), dtype=torch.int32)
        for new, old in zip(fresh.tensors(), device.inputs.tensors(), strict=True):
            if new is not None and old is not None:
                old.copy_(new)
        device.outputs.poison()
        graph.replay()
        torch.cuda.synchronize()
        host, _ = on_both(settings, fresh)
        assert device.outputs.differences(host.outputs) == []


@pytest.mark.parametrize("num_tokens", (16, 64, 256, 1000))
@pytest.mark.parametrize("model", chain.MODELS)
def test_chain_on_a_stream(model: str, num_tokens: int) -> None:
    """Enqueued behind a busy GPU: a call that comes too late cannot overtake the one before it."""
    calls = chain.Chain(model, num_tokens, "cuda")

    def launch() -> None:
        torch.cuda._sleep(2_000_000)
        calls.enqueue()

    assert chain.wrong_repetitions(calls, launch, 100) == []


@pytest.mark.parametrize("num_tokens", (16, 64, 256, 1000))
@pytest.mark.parametrize("model", chain.MODELS)
def test_chain_in_a_graph(model: str, num_tokens: int) -> None:
    calls = chain.Chain(model, num_tokens, "cuda")
    calls.enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls.enqueue()
    assert chain.wrong_repetitions(calls, graph.replay, 200) == []


@pytest.mark.parametrize("num_tokens", (16, 256, 1000))
def test_capture_may_be_the_first_call_of_a_process(num_tokens: int) -> None:
    """It gives what the host gives, or a sentence about the capture, after which the process goes on."""
    command = [sys.executable, str(HERE / "first_capture.py"), str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(("captured", "refused")), done.stdout


def test_kernel_before_it_is_awaited() -> None:
    """The launch may overlap the kernel that makes the logits, but must not read them early."""
    settings = Settings(4, "topk_softmax", budget=32)
    inputs = Inputs(torch.randn(16, 128))
    host, device = on_both(settings, inputs)
    logits = device.inputs.router_logits
    right = logits.clone()
    large = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        logits.fill_(float("nan"))
        device.outputs.poison()
        for _ in range(3):
            large @ large
        logits.copy_(right)
        device.enqueue()
        torch.cuda.synchronize()
        assert device.outputs.differences(host.outputs) == []


def test_two_streams_on_two_threads() -> None:
    settings = Settings(8, "softmax_renorm", budget=32, request_budget=12)
    generator = random.Random(SEED)
    calls = [
        [on_both(settings, make_inputs(rows + side, 128, settings, generator)) for rows in range(1, 600, 20)]
        for side in range(2)
    ]
    torch.cuda.synchronize()

    def work(mine: list[tuple[Call, Call]]) -> None:
        stream = torch.cuda.Stream()
        for _, device in mine:
            device.enqueue(stream.cuda_stream)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host, device in (*calls[0], *calls[1]):
        assert device.outputs.differences(host.outputs) == []


def test_contents_that_the_host_would_refuse() -> None:
    settings = Settings(4, "sigmoid_bias", budget=16, gpu_budget=3)
    bias = torch.randn(64)
    gpus = torch.arange(64, dtype=torch.int32) % 8
    ids = torch.arange(16, dtype=torch.int32) - 3
    meant = Inputs(torch.randn(16, 64), bias.clone(), ids.clamp(min=-1), None, gpus.clone())
    meant.correction_bias[5], meant.expert_gpu[7], meant.expert_gpu[9] = 0.0, 0, 63
    host, device = on_both(settings, meant)
    device.inputs.correction_bias[5] = torch.inf
    device.inputs.expert_gpu[7], device.inputs.expert_gpu[9] = -4, 1000
    device.inputs.request_ids.copy_(ids)
    device.enqueue()
    torch.cuda.synchronize()
    assert device.outputs.differences(host.outputs) == []


def test_refusals_name_the_argument() -> None:
    inputs = Inputs(torch.randn(300, 64, device="cuda"))
    with pytest.raises(RuntimeError, match="budget must be at least top_k=4"):
        Call(Settings(4, "softmax", budget=2), inputs, Outputs(inputs.router_logits, 4))
    call = Call(Settings(4, "softmax", budget=16), inputs, Outputs(inputs.router_logits, 4))
    call.workspace = call.workspace[:64]
    with pytest.raises(RuntimeError, match="the workspace has 64 bytes, but"):
        call.enqueue()
