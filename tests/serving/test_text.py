"""Text in pieces: whole characters, stop words wherever tokens end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving.text import Transcript, load_tokenizer, special_token, token_texts

PIECES_OF_TEXT = st.tuples(st.text("aé€😀", max_size=12), st.lists(st.integers(1, 3), min_size=40)).map(
    lambda drawn: _cut(drawn[0].encode(), drawn[1])
)


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, place = [], 0
    for size in sizes:
        if place < len(data):
            pieces.append(data[place : place + size])
            place += size
    return pieces


@given(st.one_of(PIECES_OF_TEXT, st.lists(st.binary(max_size=3), max_size=12)))
def test_pieces_are_whole_characters_and_together_the_text(texts: list[bytes]) -> None:
    transcript, chunks = Transcript(texts), []
    for token in range(len(texts)):
        transcript.add(token)
        chunks.append(transcript.take("length" if token == len(texts) - 1 else None))
    given_out = [chunk for chunk in chunks if chunk is not None]
    assert "".join(chunk.text for chunk in given_out) == b"".join(texts).decode(errors="replace")
    assert [token for chunk in given_out for token in chunk.token_ids] == list(range(len(texts)))
    for chunk in given_out:  # so that whoever decodes a chunk by itself sees the same text
        assert b"".join(texts[token] for token in chunk.token_ids).decode(errors="replace") == chunk.text


@given(
    st.text("abé", max_size=30),
    st.lists(st.integers(1, 3), min_size=60),
    st.text("abé", min_size=1, max_size=4),
)
def test_stops_with_the_token_that_completes_the_word(text: str, sizes: list[int], word: str) -> None:
    texts = _cut(text.encode(), sizes)
    transcript = Transcript(texts, [word])
    stopped = next((token for token in range(len(texts)) if transcript.add(token)), None)
    prefixes = [b"".join(texts[: token + 1]) for token in range(len(texts))]
    assert stopped == next((token for token, seen in enumerate(prefixes) if word.encode() in seen), None)


@given(
    st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(0, 7), max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=2),
)
def test_barred_tokens_are_those_that_would_complete_a_bad_word(
    texts: list[str], choices: list[int], words: list[str]
) -> None:
    transcript, said = Transcript([text.encode() for text in texts], bad_words=words), ""
    for choice in choices:
        barred = transcript.barred()
        assert barred == {
            token for token, text in enumerate(texts) if any(word in said + text for word in words)
        }
        allowed = [token for token in range(len(texts)) if token not in barred]
        if not allowed:
            break
        token = allowed[choice % len(allowed)]
        transcript.add(token)
        said += texts[token]


@given(st.text(max_size=40))
def test_token_texts_are_what_the_tokenizer_means(text: str) -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(TEXTS[token] for token in ids) == text.encode()


TEXTS = token_texts(load_tokenizer(MODEL_DIR))


def test_special_tokens_have_no_text() -> None:
    token = special_token(MODEL_DIR, "eos_token")
    assert token == 0 and TEXTS[0] == b"" and special_token(MODEL_DIR, "sep_token") is None


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        special_token(tmp_path, "eos_token")
