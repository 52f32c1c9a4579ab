"""Masked-LM training on documents of 4,096 tokens, with a sliding window and a global first token.

    python examples/long_documents.py --tokenizer path/to/bert --text corpus.txt --steps 20

A TinyBERT-4L-312 with 4,096 positions; no N x N tensor of a whole batch is ever alive.
"""

import argparse
import time
from pathlib import Path

import torch

import tinybert_fast as tbf
from tinybert_fast.data import SparseMaskingCollator
from tinybert_fast.ops import BlockPattern
from tinybert_fast.training.loading import load_tokenizer


def documents(tokenizer, text: str, length: int) -> list[dict[str, list[int]]]:
    """Consecutive pieces of the text, of ``length`` tokens with [CLS] first and [SEP] last."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = length - 2
    starts = range(0, len(ids) - body + 1, body)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [{"input_ids": [cls, *ids[start : start + body], sep]} for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a folder with a BERT tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="plain text, one long file")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    examples = documents(tokenizer, text, arguments.length)
    if not examples:
        parser.error(f"{arguments.text} has fewer than {arguments.length:,} tokens")
    config = tbf.TinyBertConfig.tiny_4l_312(
        vocab_size=len(tokenizer), max_position_embeddings=arguments.length
    )
    model = tbf.TinyBertForMaskedLM(config).to(device).train()
    tbf.accelerate(model, block_mask=BlockPattern.longformer(arguments.window))
    collate = SparseMaskingCollator(tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    for step in range(arguments.steps):
        picked = torch.randint(len(examples), (arguments.batch_size,)).tolist()
        start = time.perf_counter()
        batch = {name: x.to(device) for name, x in collate([examples[i] for i in picked]).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())  # waits for the GPU
        seconds = time.perf_counter() - start
        tokens = batch["input_ids"].numel() / seconds
        print(f"step {step + 1}: loss {value:.3f}, {tokens:,.0f} tokens/s")


if __name__ == "__main__":
    main()
