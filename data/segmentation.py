"""Where the words of a text are: every cut keeps all characters, so that a word is known by its places."""

import re
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from ..errors import InputError

Segmenter = Callable[[str], list[str]]
"""From a text to its words in order, white space included: joined, they are the text again."""
WordKind = Literal["characters", "jieba"]
_RUN = re.compile(r"[^\W\d_㐀-鿿豈-﫿]+|\d+|.", re.DOTALL)


def segmenter(kind: WordKind) -> Segmenter:
    """Return a segmenter by its name.

    Args:
        kind: "characters": each Chinese character and each run of letters or digits is a word; "jieba": the words of
            jieba's dictionary.

    Raises:
        ImportError: rjieba is not installed.
        InputError: another name.
    """
    if kind == "characters":
        return _RUN.findall
    if kind != "jieba":
        raise InputError(f"data.words={kind!r}: use one of {', '.join(get_args(WordKind))}")
    try:
        import rjieba
    except ImportError as error:
        raise ImportError("data.words=jieba needs rjieba: pip install rjieba") from error
    return partial(rjieba.cut, hmm=False)


def word_of_each_character(text: str, segment: Segmenter) -> list[str]:
    """The word that each character of a text lies in.

    Raises:
        InputError: the segmenter has changed the text.
    """
    words = segment(text)
    if "".join(words) != text:
        raise InputError(f"the segmenter has changed the text {text[:40]!r}; use one that keeps all characters")
    return [word for word in words for _ in word]
