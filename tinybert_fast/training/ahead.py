"""Batches of the next step, made on a thread while the present one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """One thing made ahead, never two at a time, and never beside one that is made by `take`.

    The thread ends with the ``with`` block, also after an error; what it makes then is lost.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[Any, Future[T]] | None = None

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, source: Any, make: Callable[[], T]) -> None:
        """Run ``make``, which reads ``source``, on the thread."""
        self._next = source, self._pool.submit(make)

    def take(self, source: Any, make: Callable[[], T]) -> T:
        """What was begun of this source, or else ``make()``. An error of the thread is raised."""
        begun, self._next = self._next, None
        if begun is None:
            return make()
        if begun[0] is source:
            return begun[1].result()
        wait((begun[1],))  # nobody wants it, but it shares what ``make`` uses
        return make()
