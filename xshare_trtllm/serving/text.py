"""Tokens and text: the bytes of each token, and text that comes in pieces of whole characters."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from xshare_trtllm.serving.generation import Chunk, FinishReason


@cache
def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes are their own letters, others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


def token_texts(tokenizer: Any) -> list[bytes]:
    """The bytes that each token of a byte-level tokenizer (`tokenizers.Tokenizer`) stands for; none for
    special tokens.

    Raises ValueError for a tokenizer of another kind.
    """
    alphabet, special = _byte_of_letter(), tokenizer.get_added_tokens_decoder()
    texts = []
    for token in range(tokenizer.get_vocab_size()):
        letters = "" if token in special else tokenizer.id_to_token(token)
        if any(letter not in alphabet for letter in letters):
            raise ValueError(f"token_texts: token {token}, {letters!r}, is not byte-level")
        texts.append(bytes(alphabet[letter] for letter in letters))
    return texts


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a model's folder. Raises ValueError where there is none."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no tokenizer.json")
    return Tokenizer.from_file(str(file))


def special_token(folder: Path, name: str) -> int | None:
    """The id of `eos_token`, `bos_token` or `pad_token` by tokenizer_config.json; None: there is none.

    Raises ValueError for a folder without these files.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no tokenizer_config.json")
    token = json.loads(file.read_text(encoding="utf-8")).get(name)
    text = token["content"] if isinstance(token, dict) else token
    found: int | None = None if text is None else load_tokenizer(folder).token_to_id(text)
    return found


class Transcript:
    """The text of one growing answer: what of it can be shown, and whether it has to stop.

    texts       the bytes of each token, by `token_texts`
    stop_words  UTF-8
    """

    def __init__(self, texts: Sequence[bytes], stop_words: Sequence[bytes] = ()) -> None:
        self._texts, self._stop_words = texts, tuple(word for word in stop_words if word)
        self._overlap = max(map(len, self._stop_words), default=1) - 1
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[int] = []
        self._text = ""

    def add(self, token: int) -> bool:
        """Take the next token; True: it completes a stop word."""
        data = self._texts[token]
        self._held.append(token)
        self._text += self._decoder.decode(data)
        window = self._tail + data
        self._tail = window[-self._overlap :] if self._overlap else b""
        return any(word in window for word in self._stop_words)

    def take(self, finish: FinishReason | None) -> Chunk | None:
        """What can be shown now; None where the last character is not complete and more will come."""
        if finish is None and (not self._held or self._decoder.getstate()[0]):
            return None
        text = self._text + self._decoder.decode(b"", final=finish is not None)
        chunk = Chunk(tuple(self._held), text, finish)
        self._held, self._text = [], ""
        return chunk
