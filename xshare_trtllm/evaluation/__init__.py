"""Measure XShare on real models: hooks for transformers, the shipped model, quality and speed."""

from xshare_trtllm.evaluation.attach import Attachment, LayerStats, attach
from xshare_trtllm.evaluation.decoder import Decoder, KVCache
from xshare_trtllm.evaluation.measure import Quality, agreement, greedy_decode, teacher_forced
from xshare_trtllm.evaluation.model import (
    MODEL_DIR,
    Document,
    held_out,
    load_model,
    token_batches,
    token_bytes,
)

__all__ = [
    "MODEL_DIR",
    "Attachment",
    "Decoder",
    "Document",
    "KVCache",
    "LayerStats",
    "Quality",
    "agreement",
    "attach",
    "greedy_decode",
    "held_out",
    "load_model",
    "teacher_forced",
    "token_batches",
    "token_bytes",
]
