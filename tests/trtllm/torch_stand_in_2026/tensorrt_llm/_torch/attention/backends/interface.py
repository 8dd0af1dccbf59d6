"""tensorrt_llm/_torch/attention/backends/interface.py at 1262edbc38: AttentionMetadata's home since August
2026. `seq_lens` is host memory; setting it makes the device's copy, in place for a CUDA graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(kw_only=True)
class AttentionMetadata:
    max_num_requests: int
    max_num_tokens: int
    kv_cache_manager: Any = None
    mapping: Any = None
    is_cuda_graph: bool = field(default=False, repr=False)
    request_ids: list[int] | None = None
    num_contexts: int = 0
    num_chunked_ctx_requests: int = 0  # after 1.0 (pyexecutor/model_engine.py, _prepare_tp_inputs)
    _seq_lens: torch.Tensor | None = field(init=False, repr=False, default=None)
    _seq_lens_cuda: torch.Tensor | None = field(init=False, repr=False, default=None)

    @property
    def seq_lens(self) -> torch.Tensor | None:
        return self._seq_lens

    @seq_lens.setter
    def seq_lens(self, value: torch.Tensor) -> None:
        self._seq_lens = value
        if self.is_cuda_graph and self._seq_lens_cuda is not None:
            self._seq_lens_cuda.copy_(value)
        else:
            self._seq_lens_cuda = value.clone()

    @property
    def seq_lens_cuda(self) -> torch.Tensor | None:
        return self._seq_lens_cuda

    def prepare(self) -> None:
        """Called before the forward step of the model."""

    def prepare_encoder_only(self) -> None:
        """For a forward pass without a KV cache; a backend may do less here."""
        self.prepare()

    def create_cuda_graph_metadata(
        self,
        max_batch_size: int,
        sub_cross_metadata: bool = False,
        max_draft_tokens: int = 0,
        buffers: Any = None,
        encode_only: bool = False,
    ) -> AttentionMetadata:
        if self.is_cuda_graph:
            return self
        made = copy.copy(self)
        made.is_cuda_graph = True
        made._seq_lens_cuda = None
        made.seq_lens = torch.ones(max_batch_size, dtype=torch.int) * (1 + max_draft_tokens)
        made.num_contexts = 0
        return made


@dataclass(kw_only=True)
class TrtllmAttentionMetadata(AttentionMetadata):
    """attention/backends/trtllm.py."""

    prepared: int = 0

    def prepare(self) -> None:
        self.prepared += 1
