"""The native library against the reference: every output bit for bit, on random and adversarial input."""

from __future__ import annotations

import ctypes
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from xshare_trtllm import ops, reference
from xshare_trtllm.config import RULES, SCORINGS, UTILITIES, RouterSpec, XShareConfig

pytestmark = pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("expert_ids", "expert_weights", "active_experts", "stats")
Call = tuple[torch.Tensor, RouterSpec, XShareConfig, dict[str, torch.Tensor]]


def assert_same_bits(name: str, native: torch.Tensor, expected: torch.Tensor) -> None:
    assert native.dtype == expected.dtype and native.shape == expected.shape, name
    as_bits = {4: torch.int32, 2: torch.int16}.get(native.element_size(), native.dtype)
    bits = as_bits if native.dtype.is_floating_point else native.dtype
    assert torch.equal(native.view(bits), expected.view(bits)), f"{name}:\n{native}\n{expected}"


def assert_matches_reference(call: Call) -> None:
    logits, spec, config, extras = call
    native = ops.route(logits, spec, config, **extras)
    expected = reference.route(logits, spec, config, **extras)
    for name, got, want in zip(OUTPUTS, native, expected, strict=True):
        assert_same_bits(name, got, want)
    masked = ops.mask_logits(logits, spec, config, **extras)
    assert_same_bits("masked_logits", masked, reference.mask_logits(logits, spec, config, **extras))


def make_logits(generator: torch.Generator, num_tokens: int, num_experts: int, kind: str) -> torch.Tensor:
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    if kind == "ties":
        return (logits * 2).round()
    if kind == "zeros":
        return logits.sign() * 0.0
    if kind == "huge":
        return logits * 1e38
    if kind == "wide":  # most affinities underflow
        return logits * 60
    if kind == "close":  # neighbours in fp32
        return 1.0 + (logits * 4).round() * 2.0**-23
    if kind == "low":  # sigmoids of 0 in fixed point
        return logits - 40
    if kind == "subnormal":
        return logits * 1e-39
    return logits


@st.composite
def calls(draw: st.DrawFn) -> Call:
    scoring = draw(st.sampled_from(SCORINGS))
    rule = RULES[scoring]
    num_groups = 1 if rule.group_best_of == 0 else draw(st.sampled_from((1, 1, 2, 4)))
    num_experts = num_groups * draw(st.integers(2, 24))
    if draw(st.integers(0, 9)) == 0:
        num_experts = num_groups * (512 // num_groups)
    top_k_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(16, top_k_groups * num_experts // num_groups)))
    scale = draw(st.sampled_from((1.0, 2.5, 0.1)))
    spec = RouterSpec(num_experts, top_k, scoring, num_groups, top_k_groups, scale)
    num_tokens = draw(st.sampled_from((0, 1, 2, 3, 7, 16, 33)))

    def maybe(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | values)

    coverage = maybe(st.floats(0.01, 1.0) | st.sampled_from((0.9, 0.97)))
    budget = st.integers(top_k, num_experts + 1)
    config = XShareConfig(
        budget=draw(budget) if coverage is None else maybe(budget),
        warmup=draw(st.integers(1 if num_groups > 1 else 0, top_k)),
        request_budget=maybe(st.integers(1, num_experts + 1)),
        gpu_budget=maybe(st.integers(1, num_experts)),
        coverage=coverage,
        max_rows=maybe(st.integers(1, 40)),
        utility=draw(st.sampled_from(UTILITIES if rule.is_bounded else ("squared_weight",))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("normal", "ties", "zeros", "huge", "wide", "close", "low", "subnormal")))
    logits = make_logits(generator, num_tokens, num_experts, kind).to(draw(st.sampled_from(DTYPES)))
    if num_tokens and draw(st.booleans()):
        logits[draw(st.integers(0, num_tokens - 1)), draw(st.integers(0, num_experts - 1))] = draw(
            st.sampled_from((torch.nan, torch.inf, -torch.inf))
        )
    if draw(st.booleans()):
        banned = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from((0.1, 0.5, 0.9)))
        logits = logits.masked_fill(banned, -torch.inf)

    extras: dict[str, torch.Tensor] = {}
    if rule.has_bias and draw(st.booleans()):
        bias = torch.randn(num_experts, generator=generator)
        extras["correction_bias"] = bias * draw(st.sampled_from((0.1, 1.0, 1e37, 1e-39, 0.0)))
    if config.request_budget is not None or draw(st.booleans()):
        names = torch.tensor(
            [-1, 0, 1, 2, 7, 2**31 - 1], dtype=draw(st.sampled_from((torch.int32, torch.int64)))
        )
        extras["request_ids"] = names[torch.randint(0, len(names), (num_tokens,), generator=generator)]
    if draw(st.booleans()):
        extras["exempt"] = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from((0.2, 0.9)))
    if config.gpu_budget is not None or draw(st.booleans()):
        gpus = draw(st.sampled_from((1, 2, min(8, num_experts), num_experts)))
        extras["expert_gpu"] = torch.randint(0, gpus, (num_experts,), generator=generator, dtype=torch.int32)
    return logits, spec, config, extras


LARGEST = torch.finfo(torch.float32).max
BEYOND = (  # logit + bias would be infinite
    torch.tensor([[LARGEST, -LARGEST, 1.0, -torch.inf, LARGEST, 0.0]]).repeat(3, 1),
    RouterSpec(6, 4, "topk_sigmoid"),
    XShareConfig(4),
    {"correction_bias": torch.tensor([LARGEST, -LARGEST, 0.0, 1.0, LARGEST, -LARGEST])},
)
EMPTY_SET = (torch.full((2, 8), -50.0), RouterSpec(8, 2, "sigmoid_bias"), XShareConfig(2, warmup=0), {})


@settings(max_examples=600, deadline=None)
@given(calls())
@example(EMPTY_SET)
@example(BEYOND)
def test_equals_reference(call: Call) -> None:
    assert_matches_reference(call)


MODELS = {
    "gpt-oss": RouterSpec(128, 4, "topk_softmax"),
    "olmoe": RouterSpec(64, 8, "softmax"),
    "qwen3": RouterSpec(128, 8, "softmax_renorm"),
    "deepseek-v3": RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
    "kimi-k2": RouterSpec(384, 8, "sigmoid_bias", 1, 1, 2.827),
    "largest": RouterSpec(512, 16, "softmax"),
    "ernie-4.5": RouterSpec(64, 6, "softmax_bias_renorm"),
    "longcat-flash": RouterSpec(512, 12, "softmax_bias", 1, 1, 6.0),
    "llama-4": RouterSpec(128, 1, "topk_sigmoid"),
    "deepseek-v4": RouterSpec(256, 6, "sqrt_softplus_bias", 1, 1, 1.5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_equals_reference_at_model_shapes(model: str, dtype: torch.dtype) -> None:
    spec = MODELS[model]
    generator = torch.Generator().manual_seed(hash(model) % 1000)
    logits = torch.randn(64, spec.num_experts, generator=generator).to(dtype)
    extras = {
        "request_ids": torch.arange(64, dtype=torch.int32) // 4 - 1,
        "exempt": torch.arange(64) % 11 == 0,
        "expert_gpu": torch.arange(spec.num_experts, dtype=torch.int32) % 8,
    }
    for config in (
        XShareConfig.off(spec),
        XShareConfig(spec.num_experts // 4),
        XShareConfig(spec.num_experts // 4, request_budget=12),
        XShareConfig(spec.num_experts // 2, warmup=min(2, spec.top_k), gpu_budget=spec.num_experts // 16),
        XShareConfig(spec.num_experts, warmup=1, request_budget=20, gpu_budget=12, coverage=0.6),
        XShareConfig(coverage=0.97),
        XShareConfig(coverage=0.9, utility="affinity" if spec.rule.is_bounded else "squared_weight"),
    ):
        assert_matches_reference((logits, spec, config, extras))


def test_rows_beyond_the_kept_keys_are_scored_again() -> None:
    spec = RouterSpec(512, 8, "sigmoid_bias", 8, 4)  # 1 MiB of keys is 512 rows
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(700, 512, generator=generator).bfloat16()
    extras = {"request_ids": torch.randint(-1, 50, (700,), generator=generator)}
    assert_matches_reference((logits, spec, XShareConfig(128, request_budget=40), extras))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_precision_value(dtype: torch.dtype) -> None:
    """Each 16-bit pattern once, in rows of 64: widening, order, exp and sigmoid at every input there is."""
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
    for scoring in ("softmax", "sigmoid_bias"):
        spec = RouterSpec(64, 8, scoring)
        for config in (XShareConfig.off(spec), XShareConfig(16), XShareConfig(coverage=0.9)):
            assert_matches_reference((logits, spec, config, {}))


def test_strided_and_odd_arguments() -> None:
    spec, config = RouterSpec(32, 4, "sigmoid_bias"), XShareConfig(8, request_budget=6, gpu_budget=2)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(32, 18, generator=generator).t()[::2]  # strided
    requests = torch.tensor([0, 0, 2**40, 2**40, -1, 5, 5, 2**62, 2**62])
    extras = {
        "correction_bias": torch.randn(64, generator=generator).bfloat16()[::2],
        "request_ids": requests,
        "exempt": (torch.arange(18) % 7 == 0)[::2],
        "expert_gpu": torch.arange(32).to(torch.uint8) // 8,
    }
    assert_matches_reference((wide, spec, config, extras))


def call_op(logits: torch.Tensor, spec: RouterSpec, config: XShareConfig, **extras: torch.Tensor) -> Any:
    names = ("correction_bias", "request_ids", "exempt", "expert_gpu")
    return (logits, *(extras.get(name) for name in names), *ops.settings(spec, config))


@pytest.mark.parametrize(
    "op", (torch.ops.xshare.route.default, torch.ops.xshare.mask_logits.default), ids=str
)
def test_opcheck(op: Any) -> None:
    spec, config = RouterSpec(32, 4, "sigmoid_bias"), XShareConfig(8, request_budget=6, gpu_budget=4)
    extras = {
        "correction_bias": torch.randn(32),
        "request_ids": torch.arange(6, dtype=torch.int32) - 1,
        "exempt": torch.arange(6) == 3,
        "expert_gpu": torch.arange(32, dtype=torch.int32) % 8,
    }
    torch.library.opcheck(op, call_op(torch.randn(6, 32), spec, config, **extras))
    plain = RouterSpec(16, 2, "softmax")
    torch.library.opcheck(op, call_op(torch.randn(3, 16).half(), plain, XShareConfig(4)))


def test_compiles_into_one_graph() -> None:
    spec, config = RouterSpec(64, 4, "topk_softmax"), XShareConfig(16)

    def layer(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = hidden @ weight
        ids, weights, active, stats = ops.route(logits, spec, config)
        return ids, weights * 2, active, stats, ops.mask_logits(logits, spec, config)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(32, 64)
    for num_tokens in (8, 5):
        hidden = torch.randn(num_tokens, 32)
        for got, want in zip(compiled(hidden, weight), layer(hidden, weight), strict=True):
            assert torch.equal(got, want)


def test_exports() -> None:
    spec, config = RouterSpec(64, 4, "softmax_renorm"), XShareConfig(16)

    class Layer(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return ops.route(logits, spec, config)[0]

    logits = torch.randn(8, 64)
    exported = torch.export.export(Layer(), (logits,))
    assert "xshare.route" in exported.graph_module.code
    assert torch.equal(exported.module()(logits), ops.route(logits, spec, config)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_modes_and_subclasses_see_the_operator() -> None:
    spec, config = RouterSpec(64, 4, "softmax_renorm"), XShareConfig(16)
    with FakeTensorMode() as mode:
        ids, weights, active, stats = ops.route(torch.empty(8, 64), spec, config)
        assert ops.mask_logits(torch.empty(8, 64).half(), spec, config).dtype == torch.float16
    assert all(isinstance(t, FakeTensor) and t.fake_mode is mode for t in (ids, weights, active, stats))
    assert (ids.shape, ids.dtype, active.shape, active.dtype) == ((8, 4), torch.int32, (64,), torch.bool)
    graph = make_fx(lambda logits: ops.route(logits, spec, config)[0])(torch.randn(8, 64))
    assert "xshare.route" in graph.code
    traced = torch.jit.trace(lambda logits: ops.route(logits, spec, config)[0], torch.randn(8, 64))
    logits = torch.randn(8, 64)
    assert torch.equal(traced(logits), ops.route(logits, spec, config)[0])


def test_threads_do_not_disturb_each_other() -> None:
    spec, config = MODELS["qwen3"], XShareConfig(32)
    inputs = [torch.randn(16 + i, 128) for i in range(4)]
    expected = [ops.route(logits, spec, config) for logits in inputs]
    same: list[bool] = []

    def work(index: int) -> None:
        for _ in range(200):
            got = ops.route(inputs[index], spec, config)
            same.append(all(map(torch.equal, got, expected[index])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 800 and all(same)


C_LIBRARY = ctypes.CDLL(None)
FE = {  # rounding directions in fenv.h: upward, downward, towards zero
    "x86_64": (0x800, 0x400, 0xC00),
    "aarch64": (0x400000, 0x800000, 0xC00000),
}


@contextmanager
def flushing() -> Iterator[None]:
    """The calling thread takes subnormal numbers for zeros, as `torch.set_flush_denormal(True)` asks for."""
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormal numbers on this CPU")
    try:
        assert torch.tensor(1e-39).mul(1.0).item() == 0.0
        yield
        assert torch.tensor(1e-39).mul(1.0).item() == 0.0, "the caller's mode was not restored"
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def rounding(direction: int) -> Iterator[None]:
    before = C_LIBRARY.fegetround()
    assert C_LIBRARY.fesetround(direction) == 0
    try:
        yield
        after = C_LIBRARY.fegetround()
    finally:
        C_LIBRARY.fesetround(before)
    assert after == direction, "the caller's mode was not restored"


def float_modes() -> list[AbstractContextManager[None]]:
    return [flushing(), *(rounding(direction) for direction in FE.get(platform.machine(), ()))]


def subnormal(*shape: int) -> torch.Tensor:
    return 1e-39 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def far_apart(num_tokens: int, num_experts: int) -> torch.Tensor:
    """The first eight of a row at 0, the others so far below that their softmax is subnormal."""
    logits = -86 - torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(6))
    return torch.where(torch.arange(num_experts) < 8, 0.0, logits)


SMALL_NUMBERS: dict[str, Call] = {
    "logits": (subnormal(16, 128), RouterSpec(128, 4, "topk_softmax"), XShareConfig(coverage=0.9), {}),
    "affinities": (far_apart(16, 64), RouterSpec(64, 16, "softmax"), XShareConfig(64), {}),
    "weights": (far_apart(16, 64), RouterSpec(64, 16, "topk_softmax"), XShareConfig(64), {}),
    "bias": (
        torch.full((16, 64), -90.0),
        RouterSpec(64, 8, "sigmoid_bias"),
        XShareConfig(16),
        {"correction_bias": subnormal(64)},
    ),
    "scaled": (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(7)),
        RouterSpec(16, 4, "softmax_renorm", routed_scaling_factor=1.5e-38),
        XShareConfig(coverage=0.97),
        {},
    ),
}


@pytest.mark.parametrize("what", SMALL_NUMBERS)
def test_small_numbers_equal_the_reference(what: str) -> None:
    assert_matches_reference(SMALL_NUMBERS[what])


def assert_same_in_every_mode(call: Call) -> None:
    logits, spec, config, extras = call
    expected = (*ops.route(logits, spec, config, **extras), ops.mask_logits(logits, spec, config, **extras))
    for mode in float_modes():
        with mode:
            got = (
                *ops.route(logits, spec, config, **extras),
                ops.mask_logits(logits, spec, config, **extras),
            )
        for name, mine, wanted in zip((*OUTPUTS, "masked_logits"), got, expected, strict=True):
            assert_same_bits(name, mine, wanted)


@pytest.mark.parametrize("what", SMALL_NUMBERS)
def test_bits_do_not_depend_on_the_callers_float_mode(what: str) -> None:
    """The reference's do, which is why these calls show whether the library has a mode of its own."""
    call = SMALL_NUMBERS[what]
    assert_same_in_every_mode(call)
    logits, spec, config, extras = call
    default = reference.route(logits, spec, config, **extras)
    with flushing():
        flushed = reference.route(logits, spec, config, **extras)
    assert not all(map(torch.equal, flushed, default))


@settings(max_examples=50, deadline=None)
@given(calls())
def test_bits_do_not_depend_on_the_callers_float_mode_anywhere(call: Call) -> None:
    assert_same_in_every_mode(call)


def test_a_refused_call_restores_the_callers_float_mode() -> None:
    for mode in float_modes():
        with mode, pytest.raises(ValueError, match="budget must be at least top_k=4"):
            ops.route(torch.zeros(2, 16), SPEC, XShareConfig(3))


SPEC = RouterSpec(16, 4, "softmax")
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"router_logits": torch.randn(2, 3, 16)},
        r"router_logits: shape must be \[rows, experts\], got \[2, 3, 16\]",
    ),
    (
        {"router_logits": torch.randn(2, 16).double()},
        "router_logits: dtype must be float32, bfloat16 or float16",
    ),
    ({"router_logits": torch.randn(2, 600)}, r"num_experts must be in 1\.\.512, not 600"),
    ({"router_logits": torch.randn(2, 3)}, "top_k=4 is more than num_experts=3"),
    ({"correction_bias": torch.zeros(16)}, "correction_bias: softmax scoring has none"),
    ({"request_ids": torch.tensor([0, -2])}, r"request_ids\[1\]=-2 must be -1 \(padding\) or not negative"),
    ({"request_ids": torch.tensor([0, -(2**40)])}, r"request_ids\[1\]=-2 must be"),
    ({"request_ids": torch.tensor([2**40, -(2**40)])}, r"request_ids\[1\]=-2 must be"),
    ({"request_ids": torch.tensor([0])}, r"request_ids: shape must be \[2\], got \[1\]"),
    ({"exempt": torch.tensor([[True, False]])}, r"exempt: shape must be \[2\], got \[1, 2\]"),
    ({"expert_gpu": torch.full((16,), 16)}, r"expert_gpu\[0\]=16 must be in 0\.\.num_experts-1=15"),
    ({"expert_gpu": torch.full((16,), 2**32)}, r"expert_gpu\[0\]=2147483647 must be"),
    ({"config": XShareConfig(3)}, r"XShareConfig\(budget=3\): budget must be at least top_k=4"),
    ({"config": XShareConfig(8, warmup=5)}, r"XShareConfig\(warmup=5\): warmup must be at most top_k=4"),
    ({"config": XShareConfig((8, 8))}, "a layer needs its own configuration"),
    ({"config": XShareConfig(8, request_budget=4)}, "request_budget=4 needs request_ids"),
    ({"config": XShareConfig(8, gpu_budget=4)}, "gpu_budget=4 needs expert_gpu"),
    (
        {"spec": RouterSpec(16, 2, "softmax", 4, 2), "config": XShareConfig(8, warmup=0)},
        "a group-limited router needs warmup of at least 1",
    ),
    (
        {
            "spec": RouterSpec(16, 4, "sigmoid_bias"),
            "correction_bias": torch.tensor([0.0] * 15 + [torch.nan]),
        },
        r"correction_bias\[15\] is not finite",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals_name_the_argument(changes: dict[str, Any], message: str) -> None:
    arguments = {"router_logits": torch.randn(2, 16), "spec": SPEC, "config": XShareConfig(8)} | changes
    for op in (ops.route, ops.mask_logits):
        with pytest.raises(ValueError, match=message):
            op(**arguments)


def test_budgets_beyond_int32() -> None:
    logits, ids = torch.randn(4, 16), torch.zeros(4, dtype=torch.int32)
    config = XShareConfig(2**40, request_budget=2**40, gpu_budget=2**40, max_rows=2**40)
    assert_matches_reference(
        (logits, SPEC, config, {"request_ids": ids, "expert_gpu": torch.zeros(16).int()})
    )


def test_masked_logits_may_be_the_logits() -> None:
    """In place through the C ABI, which the operator never does."""
    spec, config = RouterSpec(256, 8, "sigmoid_bias", 8, 4), XShareConfig(48)
    logits = torch.randn(1100, 256)  # beyond the kept keys
    expected = ops.mask_logits(logits, spec, config)
    expected_ids = ops.route(logits, spec, config)[0]
    ids = torch.empty_like(expected_ids)
    outputs = (ids.data_ptr(), 0, logits.data_ptr(), 0, 0)
    ops._call(logits, None, None, None, None, ops.settings(spec, config), outputs)
    assert torch.equal(logits, expected) and torch.equal(ids, expected_ids)


def test_says_once_that_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LIBRARY", ops.LIBRARY.with_name("libnone.so"))
    ops._load.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not ops.available() and not ops.available()
        assert [str(w.message).startswith("xshare_trtllm: no native library") for w in caught] == [True]
        with pytest.raises(RuntimeError, match="is not built: install a C"):
            ops.route(torch.randn(2, 16), SPEC, XShareConfig(8))
    finally:
        ops._load.cache_clear()
        monkeypatch.undo()
    assert ops.available()


def test_structs_have_the_size_of_the_header() -> None:
    library = ops._library()
    size = ctypes.c_size_t()
    library.xshare_workspace_size.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    values = ops.settings(RouterSpec(128, 4, "topk_softmax"), XShareConfig(32))
    params = ops.pack_params(16, 128, torch.float32, values)
    assert library.xshare_workspace_size(params, ctypes.byref(size)) == 0
    assert size.value == 16 * 128 * 4 + 64
