"""Windows over texts that are longer than an encoder takes: nothing is cut, and what lies near a border is seen twice.

`nn.decoding.merge_windows` puts together what a model finds in them.
"""

from collections.abc import Iterable

from ..errors import InputError

Window = tuple[int, int]
"""First token and exclusive end, in tokens of the text without special ones."""


def windows_over(length: int, size: int, stride: int) -> list[Window]:
    """Cover a text by windows that begin `stride` tokens apart; the last one is moved back so as to be full.

    Args:
        length: tokens of the text.
        size: most tokens of a window.
        stride: from one window to the next; what is no longer than `size - stride + 1` is whole in one of them.

    Raises:
        InputError: size or stride out of range.
    """
    check_windows(size, stride)
    if length <= size:
        return [(0, length)]
    starts = [*range(0, length - size, stride), length - size]
    return [(start, start + size) for start in starts]


def check_windows(size: int, stride: int, where: str = "windows_over") -> None:
    """Refuse windows that would leave gaps.

    Raises:
        InputError: size or stride out of range.
    """
    if size < 1 or not 1 <= stride <= size:
        raise InputError(f"{where}(size={size}, stride={stride}): use a size of 1 or more and a stride of 1 to it")


def whole_in(window: Window, first: int, last: int) -> bool:
    """Whether a span, its last token inclusive, lies in a window."""
    return window[0] <= first and last < window[1]


def not_whole_in_any(windows: Iterable[Window], spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans (first, last) that every window cuts: nothing can learn or find them there."""
    windows = list(windows)
    return [span for span in spans if not any(whole_in(window, *span) for window in windows)]
