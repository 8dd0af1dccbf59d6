"""The shipped model and its held-out text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xshare_trtllm import ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_DIR = Path(__file__).parent / "models" / "xshare-moe-14m"


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of a document that the shipped model has not seen."""

    domain: str
    source: str
    text: str


def load_model(path: Path = MODEL_DIR) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model in fp32, ready to decode on a CPU, and its tokenizer.

    The experts run in the native library (`xshare_trtllm.ops.experts`), registered with transformers as the
    experts implementation `xshare`: one pass over the weights of each active expert. Where the library is
    not built they run as transformers' own `grouped_mm`.

    Raises ImportError where transformers is missing and OSError where `path` holds no model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("transformers is missing: pip install 'xshare-trtllm[demo]'") from error
    ALL_EXPERTS_FUNCTIONS.register("xshare", _native_experts)
    experts = "xshare" if ops.available() else "grouped_mm"
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation=experts, local_files_only=True
        )
    finally:
        logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _native_experts(module: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts of a gated layer without biases, for the experts interface of transformers."""
    return ops.experts(hidden_states, ids, weights, module.gate_up_proj, module.down_proj)


@cache
def held_out() -> tuple[Document, ...]:
    """16 pieces of held-out documents of each domain, the domains in turn."""
    with (MODEL_DIR / "held_out.jsonl").open(encoding="utf-8") as file:
        return tuple(Document(**json.loads(line)) for line in file)


def token_batches(
    documents: tuple[Document, ...], tokenizer: Any, length: int, batch: int = 16
) -> list[Tensor]:
    """The documents, in batches of `batch`, as begin-of-text and their first `length` tokens: int64
    `[batch, 1 + length]` each. A last incomplete batch is dropped.

    Raises ValueError where a document is shorter than that.
    """
    rows = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(f"{document.source} has {len(ids)} tokens, fewer than length={length}")
        rows.append([tokenizer.bos_token_id, *ids])
    return list(torch.tensor(rows[: len(rows) // batch * batch]).split(batch))


def token_bytes(tokenizer: Any) -> Tensor:
    """Bytes of text that each token stands for: int64 `[vocabulary]`, 0 for special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    return torch.tensor([0 if token in special else len(token) for token in tokens])
