"""A smaller vocabulary, so that a model's embedding can be cut to the rows that a task needs."""

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from .interface import Tokenizer

T = TypeVar("T", bound=Tokenizer)


def vocabulary_subset(tokenizer: T, keep: Iterable[int | str], min_count: int = 1) -> tuple[T, list[int]]:
    """Cut a vocabulary down to some ids, and to the tokens of some texts.

    Special tokens stay, with byte-level BPE the bytes and the parts that kept tokens are merged from. A text all of
    whose tokens stay is encoded into the same tokens as before.

    Args:
        tokenizer: stays as it is.
        keep: ids, which stay, and texts, whose tokens stay if they occur often enough.
        min_count: how often a token must occur in the texts altogether.

    Returns:
        The smaller tokenizer, and the kept ids in ascending order: `weight[kept]` is its embedding.

    Raises:
        InputError: there is no such id.
    """
    ids: set[int] = set()
    counts: Counter[int] = Counter()
    for item in keep:
        if isinstance(item, str):
            counts.update(tokenizer.encode(item)[0])
        else:
            ids.add(item)
    return tokenizer.restrict(ids.union(index for index, count in counts.items() if count >= min_count))
