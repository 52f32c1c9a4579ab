"""How a training command's process allocates host memory."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER, NONE = -1, 0

_kept = False


def keep_freed_memory() -> None:
    """Freed memory stays in the process and large tensors get huge pages; before torch allocates.

    glibc returns each large block to the kernel, which hands out zeroed pages again at the next
    step, one fault for 4 KiB. Elsewhere than on glibc only torch is told.
    """
    global _kept
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        # mallopt answers 1 where it took the setting.
        _kept = bool(mallopt(M_MMAP_MAX, NONE) and mallopt(M_TRIM_THRESHOLD, NEVER))


def keeps_freed_memory() -> bool:
    """Whether this process does."""
    return _kept
