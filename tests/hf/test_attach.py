"""XShare inside real transformers models with random weights: exact when off, within its budget when on."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.hf import attach
from xshare_trtllm.hf.routers import find_routers

VOCABULARY, BATCH, LENGTH = 96, 8, 12
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
GROUPS = {"n_group": 4, "topk_group": 2}
FAMILIES = {
    "gpt_oss": lambda: GptOssConfig(**SHAPE, head_dim=8, num_local_experts=16, num_experts_per_tok=4),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=16, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **SHAPE | {"num_key_value_heads": 4},
        **LATENT,
        **ROUTED,
        first_k_dense_replace=1,
        topk_method="greedy",
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4}, **LATENT, **ROUTED, **GROUPS, first_k_dense_replace=1
    ),
}


def random_model(family):
    """A small model of the family with weights large enough that experts and positions matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5 if "gate.weight" in name or "router" in name else 0.15)
    return model


def random_tokens(seed=1):
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def tight(model):
    """A budget that binds: fewer experts than the batch picks by itself."""
    spec = RouterSpec.from_hf_config(model.config)
    return XShareConfig(spec.top_k + 1, warmup=0 if spec.num_groups == 1 else 1)


def decode(model, tokens, config, **options):
    """Logits [batch, length, vocabulary] and statistics of feeding the tokens one position a step, with a KV
    cache; the first is the prompt."""
    output = model(input_ids=tokens[:, :1], use_cache=True)
    logits = [output.logits]
    with attach(model, config, **options) as attached:
        for t in range(1, tokens.shape[1]):
            output = model(input_ids=tokens[:, t : t + 1], cache=output.cache, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, dim=1), attached.stats


# One per scoring function; test_families.py has all families.
@pytest.fixture(params=["deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def model(request):
    with torch.inference_mode():
        yield random_model(request.param)


def test_off_is_the_model_itself(model):
    tokens = random_tokens()
    own = model(input_ids=tokens).logits
    off = XShareConfig.off(RouterSpec.from_hf_config(model.config))
    for prefill in ("exempt", "shared", "stepwise"):
        with attach(model, off, prefill=prefill):
            assert torch.equal(model(input_ids=tokens).logits, own)


def test_shadow_is_the_model_itself_counted_as_if_it_were_on(model):
    """Layer by layer: a layer sees the same rows where those before it have their own routing."""
    tokens, spec = random_tokens(), RouterSpec.from_hf_config(model.config)
    own = decode(model, tokens, XShareConfig.off(spec))[0]
    layers = len(find_routers(model))
    for layer in range(layers):
        budgets = [spec.num_experts] * layers
        budgets[layer] = tight(model).budget
        config = XShareConfig(budgets)
        limited, on = decode(model, tokens, config)
        shown, shadow = decode(model, tokens, config, shadow=True)
        assert torch.equal(shown, own) and not torch.equal(limited, own)
        assert shadow[: layer + 1] == on[: layer + 1]
        assert shadow[layer].experts_after < shadow[layer].experts_before


def test_stepwise_is_teacher_forced_decoding(model):
    tokens = random_tokens()
    expected, steps = decode(model, tokens, tight(model))
    with attach(model, tight(model), prefill="stepwise") as stepwise:
        got = model(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert [layer.steps for layer in stepwise.stats] == [LENGTH - 1] * len(steps)
    assert [layer.experts_after for layer in stepwise.stats] == [layer.experts_after for layer in steps]
    own = model(input_ids=tokens).logits
    assert not torch.allclose(got, own, rtol=1e-2, atol=1e-2), (
        "the budget changed nothing: the test shows nothing"
    )


def test_the_experts_module_sees_no_more_than_the_budget(model):
    config, seen = tight(model), []
    experts = [
        module for name, module in model.named_modules() if name.endswith("experts") and "shared" not in name
    ]
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(len(args[1].unique())))
        for module in experts
    ]
    step = random_tokens()[:, :1]
    model(input_ids=step)
    own, seen[:] = list(seen), []
    with attach(model, config) as attached:
        model(input_ids=step)
    for hook in hooks:
        hook.remove()
    assert len(own) == len(seen) == len(find_routers(model))
    stats = attached.stats
    assert seen == [layer.experts_after for layer in stats]
    assert own[0] == stats[0].experts_before, "the first MoE layer has the same input with and without XShare"
    bound = [config.budget + layer.warmup_overflow for layer in stats]
    assert all(count <= limit for count, limit in zip(seen, bound, strict=True))
    assert max(own) > config.budget


def test_a_finished_sequence_is_padding(model):
    """What a row holds that the attention mask rules out changes no other row."""
    tokens = random_tokens()[:, :1]
    mask = torch.ones(BATCH, 1, dtype=torch.long)
    mask[3] = 0
    other = tokens.clone()
    other[3] = (other[3] + 7) % VOCABULARY
    with attach(model, tight(model)) as attached:
        first = model(input_ids=tokens, attention_mask=mask).logits
        second = model(input_ids=other, attention_mask=mask).logits
        assert [layer.rows for layer in attached.stats] == [BATCH - 1] * len(attached.stats)
    rows = [row for row in range(BATCH) if row != 3]
    torch.testing.assert_close(first[rows], second[rows])


def test_prefill_is_exempt_by_default(model):
    tokens = random_tokens()
    own = model(input_ids=tokens).logits
    with attach(model, tight(model)) as attached:
        assert torch.equal(model(input_ids=tokens).logits, own)
        assert all(layer.steps == 0 for layer in attached.stats)
    with attach(model, tight(model), prefill="shared") as attached:
        assert not torch.allclose(model(input_ids=tokens).logits, own, rtol=1e-2, atol=1e-2)
        assert all(layer.rows == BATCH * LENGTH for layer in attached.stats)


def test_detach_leaves_no_trace(model):
    tokens = random_tokens()
    own = model(input_ids=tokens).logits
    before = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    attached = attach(model, tight(model), prefill="shared")
    assert not torch.equal(model(input_ids=tokens).logits, own)
    attached.detach()
    attached.detach()
    assert torch.equal(model(input_ids=tokens).logits, own)
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_detached_when_the_block_raises():
    model = random_model("mixtral")
    with pytest.raises(RuntimeError, match="boom"), attach(model, XShareConfig(4)):
        raise RuntimeError("boom")
    assert all("forward" not in vars(router) for router in find_routers(model))


def test_generate_of_transformers_takes_the_hook():
    model = random_model("qwen3_moe")
    prompts = random_tokens()
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    with attach(model, XShareConfig(5)) as attached:
        model.generate(prompts, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [layer.steps for layer in attached.stats] == [3, 3]
    assert all(layer.experts_after < layer.experts_before for layer in attached.stats)


def test_budgets_per_layer_and_gpus():
    model = random_model("qwen3_moe")
    expert_gpu = torch.arange(16) // 4
    with (
        torch.inference_mode(),
        attach(model, XShareConfig((12, 6), gpu_budget=3), expert_gpu=expert_gpu) as attached,
    ):
        model(input_ids=random_tokens()[:, :1])
    first, second = attached.stats
    assert first.experts_after > 6 >= second.experts_after - second.warmup_overflow
    assert first.peak_gpu_after <= 3 + first.warmup_overflow < first.peak_gpu_before + first.warmup_overflow


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        (XShareConfig(2), {}, "budget must be at least top_k=4"),
        (XShareConfig((8, 8, 8)), {}, "names 3 layers, the model has 2 MoE layers"),
        (XShareConfig(8), {"prefill": "some"}, "must be one of exempt, shared, stepwise"),
    ],
)
def test_refusals(config, kwargs, message):
    model = random_model("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        attach(model, config, **kwargs)
    assert all("forward" not in vars(router) for router in find_routers(model))


def test_refuses_a_second_attachment_and_a_dense_model():
    model = random_model("mixtral")
    with attach(model, XShareConfig(4)), pytest.raises(ValueError, match="detach the earlier attachment"):
        attach(model, XShareConfig(5))
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(ValueError, match="model_type 'llama' is not known"):
        attach(dense, XShareConfig(4))
