"""Work shared out over processes, with results in order and little in flight."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

AHEAD = 3  # items per process that wait for it or for those before them

_work: Callable[[Any], Any]  # of a worker process


def in_order(
    make: Callable[..., Callable[[Any], Any]],
    setup: tuple,
    items: Iterable[Any],
    processes: int,
) -> Iterator[Any]:
    """``map(make(*setup), items)``, each process with a callable of its own.

    Items are taken as they are needed, so memory does not grow with their number. One process is
    this one.
    """
    if processes == 1:
        yield from map(make(*setup), items)
        return
    waiting: deque[Future] = deque()
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(make, setup)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_do, item))
                if len(waiting) > AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was ended from outside (out of memory?); use fewer processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(make: Callable[..., Callable[[Any], Any]], setup: tuple) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    _work = make(*setup)


def _do(item: Any) -> Any:
    return _work(item)
