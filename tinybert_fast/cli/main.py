"""The program `tinybert-fast`: bad input ends in one line on stderr and exit code 2."""

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Runs one command; always ends in SystemExit. 0: done. 1: a check failed. 2: bad input. 143:
    ended by SIGTERM.
    """
    try:
        from tinybert_fast.cli.app import app

        given = None if arguments is None else list(arguments)
        with _unwound_at_sigterm():
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


@contextmanager
def _unwound_at_sigterm() -> Iterator[None]:
    """SIGTERM, with which jobs are preempted and torchrun ends the processes that are left, is an
    exception: what is half written is removed.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker, forked: it ends as it always has
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the removal short
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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
