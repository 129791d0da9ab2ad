"""What was found in windows of a long text, put together."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
Border = tuple[int, int]
"""Start and exclusive end in the text."""


def merge_windows(
    found: Sequence[tuple[Border, Iterable[tuple[Border, T]]]], *, overlapping: bool = True
) -> list[tuple[Border, T]]:
    """Put together what was found in the windows of one text.

    Where windows overlap, each span is looked for where it is seen best: in the window that leaves it most context on
    its narrower side (the ends of the text are no narrow side), the first of several. What another window says of that
    place does not count, so that no span comes twice and none by an opinion formed at a border.

    Args:
        found: for each window its borders and the (borders, value) of what was found in it; the windows together cover
            the text.
        overlapping: whether two spans may overlap. If not, of those found in different windows the one stays that is
            seen better, then the earlier one.

    Returns:
        (borders, value), without repetition, in the order of the text.
    """
    windows = [window for window, _ in found]
    text = min(start for start, _ in windows), max(end for _, end in windows)
    kept: dict[tuple[Border, T], int | float] = {}
    for window, spans in found:
        for border, value in spans:
            seen = [_context(border, other, text) for other in windows]
            best = max(seen)
            if windows[seen.index(best)] == window:
                kept[border, value] = best
    if not overlapping:
        kept = _apart(kept)
    return sorted(kept, key=lambda item: item[0])


def _context(span: Border, window: Border, text: Border) -> int | float:
    """Tokens between a span and the nearer border of a window; -1 where it is not whole in it."""
    left, right = span[0] - window[0], window[1] - span[1]
    if min(left, right) < 0:
        return -1
    return min(left if window[0] > text[0] else float("inf"), right if window[1] < text[1] else float("inf"))


def _apart(found: dict[tuple[Border, T], int | float]) -> dict[tuple[Border, T], int | float]:
    """Leave out what overlaps something that is seen better."""
    kept: dict[tuple[Border, T], int | float] = {}
    for (border, value), context in sorted(found.items(), key=lambda item: (-item[1], item[0][0])):
        if all(border[1] <= other[0] or other[1] <= border[0] for other, _ in kept):
            kept[border, value] = context
    return kept
