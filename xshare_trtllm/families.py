"""How each model family writes its router down in its configuration: read, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_WHO = "RouterSpec.from_hf_config"
_NONE: Mapping[str, Any] = MappingProxyType({})
_INNER = ("text_config", "thinker_config", "llm_config", "language_config")


class Family(NamedTuple):
    """The router of one `model_type`, by the fields of its configuration.

    scoring      a scoring function, or the three words that a field decides between, see `_scoring`
    num_experts  names of the field, the first present counts; so with `top_k`
    only         fields that, where present, must have one of these values
    scale        the field of the factor on every weight, "" where there is none
    grouped      expert groups: "" none, "by fields", "by best two" of softmax scores (another scoring, where
                 there are several), or "one" where only a single group is expressed here
    where        the nested block of these fields, "" = the configuration itself
    """

    scoring: str
    num_experts: tuple[str, ...] = ("num_local_experts", "num_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    only: Mapping[str, tuple[object, ...]] = _NONE
    scale: str = ""
    grouped: str = ""
    where: str = ""


_ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")
_BY_NORM = "norm_topk_prob"
_RENORMALISED = {"norm_topk_prob": (True,)}
_SIGMOID_ONLY: dict[str, tuple[object, ...]] = {
    **_RENORMALISED,
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
_DEEPSEEK_V3 = Family(
    "sigmoid_bias", _ROUTED, only=_SIGMOID_ONLY, scale="routed_scaling_factor", grouped="by fields"
)
# The transformers router ignores norm_topk_prob; DeepSeek's own renormalises and then does not scale.
_DEEPSEEK_V2 = Family(
    "softmax",
    _ROUTED,
    only={
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    scale="routed_scaling_factor",
    grouped="by fields",
)
_KIMI_LINEAR = Family(
    "sigmoid_bias",
    ("num_experts",),
    ("num_experts_per_token", "num_experts_per_tok"),
    only={"moe_renormalize": (True,), **_SIGMOID_ONLY, "moe_router_activation_func": ("sigmoid",)},
    scale="routed_scaling_factor",
    grouped="by fields",
)
_INKLING2 = Family(
    "sigmoid_bias", _ROUTED, only={"scoring_func": ("sigmoid",)}, scale="route_scale", grouped=""
)
_STEP3 = Family(
    "sigmoid_bias",
    ("moe_num_experts", "n_routed_experts"),
    ("moe_top_k", "num_experts_per_tok"),
    only={"moe_router_activation": ("sigmoid",), "norm_expert_weight": (True,)},
    scale="moe_router_scaling_factor",
)
_BAILING_V2 = Family(
    "sigmoid_bias",
    only={**_RENORMALISED, "score_function": ("sigmoid",)},
    scale="routed_scaling_factor",
    grouped="by fields",
)

# Their routers add the bias after the softmax.
_ERNIE = Family(
    "softmax_bias_renorm",
    ("moe_num_experts", "num_experts"),
    ("moe_k", "num_experts_per_tok"),
)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        "sigmoid_bias",
        only={"score_func": ("sigmoid",), "route_norm": (True,), "n_group": (1,), "topk_group": (1,)},
        scale="route_scale",
    ),
    "aria_text": Family("topk_softmax", ("moe_num_experts",), ("moe_topk",)),
    "axk1": _DEEPSEEK_V3,
    # Its router leaves experts of other groups a score of 0, where a biased score may be below.
    "axk2": _DEEPSEEK_V3._replace(grouped="one"),
    "bailing_hybrid": _KIMI_LINEAR,
    "bailing_moe": Family(_BY_NORM),
    "bailing_moe_v2": _BAILING_V2,
    "cohere2_moe": Family("expert_selection_fn"),
    "dbrx": Family("moe_normalize_expert_weights", ("moe_num_experts",), ("moe_top_k",), where="ffn_config"),
    "deepseek_ocr2_text": _DEEPSEEK_V2,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    # Its first layers choose by a table of token ids and are no layers of a router.
    "deepseek_v4": Family(
        "sqrt_softplus_bias",
        _ROUTED,
        only={**_RENORMALISED, "scoring_func": ("sqrtsoftplus",)},
        scale="routed_scaling_factor",
    ),
    "diffusion_gemma_text": Family("softmax_renorm", top_k=("top_k_experts",)),
    "dots1": _DEEPSEEK_V3,
    "dots3_note_text": _DEEPSEEK_V3,
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_vl_moe_text": _ERNIE,
    "exaone_moe": _DEEPSEEK_V3,
    "flex_olmo": Family(_BY_NORM),
    "flint": Family("sigmoid_bias", only=_RENORMALISED),
    "gemma4_text": Family("softmax_renorm", top_k=("top_k_experts",), only={"enable_moe_block": (True,)}),
    "glm4_moe": _DEEPSEEK_V3,
    "glm4_moe_lite": _DEEPSEEK_V3,
    "glm4v_moe_text": _DEEPSEEK_V3,
    "glm5_next_text": _DEEPSEEK_V3,
    "glm_moe_dsa": _DEEPSEEK_V3,
    "gpt_oss": Family("topk_softmax"),
    "granitemoe": Family("topk_softmax"),
    "granitemoe_swa": Family("topk_softmax"),
    "granitemoehybrid": Family("topk_softmax"),
    "granitemoeshared": Family("topk_softmax"),
    "hunyuan_v1_moe": Family("softmax_renorm", ("num_experts",), ("moe_topk", "num_experts_per_tok")),
    "hy_v3": Family("sigmoid_bias", scale="router_scaling_factor"),
    "hy_v4": _DEEPSEEK_V3,
    "hy_v4_vl_text": _DEEPSEEK_V3,
    "inkling2_loop_text": _INKLING2,
    "inkling2_text": _INKLING2,
    "jamba": Family("softmax"),
    "jetmoe": Family("topk_softmax"),
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": _KIMI_LINEAR,
    "laguna": Family(
        "sigmoid_bias",
        only={"moe_router_logit_softcapping": (0, 0.0)},
        scale="moe_routed_scaling_factor",
    ),
    "kolibri1": Family("topk_sigmoid", only={"norm_topk_prob": (False,)}),
    "lara_mini": Family(_BY_NORM),
    "lfm2_moe": Family("sigmoid_bias", only=_RENORMALISED, scale="routed_scaling_factor"),
    "llama4_text": Family("topk_sigmoid"),
    "mellum": Family(_BY_NORM),
    "mimo_v2_flash": _DEEPSEEK_V3,
    "minimax": Family("softmax_renorm"),
    "minimax_m2": Family("sigmoid_bias", only={"scoring_func": ("sigmoid",)}),
    "minimax_m3_vl_text": Family(
        "sigmoid_bias", only={"scoring_func": ("sigmoid",)}, scale="routed_scaling_factor"
    ),
    "mistral4": Family(_BY_NORM, _ROUTED, scale="routed_scaling_factor", grouped="by best two"),
    "mistral_large4_text": Family(
        "softmax_renorm", _ROUTED, only=_RENORMALISED, scale="routed_scaling_factor", grouped="by best two"
    ),
    "mixtral": Family("softmax_renorm"),
    "muse_spark_text": Family("sigmoid_bias", scale="routed_scaling_factor"),
    "nemotron_h": _DEEPSEEK_V3,
    "olmoe": Family(_BY_NORM),
    "qwen2_moe": Family(_BY_NORM),
    "qwen3_5_moe_text": Family("softmax_renorm", only=_RENORMALISED),
    "qwen3_moe": Family(_BY_NORM),
    "qwen3_next": Family(_BY_NORM),
    "qwen3_omni_moe_text": Family(_BY_NORM),
    "qwen3_vl_moe_text": Family("softmax_renorm", only=_RENORMALISED),
    "qwen4_exp_text": Family(_BY_NORM),
    "sarvam_mla": _DEEPSEEK_V3,
    "sarvam_moe": _DEEPSEEK_V3,
    "solar_open": _DEEPSEEK_V3,
    "step3p5": _STEP3,
    "unlimited_ocr_text": _DEEPSEEK_V2,
}
KNOWN_MODEL_TYPES: tuple[str, ...] = tuple(sorted(FAMILIES))

# The softmax scorings whose groups count by their best two, and their bias as zeros.
_BY_BEST_TWO = {"softmax": "softmax_bias", "softmax_renorm": "softmax_bias_renorm"}
REFUSED: dict[str, str] = {
    "doge": "it finds its experts by the product of two sets of keys",
    "inkling_text": "its shared experts are in the sum that the weights are divided by",
    "longcat_flash": "some of its experts hand their input on and read no weights, where a budget counts "
    "each",
    "nllb-moe": "its experts have a capacity",
    "openai_privacy_filter": "it labels tokens and never decodes",
    "phimoe": "it chooses one expert after the other, each with a softmax of its own (SparseMixer)",
    "switch_transformers": "its experts have a capacity",
    "zaya": "its routers read what the router before them left, and may skip all experts",
}


class HFConfig:
    """Read access to a transformers configuration or to a plain config.json dictionary: to the text model's
    block, where a multimodal model wraps one."""

    def __init__(self, config: object) -> None:
        self._config = config
        self.type = str(self.get("model_type"))
        if self.type in FAMILIES or self.type in REFUSED:
            return
        for name in _INNER:
            inner = self.get(name)
            if inner is not None:
                within = HFConfig(inner)
                if within.type in FAMILIES or within.type in REFUSED:
                    self._config, self.type = within._config, within.type
                    return

    def get(self, name: str) -> Any:
        if isinstance(self._config, Mapping):
            return self._config.get(name)
        return getattr(self._config, name, None)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of a config.json's text model."""
        if not isinstance(self._config, Mapping):
            raise TypeError(f"fields: a config.json as a dict, not {type(self._config).__name__}")
        return self._config

    def need(self, *names: str) -> Any:
        for name in names:
            value = self.get(name)
            if value is not None:
                return value
        raise ValueError(f"{_WHO}: {self.type} configuration lacks {' or '.join(names)}")

    def need_one(self, *names: str) -> Any:
        """As `need`; a list of one value per layer must hold a single value."""
        value = self.need(*names)
        if not isinstance(value, (list, tuple)):
            return value
        if len(set(value)) != 1:
            raise ValueError(f"{_WHO}: {self.type} with {names[0]} that differs by layer is not supported")
        return value[0]

    def refuse_unless(self, field: str, allowed: tuple[object, ...]) -> None:
        value = self.get(field)
        if value is None or value in allowed:
            return
        right = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{_WHO}: {self.type} with {field}={value!r} is not supported, only {right}")

    def block(self, name: str) -> HFConfig:
        """The nested block of that name, which keeps this model's type in its errors."""
        inner = HFConfig(self.need(name))
        inner.type = self.type
        return inner


def router_fields(config: object) -> dict[str, Any]:
    """The arguments of `RouterSpec` for a Hugging Face configuration, an object or a dict.

    Raises ValueError for a model_type that is not known (listing those that are) or that no scoring function
    expresses (saying why), for a missing field and for a setting that is not expressed.
    """
    model = HFConfig(config)
    if model.type in REFUSED:
        raise ValueError(f"{_WHO}: {model.type} is not supported: {REFUSED[model.type]}")
    family = FAMILIES.get(model.type)
    if family is None:
        raise ValueError(
            f"{_WHO}: model_type {model.type!r} is not known; known are {', '.join(KNOWN_MODEL_TYPES)}"
        )
    if family.where:
        model = model.block(family.where)
    for field, allowed in family.only.items():
        model.refuse_unless(field, allowed)
    spec: dict[str, Any] = {
        "num_experts": model.need_one(*family.num_experts),
        "top_k": model.need_one(*family.top_k),
        "scoring": _scoring(model, family),
    }
    if family.scale:
        spec["routed_scaling_factor"] = float(_scale(model, family.scale))
    if family.grouped == "one":
        model.refuse_unless("n_group", (1,))
    elif family.grouped and model.get("topk_method") != "greedy":
        spec["num_groups"] = model.need("n_group", "num_expert_group")
        spec["top_k_groups"] = model.need("topk_group")
        if family.grouped == "by best two" and spec["num_groups"] > 1:
            spec["scoring"] = _BY_BEST_TWO[spec["scoring"]]
    return spec


def _scale(model: HFConfig, field: str) -> Any:
    if model.type == "mimo_v2_flash" and model.get(field) is None:
        return 1.0  # its published config.json says null
    return model.need(field)


def _scoring(model: HFConfig, family: Family) -> str:
    if family.scoring == "norm_topk_prob":
        return "softmax_renorm" if model.need("norm_topk_prob") else "softmax"
    if family.scoring == "expert_selection_fn":  # Cohere
        if model.need("expert_selection_fn") == "softmax":
            return "topk_softmax"
        model.refuse_unless("expert_selection_fn", ("softmax", "sigmoid"))
        model.refuse_unless("norm_topk_prob", (True,))
        return "sigmoid_bias"
    if family.scoring == "moe_normalize_expert_weights":  # DBRX: the order of a norm, None = as they are
        model.refuse_unless("moe_normalize_expert_weights", (1, 1.0))
        return "softmax" if model.get("moe_normalize_expert_weights") is None else "softmax_renorm"
    return family.scoring
