"""The operators on CUDA tensors, without a GPU: the code that calls libxshare_cuda.so, with a library that
records what it is handed and, since the pointers are the host's here, computes with libxshare.so.

On a GPU: tests/gpu/test_ops_cuda.py.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xshare_trtllm import RouterSpec, XShareConfig, ops

pytestmark = pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")

SPEC = RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5)
CONFIG = XShareConfig(48, warmup=2, request_budget=20, gpu_budget=12, coverage=0.9, max_rows=100)
STREAM = 0x5EED0
ROUTE_TENSORS = struct.Struct("@I12P")  # xshare_route_tensors in xshare.h


class Library:
    """`xshare_cuda.h` on host memory. `calls` has the arguments of each launch."""

    workspace_size, status, error = 4096, 0, b"no kernel image is available"

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []
        self.sizes_asked = 0

    def xshare_cuda_workspace_size(self, params: bytes, size: Any) -> int:
        self.sizes_asked += 1
        size._obj.value = self.workspace_size
        return 0

    def xshare_route_cuda(
        self, params: bytes, tensors: bytes, workspace: int, workspace_size: int, stream: int
    ) -> int:
        _, *pointers = ROUTE_TENSORS.unpack(tensors)
        self.calls.append(
            SimpleNamespace(
                params=params,
                pointers=pointers,
                workspace=workspace,
                workspace_size=workspace_size,
                stream=stream,
            )
        )
        return self.status or int(ops._library().xshare_route_cpu(params, tensors, None, 0))

    def xshare_last_error(self) -> bytes:
        return self.error


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    devices: list[Any] = []

    def on_device(device: torch.device) -> AbstractContextManager[None]:
        devices.append(device)
        return nullcontext()

    monkeypatch.setattr(ops, "_prebuilt", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    ops._cuda_workspace_size.cache_clear()
    monkeypatch.setattr(made, "devices", devices, raising=False)
    return made


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "router_logits": torch.randn(40, 256, generator=generator).bfloat16(),
        "correction_bias": 0.1 * torch.randn(256, generator=generator),
        "request_ids": torch.randint(-1, 6, (40,), generator=generator, dtype=torch.int32),
        "exempt": torch.rand(40, generator=generator) < 0.1,
        "expert_gpu": torch.arange(256, dtype=torch.int32) // 32,
    }


def test_contract_same_structs_and_results_as_on_the_host(library: Library) -> None:
    arguments, values = inputs(), ops.settings(SPEC, CONFIG)
    outputs = ops._route_cuda(*arguments.values(), *values)
    masked = ops._mask_logits_cuda(*arguments.values(), *values)
    for got, expected in zip(outputs, ops._route_cpu(*arguments.values(), *values), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(masked, ops._mask_logits_cpu(*arguments.values(), *values))

    routing, masking = library.calls
    assert routing.params == masking.params == ops.pack_params(40, 256, torch.bfloat16, values)
    pointers = [tensor.data_ptr() for tensor in arguments.values()]
    ids, weights, active, stats = (output.data_ptr() for output in outputs)
    assert routing.pointers == [*pointers, ids, weights, 0, active, stats, 0, 0]
    assert masking.pointers == [*pointers, 0, 0, masked.data_ptr(), 0, 0, 0, 0]
    assert routing.stream == masking.stream == STREAM
    assert library.devices == [torch.device("cpu")] * 2  # type: ignore[attr-defined]


def test_contract_workspace_is_torchs(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the library asks for, once per shape and settings; none where it asks for none."""
    made: list[Tensor] = []
    own_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made.append(own_empty(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):
        ops._route_cuda(*inputs().values(), *ops.settings(SPEC, CONFIG))
    assert library.sizes_asked == 1
    workspaces = [tensor for tensor in made if tensor.dtype == torch.uint8]
    assert [tensor.shape for tensor in workspaces] == [(4096,)] * 2
    assert [call.workspace for call in library.calls] == [tensor.data_ptr() for tensor in workspaces]
    assert [call.workspace_size for call in library.calls] == [4096] * 2

    ops._cuda_workspace_size.cache_clear()
    library.workspace_size = 0
    ops._route_cuda(*inputs().values(), *ops.settings(SPEC, CONFIG))
    assert (library.calls[-1].workspace, library.calls[-1].workspace_size) == (0, 0)


def test_contract_request_ids_are_not_waited_for(library: Library) -> None:
    """int64 ids become int32 by operations on the device alone, and ids that counted up stay distinct."""
    ids = torch.tensor([2**40, 2**40 + 1, 5, -1, -(2**40), 2**31, 2**31 - 2])
    as_int32 = ops._request_ids_on_device(ids)
    assert as_int32.dtype == torch.int32 and len(as_int32[[0, 1, 2, 5, 6]].unique()) == 5
    assert as_int32[3] == -1 and as_int32[4] == -2 and bool((as_int32[[0, 1, 2, 5, 6]] >= 0).all())
    with FakeTensorMode(allow_non_fake_inputs=True):  # a value that is read fails here
        assert ops._request_ids_on_device(torch.empty(4, dtype=torch.int64)).dtype == torch.int32


@pytest.mark.parametrize("name", ("correction_bias", "request_ids", "exempt", "expert_gpu"))
def test_contract_refuses_tensors_elsewhere(name: str, library: Library) -> None:
    arguments = inputs()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: must be on cpu as router_logits is, not on meta"):
        ops._route_cuda(*arguments.values(), *ops.settings(SPEC, CONFIG))
    assert not library.calls


@pytest.mark.parametrize(("status", "kind"), ((7, RuntimeError), (2, ValueError)))
def test_contract_errors_are_the_librarys(status: int, kind: type[Exception], library: Library) -> None:
    library.status = status
    with pytest.raises(kind, match="no kernel image is available"):
        ops._route_cuda(*inputs().values(), *ops.settings(SPEC, CONFIG))


def test_without_the_library_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_LIBRARY", ops.CUDA_LIBRARY.with_name("libnone.so"))
    monkeypatch.setattr(ops, "why_not", lambda: "cuda-python is not installed: pip install it")
    for function in (ops._load_cuda, ops._prebuilt):
        function.cache_clear()
    try:
        assert ops.why_no_cuda()
        with pytest.raises(RuntimeError, match=r"pip install it\), and libnone\.so is not built"):
            ops._prebuilt()
    finally:
        for function in (ops._load_cuda, ops._prebuilt):
            function.cache_clear()


def test_operators_are_registered_for_cuda_and_traced_without_a_gpu() -> None:
    for name in ("xshare::route", "xshare::mask_logits"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    with FakeTensorMode():
        logits = torch.empty(40, 256, dtype=torch.bfloat16, device="cuda")
        ids, weights, active, stats = ops.route(logits, SPEC, CONFIG)
        masked = ops.mask_logits(logits, SPEC, CONFIG)
    assert {t.device.type for t in (ids, weights, active, stats, masked)} == {"cuda"}
    assert (ids.shape, weights.dtype, masked.dtype) == ((40, 8), torch.float32, torch.bfloat16)


@pytest.mark.skipif(ops._load_cuda() is None, reason="needs libxshare_cuda.so: XSHARE_CUDA=1 pip install .")
def test_the_real_library_says_how_much_workspace_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_prebuilt", ops._load_cuda)
    ops._cuda_workspace_size.cache_clear()
    values = ops.settings(SPEC, XShareConfig(48))
    few, many = (ops._cuda_workspace_size(ops.pack_params(n, 256, torch.float32, values)) for n in (1, 4096))
    assert few == 0 < many and many % 64 == 0
