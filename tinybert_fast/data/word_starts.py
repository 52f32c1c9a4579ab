"""Where Chinese words begin, which BERT's tokenizer, one token for each character, cannot say."""

import logging
from collections.abc import Sequence

import numpy as np


class ChineseWords:
    """Words by `jieba`: its dictionary, and its statistics for what is not in it.

    Raises:
        ModuleNotFoundError: jieba is not installed.
    """

    def __init__(self) -> None:
        try:
            import jieba
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "whole Chinese words need the package jieba: pip install '.[chinese]' in the "
                "checkout",
                name=error.name,
            ) from None
        jieba.setLogLevel(logging.WARNING)
        jieba.initialize()
        self._cut = jieba.lcut

    def starts(self, text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
        """uint8 (T,): 1 where a token, which begins at ``offsets[i][0]``, is in another word than
        the one before it.
        """
        ends = np.cumsum([len(word) for word in self._cut(text)])
        places = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
        word = np.searchsorted(ends, places, side="right")
        return (np.diff(word, prepend=-1) != 0).astype(np.uint8)
