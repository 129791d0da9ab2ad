"""Packing: short sequences share a row, so that a batch of very different lengths holds little padding.

Packing changes how a batch lies in memory, never which examples are in it: samplers, seeds and the place inside an
epoch stay those of padded batches.  Shapes: S sequences, one for each example; R rows; L tokens in the longest row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .base import HostList

Lengths = Sequence[int] | np.ndarray
_LAYOUT = ("sequences", "positions", "starts", "lengths", "num_tokens")


def first_fit(lengths: Lengths, budget: int) -> np.ndarray:
    """Place sequences into rows by first-fit-decreasing: the longest first, each in the first row that has room.

    Rows are filled from the left and without gaps. Of equal lengths the earlier sequence goes first, so that the result
    depends on nothing but the arguments.

    Source: Johnson, Near-optimal bin packing algorithms (1973). It takes at most 11/9 of the fewest possible rows, plus
    6/9 of a row (Dósa, 2007).

    Args:
        lengths: tokens of each sequence.
        budget: most tokens in a row.

    Returns:
        Row and offset of each sequence, `(S, 2)`, in the order of `lengths`.

    Raises:
        InputError: a sequence is longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.max(initial=0) > budget:
        longest = int(lengths.argmax())
        raise InputError(
            f"sequence {longest} of the batch has {lengths[longest]} tokens and a row budget={budget}; "
            f"set budget={lengths[longest]} or more, or shorten the sequence"
        )
    starts = np.zeros((len(lengths), 2), dtype=np.int64)
    used = np.zeros(len(lengths), dtype=np.int64)  # a row for every sequence always suffices
    for sequence in np.argsort(-lengths, kind="stable"):
        row = np.argmax(used + lengths[sequence] <= budget)
        starts[sequence] = row, used[row]
        used[row] += lengths[sequence]
    return starts


def even_fit(lengths: Lengths, budget: int) -> np.ndarray:
    """Place sequences as `first_fit` does, in no more rows than it, and make the longest row as short as possible.

    A batch is as wide as its longest row. 1280 tokens under a budget of 512 fill rows of 512, 512 and 256, of which a
    sixth is padding; three rows of about 427 hold them as well. So the budget decides the number of rows, and then a
    bisection looks for the smallest budget at which first-fit still needs no more.

    Source: Coffman, Garey and Johnson, An application of bin-packing to multiprocessor scheduling (1978), MULTIFIT.

    Returns:
        Row and offset of each sequence, `(S, 2)`, in the order of `lengths`.

    Raises:
        InputError: a sequence is longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = first_fit(lengths, budget)
    rows, high = packed_shape(starts, lengths)
    low = max(lengths.max(initial=0), -(-lengths.sum() // max(rows, 1)))
    while low < high:
        middle = int(low + high) // 2
        tighter = first_fit(lengths, middle)
        if packed_shape(tighter, lengths)[0] <= rows:
            starts, (rows, high) = tighter, packed_shape(tighter, lengths)
        else:
            low = middle + 1
    return starts


def packed_shape(starts: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """Rows and tokens of the longest row, `(R, L)`, of sequences that lie at `starts`."""
    return int(starts[:, 0].max(initial=-1)) + 1, int((starts[:, 1] + lengths).max(initial=0))


def padding_ratio(batches: Iterable[Lengths], budget: int | None = None) -> float:
    """Tokens with padding per token without, over the lengths of several batches.

    Args:
        batches: for each batch the lengths of its sequences.
        budget: of the rows that they are packed into; None fills every sequence up to the longest of its batch.

    Returns:
        1 where nothing is padding, 2 where half is.
    """
    filled = real = 0
    for batch in batches:
        lengths = np.asarray(batch, dtype=np.int64)
        shape = (len(lengths), int(lengths.max()))
        if budget is not None:
            shape = packed_shape(even_fit(lengths, budget), lengths)
        filled, real = filled + shape[0] * shape[1], real + int(lengths.sum())
    return filled / real


@dataclass(frozen=True)
class PackingCollator:
    """Examples to a batch of packed rows.

    An example is a dict. Its fields named in `padding` hold one value for each token (a list, an array or a tensor of
    one dimension, all of one length); the others belong to the sequence as a whole. The batch holds

    - every field of tokens, `(R, L)`, filled up with its padding value;
    - `sequences` `(R, L)`: 1, 2, ... for the sequences of a row from left to right, 0 where there is padding;
    - `positions` `(R, L)`: 0, 1, ... within each sequence, 0 where there is padding;
    - `starts` `(S, 2)`, row and offset of each sequence, and `lengths` `(S,)`, in the order of the examples;
    - `num_tokens`, the number of tokens without padding;
    - every other field in the order of the examples: numbers, arrays and tensors stacked, `(S, ...)`; anything else,
      lists too, as a `HostList`.

    Args:
        budget: most tokens in a row; at least the length of the longest sequence of the data.
        padding: name of each field of tokens -> its padding value. An int makes the field long, a float float32 and a
            bool bool.
    """

    budget: int
    padding: Mapping[str, int | float | bool]

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise InputError(f"PackingCollator(budget={self.budget}): use 1 or more")
        if not self.padding or set(_LAYOUT) & set(self.padding):
            raise InputError(
                f"PackingCollator(padding={dict(self.padding)}): name the fields of tokens, as in {{'ids': 0}}, "
                f"none of them {', '.join(_LAYOUT)}"
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Place the sequences, then write every field in one go.

        Raises:
            InputError: a sequence longer than the budget, or examples whose fields do not fit together.
        """
        lengths = np.array([self._length(index, example) for index, example in enumerate(examples)])
        others = [name for name in examples[0] if name not in self.padding]
        for index, example in enumerate(examples):
            if example.keys() != examples[0].keys() or set(_LAYOUT) & set(others):
                raise InputError(
                    f"example {index} of the batch has the fields {', '.join(example)}; give all examples the same "
                    f"ones, none of them {', '.join(_LAYOUT)}"
                )
        starts = even_fit(lengths, self.budget)
        shape = packed_shape(starts, lengths)
        positions = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        cells = np.repeat(starts[:, 0] * shape[1] + starts[:, 1], lengths) + positions  # of the tokens, in flat rows

        def rows(values: np.ndarray, padding: int | float | bool = 0) -> torch.Tensor:
            packed = np.full(shape[0] * shape[1], padding, dtype=values.dtype)
            packed[cells] = values
            return torch.from_numpy(packed.reshape(shape))

        # What belongs to sequences goes first: whoever counts the examples of a batch looks at its first tensor.
        batch: dict[str, Any] = {"lengths": torch.from_numpy(lengths), "starts": torch.from_numpy(starts)}
        batch |= {name: _stack(name, [example[name] for example in examples]) for name in others}
        batch |= {name: rows(self._tokens(name, examples), padding) for name, padding in self.padding.items()}
        batch["sequences"] = rows((positions == 0).astype(np.int64)).cumsum(1) * rows(np.ones_like(positions))
        batch["positions"] = rows(positions)
        batch["num_tokens"] = int(lengths.sum())
        return batch

    def _length(self, index: int, example: dict[str, Any]) -> int:
        """Tokens of an example, the same in every field of tokens."""
        sizes = {name: len(example[name]) for name in self.padding if name in example}
        if len(sizes) < len(self.padding) or len(set(sizes.values())) > 1:
            wanted = ", ".join(self.padding)
            found = ", ".join(f"{name} of {size}" for name, size in sizes.items()) or "none of them"
            raise InputError(f"example {index} of the batch has {found}; give {wanted}, with one value for each token")
        return next(iter(sizes.values()))

    def _tokens(self, name: str, examples: list[dict[str, Any]]) -> np.ndarray:
        """A field of tokens of all examples, one after the other."""
        value = self.padding[name]
        kind = np.bool_ if isinstance(value, bool) else np.int64 if isinstance(value, int) else np.float32
        fields = [np.asarray(example[name]) for example in examples]
        for index, field in enumerate(fields):
            if field.ndim != 1 or (len(field) and not np.can_cast(field.dtype, kind, "same_kind")):
                raise InputError(
                    f"example {index} of the batch: {name} is {field.dtype} of shape {field.shape}; with "
                    f"padding={value!r} it takes one {kind.__name__.strip('_')} for each token"
                )
        return np.concatenate([field.astype(kind) for field in fields])


def _stack(name: str, values: list[Any]) -> torch.Tensor | HostList[Any]:
    """Numbers, arrays and tensors as one tensor `(S, ...)`, other objects as they are."""
    numeric = [isinstance(value, (int, float, np.number, np.bool_, np.ndarray, torch.Tensor)) for value in values]
    if not any(numeric):
        return HostList(values)
    shapes = {np.shape(value) if fits else "object" for value, fits in zip(values, numeric, strict=True)}
    if len(shapes) > 1:
        raise InputError(
            f"field {name} has shapes {', '.join(sorted(map(str, shapes)))} in one batch; name it in padding if it has "
            "a value for each token, else give arrays of one shape, or lists to keep them as they are"
        )
    return torch.stack([torch.as_tensor(value) for value in values])
