"""XShare in transformers models: the hook into their routers, and a decoder that is fast on a CPU."""

from xshare_trtllm.hf.attach import Attachment, LayerStats, attach
from xshare_trtllm.hf.decoder import Decoder, KVCache

__all__ = ["Attachment", "Decoder", "KVCache", "LayerStats", "attach"]
