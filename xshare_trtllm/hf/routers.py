"""Where the routers of each family are in a transformers model, and what goes in and out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec
from xshare_trtllm.families import HFConfig
from xshare_trtllm.hf.passes import Choice


class RouterKind:
    """A router module that returns `(logits, weights, ids)`, as nearly all in transformers 5.

    module  the name of its class
    method  what the MoE layer calls of it
    scales  its weights have the scaling factor in them; False: the MoE layer multiplies by it
    """

    method = "forward"

    def __init__(self, module: str, *, scales: bool = True) -> None:
        self.module, self.scales = module, scales

    def find(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model`, in the layers' order."""
        return [module for module in model.modules() if type(module).__name__ == self.module]

    def bias(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
        """The correction bias [E] of a call."""
        bias: Tensor | None = getattr(module, "e_score_correction_bias", None)
        return bias

    def read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Choice:
        """Raises RuntimeError where `output` is not as this kind's."""
        logits, weights, ids = self._unpack(output, 3)
        return Choice(logits, weights, ids)

    def weights(self, module: nn.Module, choice: Choice) -> Tensor:
        """[T, k] fp32, what the router makes of weights that `route` gave."""
        return choice.weights

    def write(self, module: nn.Module, output: Any, weights: Tensor, ids: Tensor) -> Any:
        """`output` with other weights and ids in it."""
        return output[0], weights, ids

    def _unpack(self, output: Any, length: int) -> Any:
        if isinstance(output, tuple) and len(output) == length:
            return output
        got = f"{len(output)} values" if isinstance(output, tuple) else type(output).__name__
        raise RuntimeError(f"attach: {self.module} returns {got}, not the {length} of transformers 5.24")


class _BiasIsPassed(RouterKind):
    """The MoE layer holds the bias and passes it."""

    def bias(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
        return args[1] if len(args) > 1 else None


class _Lfm2Moe(_BiasIsPassed):
    """Divides by the sum of the scores and 1e-6."""

    def weights(self, module: nn.Module, choice: Choice) -> Tensor:
        scores = choice.logits.float().sigmoid().gather(1, choice.ids)
        total = torch.where(choice.weights != 0, scores, 0).sum(dim=-1, keepdim=True)
        return choice.weights * (total / (total + 1e-6))


class _Ernie(RouterKind):
    """Divides by the sum of the scores, or by a least value."""

    def bias(self, module: Any, args: tuple[Any, ...]) -> Tensor | None:
        bias: Tensor = module.moe_statics.e_score_correction_bias
        return bias.flatten()

    def weights(self, module: Any, choice: Choice) -> Tensor:
        scores = choice.logits.float().softmax(dim=1).gather(1, choice.ids)
        total = torch.where(choice.weights != 0, scores, 0).sum(dim=-1, keepdim=True)
        return choice.weights * (total / total.clamp(min=module.norm_min))


class _ErnieVL(_Ernie):
    """Text and images have experts of their own; the text's are routed, which decoding uses."""

    def find(self, model: nn.Module) -> list[nn.Module]:
        blocks: list[Any] = super().find(model)
        return [block.text_moe.gate for block in blocks]


class _Llama4(RouterKind):
    """Returns a row of all experts' weights, 0 for those not chosen, and the logits."""

    def read(self, module: Any, args: tuple[Any, ...], output: Any) -> Choice:
        weights, logits = self._unpack(output, 2)
        ids = logits.topk(module.top_k, dim=1).indices
        return Choice(logits, weights.gather(1, ids), ids)

    def write(self, module: nn.Module, output: Any, weights: Tensor, ids: Tensor) -> Any:
        rows = torch.zeros_like(output[0])
        return rows.scatter_add(1, ids, weights.to(rows.dtype)), output[1]


class _Gemma(RouterKind):
    """Returns probabilities in place of logits, and scales each expert's weight."""

    def read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Choice:
        probabilities, weights, ids = self._unpack(output, 3)
        return Choice(probabilities.log(), weights, ids)

    def weights(self, module: Any, choice: Choice) -> Tensor:
        weights: Tensor = choice.weights * module.per_expert_scale[choice.ids]
        return weights


class _Dbrx(RouterKind):
    """The MoE layer itself chooses, in a method that takes the logits."""

    method = "route_tokens_to_experts"

    def read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Choice:
        weights, ids = self._unpack(output, 2)
        return Choice(args[0], weights, ids)

    def write(self, module: nn.Module, output: Any, weights: Tensor, ids: Tensor) -> Any:
        return weights, ids


class _JetMoe(RouterKind):
    """Returns the rows sorted by expert. Its attention has routers of the same class, which stay."""

    def find(self, model: nn.Module) -> list[nn.Module]:
        found: list[Any] = super().find(model)
        return [layer.router for layer in found]

    def read(self, module: Any, args: tuple[Any, ...], output: Any) -> Choice:
        logits = self._unpack(output, 5)[4]
        best, ids = logits.topk(module.top_k, dim=1)
        return Choice(logits, best.softmax(dim=1).to(output[2].dtype), ids)

    def write(self, module: Any, output: Any, weights: Tensor, ids: Tensor) -> Any:
        order = ids.flatten().sort().indices
        sizes = torch.bincount(ids.flatten(), minlength=module.num_experts).tolist()
        return order, order // module.top_k, weights.flatten()[order], sizes, output[4]


KINDS: dict[str, RouterKind] = {
    "afmoe": _BiasIsPassed("AfmoeTokenChoiceRouter"),
    "aria_text": RouterKind("AriaTextTopKRouter"),
    "axk1": RouterKind("AXK1TopkRouter"),
    "axk2": RouterKind("AXK2TopkRouter"),
    "bailing_hybrid": RouterKind("BailingHybridTopkRouter"),
    "cohere2_moe": RouterKind("Cohere2MoeTopKRouter"),
    "dbrx": _Dbrx("DbrxFFN"),
    "deepseek_ocr2_text": RouterKind("DeepseekOcr2TextTopkRouter"),
    "deepseek_v2": RouterKind("DeepseekV2TopkRouter"),
    "deepseek_v3": RouterKind("DeepseekV3TopkRouter"),
    "deepseek_v32": RouterKind("DeepseekV32TopkRouter"),
    "deepseek_v4": RouterKind("DeepseekV4TopKRouter"),
    "diffusion_gemma_text": _Gemma("DiffusionGemmaTextRouter"),
    "dots1": RouterKind("Dots1TopkRouter"),
    "dots3_note_text": RouterKind("Dots3NoteTextTopkRouter"),
    "ernie4_5_moe": _Ernie("Ernie4_5_MoeTopKRouter"),
    "ernie4_5_vl_moe_text": _ErnieVL("Ernie4_5_VLMoeMoeBlock"),
    "exaone_moe": RouterKind("ExaoneMoeTopkRouter"),
    "flex_olmo": RouterKind("FlexOlmoTopKRouter"),
    "flint": RouterKind("FlintTopKRouter"),
    "gemma4_text": _Gemma("Gemma4TextRouter"),
    "glm4_moe": RouterKind("Glm4MoeTopkRouter"),
    "glm4_moe_lite": RouterKind("Glm4MoeLiteTopkRouter"),
    "glm4v_moe_text": RouterKind("Glm4vMoeTextTopkRouter"),
    "glm5_next_text": RouterKind("Glm5NextTextTopkRouter"),
    "glm_moe_dsa": RouterKind("GlmMoeDsaTopkRouter"),
    "gpt_oss": RouterKind("GptOssTopKRouter"),
    "granitemoe": RouterKind("GraniteMoeTopKRouter"),
    "granitemoe_swa": RouterKind("GraniteMoeSWATopKRouter"),
    "granitemoehybrid": RouterKind("GraniteMoeHybridTopKRouter"),
    "granitemoeshared": RouterKind("GraniteMoeSharedTopKRouter"),
    "hunyuan_v1_moe": RouterKind("HunYuanMoEV1Gate"),
    "hy_v3": _BiasIsPassed("HYV3TopKRouter"),
    "hy_v4": RouterKind("HYV4TopkRouter"),
    "hy_v4_vl_text": RouterKind("HYV4VLTopkRouter"),
    "inkling2_loop_text": RouterKind("Inkling2LoopTopKRouter"),
    "inkling2_text": RouterKind("Inkling2TopKRouter"),
    "jamba": RouterKind("JambaTopKRouter"),
    "jetmoe": _JetMoe("JetMoeMoE"),
    "kimi_k2": RouterKind("DeepseekV3TopkRouter"),
    "kimi_linear": RouterKind("KimiLinearTopkRouter"),
    "laguna": RouterKind("LagunaTopKRouter", scales=False),
    "kolibri1": RouterKind("Kolibri1TopKRouter"),
    "lara_mini": RouterKind("LaraMiniTopKRouter"),
    "lfm2_moe": _Lfm2Moe("Lfm2MoeTopKRouter"),
    "llama4_text": _Llama4("Llama4Router"),
    "mellum": RouterKind("MellumTopKRouter"),
    "mimo_v2_flash": RouterKind("MiMoV2FlashTopkRouter"),
    "minimax": RouterKind("MiniMaxTopKRouter"),
    "minimax_m2": _BiasIsPassed("MiniMaxM2TopKRouter"),
    "minimax_m3_vl_text": RouterKind("MiniMaxM3VLTopKRouter", scales=False),
    "mistral4": RouterKind("Mistral4TopkRouter"),
    "mistral_large4_text": RouterKind("MistralLarge4TextTopkRouter"),
    "mixtral": RouterKind("MixtralTopKRouter"),
    "muse_spark_text": RouterKind("MuseSparkTopkRouter"),
    "nemotron_h": RouterKind("NemotronHTopkRouter"),
    "olmoe": RouterKind("OlmoeTopKRouter"),
    "qwen2_moe": RouterKind("Qwen2MoeTopKRouter"),
    "qwen3_5_moe_text": RouterKind("Qwen3_5MoeTopKRouter"),
    "qwen3_moe": RouterKind("Qwen3MoeTopKRouter"),
    "qwen3_next": RouterKind("Qwen3NextTopKRouter"),
    "qwen3_omni_moe_text": RouterKind("Qwen3OmniMoeThinkerTextTopKRouter"),
    "qwen3_vl_moe_text": RouterKind("Qwen3VLMoeTextTopKRouter"),
    "qwen4_exp_text": RouterKind("Qwen4ExpTextTopKRouter"),
    "sarvam_mla": RouterKind("DeepseekV3TopkRouter"),
    "sarvam_moe": RouterKind("Glm4MoeTopkRouter"),
    "solar_open": RouterKind("SolarOpenTopkRouter"),
    "step3p5": RouterKind("Step3p7TopKRouter", scales=False),
    "unlimited_ocr_text": RouterKind("UnlimitedOcrTextTopkRouter"),
}


def router_kind(model: nn.Module) -> RouterKind:
    """The kind of the routers of a transformers model; raises ValueError where it is not known."""
    model_type = HFConfig(model.config).type
    kind = KINDS.get(model_type)
    if kind is None:
        raise ValueError(f"attach: the routers of a {model_type} model are not known; known are {_known()}")
    return kind


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer, in the layers' order; raises ValueError where there is none."""
    kind = router_kind(model)
    routers = kind.find(model)
    if not routers:
        raise ValueError(
            f"attach: {type(model).__name__} has no {kind.module} module: "
            "load the model with transformers' own code, and check that it has MoE layers"
        )
    return routers


def check_sizes(routers: list[nn.Module], spec: RouterSpec) -> None:
    """Raises ValueError where a router is not as wide as the configuration says."""
    for layer, router in enumerate(routers):
        for name in ("num_experts", "top_k"):
            has, says = getattr(router, name, None), getattr(spec, name)
            if isinstance(has, int) and has != says:
                raise ValueError(f"attach: MoE layer {layer} has {name}={has}, the configuration says {says}")


def _known() -> str:
    return ", ".join(KINDS)
