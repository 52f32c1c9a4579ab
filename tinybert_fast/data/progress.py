"""A progress bar on stderr, where that is a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(items: Iterable[T], title: str, total: int | None = None, on: bool = True) -> Iterable[T]:
    """The items, with a bar while they are taken; `total` None: how many come is not known."""
    console = Console(stderr=True)
    if not on or not console.is_terminal:
        return items
    return track(items, title, total=total, console=console, transient=True)
