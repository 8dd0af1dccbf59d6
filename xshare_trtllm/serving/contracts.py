"""What clients call the text model, its inputs and its outputs: two contracts, of TensorRT-LLM's examples.

`llmapi`                NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm: config.pbtxt
                        (commit 0a710573), 1/model.py (044a90d2), 1/helpers.py (0df60f9a)
`inflight_batcher_llm`  its `ensemble` and `tensorrt_llm_bls`, config.pbtxt (2a9abd95, 0193dbd4), removed
                        in 2026; Triton's OpenAI frontend speaks it (triton-inference-server/server e1db8a60,
                        python/openai/openai_frontend/engine/utils/triton.py)

Names of inputs are those of `inflight_batcher_llm` where both have one; `Contract.inputs` says what a client
calls them.
"""

from __future__ import annotations

from dataclasses import dataclass

from xshare_trtllm.serving.tensors import OPTIONS, Tensor

# Inputs whose one value asks for nothing: a back end without the feature takes that value only.
NEUTRAL: dict[str, float | bool] = {
    **{option.tensor.name: option.neutral for option in OPTIONS if option.neutral is not None},
    "best_of": 1,
    "return_cumulative_logprob": False,
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
READ = frozenset(
    {
        *("text_input", "stream", "max_tokens", "min_tokens", "end_id", "pad_id", "stop_words", "bad_words"),
        *("temperature", "top_k", "top_p", "seed", "exclude_input_in_output", "stop"),
        *("return_finish_reason", "return_stop_reason", "return_perf_metrics"),
        *("return_num_input_tokens", "return_num_output_tokens"),
    }
)

_MOMENTS = ("arrival", "first_scheduled", "first_token", "last_token")
_TIMES = tuple(Tensor(f"{moment}_time_ns", "TYPE_INT64") for moment in _MOMENTS)
_COUNTS = (Tensor("num_input_tokens", "TYPE_INT32"), Tensor("num_output_tokens", "TYPE_INT32"))
CONTROL = (Tensor("xshare", "TYPE_STRING"), Tensor("xshare_coverage", "TYPE_FP32"))


@dataclass(frozen=True, slots=True)
class Contract:
    """One way to ask.

    model          the text model's name
    inputs         by our name: the tensor as clients call it
    outputs        what a response may hold
    is_batched     tensors have a batch dimension of 1 before the others
    is_cumulative  a chunk of a stream holds the text so far, not what is new; a stop word is not part of it
    """

    model: str
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    is_batched: bool
    is_cumulative: bool

    def name(self, ours: str) -> str:
        """What a client calls an input."""
        return self.inputs[ours].name


def _llmapi(
    name: str, type: str, ours: str | None = None, dims: tuple[int, ...] = (1,)
) -> tuple[str, Tensor]:
    return ours or name, Tensor(name, type, dims)


def _sampling(
    name: str, type: str, ours: str | None = None, dims: tuple[int, ...] = (1,)
) -> tuple[str, Tensor]:
    return ours or name, Tensor(f"sampling_param_{name}", type, dims)


CONTRACTS: dict[str, Contract] = {
    "llmapi": Contract(
        model="tensorrt_llm",
        inputs=dict(
            (
                ("text_input", Tensor("text_input", "TYPE_STRING", (-1,), optional=False)),
                _llmapi("streaming", "TYPE_BOOL", "stream"),
                _sampling("best_of", "TYPE_INT32"),
                _sampling("temperature", "TYPE_FP32"),
                _sampling("top_k", "TYPE_INT32"),
                _sampling("top_p", "TYPE_FP32"),
                _sampling("frequency_penalty", "TYPE_FP32"),
                _sampling("presence_penalty", "TYPE_FP32"),
                _sampling("max_tokens", "TYPE_INT32"),
                _sampling("stop", "TYPE_STRING", "stop_words", (-1,)),
                _sampling("seed", "TYPE_UINT64"),
                _sampling("exclude_input_from_output", "TYPE_BOOL", "exclude_input_in_output"),
                _sampling("return_perf_metrics", "TYPE_BOOL", "return_perf_metrics"),
                _llmapi("return_finish_reason", "TYPE_BOOL"),
                _llmapi("return_stop_reason", "TYPE_BOOL"),
                _llmapi("return_cumulative_logprob", "TYPE_BOOL"),
                _llmapi("stop", "TYPE_BOOL"),
                _llmapi("image_url", "TYPE_STRING", dims=(-1,)),
                _llmapi("lora_id", "TYPE_UINT64"),
                _llmapi("lora_name", "TYPE_STRING"),
                _llmapi("lora_path", "TYPE_STRING"),
                _llmapi("lora_ckpt_source", "TYPE_STRING"),
                # More than upstream has, by the names of SamplingParams:
                _sampling("bad", "TYPE_STRING", "bad_words", (-1,)),
                _sampling("min_tokens", "TYPE_INT32"),
                _sampling("end_id", "TYPE_INT32"),
                _sampling("repetition_penalty", "TYPE_FP32"),
                _llmapi("return_num_input_tokens", "TYPE_BOOL"),
                _llmapi("return_num_output_tokens", "TYPE_BOOL"),
            )
        ),
        outputs=(
            Tensor("text_output", "TYPE_STRING", (-1,)),
            Tensor("finish_reason", "TYPE_STRING", (-1,)),
            Tensor("stop_reason", "TYPE_STRING", (-1,)),
            Tensor("cumulative_logprob", "TYPE_FP32", (-1,)),
            Tensor("kv_cache_reused_block", "TYPE_INT32", (-1,)),
            Tensor("kv_cache_missed_block", "TYPE_INT32", (-1,)),
            Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32", (-1,)),
            Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32", (-1,)),
            Tensor("kv_cache_hit_rate", "TYPE_FP32", (-1,)),
            *_TIMES,
            Tensor("acceptance_rate", "TYPE_FP32"),
            Tensor("total_accepted_draft_tokens", "TYPE_INT32"),
            Tensor("total_draft_tokens", "TYPE_INT32"),
            *_COUNTS,
        ),
        is_batched=False,
        is_cumulative=True,
    ),
    "inflight_batcher_llm": Contract(
        model="ensemble",
        inputs={
            **{option.tensor.name: option.tensor for option in OPTIONS},
            "stop": Tensor("stop", "TYPE_BOOL"),
        },
        outputs=(Tensor("text_output", "TYPE_STRING", (-1,)), *_TIMES, *_COUNTS),
        is_batched=True,
        is_cumulative=False,
    ),
}
