"""A WordPiece vocabulary of a corpus's own, as a tokenizer that Transformers loads."""

import logging
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizerFast

from tinybert_fast.data.atomic import replacing_folder
from tinybert_fast.data.corpus import Corpus
from tinybert_fast.data.progress import shown

log = logging.getLogger(__name__)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
SMALLEST = 32


def train_wordpiece(
    corpus: Corpus,
    folder: str | Path,
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    progress: bool = False,
) -> BertTokenizerFast:
    """Learns a vocabulary and saves the tokenizer to ``folder``, whole or not at all.

    Text is normalised and split as BERT's is: ``lowercase`` also drops accents, and each Chinese
    character is a token. Special tokens come first, characters next (the most frequent ones, if
    they would not fit), then pieces as they were merged, ``min_frequency`` times seen or more. The
    same corpus gives the same vocabulary. Memory grows with the number of different words.

    Raises:
        FileExistsError: ``folder`` holds something. ValueError: no text, or a ``vocab_size`` too
            small.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size is {vocab_size}; expected {SMALLEST} or more")
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with replacing_folder(Path(folder)) as target:
        characters, alphabet = _alphabet(
            shown(corpus, "counting characters", on=progress), learner, (vocab_size - 5) // 2
        )
        if not characters:
            raise ValueError(f"{corpus} holds no text; expected sentences")
        # The trainer numbers characters in the order of a hash table that differs from run to run,
        # and breaks ties by number. Named as special tokens they have their numbers beforehand.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[*SPECIAL, *alphabet],
            initial_alphabet=characters,
            limit_alphabet=len(characters),
            show_progress=False,
        )
        learner.train_from_iterator(shown(corpus, "learning words", on=progress), trainer)
        vocabulary = learner.get_vocab()
        if len(vocabulary) < vocab_size:
            log.warning("%s gives %d tokens, not %d", corpus, len(vocabulary), vocab_size)
        tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase)
        tokenizer.save_pretrained(target)
    return BertTokenizerFast.from_pretrained(folder)


def _alphabet(corpus, learner: Tokenizer, most: int) -> tuple[list[str], list[str]]:
    """The ``most`` frequent characters, and these with those that also continue words, sorted."""
    words: Counter[str] = Counter()
    for sentence in corpus:
        plain = learner.normalizer.normalize_str(sentence)
        words.update(word for word, _ in learner.pre_tokenizer.pre_tokenize_str(plain))
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, times in words.items():
        continuing.update(word[1:])
        for character in word:
            counts[character] += times
    characters = sorted(sorted(counts), key=lambda c: -counts[c])[:most]
    pieces = sorted(CONTINUATION + c for c in continuing.intersection(characters))
    return characters, [*sorted(characters), *pieces]
