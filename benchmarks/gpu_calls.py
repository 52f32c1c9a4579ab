"""Every compiled kernel once or a few times on small operands, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck python benchmarks/gpu_calls.py [--device cpu]

The calls are some of those of `tinybert-fast validate`, which leaves its compiled Triton kernels on
the disk. Values of the integer ops are held against the reference's, those of others are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.testing.proofs import implementations, serves
from tinybert_fast.testing.validation import CALLS, CLAIMS

COMPILED = ("native", "triton")
CALLS_EACH = 4  # of an op, spread over the list
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
            calls = list(CALLS[op]().items())
            for label, make in calls[:: max(1, len(calls) // CALLS_EACH)]:
                make(dtype=dtype, device=device).run(impl)
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
