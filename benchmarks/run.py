"""The benchmark runner as a script, the same as ``tinybert-fast bench``.

python benchmarks/run.py --suite step
"""

from __future__ import annotations

import argparse
import sys

from tinybert_fast.benchmarks.runner import DTYPE_CHOICES, SUITES, Disagreement, run_suite


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: measured. 1: providers disagree, no speed. 2: an argument makes no sense."""
    parser = argparse.ArgumentParser(
        description="Ours beside what one would use otherwise, in one interleaved run."
    )
    parser.add_argument("--suite", default="step", help=" or ".join(SUITES))
    parser.add_argument(
        "--case", dest="cases", action="append", default=[], metavar="NAME",
        help="only cases whose name begins so; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dtype", default="fp32", help=", ".join(DTYPE_CHOICES))
    parser.add_argument("--rounds", type=int, help="repetitions (default: by device)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (default 2)")
    parser.add_argument("--dropout", type=float, default=0.1, help="while timed (default 0.1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights, lengths and words")
    parser.add_argument("--json", dest="json_path", metavar="FILE", help="write the rows")
    parser.add_argument("--csv", dest="csv_path", metavar="FILE", help="append the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    options = vars(parser.parse_args(arguments))
    try:
        run_suite(options.pop("suite"), **options)
    except Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
