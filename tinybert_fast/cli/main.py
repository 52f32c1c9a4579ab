"""The program `tinybert-fast`: bad input ends in one line on stderr and exit code 2."""

import errno
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

# What [train] installs; torch and the standard library are always there.
EXTRA = {
    "accelerate", "datasets", "matplotlib", "numpy", "rich", "safetensors", "tensorboard",
    "tokenizers", "transformers", "typer",
}  # fmt: skip
OPTIONAL = {"jieba"}  # whose absence says by itself how to install it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors and torch.save say of a full disk, in exceptions that are no OSError.
SAY_FULL = re.compile(rf"\(os error ({'|'.join(map(str, DISK_FULL))})\)|unexpected pos \d+ vs \d+")
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; always ends in SystemExit. 0: done. 1: a check failed. 2: bad input."""
    try:
        from tinybert_fast.cli.app import app

        given = None if arguments is None else list(arguments)
        sys.exit(app(args=given, standalone_mode=False))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OPTIONAL:
            _stop(str(error))
        if missing not in EXTRA:
            raise
        _stop(f"this command needs {missing}; run: pip install '.[train]' in the checkout")
    except BAD_INPUT as error:
        if logging.getLogger("tinybert_fast").isEnabledFor(logging.DEBUG):
            raise  # --verbose
        _stop(str(error) or type(error).__name__)
    except (ConnectionError, ChildProcessError) as error:  # another process of the run has ended
        _stop(str(error), code=1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f": {error.filename}" if error.filename else ""
        _stop(f"{error.strerror}{where}")
    except Exception as error:
        _stop_at_usage(error)
        if not SAY_FULL.search(str(error)):
            raise
        _stop(
            "a checkpoint or model could not be written whole: is the disk full? Make room; where "
            "there is a checkpoint, --resume goes on from the last whole one"
        )


def _stop_at_usage(error: Any) -> None:
    """Exceptions of click, which is a package or a part of Typer: told by what they have."""
    name = type(error).__name__
    if name == "Abort":  # Ctrl-C
        sys.exit(130)
    if name == "NoArgsIsHelpError":  # which has been shown
        sys.exit(2)
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        _stop(error.format_message().rstrip(".") + hint)


def _stop(message: str, code: int = 2) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
