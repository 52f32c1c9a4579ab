"""What losses are worth to a student whose teacher has other heads: a classifier of reactions.

    pip install --no-deps rxnfp==0.1.0
    python benchmarks/reactions.py [--steps N] [--seeds N] [--folder FOLDER] [--json FILE]

The teacher is rxnfp's classifier (Schwaller et al., "Mapping the space of chemical reactions using
attention-based neural networks", Nature Machine Intelligence 2021, MIT licence): BERT, 12 layers,
256 wide, 4 heads of 64, fine-tuned by its authors on 50 classes of reactions written as SMILES. Its
files are read where its package installs them, which is not imported.

No package has reactions to train on, so they are made here from templates of textbook ones. What is
measured is the student's likeness to the teacher, not chemistry: on held-out reactions, whose pairs
of substituents no training reaction has, the share that both put into the same class, and the mean
KL divergence of the teacher's distribution to the student's, in nats.

Students are TinyBERT-4L-312 from a random start. One with intermediate losses learns by them in the
first half of its steps, and from the teacher's logits in the second. Beside it stand students of
the logits alone: on the same reactions in all steps, which is the fair rival for an equal number of
steps, and in the second half alone, which shows what the intermediate stage adds to the same
prediction stage. Each reaction is seen once. TinyBERT's attention loss compares heads one by one
and refuses 12 against 4, so its student has 4 heads of 78, and so has one of the logits alone.

A few hundred steps compare how fast students learn, not where they end. All have the same rate,
which was not tuned for any; rate, steps, batch and the reactions were settled after several looks
at single runs with another seed, on held-out reactions drawn from the same pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, product
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from zlib import crc32

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import BertForSequenceClassification, BertTokenizerFast, set_seed

from tinybert_fast.benchmarks.hardware import facts, has_bf16
from tinybert_fast.benchmarks.real_heads import TOKEN, installed
from tinybert_fast.data import LengthCollator
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.integrations import TinyBertConfig, accelerate
from tinybert_fast.training.common import training_arguments
from tinybert_fast.training.distill import STAGES, DistillationTrainer
from tinybert_fast.training.evaluate import predict
from tinybert_fast.training.loading import load_classifier
from tinybert_fast.training.objectives import Loss, matches_for

CLASSIFIER = "bert_ft_10k_25s"  # bert_ft beside it is an encoder without its head
BATCH = 16
LR = 5e-4  # from a random start, either stage
HELD_OUT = 10  # one pair of substituents of so many
HELD_OUT_OF_EACH = 50  # type
HEADS = 12  # TinyBERT-4L-312's own


class Student(NamedTuple):
    name: str
    loss: Loss | None  # of the first half of the steps; None: no such stage
    heads: int | None  # None: as many as the teacher has
    second_half_alone: bool = False


STUDENTS = (
    Student("prediction, all steps", None, HEADS),
    Student("prediction, second half alone", None, HEADS, second_half_alone=True),
    Student("MiniLM, then prediction", "minilm", HEADS),
    Student("prediction, all steps", None, None),
    Student("TinyBERT, then prediction", "tinybert", None),
)

# ---- reactions -----------------------------------------------------------------------------------

# A substituent begins with the atom that is bound, and closes its rings.
_ON_RING = "F Cl C OC C#N CC C(C)C N(C)C".split()
_RINGS = "c1ccc({})cc1 c1cccc({})c1 c1ccccc1{} c1ccc({})nc1 c1ccc({})cc1F".split()
ARYL = ["c1ccccc1", "c1ccncc1", "c1cccnc1", "c1cccs1", "c1ccc2ccccc2c1", "c1cnc2ccccc2c1",
        "c1ccc2[nH]ccc2c1", "c1ccc2c(c1)OCO2"]  # fmt: skip
ARYL += [ring.format(group) for ring in _RINGS for group in _ON_RING]
ALKYL = """CC CCC CCCC CCCCC CCCCCC CC(C)C CCC(C)C C(C)C C(C)CC C1CCCC1 C1CCCCC1 C1CC1 CC1CC1 CCOC
CCCOC CCOCC CCC#N CCN(C)C CCCN(C)C C1CCOCC1 CC1CCCO1 CCSC CC=C CCC=C""".split()
ALKYL += [f"C{ring}" for ring in ARYL[:7]]
# type: its two substituents, and the reaction
TEMPLATES: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "amide of an acid": (ARYL, ALKYL, "O=C(O){a}.N{b}>>O=C({a})N{b}"),
    "amide of a chloride": (ARYL, ALKYL, "O=C(Cl){a}.N{b}>>O=C({a})N{b}"),
    "ester of a chloride": (ARYL, ALKYL, "O=C(Cl){a}.O{b}>>O=C({a})O{b}"),
    "sulfonamide": (ARYL, ALKYL, "O=S(=O)(Cl){a}.N{b}>>O=S(=O)({a})N{b}"),
    "urea": (ARYL, ALKYL, "O=C=N{a}.N{b}>>O=C(N{a})N{b}"),
    "reductive amination, aldehyde": (ARYL, ALKYL, "O=C{a}.N{b}>>C({a})N{b}"),
    "reductive amination, ketone": (ARYL, ALKYL, "CC(=O){a}.N{b}>>CC({a})N{b}"),
    "N-alkylation": (ARYL, ALKYL, "BrC{a}.CN{b}>>CN(C{a}){b}"),
    "Buchwald, bromide": (ARYL, ALKYL, "Br{a}.N{b}>>N({a}){b}"),
    "Buchwald, chloride": (ARYL, ALKYL, "Cl{a}.N{b}>>N({a}){b}"),
    "SNAr": (ARYL, ALKYL, "F{a}.N{b}>>N({a}){b}"),
    "Suzuki, bromide": (ARYL, ARYL, "Br{a}.OB(O){b}>>{a-b}"),
    "Suzuki, chloride": (ARYL, ARYL, "Cl{a}.OB(O){b}>>{a-b}"),
    "Sonogashira": (ARYL, ARYL, "I{a}.C#C{b}>>C(#C{b}){a}"),
    "Williamson": (ARYL, ALKYL, "O{a}.Br{b}>>O({a}){b}"),
    "thioether": (ARYL, ALKYL, "S{a}.Br{b}>>S({a}){b}"),
    "methyl ester, cleaved": (ARYL, ALKYL, "COC(=O)C({a}){b}>>O=C(O)C({a}){b}"),
    "ethyl ester, cleaved": (ARYL, ALKYL, "CCOC(=O)C({a}){b}>>O=C(O)C({a}){b}"),
    "Boc, taken off": (ARYL, ALKYL, "CC(C)(C)OC(=O)N(C{a}){b}>>N(C{a}){b}"),
    "alcohol to ketone": (ARYL, ALKYL, "OC({a}){b}>>O=C({a}){b}"),
    "nitro to amine": (ARYL, ALKYL, "O=[N+]([O-])c1ccccc1N({a}){b}>>Nc1ccccc1N({a}){b}"),
    "acid to chloride": (ARYL, ALKYL, "O=C(O)C({a}){b}>>O=C(Cl)C({a}){b}"),
}


def reaction(draw: random.Random, name: str, a: str, b: str) -> str:
    """One of its type with these substituents; what reacts stands in random order."""
    _, _, text = TEMPLATES[name]
    inner = b.translate(str.maketrans("123", "234"))  # while the ring of a's first atom is open
    text = text.replace("{a-b}", f"{a[:2]}(-{inner}){a[2:]}")
    left, right = text.format(a=a, b=b).split(">>")
    molecules = left.split(".")
    draw.shuffle(molecules)
    return f"{'.'.join(molecules)}>>{right}"


def is_held_out(a: str, b: str) -> bool:
    """Whether this pair, in either order, is."""
    return crc32(" ".join(sorted((a, b))).encode()) % HELD_OUT == 0


def reactions(of_each: int, *, held_out: bool, seed: int = 0) -> dict[str, list[str]]:
    """``of_each`` different ones of every type, whose pairs of substituents are held out or not."""
    made = {}
    for name, (first, second, _) in TEMPLATES.items():
        pairs = [pair for pair in product(first, second) if is_held_out(*pair) == held_out]
        if of_each > len(pairs):
            raise ValueError(
                f"{of_each} reactions of the type {name!r} are asked for, and there are "
                f"{len(pairs)} pairs of substituents; take fewer steps"
            )
        draw = random.Random(f"{seed} {name}")
        made[name] = [reaction(draw, name, *pair) for pair in draw.sample(pairs, of_each)]
    return made


def encoded(texts: Iterable[str], tokenizer: Any) -> Dataset:
    """Columns as `LengthCollator` reads them."""
    rows = [
        tokenizer.convert_tokens_to_ids(["[CLS]", *TOKEN.findall(text), "[SEP]"]) for text in texts
    ]
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "token_type_ids": [[0] * len(row) for row in rows],
            "length": [len(row) for row in rows],
        }
    )


# ---- the experiment ------------------------------------------------------------------------------


def taught(
    student: Student, teacher: Any, train: Dataset, tokenizer: Any, *, steps: int, seed: int
) -> Any:
    """A new student after its steps, each with reactions that it has not seen."""
    theirs = teacher.config
    config = TinyBertConfig.tiny_4l_312(
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        num_attention_heads=student.heads or theirs.num_attention_heads,
        num_labels=theirs.num_labels,
    )
    set_seed(seed)
    model = accelerate(BertForSequenceClassification(config))
    matches = matches_for(None, config, theirs, loss=student.loss) if student.loss else None
    first = steps // 2 if matches or student.second_half_alone else 0
    rows = train.shuffle(seed=seed).select(range(steps * BATCH))
    with tempfile.TemporaryDirectory() as folder:
        for stage, begin, end in zip(STAGES, (0, first), (first, steps), strict=True):
            if begin == end or (stage == "intermediate" and matches is None):
                continue
            arguments = training_arguments(
                folder,
                max_steps=end - begin,
                lr=LR,
                batch_size=BATCH,
                seed=seed,
                bf16=has_bf16(torch.device("cpu")),
                use_cpu=True,
                evaluate=False,
                save_strategy="no",
            )
            DistillationTrainer(
                model,
                teacher,
                args=arguments,
                stage=stage,
                matches=matches,
                train_dataset=rows.select(range(begin * BATCH, end * BATCH)),
                data_collator=LengthCollator(tokenizer, lengths=True),
                title=f"{student.name}, seed {seed}, {stage}",
            ).train()
    return model


def likeness(logits: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """Of a student's logits (rows, classes) to the teacher's."""
    theirs, ours = teacher.log_softmax(-1), logits.log_softmax(-1)
    return {
        "fidelity": (logits.argmax(-1) == teacher.argmax(-1)).double().mean().item(),
        "kl": (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
    }


def refusal(teacher: Any) -> str:
    """What TinyBERT's losses say to a student of TinyBERT-4L-312's own heads."""
    try:
        matches_for(None, TinyBertConfig.tiny_4l_312(), teacher.config, loss="tinybert")
    except ValueError as error:
        return str(error)
    raise ValueError(f"the teacher has {HEADS} heads too; take one that has not")


def measure(
    teacher: Any,
    tokenizer: Any,
    *,
    steps: int,
    seeds: int,
    held_out_of_each: int = HELD_OUT_OF_EACH,
) -> dict[str, Any]:
    """Every student and seed, in turn; the teacher is used accelerated."""
    machine = facts(torch.device("cpu"))
    accelerate(teacher)
    refused = refusal(teacher)
    relations = matches_for(None, TinyBertConfig.tiny_4l_312(), teacher.config, loss="minilm")
    kinds = reactions(held_out_of_each, held_out=True)
    of_each = ceil(steps * BATCH / len(TEMPLATES))
    train = encoded(chain(*reactions(of_each, held_out=False).values()), tokenizer)
    held_out = encoded(chain(*kinds.values()), tokenizer)
    wanted = torch.from_numpy(predict(teacher, held_out, tokenizer)).double()
    classes = wanted.argmax(-1).view(len(kinds), held_out_of_each).tolist()
    rows = []
    for seed in range(seeds):
        for student in STUDENTS:
            model = taught(student, teacher, train, tokenizer, steps=steps, seed=seed)
            logits = torch.from_numpy(predict(model, held_out, tokenizer)).double()
            rows.append(
                {
                    "student": student.name,
                    "loss": student.loss,
                    "heads": model.config.num_attention_heads,
                    "seed": seed,
                    **likeness(logits, wanted),
                }
            )
    return {
        "settings": {
            "teacher_layers": teacher.config.num_hidden_layers,
            "teacher_width": teacher.config.hidden_size,
            "teacher_heads": teacher.config.num_attention_heads,
            "relations": str(relations),
            "steps": steps,
            "batch": BATCH,
            "lr": LR,
            "train_reactions": len(train),
            "held_out_reactions": len(held_out),
            "mean_tokens": fmean(held_out["length"]),
            "bf16": has_bf16(torch.device("cpu")),
        },
        "refusal": refused,
        "teacher_confidence": wanted.softmax(-1).amax(-1).mean().item(),
        "teacher_classes": {
            kind: dict(Counter(map(str, found)).most_common())
            for kind, found in zip(kinds, classes, strict=True)
        },
        "students": summary(rows),
        "rows": rows,
        "machine": machine,
    }


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each student: mean and sample deviation (None of one seed) of both figures over seeds."""
    students: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        students.setdefault((row["student"], row["heads"]), []).append(row)
    lines = []
    for (name, heads), found in students.items():
        line: dict[str, Any] = {"student": name, "heads": heads, "seeds": len(found)}
        for figure in ("fidelity", "kl"):
            values = [row[figure] for row in found]
            line[figure] = fmean(values)
            line[f"{figure}_sd"] = stdev(values) if len(values) > 1 else None
        lines.append(line)
    return lines


def in_words(line: dict[str, Any]) -> tuple[str, ...]:
    """A line of `summary`; fidelity in percent."""
    words = [line["student"], str(line["heads"]), str(line["seeds"])]
    for figure, factor, form in (("fidelity", 100, ".1f"), ("kl", 1, ".3f")):
        spread = line[f"{figure}_sd"]
        words.append(format(factor * line[figure], form))
        words[-1] += "" if spread is None else f" ± {factor * spread:{form}}"
    return tuple(words)


def load(folder: Path) -> tuple[Any, Any]:
    """The teacher and a tokenizer that looks whole tokens up."""
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False)
    return load_classifier(folder), tokenizer


def main() -> None:
    """Print the table, and write everything where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    there = installed(CLASSIFIER)
    parser.add_argument("--folder", type=Path, default=there, help="of the teacher's files")
    parser.add_argument("--steps", type=int, default=400, help="of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.folder is None:
        parser.error("rxnfp is not installed: pip install --no-deps rxnfp==0.1.0")
    result = measure(*load(given.folder), steps=given.steps, seeds=given.seeds)
    console = Console(width=None if sys.stdout.isatty() else 120)
    classes = Table("held-out reactions of", "the teacher's classes")
    for kind, found in result["teacher_classes"].items():
        classes.add_row(kind, ", ".join(f"{label}: {n}" for label, n in found.items()))
    students = Table("student", "heads", "seeds", "same class, %", "KL, nats")
    for line in result["students"]:
        students.add_row(*in_words(line))
    console.print(classes, f"TinyBERT's losses, {HEADS} heads: {result['refusal']}", students)
    if given.json is not None:
        atomic_write(given.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
