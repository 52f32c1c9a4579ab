"""The benchmark runner as a script: ``python benchmarks/run.py`` is ``tinybert-fast bench``."""

import sys

from tinybert_fast.cli.main import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
