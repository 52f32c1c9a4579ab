"""Sentence ends of English and Chinese, and text that has none."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinybert_fast.data.sentences import MAX_CHARS, split_sentences


@pytest.mark.parametrize(
    "marked",
    [
        "It ended. |Then it began! |Did it? |Yes.",
        "Mr. Smith of the U.S. Senate met J. R. Doe at No. 5 Main St. Mary.",
        'He said "Stop." |"Why?" |(Nobody knew.) |End',
        "It costs 3.50 a piece, i.e. much. |Then 4. |",
        "well . . . so it went on, etc. and on.",
        "他来了。|“好吗？”|她说：“好！”|真的……|没有结尾",
        "他说OK。|Then English. |再见！",
    ],
)
def test_ends(marked):
    """Where the bars are."""
    assert list(split_sentences(marked.replace("|", ""))) == [
        sentence.strip() for sentence in marked.split("|") if sentence
    ]


@given(st.text(st.sampled_from(" .!?\"')”aA1。！？…”\t\u00a0"), max_size=200))
def test_nothing_is_lost(text):
    sentences = list(split_sentences(text))
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


@pytest.mark.parametrize("unit", ["a", "ab ", ".", "!", "\"')", " ", "。", "…", ".  ", ". x", "A."])
def test_a_megabyte_of_anything_is_quick_and_bounded(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    sentences = list(split_sentences(text))
    assert time.process_time() - start < 2
    assert max(map(len, sentences), default=0) <= MAX_CHARS
    assert sum(len("".join(s.split())) for s in sentences) == len("".join(text.split()))
