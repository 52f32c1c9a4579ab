"""Generated reactions, and the experiment on them with a teacher of a few kilobytes."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizerFast

from tinybert_fast.benchmarks import reactions as script
from tinybert_fast.benchmarks.real_heads import TOKEN, installed
from tinybert_fast.testing.tiny_models import SPECIAL, tiny_config

OF_EACH = 30
MADE = {held_out: script.reactions(OF_EACH, held_out=held_out) for held_out in (False, True)}
TEXTS = [text for made in MADE.values() for texts in made.values() for text in texts]


def test_types_are_balanced_and_reactions_distinct():
    assert all(len(texts) == OF_EACH for made in MADE.values() for texts in made.values())
    assert len(set(TEXTS)) == len(TEXTS) == 2 * OF_EACH * len(script.TEMPLATES)
    assert MADE[True] == script.reactions(OF_EACH, held_out=True)  # seeded


def test_more_reactions_than_pairs_are_refused():
    with pytest.raises(ValueError, match="99999 reactions of the type 'amide of an acid'"):
        script.reactions(99999, held_out=False)


def test_reactions_fall_into_tokens_and_close_what_they_open():
    for text in TEXTS:
        tokens = TOKEN.findall(text)
        assert "".join(tokens) == text
        assert tokens.count(">>") == 1
        for molecule in text.replace(">>", ".").split("."):
            atoms = TOKEN.findall(molecule)
            assert atoms.count("(") == atoms.count(")"), molecule
            assert all(atoms.count(ring) % 2 == 0 for ring in "1234"), molecule


def test_a_biaryl_gives_its_second_ring_other_numbers():
    made = script.reaction(random.Random(0), "Suzuki, bromide", "c1ccncc1", "c1ccc(F)cc1")
    assert made.endswith(">>c1(-c2ccc(F)cc2)ccncc1")


def test_held_out_pairs_of_substituents_are_in_no_training_reaction(monkeypatch):
    """Seen where reactions are made: the pairs that either half asks for."""
    pairs = {}
    for held_out in (False, True):
        seen = pairs[held_out] = set()

        def note(draw, name, a, b, seen=seen):
            seen.add(frozenset((a, b)))
            return f"{name} {a} {b}"

        monkeypatch.setattr(script, "reaction", note)
        script.reactions(OF_EACH, held_out=held_out)
    assert all(pairs.values())
    assert not pairs[True] & pairs[False]


@pytest.mark.skipif(
    installed(script.CLASSIFIER) is None, reason="pip install --no-deps rxnfp==0.1.0"
)
def test_the_teacher_knows_every_token_and_gives_each_type_a_class_of_its_own():
    teacher, tokenizer = script.load(installed(script.CLASSIFIER))
    rows = script.encoded(TEXTS, tokenizer)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in rows)
    held_out = script.encoded([texts[0] for texts in MADE[True].values()], tokenizer)
    found = script.predict(teacher, held_out, tokenizer).argmax(-1).tolist()
    assert len(set(found)) >= len(script.TEMPLATES) - 2


def test_likeness():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert script.likeness(3 + teacher, teacher) == {"fidelity": 1.0, "kl": pytest.approx(0)}
    found = script.likeness(torch.zeros(2, 2, dtype=torch.float64), teacher)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    assert found["fidelity"] == 0.5
    assert found["kl"] == pytest.approx(float(torch.tensor(2.0).log() - entropy))


def test_seeds_are_summed_up():
    rows = [
        {"student": "A", "heads": heads, "fidelity": share, "kl": 0.5}
        for heads, share in ((12, 0.5), (4, 1.0), (12, 0.7))
    ]
    assert [script.in_words(line) for line in script.summary(rows)] == [
        ("A", "12", "2", "60.0 ± 14.1", "0.500 ± 0.000"),
        ("A", "4", "1", "100.0", "0.500"),
    ]


def test_who_learns_what_from_which_reactions(monkeypatch):
    """Halves of the same order: what a prediction stage sees is the same with a stage before it."""
    seen = []

    class Trainer:
        def __init__(self, model, teacher, *, args, stage, matches, train_dataset, **_):
            rows = [row[0] for row in train_dataset["input_ids"]]
            seen.append((stage, getattr(matches, "loss", None), args.max_steps, rows))

        def train(self):
            pass

    monkeypatch.setattr(script, "DistillationTrainer", Trainer)
    monkeypatch.setattr(script, "BATCH", 2)
    teacher = BertForSequenceClassification(tiny_config(num_hidden_layers=4))
    train = script.Dataset.from_dict({"input_ids": [[n] for n in range(9)]})
    for student in script.STUDENTS:
        script.taught(student, teacher, train, SimpleNamespace(pad_token_id=0), steps=3, seed=0)
    whole = seen[0][-1]
    assert len(set(whole)) == 6
    first, second = whole[:2], whole[2:]
    assert seen == [
        ("prediction", None, 3, whole),
        ("prediction", None, 2, second),
        ("intermediate", "minilm", 1, first),
        ("prediction", "minilm", 2, second),
        ("prediction", None, 3, whole),
        ("intermediate", "tinybert", 1, first),
        ("prediction", "tinybert", 2, second),
    ]


def test_the_experiment_with_a_tiny_teacher(tmp_path, monkeypatch):
    words = (*SPECIAL, *sorted({token for text in TEXTS for token in TOKEN.findall(text)}))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = tiny_config(
        vocab_size=len(words), num_hidden_layers=4, max_position_embeddings=200, num_labels=5
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert isinstance(script.load(tmp_path)[1], BertTokenizerFast)
    monkeypatch.setattr(script, "BATCH", 4)
    found = script.measure(*script.load(tmp_path), steps=2, seeds=1, held_out_of_each=1)
    json.dumps(found)
    assert "12 heads and the teacher 2" in found["refusal"]
    assert [row["heads"] for row in found["rows"]] == [12, 12, 12, 2, 2]
    assert all(0 <= row["fidelity"] <= 1 and row["kl"] > 0 for row in found["rows"])
    names = [student.name for student in script.STUDENTS]
    assert [line["student"] for line in found["students"]] == names
    teacher, _ = script.load(tmp_path)
    teacher.config.num_attention_heads = 12
    with pytest.raises(ValueError, match="the teacher has 12 heads too"):
        script.refusal(teacher)
