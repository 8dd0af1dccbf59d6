"""The native experts against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from xshare_trtllm import ops

pytestmark = pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built")


def plain(hidden_states, expert_ids, expert_weights, gate_up, down):
    """Every slot by itself, in fp64."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float64)
    for row, (ids, weights) in enumerate(zip(expert_ids.tolist(), expert_weights.double(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (gate_up[expert].double() @ hidden_states[row].double()).chunk(2)
            output[row] += weight * (down[expert].double() @ (functional.silu(gate) * up))
    return output


def random_layer(tokens, experts, top_k, width, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    return {
        "hidden_states": torch.randn(tokens, width, generator=generator),
        "expert_ids": scores.topk(top_k, dim=-1).indices,
        "expert_weights": torch.rand(tokens, top_k, generator=generator),
        "gate_up": torch.randn(experts, 2 * size, width, generator=generator) / width**0.5,
        "down": torch.randn(experts, width, size, generator=generator) / size**0.5,
    }


@given(
    tokens=st.integers(0, 21),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    width=st.integers(1, 40),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_equals_plain_torch(tokens, experts, top_k, width, size, seed):
    layer = random_layer(tokens, experts, min(top_k, experts), width, size, seed)
    torch.testing.assert_close(ops.experts(**layer).double(), plain(**layer), rtol=1e-4, atol=1e-5)


def test_touches_no_weight_of_an_expert_without_rows():
    """NaN in every inactive expert, and in one that is named with weight 0 only, does not reach the
    output."""
    layer = random_layer(tokens=6, experts=16, top_k=2, width=32, size=16, seed=0)
    layer["expert_ids"] = torch.tensor([[3, 7]] * 6, dtype=torch.int32)
    layer["expert_weights"][:, 1] = 0.0
    expected = plain(**layer)
    inactive = torch.arange(16) != 3
    layer["gate_up"][inactive] = torch.nan
    layer["down"][inactive] = torch.nan
    torch.testing.assert_close(ops.experts(**layer).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.zeros(4, 9)},
            r"gate_up: must be float32 \[8, 12, 9\], got torch.float32 \[8, 12, 10\]",
        ),
        ({"gate_up": torch.zeros(8, 12, 10).half()}, "gate_up: must be float32"),
        ({"expert_ids": torch.full((4, 2), 8)}, r"expert_ids\[0, 0\]=8 must be in 0..num_experts-1=7"),
        ({"expert_ids": torch.full((4, 2), -1)}, r"expert_ids\[0, 0\]=-1 must be"),
        ({"expert_ids": torch.zeros(3, 2, dtype=torch.int32)}, r"expert_ids: shape must be \[4, 2\]"),
        ({"expert_weights": torch.zeros(4, 3)}, "expert_weights: must be float32"),
    ],
)
def test_refusals(change, message):
    layer = random_layer(tokens=4, experts=8, top_k=2, width=10, size=6, seed=0) | change
    with pytest.raises(ValueError, match=message):
        ops.experts(**layer)
