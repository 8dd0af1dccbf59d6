"""Calls behind each other that read what the one before has written last: A -> B -> C, where a call's logits
are the masked logits of the call before, and that several times through the same two buffers.

A call that starts before the one ahead of it has ended reads other data, or has what it reads overwritten:
both show, since every turn has data of its own. Needs torch alone; tests/test_device_check.py breaks the
order on purpose, on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from device_routing import Call, Inputs, Outputs, Settings
from torch import Tensor

MASKED_LOGITS = Outputs.NAMES.index("masked_logits")
OTHERS = ("expert_ids", "expert_weights", "active_experts", "stats")
SHARES = (0.75, 0.5, 0.25)  # of the experts: the budgets of A, B and C
NUM_TURNS = 3
NUM_INPUTS = 5  # more than turns, so that the next repetition has other data in the same turn
MODELS = {
    "gpt-oss": (128, Settings(4, "topk_softmax", warmup=0)),
    "kimi-k2": (384, Settings(8, "sigmoid_bias", routed_scaling_factor=2.827, warmup=0)),
}


class Chain:
    """The calls of one model on one device, in their order."""

    def __init__(self, model: str, num_tokens: int, device: str) -> None:
        self.model = model
        num_experts, _ = MODELS[model]

        def buffer() -> Tensor:
            return torch.zeros(num_tokens, num_experts, device=device)

        self.inputs, self.outputs = ([buffer() for _ in range(NUM_TURNS)] for _ in range(2))
        shared = [buffer() for _ in SHARES[1:]]
        self.calls = []
        for given, result in zip(self.inputs, self.outputs, strict=True):
            places = [given, *shared, result]
            for share, read, written in zip(SHARES, places, places[1:], strict=False):
                self.calls.append(self.make_call(share, read, written))

    def make_call(self, share: float, read: Tensor, written: Tensor) -> Call:
        num_experts, plain = MODELS[self.model]
        settings = Settings(**plain.__dict__ | {"budget": int(share * num_experts)})
        outputs = Outputs(read, settings.top_k, OTHERS)
        outputs.tensors[MASKED_LOGITS] = written
        return Call(settings, Inputs(read), outputs)

    def start_with(self, inputs: list[Tensor]) -> None:
        for place, logits in zip(self.inputs, inputs, strict=True):
            place.copy_(logits)

    def enqueue(self) -> None:
        for call in self.calls:
            call.enqueue()

    def run_on_host(self) -> None:
        for call in self.calls:
            call.run_on_host()

    def results(self) -> list[Tensor]:
        """Of all calls but the shared buffers, which the last turn alone has written."""
        others = (t for call in self.calls for t in call.outputs.tensors[:MASKED_LOGITS])
        sets = (t for call in self.calls for t in call.outputs.tensors[MASKED_LOGITS + 1 :])
        return [t for t in (*others, *sets, *self.outputs) if t is not None]


def wrong_repetitions(chain: Chain, launch: Callable[[], None], repetitions: int) -> list[int]:
    """Those after which some output differs from the host's. `launch` runs the calls of `chain` once."""
    num_tokens, num_experts = chain.inputs[0].shape
    inputs = [torch.randn(num_tokens, num_experts) for _ in range(NUM_INPUTS)]
    batches = [
        [inputs[(first + turn) % NUM_INPUTS] for turn in range(NUM_TURNS)] for first in range(NUM_INPUTS)
    ]
    device = chain.inputs[0].device
    on_host, expected, wrong = Chain(chain.model, num_tokens, "cpu"), [], []
    for batch in batches:
        on_host.start_with(batch)
        on_host.run_on_host()
        expected.append([result.to(device, copy=True) for result in on_host.results()])
    batches = [[logits.to(device) for logits in batch] for batch in batches]
    for repetition in range(repetitions):
        which = repetition % NUM_INPUTS
        chain.start_with(batches[which])
        launch()
        if not all(map(torch.equal, chain.results(), expected[which])):
            wrong.append(repetition)
    return wrong
