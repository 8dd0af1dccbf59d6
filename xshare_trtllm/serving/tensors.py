"""Names, types and shapes of the models' tensors: those of TensorRT-LLM's own Triton examples.

From NVIDIA/TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm: ensemble/config.pbtxt (commit
2a9abd95), tensorrt_llm/config.pbtxt (0c8de69a), tensorrt_llm_bls/config.pbtxt (0193dbd4),
preprocessing/config.pbtxt (08dc37e3), postprocessing/config.pbtxt (89fd9b74). Left out are images, videos,
encoders and draft models.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model, without its batch dimension.

    dims     -1 = any
    scalar   in `tensorrt_llm` the shape is [] where the text models have [1]
    ragged   requests of one batch may differ in shape
    """

    name: str
    type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    scalar: bool = False
    ragged: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """An input of the text model, and where it goes in an ensemble over an engine.

    to_text   its name in `preprocessing`; "" = it does not go there
    to_model  its name in `tensorrt_llm`; "" = it does not go there
    neutral   the value that asks for nothing: the only one that a back end takes which lacks the feature;
              None: such a back end refuses the input whatever it holds
    """

    tensor: Tensor
    to_text: str = ""
    to_model: str = ""
    neutral: float | bool | None = None


def _scalar(name: str, type: str, to_model: str | None = None, neutral: float | bool | None = None) -> Option:
    return Option(
        Tensor(name, type, scalar=True), to_model=name if to_model is None else to_model, neutral=neutral
    )


OPTIONS: tuple[Option, ...] = (
    Option(Tensor("text_input", "TYPE_STRING", optional=False), to_text="QUERY"),
    Option(Tensor("decoder_text_input", "TYPE_STRING"), to_text="DECODER_QUERY"),
    Option(Tensor("max_tokens", "TYPE_INT32", optional=False), to_text="REQUEST_OUTPUT_LEN"),
    Option(Tensor("bad_words", "TYPE_STRING", (-1,)), to_text="BAD_WORDS_DICT"),
    Option(Tensor("stop_words", "TYPE_STRING", (-1,)), to_text="STOP_WORDS_DICT"),
    Option(Tensor("end_id", "TYPE_INT32"), to_text="END_ID"),
    Option(Tensor("pad_id", "TYPE_INT32"), to_text="PAD_ID"),
    Option(Tensor("embedding_bias_words", "TYPE_STRING", (-1,)), to_text="EMBEDDING_BIAS_WORDS"),
    Option(Tensor("embedding_bias_weights", "TYPE_FP32", (-1,)), to_text="EMBEDDING_BIAS_WEIGHTS"),
    _scalar("exclude_input_in_output", "TYPE_BOOL"),
    _scalar("stream", "TYPE_BOOL", "streaming"),
    _scalar("temperature", "TYPE_FP32"),
    _scalar("top_k", "TYPE_INT32", "runtime_top_k"),
    _scalar("top_p", "TYPE_FP32", "runtime_top_p"),
    _scalar("seed", "TYPE_UINT64"),
    _scalar("length_penalty", "TYPE_FP32", "len_penalty", 1.0),
    _scalar("repetition_penalty", "TYPE_FP32", neutral=1.0),
    _scalar("min_tokens", "TYPE_INT32"),
    _scalar("presence_penalty", "TYPE_FP32", neutral=0.0),
    _scalar("frequency_penalty", "TYPE_FP32", neutral=0.0),
    _scalar("beam_width", "TYPE_INT32", neutral=1),
    _scalar("num_return_sequences", "TYPE_INT32", neutral=1),
    _scalar("return_log_probs", "TYPE_BOOL", neutral=False),
    _scalar("return_context_logits", "TYPE_BOOL", neutral=False),
    _scalar("return_generation_logits", "TYPE_BOOL", neutral=False),
    _scalar("return_perf_metrics", "TYPE_BOOL"),
    _scalar("return_num_input_tokens", "TYPE_BOOL"),
    _scalar("return_num_output_tokens", "TYPE_BOOL"),
    Option(
        Tensor("prompt_embedding_table", "TYPE_FP16", (-1, -1), ragged=True),
        to_model="prompt_embedding_table",
    ),
    _scalar("prompt_vocab_size", "TYPE_INT32"),
    _scalar("lora_task_id", "TYPE_UINT64"),
    Option(Tensor("lora_weights", "TYPE_FP16", (-1, -1), ragged=True), to_model="lora_weights"),
    Option(Tensor("lora_config", "TYPE_INT32", (-1, 3), ragged=True), to_model="lora_config"),
    Option(
        Tensor("guided_decoding_guide_type", "TYPE_STRING", ragged=True),
        to_model="guided_decoding_guide_type",
    ),
    Option(Tensor("guided_decoding_guide", "TYPE_STRING", ragged=True), to_model="guided_decoding_guide"),
)

TEXT_OUTPUTS = (Tensor("text_output", "TYPE_STRING", (-1,)),)

PREPROCESSING_OUTPUTS = (
    Tensor("INPUT_ID", "TYPE_INT32", (-1,)),
    Tensor("REQUEST_INPUT_LEN", "TYPE_INT32"),
    Tensor("REQUEST_OUTPUT_LEN", "TYPE_INT32", (-1,)),
    Tensor("BAD_WORDS_IDS", "TYPE_INT32", (2, -1)),
    Tensor("STOP_WORDS_IDS", "TYPE_INT32", (2, -1)),
    Tensor("OUT_END_ID", "TYPE_INT32"),
    Tensor("OUT_PAD_ID", "TYPE_INT32"),
)

# What `preprocessing` hands to `tensorrt_llm`, by their names.
TOKENS_TO_MODEL: dict[str, str] = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list",
    "STOP_WORDS_IDS": "stop_words_list",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
}

# Inputs of `tensorrt_llm` that do not come from an option of the text models alone.
MODEL_INPUTS = (
    Tensor("input_ids", "TYPE_INT32", (-1,), ragged=True),
    Tensor("input_lengths", "TYPE_INT32", optional=False, scalar=True),
    Tensor("request_output_len", "TYPE_INT32", optional=False, scalar=True),
    Tensor("end_id", "TYPE_INT32", scalar=True),
    Tensor("pad_id", "TYPE_INT32", scalar=True),
    Tensor("stop_words_list", "TYPE_INT32", (2, -1), ragged=True),
    Tensor("bad_words_list", "TYPE_INT32", (2, -1), ragged=True),
    Tensor("stop", "TYPE_BOOL", scalar=True),
)

MODEL_OUTPUTS = (
    Tensor("output_ids", "TYPE_INT32", (-1, -1)),
    Tensor("sequence_length", "TYPE_INT32", (-1,)),
    Tensor("cum_log_probs", "TYPE_FP32", (-1,)),
    Tensor("output_log_probs", "TYPE_FP32", (-1, -1)),
    Tensor("context_logits", "TYPE_FP32", (-1, -1)),
    Tensor("generation_logits", "TYPE_FP32", (-1, -1, -1)),
    Tensor("batch_index", "TYPE_INT32"),
    Tensor("sequence_index", "TYPE_INT32"),
    Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32"),
    Tensor("kv_cache_reused_blocks", "TYPE_INT32"),
    Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32"),
    Tensor("arrival_time_ns", "TYPE_INT64"),
    Tensor("first_scheduled_time_ns", "TYPE_INT64"),
    Tensor("first_token_time_ns", "TYPE_INT64"),
    Tensor("last_token_time_ns", "TYPE_INT64"),
    Tensor("acceptance_rate", "TYPE_FP32"),
    Tensor("total_accepted_draft_tokens", "TYPE_INT32"),
    Tensor("total_draft_tokens", "TYPE_INT32"),
    Tensor("num_input_tokens", "TYPE_INT32"),
    Tensor("num_output_tokens", "TYPE_INT32"),
)

POSTPROCESSING_INPUTS = (
    Tensor("TOKENS_BATCH", "TYPE_INT32", (-1, -1), optional=False),
    Tensor("SEQUENCE_LENGTH", "TYPE_INT32", (-1,), optional=False),
)

POSTPROCESSING_OUTPUTS = (Tensor("OUTPUT", "TYPE_STRING", (-1,)),)

# What `tensorrt_llm` hands to `postprocessing`, by their names.
TOKENS_TO_TEXT: dict[str, str] = {"output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH"}
