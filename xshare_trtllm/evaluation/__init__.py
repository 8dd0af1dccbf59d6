"""Measure XShare on real models: the shipped models and their text, quality and speed."""

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
    "Document",
    "Quality",
    "agreement",
    "greedy_decode",
    "held_out",
    "load_model",
    "teacher_forced",
    "token_batches",
    "token_bytes",
]
