"""Which rows of a step of the PyTorch backend are padding or prefill, and whose request they are.

TensorRT-LLM describes a step on the host, in its `AttentionMetadata`, and calls `prepare()` on it before
every step, also before the replay of a CUDA graph, where no Python of the model runs. So that is where two
device tensors per metadata object are filled. Their addresses stay, and a captured graph reads the values of
the step that it is replayed for.

What the metadata says (TensorRT-LLM, tensorrt_llm/_torch/attention_backend/interface.py, since August 2026
_torch/attention/backends/interface.py, and pyexecutor/model_engine.py): rows are packed, prefill first;
`seq_lens` has the rows of each sequence, `request_ids` its request, and the first `num_contexts` are prefill.
Verification of draft tokens may count as prefill and then comes last there (`num_chunked_ctx_requests`). A
batch that is padded to the size of a CUDA graph ends in a dummy request, repeated
(pyexecutor/cuda_graph_runner.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

# Ids of dummy requests count down from the end of uint64.
_FIRST_DUMMY_ID = 2**63


class StepRows:
    """What the rows of a step are.

    request_ids  int32 [capacity], the place of the row's request in the batch; -1 = padding
    exempt       bool [capacity], prefill
    num_rows     rows of the step; behind them everything is padding
    has_real     whether one of them is not padding
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # or they could only be written to in inference mode
            self.request_ids = torch.full((capacity,), -1, dtype=torch.int32, device=device)
            self.exempt = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.num_rows, self.has_real = 0, False

    def update(self, metadata: Any) -> None:
        """From the metadata of the step to come. Enqueues two copies and waits for nothing."""
        lengths = metadata.seq_lens.to(torch.int64)
        requests = torch.arange(len(lengths), dtype=torch.int32)
        requests[torch.tensor(_is_padding(metadata), dtype=torch.bool)] = -1
        per_row = requests.repeat_interleave(lengths)
        drafts = getattr(metadata, "num_chunked_ctx_requests", 0)
        prefill_rows = int(lengths[: metadata.num_contexts - drafts].sum())
        self.num_rows, capacity = len(per_row), len(self.request_ids)
        self.has_real = bool((per_row >= 0).any())
        if self.num_rows > capacity:
            raise ValueError(f"XShare: {self.num_rows} rows in a step, more than max_num_tokens={capacity}")
        # Fresh host memory for every step: the copies of an earlier one may still be waiting for the device.
        on_gpu = self.request_ids.is_cuda
        request_ids = torch.full((capacity,), -1, dtype=torch.int32, pin_memory=on_gpu)
        exempt = torch.zeros(capacity, dtype=torch.bool, pin_memory=on_gpu)
        request_ids[: self.num_rows] = per_row
        exempt[:prefill_rows] = True
        self.request_ids.copy_(request_ids, non_blocking=True)
        self.exempt.copy_(exempt, non_blocking=True)

    def slice(self, first: int, count: int) -> dict[str, Tensor]:
        """`request_ids` and `exempt` of rows first .. first + count - 1, beyond the capacity too."""
        request_ids, exempt = self.request_ids[first : first + count], self.exempt[first : first + count]
        missing = count - len(request_ids)
        if missing:
            request_ids = nn.functional.pad(request_ids, (0, missing), value=-1)
            exempt = nn.functional.pad(exempt, (0, missing))
        return {"request_ids": request_ids, "exempt": exempt}


def _is_padding(metadata: Any) -> list[bool]:
    """Per sequence."""
    ids, num_sequences = metadata.request_ids, len(metadata.seq_lens)
    if ids is None or len(ids) != num_sequences:  # not one id per sequence (beams): no padding is known
        return [False] * num_sequences
    # With attention data parallelism a rank without requests runs a dummy one with id 0, which no other has.
    idle = 0 if getattr(metadata.mapping, "enable_attention_dp", False) else None
    return [request >= _FIRST_DUMMY_ID or request == idle for request in ids]


def rows_of_this_step() -> StepRows | None:
    """Of the model call under way, in whose thread TensorRT-LLM keeps a reference to the metadata. None where
    a layer is called outside of the engine.

    Raises RuntimeError where the engine calls and its metadata was not seen: a guess would route padding.
    """
    attributes = import_module("tensorrt_llm._torch.utils").get_model_extra_attrs()
    if attributes is None:
        return None
    reference = attributes.get("attention_metadata")
    metadata = None if reference is None else reference()
    rows = None if metadata is None else _attached_rows(metadata)
    if rows is None:
        raise RuntimeError(
            "XShare: the attention metadata of this step was not prepared by AttentionMetadata.prepare() "
            "with a KV cache, this version or mode of TensorRT-LLM is not supported"
        )
    return rows


def _attached_rows(metadata: Any) -> StepRows | None:
    rows, owner = vars(metadata).get("xshare_rows", (None, None))
    return rows if owner is not None and owner() is metadata else None  # a copy of the metadata has them too


def _note_rows(metadata: Any) -> StepRows | None:
    """The rows of the step to come; None where the metadata is not that of a step of the model."""
    if metadata.seq_lens is None or metadata.kv_cache_manager is None:
        return None  # a vision tower prepares metadata of its own, without a KV cache and of another size
    rows = _attached_rows(metadata)
    if rows is None:
        rows = StepRows(metadata.max_num_tokens, metadata.seq_lens_cuda.device)
        vars(metadata)["xshare_rows"] = (rows, weakref.ref(metadata))
    rows.update(metadata)
    return rows


METADATA_MODULES = (
    "tensorrt_llm._torch.attention.backends.interface",  # since August 2026
    "tensorrt_llm._torch.attention_backend.interface",
)


def attention_metadata_class() -> Any:
    """`AttentionMetadata`, from either of its homes. Raises RuntimeError where it is in neither."""
    for name in METADATA_MODULES:
        try:
            return import_module(name).AttentionMetadata
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):  # it is there, and misses something
                raise
    raise RuntimeError(
        f"XShare: this version of TensorRT-LLM has AttentionMetadata in none of {', '.join(METADATA_MODULES)}"
    )


_listeners: list[Callable[[bool], None]] = []


def after_prepare(listener: Callable[[bool], None]) -> None:
    """Calls `listener` before every step from now on, in the thread that makes it, after its rows were noted,
    and says whether one of them is not padding: a warm-up and a rank without requests have none."""
    _listeners.append(listener)


class MetadataWatch:
    """Notes the rows of every step whose metadata is prepared, from the first `start` to the last `stop`."""

    def __init__(self) -> None:
        self._starts = 0
        self._own: list[tuple[Any, Callable[..., Any]]] = []

    def start(self) -> None:
        if self._starts:
            self._starts += 1
            return
        base = attention_metadata_class()
        self._starts = 1
        for kind in _family(base):
            prepare = vars(kind).get("prepare")
            if prepare is not None:
                self._own.append((kind, prepare))
                kind.prepare = _noting(prepare)

    def stop(self) -> None:
        self._starts -= 1
        while not self._starts and self._own:
            kind, prepare = self._own.pop()
            kind.prepare = prepare


def _noting(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prepare)
    def prepare_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = prepare(self, *args, **kwargs)
        rows = _note_rows(self)
        if rows is not None:
            for listener in _listeners:
                listener(rows.has_real)
        return result

    return prepare_and_note


def _family(kind: Any) -> list[Any]:
    """The class and all that derive from it, each once."""
    family = [kind]
    for member in family:
        family += [child for child in member.__subclasses__() if child not in family]
    return family
