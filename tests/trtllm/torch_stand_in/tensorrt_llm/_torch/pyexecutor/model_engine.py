"""tensorrt_llm/_torch/pyexecutor/model_engine.py and cuda_graph_runner.py (at 7b437aaa73): a step.

The metadata's fields are set, then `prepare()`, then `model.forward(**inputs)`: not `model(...)`, so hooks of
the model would not run. A CUDA graph is a `make_fx` trace here: like a graph it holds the operators and the
addresses of the tensors that were there when it was captured, and a replay runs no Python of the model.
torch.compile is put around the model in `__init__`, and traces it in the first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

try:  # since August 2026
    from tensorrt_llm._torch.attention.backends.interface import TrtllmAttentionMetadata
except ModuleNotFoundError:
    from tensorrt_llm._torch.attention_backend.interface import TrtllmAttentionMetadata
from tensorrt_llm._torch.utils import get_model_extra_attrs, model_extra_attrs, set_torch_compiling

CUDA_GRAPH_DUMMY_REQUEST_ID = (1 << 64) - 1


class Model(nn.Module):
    """A DecoderModelForCausalLM: `config`, `forward` with keyword arguments."""

    def __init__(self, *layers: nn.Module, num_hidden_layers: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.config = SimpleNamespace(num_hidden_layers=num_hidden_layers or len(layers))
        numbers = {str(getattr(layer, "layer_idx", None)): weakref.ref(layer) for layer in layers}
        self.extra_attrs: dict[str, Any] = {"moe_layers": numbers}

    def forward(self, attn_metadata: Any, router_logits: Tensor, **kwargs: Any) -> Tensor:
        x = torch.ones(len(router_logits), 4)
        for layer in self.layers:
            x = layer(x, router_logits)
        return x


class PyTorchModelEngine:
    def __init__(
        self,
        *,
        model_path: str = "",
        model: Any,
        mapping: Any = None,
        is_draft_model: bool = False,
        torch_compile_backend: Any = None,
    ) -> None:
        self.model, self.is_draft_model, self.mapping = model, is_draft_model, mapping
        set_torch_compiling(torch_compile_backend is not None)
        if torch_compile_backend is not None:
            self.model = torch.compile(self.model, backend=torch_compile_backend, fullgraph=True)
        self.attn_metadata = TrtllmAttentionMetadata(
            max_num_requests=64, max_num_tokens=64, mapping=mapping, kv_cache_manager=object()
        )
        self.graphs: dict[int, tuple[Any, Any, Tensor]] = {}

    def _release_cuda_graphs(self) -> None:
        self.graphs.clear()

    def step(
        self,
        router_logits: Tensor,
        request_ids: Sequence[int],
        seq_lens: Sequence[int] | None = None,
        num_contexts: int = 0,
        drafts: int = 0,
        cuda_graph: bool = False,
    ) -> Tensor:
        """One forward pass. The logits are those of the packed rows."""
        lengths = torch.tensor(seq_lens or [1] * len(request_ids), dtype=torch.int)
        metadata = self.attn_metadata
        if cuda_graph:
            graph = self.graphs.get(len(lengths))
            metadata = graph[1] if graph else metadata.create_cuda_graph_metadata(len(lengths))
        metadata.seq_lens = lengths
        metadata.request_ids = list(request_ids)
        metadata.num_contexts, metadata.num_chunked_ctx_requests = num_contexts, drafts
        metadata.prepare()
        with model_extra_attrs(getattr(self.model, "extra_attrs", {})):
            if not cuda_graph:
                return self.model_forward(attn_metadata=metadata, router_logits=router_logits)
            if not graph:
                inputs = torch.zeros_like(router_logits)
                for _ in range(2):  # warm up
                    self.model_forward(attn_metadata=metadata, router_logits=inputs)
                trace = make_fx(
                    lambda logits: self.model_forward(attn_metadata=metadata, router_logits=logits)
                )(inputs)
                graph = self.graphs[len(lengths)] = (trace, metadata, inputs)
        graph[2].copy_(router_logits)
        output: Tensor = graph[0](graph[2])
        return output

    def model_forward(self, **kwargs: Any) -> Tensor:
        attrs = get_model_extra_attrs()
        assert attrs is not None
        attrs["attention_metadata"] = weakref.ref(kwargs["attn_metadata"])
        output: Tensor = self.model.forward(**kwargs)
        return output


def make_model(mapping: Any) -> Model:
    """What a worker loads: one MoE layer of 32 experts, 4 per token."""
    from importlib import import_module

    try:  # since August 2026
        home = "tensorrt_llm._torch.moe.fused_moe"
        method = import_module(f"{home}.routing").RenormalizeMoeRoutingMethod(4)
        moe = import_module(f"{home}.moe")
        options = {"routing_method": method, "num_experts": 32, "mapping": mapping}
        layer = moe.ConfigurableMoE(moe.TrtllmCutlassUnquantizedImpl, **options)
    except ModuleNotFoundError:
        home = "tensorrt_llm._torch.modules.fused_moe"
        method = import_module(f"{home}.routing").RenormalizeMoeRoutingMethod(4)
        options = {"routing_method": method, "num_experts": 32, "mapping": mapping}
        layer = import_module(f"{home}.moe").CutlassFusedMoE(**options)
    return Model(layer)
