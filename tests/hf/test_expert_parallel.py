"""The experts of a model spread over real processes, against the same model in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

sys.path.append(str(Path(__file__).resolve().parent.parent))

from distributed_launch import join_group, launch, preload

from xshare_trtllm import XShareConfig, ops
from xshare_trtllm.evaluation import greedy_decode, held_out, load_model, token_batches
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.expert_parallel import expert_parallel
from xshare_trtllm.routing import contiguous_placement

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e ."),
]

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")
EXPERTS, STEPS = 18, 6
SHIPPED = XShareConfig(coverage=0.9)  # sets the cap of each rank


def random_model() -> torch.nn.Module:
    """A small model with weights large enough that experts and positions matter; 18 experts do not divide by
    4."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.2)
    return model


def decode(model: torch.nn.Module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, STEPS] and the logits that they were chosen by [batch, STEPS, vocabulary]."""
    cache, piece, tokens, logits = None, prompts, [], []
    for _ in range(STEPS):
        output = model(input_ids=piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits[:, -1])
        piece = logits[-1].argmax(-1, keepdim=True)
        tokens.append(piece)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


def configurations(world: int) -> dict[str, XShareConfig]:
    return {
        "off": XShareConfig(EXPERTS),
        "budget": XShareConfig((8, 6)),
        "per GPU": XShareConfig(3 * world, gpu_budget=3, warmup=0),
        "coverage": XShareConfig(coverage=0.8),
        "paper": XShareConfig(gpu_budget=3, utility="affinity"),
        "per request": XShareConfig(9, request_budget=5),
        "stands aside": XShareConfig(6, max_rows=7),
    }


@torch.inference_mode()
def compare_with_one_process(rank: int, sequences: list[int], folder: str) -> None:
    """Every rank computes the whole batch by itself, and then its own sequences with the others."""
    world, mine = len(sequences), slice(sum(sequences[:rank]), sum(sequences[: rank + 1]))
    model, owner = random_model(), contiguous_placement(EXPERTS, world)
    prompts = torch.randint(1, 96, (sum(sequences), 5), generator=torch.Generator().manual_seed(1))
    expected = {}
    for name, config in configurations(world).items():
        with attach(model, config, expert_gpu=owner) as attached:
            expected[name] = decode(model, prompts), attached.stats
    for parameter in model.parameters():
        if parameter.shape[0] == EXPERTS and parameter.dim() == 3:
            parameter[owner != rank] = torch.nan  # what another rank holds is not read here
    join_group(rank, world, folder)
    for runner in (model, Decoder(model, capacity=16)):
        for name, ((tokens, logits), stats) in expected.items():
            with expert_parallel(runner, configurations(world)[name]) as parallel:
                if sequences[rank] == 0:
                    for _ in range(STEPS):
                        parallel.idle()
                    assert len(parallel.work) == 2 * STEPS
                    continue
                got_tokens, got_logits = decode(runner, prompts[mine])
            assert torch.equal(got_tokens, tokens[mine]), name
            # Other numbers of rows and another order of a row's experts round differently, by 1e-6 of a sum;
            # the layers make that at most a hundred times larger.
            torch.testing.assert_close(got_logits, logits[mine], rtol=1e-4, atol=1e-4)
            if name == "per GPU" and not any(layer.warmup_overflow for layer in stats):
                assert max(work.experts for work in parallel.work[2:]) <= 3, "beyond the prefill"
    dist.destroy_process_group()


@pytest.mark.parametrize("sequences", [[4, 0, 5], [1, 1, 2, 5]], ids=str)
def test_equals_one_process(sequences: list[int], tmp_path: Path) -> None:
    launch(len(sequences), compare_with_one_process, sequences, str(tmp_path), seconds=100)


@torch.inference_mode()
def decode_shipped_model(rank: int, folder: str) -> tuple[list[list[int]], list[int]]:
    """Half of a batch of 16: its tokens, and the experts that this rank ran in each layer and step."""
    join_group(rank, 2, folder)
    model, tokenizer = load_model()
    prompts = token_batches(held_out(), tokenizer, 24)[0][:, :24]
    decoder = Decoder(model, capacity=64)
    with expert_parallel(decoder, SHIPPED) as parallel:
        tokens, _ = greedy_decode(decoder, prompts[8 * rank : 8 * rank + 8], 20)
    assert all("forward" not in vars(layer.mlp) for layer in decoder.layers)
    return tokens.tolist(), [work.experts for work in parallel.work[len(decoder.layers) :]]


def test_shipped_model(tmp_path: Path) -> None:
    model, tokenizer = load_model()
    prompts = token_batches(held_out(), tokenizer, 24)[0][:, :24]
    decoder = Decoder(model, capacity=64)
    with attach(decoder, SHIPPED, expert_gpu=contiguous_placement(64, 2)) as attached:
        expected, _ = greedy_decode(decoder, prompts, 20)
        stats = attached.stats
    results = launch(2, decode_shipped_model, str(tmp_path), seconds=100)
    assert results[0][0] + results[1][0] == expected.tolist()
    used = torch.tensor([experts for _, experts in results]).view(2, 19, -1).double()
    peak = used.amax(dim=0).mean(dim=0)  # of each layer
    own = [layer.peak_gpu_before for layer in stats]
    assert all(now < 0.8 * before for now, before in zip(peak.tolist(), own, strict=True))
    assert peak.tolist() == pytest.approx([layer.peak_gpu_after for layer in stats])
    assert used.sum(dim=0).mean(dim=0).tolist() == pytest.approx([layer.experts_after for layer in stats])


def test_refusals() -> None:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    mixtral = AutoModelForCausalLM.from_config(
        MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="runs qwen3_moe models, not mixtral"):
        expert_parallel(mixtral, XShareConfig(4))
    model = random_model()
    with pytest.raises(ValueError, match="budget must be at least top_k=4"):
        expert_parallel(model, XShareConfig(2))
    with pytest.raises(ValueError, match="is not initialised"):
        expert_parallel(model, XShareConfig(6))
    assert all("forward" not in vars(module) for module in model.modules())
