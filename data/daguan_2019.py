"""The Daguan cup 2019: labelled sentences of numbers in folds, and the sentences without labels to pretrain on."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .base import KexueDataModule, Split, file_below, generated_rows
from .daguan import pieces_of, read_daguan
from .folds import stratified_folds, with_fields_left_out
from .generators.anonymous_sentences import anonymous_sentences
from .ner import NerDataModule
from .records import SpanRecord
from .rows import OnBadRow
from .sentences import encode_texts
from .tokenizers.numbers import SEPARATOR, NumberTokenizer


class DaguanDataModule(NerDataModule):
    """The contest's rows as `NerDataModule` gives them, whole or one of several folds.

    Args:
        batch_size: most sentences in a training batch of one process.
        fold: which part of the training rows validates, from 0; None: all of them train and the dev rows validate.
        num_folds: parts, each with its share of every set of types.
        augment: also train on copies of sentences without the fields of a type, see `with_fields_left_out`; without a
            dictionary.
        root, train_file, dev_file, test_file, dictionary, vocab_file, min_count, max_length, stride, max_characters,
            row_budget, num_generated, eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see
            `NerDataModule`.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        batch_size: int = 24,
        *,
        fold: int | None = None,
        num_folds: int = 5,
        augment: bool = False,
        root: str | None = None,
        train_file: str = "daguan_2019/train.txt.gz",
        dev_file: str = "daguan_2019/dev.txt",
        test_file: str | None = None,
        dictionary: bool = False,
        vocab_file: str | None = None,
        min_count: int = 2,
        max_length: int = 256,
        stride: int = 192,
        max_characters: int = 100_000,
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
            root=root,
            format="daguan",
            train_file=train_file,
            dev_file=dev_file,
            test_file=test_file,
            dictionary=dictionary,
            vocab_file=vocab_file,
            min_count=min_count,
            max_length=max_length,
            stride=stride,
            max_characters=max_characters,
            row_budget=row_budget,
            num_generated=num_generated,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        if num_folds < 2 or not 0 <= (fold or 0) < num_folds:
            raise InputError(
                f"data.fold={fold}, data.num_folds={num_folds}: use 2 folds or more, and one of them from 0, or null"
            )
        if augment and dictionary:
            raise InputError(
                "data.augment=true, data.dictionary=true: a copy would tell the dictionary of its original's fields; "
                "use one of the two"
            )
        self.fold = fold
        self.num_folds = num_folds
        self.augment = augment

    def read_split(self, split: Split) -> Sequence[SpanRecord]:
        """Read the sentences of train, val or test: of the fold, where there is one."""
        if split == "test" or (split == "val" and self.fold is None):
            return super().read_split(split)
        rows = super().read_split("train")
        if self.fold is not None:
            # Always the same folds, whatever the seed of a run: else rows that one model learnt validate another.
            folds = stratified_folds(rows, self.num_folds)
            mine = split == "val"
            rows = [row for row, fold in zip(rows, folds, strict=True) if (fold == self.fold) == mine]
        return list(with_fields_left_out(rows)) if self.augment and split == "train" else rows


class DaguanCorpusDataModule(KexueDataModule):
    """Sentences of numbers to pretrain on, labels left aside; longer ones come in pieces.

    Args:
        batch_size: most pieces in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        train_files: below `root`, with labels or without.
        dev_file: below `root`, held out of training.
        vocab_file: vocabulary, one token a line; None builds it from the training texts.
        min_count: a number seen less often in them is unknown.
        min_length: shorter pieces are left out: they say too little of what is missing in them.
        max_length: most tokens of a piece, with [CLS] and [SEP].
        max_characters: a longer line is a bad row.
        row_budget: see `NerDataModule`.
        num_generated: training sentences made by the generator, and a tenth of it for validation.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        *,
        root: str | None = None,
        train_files: list[str] | None = None,
        dev_file: str = "daguan_2019/dev.txt",
        vocab_file: str | None = None,
        min_count: int = 1,
        min_length: int = 5,
        max_length: int = 128,
        max_characters: int = 100_000,
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
        if min_length < 1 or max_length < min_length + 2:
            raise InputError(
                f"data.min_length={min_length}, data.max_length={max_length}: use 1 or more, and 2 more than that"
            )
        if num_generated < 10:
            raise InputError(f"data.num_generated={num_generated}: use 10 or more, a tenth is for validation")
        self.root = Path(root).expanduser() if root is not None else None
        self.train_files = list(train_files or ("daguan_2019/corpus_part.txt.gz", "daguan_2019/train.txt.gz"))
        self.dev_file = dev_file
        self.vocab_file = vocab_file
        self.min_count = min_count
        self.min_length = min_length
        self.max_length = max_length
        self.max_characters = max_characters
        self.row_budget = row_budget
        self.num_generated = num_generated
        self.tokenizer: NumberTokenizer | None = None

    def prepare(self) -> None:
        """Take the vocabulary from the training texts, unless it is given."""
        if self.tokenizer is not None:
            return
        if self.vocab_file is not None:
            self.tokenizer = NumberTokenizer.from_vocab(self.vocab_file)
        else:
            texts = (record.text for record in self.records("train"))
            self.tokenizer = NumberTokenizer.from_texts(texts, min_count=self.min_count)
        if self.tokenizer.mask_id is None:
            raise InputError(f"data.vocab_file={self.vocab_file}: it lacks [MASK]; add it on a line of its own")

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size`, `mask_id` and `special_ids`, those never masked."""
        tokenizer = self._tokenizer()
        special = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
        return {"vocab_size": len(tokenizer), "mask_id": tokenizer.mask_id, "special_ids": special}

    def read_split(self, split: Split) -> Sequence[SpanRecord]:
        """Read the pieces of train, or of the dev rows for val and test."""
        names = self.train_files if split == "train" else [self.dev_file]
        if self.root is None:
            rows = generated_rows(anonymous_sentences(), split, self.num_generated)
        else:
            rows = [row for name in names for row in self._read(file_below(self.root, name))]
        pieces = (piece for row in rows for piece in pieces_of(row, self.max_length - 2))
        return [piece for piece in pieces if piece.text.count(SEPARATOR) + 1 >= self.min_length]

    def collator(self) -> Callable[[list[SpanRecord]], dict[str, Any]]:
        """A `CorpusCollator`."""
        return CorpusCollator(self._tokenizer(), self.row_budget)

    def source_files(self) -> list[Path]:
        """The files, and the vocabulary if one is given."""
        given = [Path(self.vocab_file)] if self.vocab_file is not None else []
        return given if self.root is None else [self.root / name for name in (*self.train_files, self.dev_file)] + given

    def length(self, record: SpanRecord) -> int:
        """Tokens of the piece."""
        return record.text.count(SEPARATOR) + 1

    def fingerprint(self) -> dict[str, Any]:
        """The vocabulary."""
        return {"vocabulary": self._tokenizer().fingerprint()}

    def save_assets(self, folder: Path) -> None:
        """Write `vocab.txt`, which is also what a tagger that goes on from here takes as its `data.vocab_file`."""
        self._tokenizer().save(folder)

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote."""
        self.tokenizer = NumberTokenizer.load(folder)

    def _read(self, path: Path) -> Iterator[SpanRecord]:
        rows = read_daguan(path, with_spans=False, max_characters=self.max_characters, **self.row_options())
        return (SpanRecord(f"{path.name}:{row.id}", row.text) for row in rows)

    def _tokenizer(self) -> NumberTokenizer:
        if self.tokenizer is None:
            self.prepare()
        assert self.tokenizer is not None
        return self.tokenizer


class CorpusCollator:
    """Pieces to a batch, see `encode_texts`; `row_keys` (B,) tell pieces apart: what is masked in one hangs on them.

    Args:
        tokenizer: of the pieces.
        row_budget: see `NerDataModule`.
    """

    def __init__(self, tokenizer: NumberTokenizer, row_budget: int | None) -> None:
        self.tokenizer = tokenizer
        self.row_budget = row_budget

    def __call__(self, records: list[SpanRecord]) -> dict[str, Any]:
        """Encode and fill up."""
        batch, _ = encode_texts(self.tokenizer, records, self.row_budget)
        keys = [zlib.crc32(f"{record.id}".encode()) for record in records]
        return {**batch, "row_keys": torch.tensor(keys)}
