"""A vocabulary learned from text: order, size, repeatability, Chinese, what it saves."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tinybert_fast.data import Corpus, train_wordpiece
from tinybert_fast.data.shards import fingerprint
from tinybert_fast.data.wordpiece import SPECIAL

TEXT = (
    "The naïve writer wrote letters. The writers' letter was written, 他写信给作家。作家写了信！\n"
    * 5
)
AGAIN = """
import sys
from tinybert_fast.data import Corpus, train_wordpiece
from tinybert_fast.data.shards import fingerprint
print(fingerprint(train_wordpiece(Corpus.of(sys.argv[1]), sys.argv[2], vocab_size=60)))
"""


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return Corpus.of(tmp_path / "a.txt")


def test_what_is_learned(corpus, tmp_path):
    tokenizer = train_wordpiece(corpus, tmp_path / "tokenizer", vocab_size=60)
    vocabulary = tokenizer.get_vocab()
    ranked = sorted(vocabulary, key=vocabulary.get)
    assert len(ranked) == len(tokenizer) == 60
    assert tuple(ranked[:5]) == SPECIAL
    assert max(map(len, ranked[5:])) > 3  # pieces of words
    assert tokenizer.tokenize("Naive 作家 letter") == tokenizer.tokenize("naïve 作 家 LETTER")
    assert "[UNK]" not in tokenizer.tokenize(TEXT)
    assert "##家" not in vocabulary  # a character that never continues a word
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded("the letter")["input_ids"] == tokenizer("the letter")["input_ids"]


def test_another_process_learns_the_same(corpus, tmp_path):
    here = fingerprint(train_wordpiece(corpus, tmp_path / "one", vocab_size=60))
    command = [sys.executable, "-c", AGAIN, str(corpus.paths[0]), str(tmp_path / "two")]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert there.stdout.strip() == here


def test_case_and_rare_characters(corpus, tmp_path):
    cased = train_wordpiece(corpus, tmp_path / "cased", vocab_size=90, lowercase=False)
    assert "ï" in "".join(cased.tokenize("naïve"))
    small = train_wordpiece(corpus, tmp_path / "small", vocab_size=32)
    assert len(small) <= 32
    assert "[UNK]" in small.tokenize(TEXT)


def test_refusals(corpus, tmp_path, caplog):
    train_wordpiece(corpus, tmp_path / "large", vocab_size=5000)
    assert "tokens, not 5000" in caplog.text
    with pytest.raises(FileExistsError, match="large is there already"):
        train_wordpiece(corpus, tmp_path / "large")
    with pytest.raises(ValueError, match="vocab_size is 8; expected 32 or more"):
        train_wordpiece(corpus, tmp_path / "none", vocab_size=8)
    corpus.paths[0].write_text("\n")
    with pytest.raises(ValueError, match=r"a\.txt holds no text"):
        train_wordpiece(corpus, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "large"]
