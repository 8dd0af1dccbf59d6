"""MoE modules in tensorrt_llm/_torch/moe/fused_moe/: a complete layer around an execution unit.

- configurable_moe.py at 17d5bd861c: the layer; `forward_impl` hands on to a scheduler.
- moe_scheduler.py at 0594f78ce9: what the scheduler asks for, and when `apply` is called, with `input_ids`.
- impl_base.py at 210daf12df: an execution unit has `routing_method`, `num_experts`, `ep_size` and so on, a
  `run_moe` and a `try_fused_route_quant`, but no forward.
- impl_identity.py at 47af5a5de6, trtllm_gen/identity.py and base.py at 598c4dcd1b, the leaf
  TrtllmCutlassUnquantizedImpl (cutlass/, 2026-09): one class per format, with `descriptor.identity`.
- interface.py at 1f41a4c7d3: `MoE.forward`; fused_moe_triton.py stays a layer of its own.

Experts multiply a row by a number of their own, so that a wrong id or weight is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorrt_llm._torch.utils import SINGLE


@dataclass(frozen=True)
class MoEImplId:
    provider: str
    technique: str
    kernel_name: str
    quant: str


@dataclass(frozen=True)
class MoEImplDescriptor:
    identity: MoEImplId


def construct(
    module: Any, routing_method: Any, num_experts: int, layer_idx: int | None, mapping: Any
) -> None:
    module.routing_method, module.num_experts, module.layer_idx = routing_method, num_experts, layer_idx
    module.mapping, module.ep_size = mapping, mapping.moe_ep_size
    module.use_dp, module.parallel_size = mapping.enable_attention_dp, mapping.tp_size
    module.num_slots, module.layer_load_balancer = num_experts, None


class MoEImplBase(nn.Module):
    """An execution unit."""

    descriptor: MoEImplDescriptor
    scheduler_kind = "external_comm"

    def __init__(self, *, routing_method: Any, num_experts: int, mapping: Any = SINGLE) -> None:
        super().__init__()
        construct(self, routing_method, num_experts, None, mapping)
        self.scale = nn.Parameter(1.0 + torch.arange(num_experts, dtype=torch.float32), requires_grad=False)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def _supports_load_balancer(self) -> bool:
        return True

    def try_fused_route_quant(self, x: Tensor, router_logits: Tensor) -> tuple[Tensor, ...] | None:
        return None

    def run_moe(self, x: Tensor, ids: Tensor | None, weights: Tensor | None, router_logits: Tensor) -> Tensor:
        assert ids is not None and weights is not None
        self.calls.append((ids, weights))
        return x * (self.scale[ids.long()] * weights).sum(-1, keepdim=True)


class CutlassFusedMoEBase(MoEImplBase):
    pass


class TrtllmCutlassUnquantizedImpl(CutlassFusedMoEBase):
    descriptor = MoEImplDescriptor(MoEImplId("trtllm", "cutlass", "grouped_gemm", "none"))


class DeepgemmCudaHopperFp8BlockScalesImpl(MoEImplBase):
    descriptor = MoEImplDescriptor(MoEImplId("deepgemm", "cuda_cpp", "grouped_gemm", "fp8_block_scales"))


class DenseGemmNvfp4Impl(MoEImplBase):
    descriptor = MoEImplDescriptor(MoEImplId("trtllm", "cutedsl", "dense_gemm", "nvfp4"))


class UnheardOfImpl(MoEImplBase):
    descriptor = MoEImplDescriptor(MoEImplId("someone", "tilelang", "grouped_gemm", "none"))


class MegaMoEDeepGemm(MoEImplBase):
    """mega_moe/mega_moe_deepgemm.py: the exchange between ranks is in its kernel."""

    scheduler_kind = "fused_comm"


class MarlinFusedMoE(MoEImplBase):
    """fused_moe_marlin.py at 1f41a4c7d3: may route from the logits by itself."""

    def _supports_load_balancer(self) -> bool:
        return False

    def run_moe(self, x: Tensor, ids: Tensor | None, weights: Tensor | None, router_logits: Tensor) -> Tensor:
        if ids is None or weights is None:
            best, chosen = router_logits.topk(self.routing_method.experts_per_token)
            ids, weights = chosen.to(torch.int32), best.softmax(-1)
        return super().run_moe(x, ids, weights, router_logits)


class MarlinCudaNvfp4Impl(MarlinFusedMoE):
    """marlin/nvfp4.py at af978d1ca1, marlin/identity.py at 829486f6f9: Marlin is the provider there."""

    descriptor = MoEImplDescriptor(MoEImplId("marlin", "cuda", "fused_moe", "nvfp4"))


class TrtllmGenFusedMoEBase(MarlinFusedMoE):
    """trtllm_gen/base.py: routes in its kernel unless the top-k is computed before."""

    def _supports_load_balancer(self) -> bool:
        return bool(self.use_dp and self.parallel_size > 1)


class TrtllmTrtllmGenNvfp4Impl(TrtllmGenFusedMoEBase):
    descriptor = MoEImplDescriptor(MoEImplId("trtllm", "trtllm_gen", "fused_moe", "nvfp4"))

    def try_fused_route_quant(self, x: Tensor, router_logits: Tensor) -> tuple[Tensor, ...] | None:
        ids = router_logits.topk(self.routing_method.experts_per_token).indices
        return ids.to(torch.int32), torch.ones(ids.shape), x, x


class PrimsTSNvfp4FusedMoE(TrtllmGenFusedMoEBase):
    """fused_moe_prims_ts.py at 0f271ef0eb: has the routing method from before, for its own routing."""

    descriptor = MoEImplDescriptor(MoEImplId("flashinfer", "cutedsl", "prims_ts", "nvfp4"))


class MoE(nn.Module):
    def forward(
        self,
        x: Tensor,
        router_logits: Tensor,
        do_finalize: bool = True,
        output_dtype: torch.dtype | None = None,
        all_rank_num_tokens: list[int] | None = None,
        use_dp_padding: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = self.forward_impl(
            x,
            router_logits,
            do_finalize=do_finalize,
            output_dtype=output_dtype,
            all_rank_num_tokens=all_rank_num_tokens,
            use_dp_padding=use_dp_padding,
            **kwargs,
        )
        return output


class ConfigurableMoE(MoE):
    def __init__(
        self,
        backend: type[MoEImplBase],
        *,
        routing_method: Any,
        num_experts: int,
        mapping: Any = SINGLE,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        construct(self, routing_method, num_experts, layer_idx, mapping)
        self.backend = backend(routing_method=routing_method, num_experts=num_experts, mapping=mapping)
        self.comm = None

    def forward_impl(
        self,
        x: Tensor,
        router_logits: Tensor,
        *,
        do_finalize: bool,
        output_dtype: torch.dtype | None,
        all_rank_num_tokens: list[int] | None,
        use_dp_padding: bool | None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        if self.backend.scheduler_kind == "fused_comm":
            return self._fused_comm(x, router_logits, all_rank_num_tokens, input_ids)
        return self._external_comm(x, router_logits, input_ids)

    def _external_comm(self, x: Tensor, router_logits: Tensor, input_ids: Tensor | None) -> Tensor:
        backend, ids, weights = self.backend, None, None
        if backend._supports_load_balancer() or self.routing_method.requires_separated_routing:
            fused = backend.try_fused_route_quant(x, router_logits)
            if fused is None:
                ids, weights = self.routing_method.apply(router_logits, input_ids)
            else:
                ids, weights = fused[:2]
            assert ids.shape[1] == self.routing_method.experts_per_token and ids.shape == weights.shape
            assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        return backend.run_moe(x, ids, weights, router_logits)

    def _fused_comm(
        self,
        x: Tensor,
        router_logits: Tensor,
        all_rank_num_tokens: list[int] | None,
        input_ids: Tensor | None,
    ) -> Tensor:
        """Rows that pad attention data parallelism are cut off before `apply`."""
        rows = len(x) if all_rank_num_tokens is None else all_rank_num_tokens[0]
        ids, weights = self.routing_method.apply(router_logits[:rows], input_ids)
        return self.backend.run_moe(x[:rows], ids.to(torch.int32), weights.to(torch.float32), router_logits)


class TritonFusedMoE(MoE):
    def __init__(
        self, *, routing_method: Any, num_experts: int, mapping: Any = SINGLE, layer_idx: int | None = None
    ) -> None:
        super().__init__()
        construct(self, routing_method, num_experts, layer_idx, mapping)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward_impl(self, x: Tensor, router_logits: Tensor, **kwargs: Any) -> Tensor:
        best, ids = router_logits.float().topk(self.routing_method.experts_per_token)
        self.calls.append((ids.to(torch.int32), best.softmax(-1)))
        return x * best.softmax(-1).sum(-1, keepdim=True)
