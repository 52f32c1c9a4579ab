"""Tokens of blocks: a word tokenised once is what the tokenizer gives in the text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tinybert_fast.data import Corpus, token_store
from tinybert_fast.data.token_store import BlockEncoder, blocks
from tinybert_fast.testing.tiny_models import SPECIAL, tiny_tokenizer

# White space that is and is not a space, marks that combine or vanish, letters whose lower case
# depends on where they stand, Chinese, punctuation, names of special tokens.
PIECES = [
    " ", "  ", "\t", "\u00a0", "\u3000", "\x1c", "\u200b", "\u0301", "\ufffd", "Σ", "İ", "ß", "Å",
    "한", "汉字", "a", "ab", "xx", "film", ",", "。", "[MASK]", "##s",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = (
        "a",
        "##a",
        "b",
        "##b",
        "film",
        "##s",
        "s",
        "汉",
        ",",
        "#",
        "a##",
        "σ",
        "i",
        "##x",
        "e",
    )
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), (*SPECIAL, *words))


def encoder_of(tokenizer):
    corpus = Corpus((), sentences="lines")
    return BlockEncoder(tokenizer.backend_tokenizer.to_str(), corpus, "wordpiece", np.dtype("i4"))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES)).map("".join)))
def test_words_by_themselves_give_the_same_tokens(tokenizer, texts):
    encoder, direct = encoder_of(tokenizer), encoder_of(tokenizer)
    direct.by_word = False
    assert encoder.by_word
    for got, want in zip(encoder(texts), direct(texts)):
        assert np.array_equal(got, want)


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(token_store, "KNOWN_CHARS", 100)
    encoder = encoder_of(tokenizer)
    for number in range(50):
        block = encoder([f"film {number:09}", None])
        assert block.ids[0] == tokenizer.convert_tokens_to_ids("film")
        assert sum(map(len, encoder._known)) < 120


def test_other_tokenizers_take_whole_sentences(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "t")
    tokenizer.add_tokens([AddedToken("the film")])
    encoder = encoder_of(tokenizer)
    assert not encoder.by_word
    assert encoder(["the film"]).ids.tolist() == [len(tokenizer) - 1]


def test_blocks_hold_all_lines(monkeypatch):
    monkeypatch.setattr(token_store, "BLOCK_CHARS", 10)
    lines = ["a" * 4, None, "b" * 7, "c" * 30, None]
    made = list(blocks(lines))
    assert made == [["a" * 4, None, "b" * 7], ["c" * 30], [None]]
