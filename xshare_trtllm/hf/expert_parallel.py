"""Expert parallelism on real processes: every rank holds a slice of each layer's experts and its own rows.

In every MoE layer the ranks agree on one routing (`distributed.route`), send each row to the ranks that hold
its experts, run their own experts, and send the results back: all-to-all by torch.distributed.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xshare_trtllm import distributed, ops
from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.routing import contiguous_placement


def expert_parallel(
    model: nn.Module, config: XShareConfig, *, group: dist.ProcessGroup | None = None
) -> ExpertParallel:
    """Spreads the experts of a Qwen3-MoE model, or of its `Decoder`, over the ranks of `group` (None = all),
    until `detach()` or the end of a `with`.

    The ranks call the model at the same time, each with its own sequences, without padding; a rank that has
    none calls `idle()` instead. A pass of more than one token per sequence is a prefill: its rows keep their
    own routing. No rank reads a weight of an expert outside its slice.

    Raises ValueError for another model family, a configuration that does not fit, or where the MoE layers are
    replaced already, RuntimeError where libxshare.so is not built.
    """
    return ExpertParallel(model, config, group)


class Work(NamedTuple):
    """What one rank's experts did in one MoE layer and pass."""

    seconds: float  # processor time
    experts: int  # distinct experts run
    rows: int  # rows received


class ExpertParallel:
    """The MoE layers of one model spread over ranks. `work` has this rank's entries, passes after each other,
    the layers of a pass in their order."""

    def __init__(self, model: nn.Module, config: XShareConfig, group: dist.ProcessGroup | None) -> None:
        model_config: Any = model.config
        if model_config.model_type != "qwen3_moe":
            raise ValueError(f"expert_parallel: runs qwen3_moe models, not {model_config.model_type}")
        spec = RouterSpec.from_hf_config(model_config)
        config.check(spec)
        blocks = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeSparseMoeBlock"]
        if any("forward" in vars(block) for block in blocks):
            raise ValueError("expert_parallel: the MoE layers are replaced already; detach first")
        group = distributed.resolve_group(group)
        ops.version()
        self.work: list[Work] = []
        self.hidden_size: int = model_config.hidden_size
        self._layers = [
            _Layer(block, spec, config.for_layer(number), group, self.work)
            for number, block in enumerate(blocks)
        ]
        for layer in self._layers:
            layer.block.forward = layer.forward

    @torch.inference_mode()
    def idle(self) -> None:
        """One pass of a rank without sequences: its experts serve the others' rows."""
        for layer in self._layers:
            layer.forward(torch.empty(0, 1, self.hidden_size))

    def detach(self) -> None:
        """Give the model its own MoE layers back; harmless when repeated."""
        for layer in self._layers:
            vars(layer.block).pop("forward", None)

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class _Layer:
    """What one MoE block does in place of its `forward`."""

    def __init__(
        self,
        block: Any,
        spec: RouterSpec,
        config: XShareConfig,
        group: dist.ProcessGroup,
        work: list[Work],
    ) -> None:
        self.block, self.spec, self.config, self.group, self.work = block, spec, config, group, work
        self.ranks = dist.get_world_size(group)
        self.owner = contiguous_placement(spec.num_experts, self.ranks)
        mine = (self.owner == dist.get_rank(group)).nonzero().flatten()
        self.first, self.size = int(mine[0]) if len(mine) else 0, len(mine)
        own_slice = slice(self.first, self.first + self.size)
        self.gate_up = block.experts.gate_up_proj.detach()[own_slice]
        self.down = block.experts.down_proj.detach()[own_slice]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, length, hidden] to the same: this rank's rows through the experts of all ranks."""
        batch, length, width = hidden_states.shape
        rows = hidden_states.reshape(-1, width)
        routing = distributed.route(
            nn.functional.linear(rows, self.block.gate.weight).detach(),
            self.spec,
            self.config,
            group=self.group,
            request_ids=torch.arange(batch).repeat_interleave(length),
            exempt=torch.full((batch * length,), length > 1),
            expert_gpu=self.owner,
            whole_batch_stats=False,
        )
        output = self._dispatch(rows, routing.expert_ids, routing.expert_weights)
        return output.view(batch, length, width)

    def _dispatch(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Each row goes once to every rank that holds an expert of it, with its ids and weights, and comes
        back as that rank's part of the sum."""
        goes = torch.stack(
            [((self.owner[ids] == rank) & (weights != 0)).any(dim=-1) for rank in range(self.ranks)]
        )
        sent = goes.nonzero()[:, 1]  # by rank, then by row
        outgoing = goes.sum(dim=1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        there, here = outgoing.tolist(), incoming.tolist()

        # Ids travel as fp32, in which small integers are exact: one exchange instead of two.
        packed = torch.cat([rows, ids.float(), weights], dim=1)[sent]
        received = packed.new_empty(sum(here), packed.shape[1])
        dist.all_to_all_single(received, packed, here, there, group=self.group)
        parts = self._run_experts(*received.split([rows.shape[1], ids.shape[1], ids.shape[1]], dim=1))
        returned = rows.new_empty(len(sent), rows.shape[1])
        dist.all_to_all_single(returned, parts, there, here, group=self.group)
        return torch.zeros_like(rows).index_add_(0, sent, returned)

    def _run_experts(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """This rank's experts on the rows that came; slots of other ranks' experts weigh nothing."""
        local = ids.int() - self.first
        is_mine = (local >= 0) & (local < self.size) & (weights != 0)
        local, weights = torch.where(is_mine, local, 0), torch.where(is_mine, weights, 0.0)
        start = time.thread_time()
        output = ops.experts(rows, local, weights, self.gate_up, self.down)
        seconds = time.thread_time() - start
        self.work.append(Work(seconds, len(local[is_mine].unique()), len(rows)))
        return output
