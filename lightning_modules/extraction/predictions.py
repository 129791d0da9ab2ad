"""What `predict_step` gives back."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Predictions(Generic[T]):
    """Records of a batch, to be walked through in order.

    Not a list: Lightning looks for tensors in every list that a `predict_step` returns, and refuses frozen dataclasses.
    """

    def __init__(self, records: Iterable[T]) -> None:
        self._records = list(records)

    def __iter__(self) -> Iterator[T]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> T:
        return self._records[index]
