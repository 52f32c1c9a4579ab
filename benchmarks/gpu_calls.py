"""Every compiled kernel once or a few times on small operands, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck python benchmarks/gpu_calls.py [--device cpu]

The calls are CHOSEN of those of `tinybert-fast validate`, which leaves its compiled Triton kernels
on the disk. Values of the integer ops are held against the reference's, those of others are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.testing.proofs import implementations, serves
from tinybert_fast.testing.validation import CALLS, CLAIMS

COMPILED = ("native", "triton")
SEVERAL = "0 1 2 31 127 128 129"
# Labels, of ops with more calls than a sanitizer has time for: wherever a kernel finds addresses in
# another way. Of attention one tile and several, each direction in both, blocks of each size.
CHOSEN = {
    "attention": (
        "heads of 26, lengths 5 32, dropout 0.1",
        f"heads of 26, lengths {SEVERAL} 512",
        "heads of 64, lengths 5 32",
        f"heads of 64, lengths {SEVERAL} 512, dropout 0.1",
        "heads of 128, lengths 0 31 127 128",
        "heads of 26, causal, lengths 5 32",
        "heads of 26, causal, lengths 31 129, dropout 0.1",
        "heads of 26, anti_causal, lengths 5 32, dropout 0.1",
        "heads of 26, anti_causal, lengths 31 129",
        "2 heads of 26, padded on the left, lengths 31 0 65",
        "heads of 64, mask of blocks of 64, lengths 256 31, dropout 0.1",
        "heads of 64, mask of blocks of 128, lengths 256 31",
        "no token",
    ),
    "attention_relation_kl": (
        "2 heads of 26 against 2 of 64 as 2, lengths 5 32",
        f"2 heads of 26 against 2 of 64 as 2, lengths {SEVERAL} 512",
        "4 heads of 26 against 2 of 64 as 2, lengths 5 32, with itself",
        f"1 heads of 64 against 2 of 32 as 4, lengths {SEVERAL} 512, with itself",
        "1 heads of 128 against 2 of 64 as 1, lengths 0 31 127 128",
    ),
    "attention_score_mse": (
        f"heads of 26 against 64, direct, full loss, lengths {SEVERAL}",
        f"heads of 26 against 64, gram, full loss, lengths {SEVERAL}",
        f"heads of 64 against 64, direct, student loss, lengths {SEVERAL}",
        f"heads of 64 against 64, gram, student loss, lengths {SEVERAL}",
        "heads of 26 against 64, mask of blocks of 64, lengths 256 31",
        "heads of 64 against 64, mask of blocks of 128, lengths 256 31",
        "no token",
    ),
    "dropout_add_layer_norm": (
        "0 x 312",
        "131 x 312, dropout 0.1",
        "33 x 768",
        "131 x 312 beside an fp32 residual",
    ),
    "embedding_layer_norm": (
        "0 tokens of 312",
        "131 tokens of 312, dropout 0.1",
        "33 tokens of 768",
    ),
}
DRAWS = "draws"  # in the label of a claim about frequencies, whose many rows would take minutes


def run(device: torch.device) -> Iterator[str]:
    """Runs the calls; gives a line for each as soon as it has ended."""
    for op in sorted({*CALLS, *CLAIMS}):
        dtypes = dispatch.OPS[op].reference.dtypes
        dtype = torch.float16 if torch.float16 in dtypes else dtypes[0]
        for impl in COMPILED:
            if impl not in implementations(op) or not serves(op, impl, dtype, device):
                continue
            if op in CLAIMS:
                for label, hold in CLAIMS[op](device, impl):
                    if DRAWS not in label:
                        over = [str(verdict) for verdict in hold() if not verdict.passed]
                        if over:
                            raise AssertionError(f"{op} {impl}, {label}: {'; '.join(over)}")
                        yield f"called {op} {impl}: {label}"
                continue
            calls = CALLS[op]()
            for label in CHOSEN.get(op, calls):
                calls[label](dtype=dtype, device=device).run(impl)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield f"called {op} {impl}: {label}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    for line in run(parser.parse_args().device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
