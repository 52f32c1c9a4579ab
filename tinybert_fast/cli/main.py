"""Entry point of ``tinybert-fast``: gathers the commands and turns errors into one line.

Libraries load inside the commands, so ``--help`` answers at once.
"""

from __future__ import annotations

import sys

BAD_INPUT = 2  # exit code of anything the user can put right
FAILED_CHECK = 1  # a benchmark whose providers disagree


def main() -> None:
    """Run the command line."""
    try:
        from tinybert_fast.cli.app import app
    except ModuleNotFoundError as error:
        _fail(
            f"the command line needs the package {error.name!r}: pip install 'tinybert-fast[train]'"
        )
    try:
        app(standalone_mode=True)
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"tinybert-fast: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
