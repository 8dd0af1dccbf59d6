"""Every family that `attach` knows, as a tiny random model: exact when off, within its budget when on."""

from pathlib import Path

import pytest
import torch
from tiny_models import EXPERTS, TOP_K, VOCABULARY, WRAPPERS, tiny_model, tiny_wrapper

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.config import SCORINGS
from xshare_trtllm.families import FAMILIES, REFUSED
from xshare_trtllm.hf import attach
from xshare_trtllm.hf.routers import KINDS
from xshare_trtllm.planning.shapes import PREDICTED

BATCH, LENGTH = 8, 4
# Ours computes scores in fp32, some models in their own dtype, which rounds to 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# Written by their authors for transformers, not in it; the configuration of kimi_k2 becomes deepseek_v3's.
ELSEWHERE = {"bailing_moe", "bailing_moe_v2"}
MODELS = sorted(set(KINDS) - {"kimi_k2"})


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products do not gain from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(length=LENGTH):
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def decode(model):
    """Outputs of a prefill and a decode step."""
    output = model(input_ids=tokens(), use_cache=True)
    step = model(input_ids=tokens(1), cache=output.cache)
    return output[0], step[0]


@pytest.mark.parametrize("model_type", MODELS)
def test_off_is_bit_equal_and_a_budget_is_kept(model_type):
    for dtype in TOLERANCE:
        with torch.inference_mode():
            model = tiny_model(model_type, dtype)
            own = decode(model)
            spec = RouterSpec.from_hf_config(model.config)
            off = XShareConfig.off(spec)
            with attach(model, off) as attached:
                assert all(map(torch.equal, decode(model), own)), dtype
            assert all(layer.steps == 1 for layer in attached.stats)
            # A proposal of all experts per request limits nothing, but XShare routes: by the model's scores.
            with attach(model, XShareConfig(spec.num_experts, request_budget=spec.num_experts)):
                again = decode(model)[1]
            torch.testing.assert_close(again, own[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            budget = spec.top_k + 1
            with attach(model, XShareConfig(budget, warmup=1)) as attached:
                prefill, step = decode(model)
            assert torch.equal(prefill, own[0]) and not torch.equal(step, own[1])
            assert torch.isfinite(step).all()
            for layer in attached.stats:
                assert layer.experts_before > budget, "the budget does not bind: the test shows nothing"
                assert layer.experts_after <= budget + layer.warmup_overflow
                assert layer.experts_after < layer.experts_before


def test_images_go_to_experts_of_their_own():
    """A prompt of which only a part is text; decoding is text, and routed."""
    model_type = "ernie4_5_vl_moe_text"
    images = torch.tensor([[0, 1, 1, 0]]).repeat(BATCH, 1)
    with torch.inference_mode():
        model = tiny_model(model_type)
        own = model(input_ids=tokens(), moe_mm_token_type_ids=images)[0]
        spec = RouterSpec.from_hf_config(model.config)
        with attach(model, XShareConfig(spec.top_k + 1)) as attached:
            output = model(input_ids=tokens(), moe_mm_token_type_ids=images, use_cache=True)
            model(input_ids=tokens(1), cache=output.cache)
        assert torch.equal(output[0], own)
        assert all(layer.experts_after < layer.experts_before for layer in attached.stats)
        shared = attach(model, XShareConfig(spec.top_k + 1), prefill="shared")
        with shared, pytest.raises(RuntimeError, match="gives logits, weights and ids of shapes"):
            model(input_ids=tokens(), moe_mm_token_type_ids=images)


def test_layers_that_choose_by_token_ids_keep_their_choice():
    with torch.inference_mode():
        model = tiny_model("deepseek_v4")
        with attach(model, XShareConfig(TOP_K + 1)) as attached:
            decode(model)
        kinds = model.config.mlp_layer_types
        assert len(attached.stats) == kinds.count("moe") < len(kinds)


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_a_multimodal_model_is_entered(model_type):
    with torch.inference_mode():
        model = tiny_wrapper(model_type)
        own = decode(model)
        spec = RouterSpec.from_hf_config(model.config)
        assert (spec.num_experts, spec.top_k) == (EXPERTS, TOP_K)
        with attach(model, XShareConfig(spec.top_k + 1)) as attached:
            prefill, step = decode(model)
        assert torch.equal(prefill, own[0]) and not torch.equal(step, own[1])
        assert all(layer.experts_after < layer.experts_before for layer in attached.stats)


def cells():
    """The rows of both tables of docs/families.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in lines if first not in ("model_type", "---")}


def test_the_page_of_families_is_as_the_code():
    table = cells()
    assert set(table) == set(FAMILIES) | set(REFUSED)
    for model_type, family in FAMILIES.items():
        scoring, from_config, attached, predicted, *_ = table[model_type]
        if family.scoring in SCORINGS:
            assert scoring.split(",")[0] == f"`{family.scoring}`"
        assert scoring.endswith(", groups") == (family.grouped in ("by fields", "by best two"))
        assert from_config == "yes"
        assert attached == ("yes" if model_type in KINDS else "no")
        assert predicted == ("yes" if model_type in PREDICTED else "no")
    assert all(table[model_type] == [reason] for model_type, reason in REFUSED.items())


def test_every_family_has_routers_or_is_not_in_transformers():
    assert set(FAMILIES) - set(KINDS) == ELSEWHERE
