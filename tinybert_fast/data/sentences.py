"""Where sentences end in plain English and Chinese text."""

import re
from collections.abc import Iterator

MAX_CHARS = 2000  # of a sentence; text without sentence ends is cut, at a space if there is one
TAIL = 32  # characters before an end that decide whether it is one

CLOSERS = "\"')]}”’"
OPENERS = "\"'([{“‘"
# English: white space behind an end mark or a closing quote, before anything but a small letter or
# a mark. Chinese: the mark and the quotes it closes. Both take linear time on any text.
END = re.compile(r"(?<=[.!?\"')\]}”’])\s+(?=[^\sa-z.!?])|(?:[。！？]|……)+[”’」』）]*")
ABBREVIATIONS = frozenset(
    "al art capt cf co col corp dept dr etc ft gen gov hon inc jr lt ltd maj mr mrs ms mt no nos "
    "pp prof rep rev sec sen sgt sr st vol vs "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a line of text, stripped, of 1 to MAX_CHARS characters."""
    start = 0
    for end in END.finditer(text):
        if end[0].isspace() and not _ends(text[max(start, end.start() - TAIL) : end.start()]):
            continue
        yield from pieces(text[start : end.end()])
        start = end.end()
    yield from pieces(text[start:])


def pieces(text: str) -> Iterator[str]:
    """The text itself, stripped, in parts of at most MAX_CHARS characters; nothing if blank."""
    text = text.strip()
    while len(text) > MAX_CHARS:
        space = text.rfind(" ", MAX_CHARS // 2, MAX_CHARS)
        cut = MAX_CHARS if space < 0 else space
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text


def _ends(before: str) -> bool:
    """Whether a sentence ends with these characters: not with "Mr.", an initial or "U.S."."""
    before = before.rstrip(CLOSERS)
    if not before.endswith("."):
        return before.endswith(("!", "?"))
    words = before[:-1].split()
    last = words[-1].lstrip(OPENERS) if words else ""
    initial = len(last) == 1 and last.isalpha()
    return not (initial or "." in last or last.lower() in ABBREVIATIONS)
