"""Chinese words: where they begin, stored beside the tokens, masked whole; the missing package."""

import sys

import pytest

from tinybert_fast.data import (
    Corpus,
    PreTrainingCollator,
    open_shards,
    train_wordpiece,
    write_shards,
)
from tinybert_fast.data.word_starts import ChineseWords

TEXT = (
    "我们在北京大学学习自然语言处理。\n今天天气很好，适合出去散步。\n\n他喜欢看电影hello world。\n"
)
WORDS = {"我们", "北京大学", "自然语言", "今天天气", "喜欢", "散步"}


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    return Corpus.of(tmp_path / "a.txt")


def test_tokens_that_begin_words():
    pytest.importorskip("jieba")
    words = ChineseWords()
    places = [(i, i + 1) for i in range(8)]
    assert words.starts("我们在北京大学学", places).tolist() == [1, 0, 1, 1, 0, 0, 0, 1]
    # A character that the tokenizer drops does not hide where the next word begins.
    assert words.starts("我们\u200b北京", [(0, 1), (1, 2), (3, 4), (4, 5)]).tolist() == [1, 0, 1, 0]
    assert words.starts("", []).tolist() == []
    assert words.starts("hello大学", [(0, 3), (3, 5), (5, 6), (6, 7)]).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("max_length", [40, 12], ids=["whole", "cut inside words"])
@pytest.mark.parametrize("nsp", [True, False])
def test_words_are_stored_and_masked_whole(corpus, tmp_path, nsp, max_length):
    pytest.importorskip("jieba")
    tokenizer = train_wordpiece(corpus, tmp_path / "tokenizer", vocab_size=120)
    options = {"nsp": nsp, "max_length": max_length, "duplicates": 2}
    write_shards(corpus, tokenizer, tmp_path / "s", words="jieba", **options)
    write_shards(corpus, tokenizer, tmp_path / "plain", **options)
    examples, plain = (open_shards(tmp_path / name, tokenizer).examples for name in ("s", "plain"))
    assert plain["input_ids"][:] == examples["input_ids"][:]
    found = set()
    for row in examples:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        starts = row["word_starts"]
        assert len(starts) == len(tokens)
        first = row.get("first_length", len(tokens))
        assert all(starts[i] for i in (0, 1, first - 1, len(tokens) - 1))
        assert not nsp or starts[first]
        words = []
        for token, start in zip(tokens, starts):
            words += [token] if start else [words.pop() + token.removeprefix("##")]
        found.update(words)
    if max_length == 40:
        assert found >= {"我们", "北京大学", "喜欢", "hello", "world", "电影"}
    collate = PreTrainingCollator(tokenizer, whole_word_mask=True, mlm_probability=0.4)
    labels = collate(list(examples))["labels"].tolist()
    inside = 0
    for row, of_row in zip(examples, labels):
        for i, start in enumerate(row["word_starts"]):
            if not start:
                assert (of_row[i] == -100) == (of_row[i - 1] == -100)
                inside += of_row[i] != -100
    assert inside


def test_the_missing_package_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    tokenizer = train_wordpiece(corpus, tmp_path / "tokenizer", vocab_size=120)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[chinese\]'") as no:
        write_shards(corpus, tokenizer, tmp_path / "s", words="jieba")
    assert no.value.name == "jieba"
