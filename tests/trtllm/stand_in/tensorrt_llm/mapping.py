"""tensorrt_llm/mapping.py of 1.x: which layers and experts a rank holds."""

from __future__ import annotations


class Mapping:
    def __init__(
        self, world_size: int = 1, rank: int = 0, tp_size: int = 1, pp_size: int = 1, moe_ep_size: int = 1
    ) -> None:
        self.world_size, self.rank = world_size, rank
        self.tp_size, self.pp_size, self.moe_ep_size = tp_size, pp_size, moe_ep_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    def pp_layers(self, num_layers: int) -> list[int]:
        per_stage = num_layers // self.pp_size
        return list(range(self.pp_rank * per_stage, (self.pp_rank + 1) * per_stage))
