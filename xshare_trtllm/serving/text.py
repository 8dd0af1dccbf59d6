"""Tokens and text: the bytes of each token, and text that comes in pieces of whole characters."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from xshare_trtllm.serving.generation import Chunk, FinishReason, Times


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


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte-order mark. Raises ValueError, naming the file, where
    there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object, has {type(values).__name__}")
    return values


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
    token = read_json(file).get(name)
    text = token["content"] if isinstance(token, dict) else token
    found: int | None = None if text is None else load_tokenizer(folder).token_to_id(text)
    return found


class Transcript:
    """The text of one growing answer: what of it can be shown, whether it has to stop, what may not follow.

    texts       the bytes of each token, by `token_texts`
    stop_words  texts that end the answer
    bad_words   texts that it must not contain
    """

    def __init__(
        self, texts: Sequence[bytes], stop_words: Sequence[str] = (), bad_words: Sequence[str] = ()
    ) -> None:
        self._texts = texts
        self._stop_words = tuple(word for word in stop_words if word)
        self._stop_data = tuple(word.encode() for word in self._stop_words)
        self._bad_words = tuple(word.encode() for word in bad_words if word)
        self._overlap = max(map(len, (*self._stop_data, *self._bad_words)), default=1) - 1
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[int] = []
        self._text = ""
        self._containers: dict[bytes, set[int]] = {}
        self.stop_word = ""

    def add(self, token: int) -> bool:
        """Take the next token; True: it completes a stop word, which is now `stop_word`."""
        data = self._texts[token]
        self._held.append(token)
        self._text += self._decoder.decode(data)
        window = self._tail + data
        self._tail = window[-self._overlap :] if self._overlap else b""
        found = (
            word for word, bytes_ in zip(self._stop_words, self._stop_data, strict=True) if bytes_ in window
        )
        self.stop_word = next(found, "")
        return bool(self.stop_word)

    def barred(self) -> set[int]:
        """Tokens that would complete a bad word."""
        tokens: set[int] = set()
        for word in self._bad_words:
            tokens |= self._containing(word)
            for seen in range(1, len(word)):
                if self._tail.endswith(word[:seen]):
                    tokens |= self._beginning_with(word[seen:])
        return tokens

    def _containing(self, word: bytes) -> set[int]:
        if word not in self._containers:
            self._containers[word] = {token for token, data in enumerate(self._texts) if word in data}
        return self._containers[word]

    def _beginning_with(self, rest: bytes) -> set[int]:
        return {token for token, data in enumerate(self._texts) if data.startswith(rest)}

    def take(self, finish: FinishReason | None, times: Times | None = None) -> Chunk | None:
        """What can be shown now; None where the last character is not complete and more will come."""
        if finish is None and (not self._held or self._decoder.getstate()[0]):
            return None
        text = self._text + self._decoder.decode(b"", final=finish is not None)
        chunk = Chunk(tuple(self._held), text, finish, self.stop_word, times)
        self._held, self._text = [], ""
        return chunk
