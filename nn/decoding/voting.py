"""One answer from what was found in several passages, or in several windows of one.

Source: https://kexue.fm/archives/5409.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

Voting = Literal["vote", "best"]


def vote(found: Iterable[Mapping[str, float]], how: Voting = "vote") -> dict[str, float]:
    """Score the answers of all passages.

    Args:
        found: for each passage its answers and their scores v, from 0 to 1.
        how: "vote" gives an answer `sum v^2 / (1 + sum v)`, so that a clear find counts for more than several doubtful
            ones; "best" its highest v.

    Returns:
        Answers and their scores, the best first; of equal scores the one that was found first.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for passage in found:
        for text, value in passage.items():
            values[text].append(value)
    if how == "best":
        scores = {text: max(group) for text, group in values.items()}
    else:
        scores = {text: sum(v * v for v in group) / (1 + sum(group)) for text, group in values.items()}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
