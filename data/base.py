"""What all DataModules share: records to loaders, assets, and a fingerprint that a checkpoint carries."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .rows import OnBadRow
from .sampling import LengthBucketSampler

log = logging.getLogger(__name__)

T = TypeVar("T")
Split = Literal["train", "val", "test", "predict"]
_SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class HostList(Generic[T]):
    """A list in a batch that stays where it is.

    Lightning walks through the lists and dataclasses of every batch to move and convert tensors (and refuses frozen
    dataclasses); for records and offsets this is time spent on nothing. It leaves an object of this class alone.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = list(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> T:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, HostList)) and self._items == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"HostList({self._items!r})"


class RecordDataset(Dataset[list[Any]]):
    """Records by list of indices, as `LengthBucketSampler` gives them."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: list[int]) -> list[Any]:
        return [self.records[index] for index in indices]


class KexueDataModule(pl.LightningDataModule, ABC):
    """Records of four splits, loaded when first needed, in batches that are the same for any number of workers.

    A subclass gives `prepare`, `model_arguments`, `read_split`, `collator` and, for rows of different size, `length`.

    Args:
        batch_size: most records in a training batch of one process.
        eval_batch_size: the same for validation, test and prediction; None takes `batch_size`.
        num_workers: loader processes.
        seed: of the order of the training rows.
        on_bad_row: "raise" stops at a row that cannot be used, "skip" leaves it out and says so.
        bad_rows_file: where skipped rows are listed; None logs them.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_row: OnBadRow = "raise",
        bad_rows_file: str | None = None,
    ) -> None:
        super().__init__()
        if on_bad_row not in ("raise", "skip"):
            raise InputError(f"data.on_bad_row={on_bad_row!r}: use raise or skip")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or batch_size)):
            if value < 1:
                raise InputError(f"data.{name}={value}: use 1 or more")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.on_bad_row: OnBadRow = on_bad_row
        self.bad_rows_file = bad_rows_file
        self._records: dict[Split, Sequence[Any]] = {}

    @abstractmethod
    def prepare(self) -> None:
        """Read what decides the model's shape. Calling it again, or after `load_assets`, does nothing."""

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """Plain data for the model's constructor; `prepare` comes first."""

    @abstractmethod
    def read_split(self, split: Split) -> Sequence[Any]:
        """Read the records of train, val or test."""

    @abstractmethod
    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The function from records to a batch; it travels to loader processes, so it holds no more than it needs."""

    def training_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The function for batches to train on, where those hold something else."""
        return self.collator()

    def source_files(self) -> list[Path]:
        """Files that the records are read from; none for a built-in source."""
        return []

    def num_rows(self) -> dict[str, int]:
        """Records of each split that has been read."""
        return {split: len(records) for split, records in self._records.items()}

    def length(self, record: Any) -> int:
        """How long a record is, for batches of similar lengths."""
        return 1

    def save_assets(self, folder: Path) -> None:
        """Write what `load_assets` needs, so that testing and predicting do without the training data."""

    def load_assets(self, folder: Path) -> None:
        """Take the assets of an earlier run in place of building them from data."""

    def read_inputs(self, path: Path) -> None:
        """Read the records to predict on.

        Raises:
            InputError: a file that cannot be read, or a data module without an input format.
        """
        raise InputError(f"{path}: {type(self).__name__} reads no input files; predict with another experiment")

    def write_answers(self, predictions: Iterable[Any], path: Path) -> int:
        """Write predicted records in the data set's answer format, whole or not at all; return the number of rows."""
        raise InputError(f"{path}: {type(self).__name__} has no answer format; predict with another experiment")

    def combine(self, predictions: Sequence[Iterable[Any]]) -> list[Any]:
        """Make one prediction of those of several models, one group of records each.

        Raises:
            InputError: a data module that knows no way to.
        """
        raise InputError(f"run=...: {type(self).__name__} cannot put several runs' answers together; give one run")

    def in_order_of_inputs(self, predictions: Iterable[T]) -> list[T]:
        """Predicted records, by their `id` in the order in which `read_inputs` has read them; batches go by length."""
        place = {record.id: index for index, record in enumerate(self._records.get("predict", ()))}
        return sorted(predictions, key=lambda record: place.get(record.id, len(place)))  # type: ignore[attr-defined]

    def records(self, split: Split) -> Sequence[Any]:
        """Records of a split, read at the first call."""
        if split not in self._records:
            if split == "predict":
                raise InputError("nothing to predict on; give input=FILE, or call read_inputs(FILE) in a script")
            self._records[split] = self.read_split(split)
        return self._records[split]

    def set_records(self, split: Split, records: Sequence[Any]) -> None:
        """Use these records for a split in place of reading them."""
        self._records[split] = records

    def row_options(self) -> dict[str, Any]:
        """What readers of rows take: of several processes that read the same file, the first lists the bad rows."""
        listing = self.bad_rows_file if rank_zero_only.rank == 0 else os.devnull
        return {"on_bad_row": self.on_bad_row, "bad_rows_file": listing}

    def setup(self, stage: str | None = None) -> None:
        """Prepare, then read the splits of the stage, so that wrong input shows before any work is done."""
        self.prepare()
        for split in _SPLITS_OF_STAGE.get(stage or "", ()):
            self.records(split)

    def train_dataloader(self) -> DataLoader:
        """Batches of similar lengths in an order of their own each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Batches sorted by length."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches sorted by length."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches sorted by length; the records in them carry their ids."""
        return self._loader("predict")

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that a checkpoint's model depends on: they must be the same when it is loaded."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the data it was trained on."""
        return {
            "must_match": self.fingerprint(),
            "order": self._order(),
            "mid_epoch": self.trainer is not None and not self.trainer.is_last_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with this one.

        Raises:
            InputError: the model of the checkpoint cannot fit this data (another vocabulary, other labels).
        """
        for name, now in self.fingerprint().items():
            then = state_dict.get("must_match", {}).get(name, now)
            if then != now:
                raise InputError(
                    f"the checkpoint was trained with other data: {name} {_difference(then, now)}; "
                    "use the assets folder of its run, or begin a new run with resume=null"
                )
        changed = {
            name: (then, self._order().get(name))
            for name, then in state_dict.get("order", {}).items()
            if then != self._order().get(name)
        }
        if changed and state_dict.get("mid_epoch") and self.trainer is not None and self.trainer.training:
            what = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in changed.items())
            log.warning("resuming in the middle of an epoch with %s: some of its rows come twice or not at all", what)

    def _order(self) -> dict[str, Any]:
        """What decides which rows an epoch has; their order is in the checkpoint, see `LengthBucketSampler.plan`."""
        return {"rows": len(self._records["train"]) if "train" in self._records else None}

    def _loader(self, split: Split) -> DataLoader:
        records, training = self.records(split), split == "train"
        trainer: Any = self.trainer  # sets overfit_batches where type checkers do not see it
        overfitting = trainer is not None and trainer.overfit_batches > 0
        sampler = LengthBucketSampler(
            [self.length(record) for record in records],
            self.batch_size if training else self.eval_batch_size,
            shuffle=training and not overfitting,
            seed=self.seed,
        )
        return DataLoader(
            RecordDataset(records),
            batch_size=None,
            sampler=sampler,
            collate_fn=self.training_collator() if training else self.collator(),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def generated_rows(stream: Iterable[T], split: Split, number: int) -> list[T]:
    """The rows of a split from a generator: `number` for training, a tenth of it for validation and test each."""
    held_out = number // 10
    first = {"train": 0, "val": number, "test": number + held_out}[split]
    return list(islice(stream, first, first + (number if split == "train" else held_out)))


def file_below(root: Path, name: str) -> Path:
    """A file of the data sets.

    Raises:
        InputError: there is no folder `root`.
    """
    if not root.is_dir():
        raise InputError(
            f"data.root={root}: no such folder; give the folder of the data sets, or data.root=null for generated rows"
        )
    return root / name


def _difference(then: Any, now: Any) -> str:
    """Say shortly how two plain values differ: the first entry where lists part, else both."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        then, now = sorted(then.items()), sorted(now.items())
    if isinstance(then, list) and isinstance(now, list):
        if len(then) != len(now):
            return f"has {len(now)} entries here and {len(then)} there"
        index = next(i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        return f"entry {index} is {now[index]!r} here and {then[index]!r} there"
    return f"is {now!r} here and {then!r} there"
