"""What DataModules of annotated sentences share: files or a generator, characters as tokens, labels, assets."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from ..errors import InputError
from .base import HostList, KexueDataModule, Split, file_below, generated_rows
from .files import read_text
from .packing import even_fit
from .rows import OnBadRow
from .tokenizers import CharTokenizer
from .tokenizers.numbers import NumberTokenizer
from .windows import windows_over

LABELS_FILE = "labels.json"


class Sentence(Protocol):
    """A record of any task that has a text."""

    @property
    def id(self) -> str | int:
        """Its name, unlike any other."""
        ...

    @property
    def text(self) -> str:
        """What is read."""
        ...


R = TypeVar("R", bound=Sentence)


class SentenceDataModule(KexueDataModule, Generic[R]):
    """Sentences with labels, character by character.

    A subclass gives `read_labels`, `generated`, `read_file` and `collator`.

    Args:
        batch_size: most sentences in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        files: below `root`, by name: "train", "val", "test" and what else `read_labels` reads.
        vocab_file: vocabulary, one token a line; None builds it from the training texts.
        min_count: a character seen less often in the training texts is unknown, so that [UNK] is trained too.
        lowercase, half_width: see `CharTokenizer`.
        max_length: most tokens of a training sentence with [CLS] and [SEP].
        row_budget: let the encoder see several sentences in a row, at most so many tokens (or the longest sentence of
            the batch where that is more); None: a row each, filled up to the longest.
        num_generated: training sentences made by the generator, and a tenth of it for validation and test each.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    LABELS = "[label, ...] pairs"
    """What the entries of `labels` are, for messages."""

    def __init__(
        self,
        batch_size: int,
        *,
        root: str | None,
        files: dict[str, str],
        vocab_file: str | None = None,
        min_count: int = 2,
        lowercase: bool = False,
        half_width: bool = False,
        max_length: int = 512,
        row_budget: int | None = None,
        num_generated: int = 2000,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_row: OnBadRow = "raise",
        bad_rows_file: str | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        if max_length < 3:
            raise InputError(f"data.max_length={max_length}: use 3 or more, [CLS] and [SEP] count")
        if row_budget is not None and row_budget < 1:
            raise InputError(f"data.row_budget={row_budget}: use 1 or more, or null for rows of one sentence")
        if num_generated < 10:
            raise InputError(f"data.num_generated={num_generated}: use 10 or more, a tenth is for validation")
        self.root = Path(root).expanduser() if root is not None else None
        self.files = files
        self.vocab_file = vocab_file
        self.min_count = min_count
        self.lowercase = lowercase
        self.half_width = half_width
        self.max_length = max_length
        self.row_budget = row_budget
        self.num_generated = num_generated
        self.tokenizer: CharTokenizer | NumberTokenizer | None = None
        self.labels: list[Any] = []

    @property
    def tokenizer_kind(self) -> type[CharTokenizer] | type[NumberTokenizer]:
        """What makes tokens of a text."""
        return CharTokenizer

    @abstractmethod
    def read_labels(self) -> list[Any]:
        """The labels, in an order that stays: of the files, or of the generator where there is no `root`."""

    @abstractmethod
    def generated(self) -> Iterator[R]:
        """Sentences of the built-in generator, without end."""

    @abstractmethod
    def read_file(self, split: Split) -> Iterable[R]:
        """The sentences of the file of train, val or test."""

    def prepare(self) -> None:
        """Read the labels and, unless given, build the vocabulary from the training texts."""
        if self.tokenizer is not None:
            return
        self.labels = self.read_labels()
        kind: Any = self.tokenizer_kind
        options = {"lowercase": self.lowercase, "half_width": self.half_width} if kind is CharTokenizer else {}
        if self.vocab_file is not None:
            self.tokenizer = kind.from_vocab(self.vocab_file, **options)
        else:
            texts = (record.text for record in self.records("train"))
            self.tokenizer = kind.from_texts(texts, min_count=self.min_count, **options)

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size` and `labels`."""
        return {"vocab_size": len(self.get_tokenizer()), "labels": self.labels}

    def read_split(self, split: Split) -> Sequence[R]:
        """Read the sentences of train, val or test."""
        if self.root is not None:
            return list(self.read_file(split))
        return generated_rows(self.generated(), split, self.num_generated)

    def source_files(self) -> list[Path]:
        """The files below `root`, and the vocabulary if one is given."""
        given = [Path(self.vocab_file)] if self.vocab_file is not None else []
        return given if self.root is None else [self.root / name for name in self.files.values()] + given

    def length(self, record: R) -> int:
        """Characters of the text."""
        return len(record.text)

    def fingerprint(self) -> dict[str, Any]:
        """Vocabulary and labels."""
        return {"vocabulary": self.get_tokenizer().fingerprint(), "labels": self.labels}

    def check_label(self, entry: Any) -> Any:
        """One of `labels` as it was saved; `TypeError` or `ValueError` where it is none."""
        kind, part = entry
        return [str(kind), str(part)]

    def save_assets(self, folder: Path) -> None:
        """Write `vocab.txt`, `tokenizer.json` and `labels.json`."""
        self.get_tokenizer().save(folder)
        text = json.dumps(self.labels, ensure_ascii=False, indent=0)
        (Path(folder) / LABELS_FILE).write_text(text + "\n", encoding="utf-8")

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / LABELS_FILE
        try:
            labels = [self.check_label(entry) for entry in json.loads(read_text(path))]
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a list of {self.LABELS}; save the assets again") from error
        if not labels:
            raise InputError(f"{path}: an empty list, not one of {self.LABELS}; save the assets again")
        self.labels, self.tokenizer = labels, self.tokenizer_kind.load(folder)

    def get_tokenizer(self) -> CharTokenizer | NumberTokenizer:
        """The tokenizer, made when first needed."""
        if self.tokenizer is None:
            self.prepare()
        assert self.tokenizer is not None
        return self.tokenizer

    def file(self, name: str) -> Path:
        """The path of one of `files`.

        Raises:
            InputError: there is no folder `root`.
        """
        assert self.root is not None
        return file_below(self.root, self.files[name])


def encode_texts(
    tokenizer: CharTokenizer | NumberTokenizer,
    records: Sequence[Any],
    row_budget: int | None,
    window: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], list[tuple[dict[int, int], dict[int, int]]]]:
    """Texts as the part of a batch that does not depend on the task.

    Args:
        tokenizer: makes the tokens.
        records: whose texts.
        row_budget: see `SentenceDataModule`.
        window: size and stride of the windows in which texts are seen, see `windows_over`; None: each as a whole.

    Returns:
        `ids` (B, T) and `mask` (B, T), True where there is a token; `num_tokens`, the number of these; `records` and
        `offsets` (character span of each token) as they are; with a `row_budget` also `starts` (B, 2), the place of
        each sentence in packed rows; with a `window`, a row for each and `owners`, the number of its record.
        For each row, the token that begins at a character and the token that ends before a character.
    """
    encoded = [tokenizer.encode(record.text) for record in records]
    more: dict[str, Any] = {}
    if window is not None:
        whole, encoded, owners = encoded, [], []
        for owner, (tokens, offsets) in enumerate(whole):
            for start, end in windows_over(len(tokens) - 2, *window):
                shown = slice(start + 1, end + 1)
                owners.append(owner)
                encoded.append(([tokens[0], *tokens[shown], tokens[-1]], [offsets[0], *offsets[shown], offsets[-1]]))
        more["owners"] = HostList(owners)
    lengths = np.array([len(ids) for ids, _ in encoded])
    ids = np.full((len(encoded), lengths.max()), tokenizer.pad_id)
    borders = []
    for row, (tokens, offsets) in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
        spans = list(enumerate(offsets))[1:-1]
        borders.append(({start: token for token, (start, _) in spans}, {end: token for token, (_, end) in spans}))
    if row_budget is not None:
        more["starts"] = torch.from_numpy(even_fit(lengths, max(row_budget, int(lengths.max()))))
    batch = {
        "ids": torch.from_numpy(ids),
        "mask": torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
        "num_tokens": int(lengths.sum()),
        **more,
        "records": HostList(records),
        "offsets": HostList(offsets for _, offsets in encoded),
    }
    return batch, borders
