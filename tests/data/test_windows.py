"""Windows cover every text, and what is found in them is put together once."""

import random

import pytest

from kexue.data.windows import not_whole_in_any, whole_in, windows_over
from kexue.errors import InputError
from kexue.nn.decoding import merge_windows


def test_windows_by_hand() -> None:
    assert windows_over(5, 8, 4) == [(0, 5)]
    assert windows_over(8, 8, 4) == [(0, 8)]
    assert windows_over(13, 8, 4) == [(0, 8), (4, 12), (5, 13)]
    assert windows_over(16, 8, 8) == [(0, 8), (8, 16)]


@pytest.mark.parametrize(("size", "stride"), [(8, 8), (8, 3), (5, 1), (1, 1)])
def test_every_short_span_is_whole_in_a_window(size: int, stride: int) -> None:
    for length in range(1, 40):
        windows = windows_over(length, size, stride)
        assert all(end - start == min(size, length) for start, end in windows)
        assert windows[0][0] == 0
        assert windows[-1][1] == length
        spans = [(i, j) for i in range(length) for j in range(i, min(length, i + size - stride + 1))]
        assert not_whole_in_any(windows, spans) == []
    assert not_whole_in_any([(0, 4), (4, 8)], [(3, 4), (4, 5)]) == [(3, 4)]


@pytest.mark.parametrize("overlapping", [True, False])
def test_what_all_windows_see_is_found_once(overlapping: bool) -> None:
    rng = random.Random(0)
    for _ in range(200):
        length, size = rng.randint(1, 60), 12
        stride = rng.randint(1, 8)
        windows = windows_over(length, size, stride)
        gold, place = [], 0
        while place < length:
            width = rng.randint(1, size - stride + 1)
            if place + width <= length and rng.random() < 0.6:
                gold.append(((place, place + width), rng.choice("ab")))
            place += width
        found = [(w, [span for span in gold if whole_in(w, span[0][0], span[0][1] - 1)]) for w in windows]
        assert merge_windows(found, overlapping=overlapping) == gold


def test_the_window_that_sees_more_decides() -> None:
    left, right = (0, 10), (6, 16)
    # 7..9 is one token from the end of the left window and one from the start of the right: the first decides.
    assert merge_windows([(left, []), (right, [((7, 9), "a")])]) == []
    assert merge_windows([(left, [((7, 9), "a")]), (right, [((7, 9), "b")])]) == [((7, 9), "a")]
    # 8..9 is seen better by the right one.
    assert merge_windows([(left, [((8, 9), "a")]), (right, [((8, 9), "b")])]) == [((8, 9), "b")]
    # A span that begins with the text has no narrow side there.
    assert merge_windows([(left, [((0, 2), "a")]), (right, [])]) == [((0, 2), "a")]


def test_spans_of_different_windows_may_be_kept_apart() -> None:
    found = [((0, 10), [((5, 8), "a")]), ((6, 16), [((7, 12), "b")])]
    assert merge_windows(found) == [((5, 8), "a"), ((7, 12), "b")]
    assert merge_windows(found, overlapping=False) == [((5, 8), "a")]


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (4, 0), (4, 5)])
def test_windows_that_leave_gaps_are_refused(size: int, stride: int) -> None:
    with pytest.raises(InputError, match=rf"size={size}, stride={stride}.*use a size of 1 or more"):
        windows_over(10, size, stride)
