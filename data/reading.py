"""Reading comprehension: questions from files in the published forms, or from the built-in generator."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ..errors import InputError
from .base import KexueDataModule, Split, file_below, generated_rows
from .generators.reading_passages import reading_passages
from .records import ReadingRecord
from .rows import OnBadRow
from .squad import read_squad, write_answers
from .tokenizers import CharTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from .webqa import read_webqa, write_answer_lines

FileFormat = Literal["squad", "webqa"]
Units = Literal["characters", "words"]
READERS: dict[str, Callable[..., Iterator[ReadingRecord]]] = {"squad": read_squad, "webqa": read_webqa}
WRITERS: dict[str, Callable[..., int]] = {"squad": write_answers, "webqa": write_answer_lines}
PARTS: tuple[Split, ...] = ("train", "val", "test")


class Batches(Protocol):
    """How a model wants questions and passages; `WindowBatches` and `PassageBatches` are such."""

    def collator(self, tokenizer: Tokenizer, training: bool = False) -> Callable[[list[Any]], dict[str, Any]]:
        """The function from records to a batch."""
        ...

    def model_arguments(self) -> dict[str, Any]:
        """Plain data for the model's constructor."""
        ...

    def source_files(self) -> list[Path]:
        """Files that it reads."""
        ...


class ReadingDataModule(KexueDataModule):
    """The questions of three splits, a tokenizer, and answers in the sets' format.

    Args:
        batch_size: most questions in a training batch of one process.
        batches: what a batch is made of.
        format: "squad" (CMRC 2018, DuReader) or "webqa".
        root: folder of real data; None takes the built-in generator.
        train_files: below `root`; several are read one after another.
        dev_file, test_file: below `root`; `test_file=None` tests on the dev file.
        dev_parts: for a set with no other file: divides the questions of the dev file, by passage, in this proportion
            into training (beside `train_files`), validation and test.
        no_answer: what an answer file says where the passages do not tell.
        tokenizer: folder of a published model's tokenizer; None takes the units of the training texts.
        units: "characters", or "words", for which rjieba is needed.
        min_count: a unit seen less often in the training texts is unknown, so that [UNK] is trained too.
        lowercase, half_width: see `CharTokenizer`; words are always looked up in lower case.
        num_generated: training questions made by the generator, and a tenth of it for validation and test each.
        num_passages: of a generated question.
        unanswerable: share of generated questions that the passages do not answer.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 16,
        *,
        batches: Batches,
        format: FileFormat = "squad",
        root: str | None = None,
        train_files: list[str] | None = None,
        dev_file: str = "reading_comprehension/cmrc2018_dev.json",
        test_file: str | None = None,
        dev_parts: list[int] | None = None,
        no_answer: str = "",
        tokenizer: str | None = None,
        units: Units = "characters",
        min_count: int = 2,
        lowercase: bool = False,
        half_width: bool = False,
        num_generated: int = 2000,
        num_passages: int = 1,
        unanswerable: float = 0.0,
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
        if format not in READERS:
            raise InputError(f"data.format={format!r}: use one of {', '.join(READERS)}")
        if units not in get_args(Units):
            raise InputError(f"data.units={units!r}: use one of {', '.join(get_args(Units))}")
        if num_generated < 10:
            raise InputError(f"data.num_generated={num_generated}: use 10 or more, a tenth is for validation")
        if num_passages < 1:
            raise InputError(f"data.num_passages={num_passages}: use 1 or more")
        if not 0 <= unanswerable <= 1:
            raise InputError(f"data.unanswerable={unanswerable}: use a share from 0 to 1")
        if dev_parts is not None and (len(dev_parts) != 3 or min(dev_parts) < 0 or min(dev_parts[1:]) < 1):
            raise InputError(f"data.dev_parts={dev_parts}: use three whole numbers such as [3, 1, 1], or null")
        if root is not None and not train_files and not (dev_parts and dev_parts[0]):
            raise InputError("data.train_files=[]: name at least one file, or give data.dev_parts a part to train on")
        if dev_parts is not None and test_file is not None:
            raise InputError(f"data.test_file={test_file}: the dev file has a part for the test; use dev_parts=null")
        self.batches = batches
        self.format = format
        self.root = Path(root).expanduser() if root is not None else None
        self.train_files = list(train_files or [])
        self.dev_file = dev_file
        self.test_file = test_file or dev_file
        self.dev_parts = dev_parts
        self.no_answer = no_answer
        self.tokenizer_folder = tokenizer
        self.units: Units = units
        self.min_count = min_count
        self.lowercase = lowercase
        self.half_width = half_width
        self.num_generated = num_generated
        self.num_passages = num_passages
        self.unanswerable = unanswerable
        self.tokenizer: Tokenizer | None = None

    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The function from records to a batch."""
        return self.batches.collator(self.get_tokenizer())

    def training_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The same, which may draw what it shows of a question."""
        return self.batches.collator(self.get_tokenizer(), training=True)

    def prepare(self) -> None:
        """Read the tokenizer or build it from questions and passages of the training data."""
        if self.tokenizer is not None:
            return
        if self.tokenizer_folder is not None:
            self.tokenizer = load_tokenizer(self.tokenizer_folder)
            return
        passages = dict.fromkeys(passage for record in self.records("train") for passage in record.passages)
        texts = [*passages, *(record.question for record in self.records("train"))]
        if self.units == "words":
            self.tokenizer = WordTokenizer.from_texts(texts, min_count=self.min_count)
            return
        self.tokenizer = CharTokenizer.from_texts(
            texts, min_count=self.min_count, lowercase=self.lowercase, half_width=self.half_width
        )

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size`, and what the kind of batches adds."""
        return {"vocab_size": len(self.get_tokenizer()), **self.batches.model_arguments()}

    def read_split(self, split: Split) -> Sequence[ReadingRecord]:
        """Read the questions of train, val or test."""
        if self.root is None:
            source = reading_passages(num_passages=self.num_passages, unanswerable=self.unanswerable)
            return generated_rows(source, split, self.num_generated)
        part = PARTS.index(split)
        if split == "train":
            found = [record for file in self.train_files for record in self._read(file)]
            return found + (self._dev_part(part) if self.dev_parts else [])
        return self._dev_part(part) if self.dev_parts else list(self._read((self.dev_file, self.test_file)[part - 1]))

    def source_files(self) -> list[Path]:
        """The files of the splits, and those that the batches need."""
        names = dict.fromkeys([*self.train_files, self.dev_file, self.test_file])
        return [*([] if self.root is None else [self.root / name for name in names]), *self.batches.source_files()]

    def length(self, record: ReadingRecord) -> int:
        """Characters of the passages."""
        return sum(map(len, record.passages))

    def fingerprint(self) -> dict[str, Any]:
        """The tokenizer."""
        return {"tokenizer": self.get_tokenizer().fingerprint()}

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.get_tokenizer().save(folder)

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        self.tokenizer = load_tokenizer(folder)

    def read_inputs(self, path: Path) -> None:
        """Read the questions to answer; answers in the file are left aside."""
        self.set_records("predict", list(READERS[self.format](path, with_answers=False, **self.row_options())))

    def write_answers(self, predictions: Iterable[ReadingRecord], path: Path) -> int:
        """Write the answer format of the sets, in the order of the inputs where `read_inputs` has read them."""
        return WRITERS[self.format](self.in_order_of_inputs(predictions), path, self.no_answer)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, made when first needed."""
        if self.tokenizer is None:
            self.prepare()
        assert self.tokenizer is not None
        return self.tokenizer

    def _read(self, file: str) -> Iterator[ReadingRecord]:
        assert self.root is not None
        return READERS[self.format](file_below(self.root, file), **self.row_options())

    def _dev_part(self, part: int) -> list[ReadingRecord]:
        return self._divided[part]

    @functools.cached_property
    def _divided(self) -> list[list[ReadingRecord]]:
        """The dev file in three parts: passages are dealt out in turn, so that no passage is in two of them."""
        assert self.dev_parts is not None
        deal = [part for part, count in enumerate(self.dev_parts) for _ in range(count)]
        numbers: dict[tuple[str, ...], int] = {}
        found: list[list[ReadingRecord]] = [[], [], []]
        for record in self._read(self.dev_file):
            number = numbers.setdefault(record.passages, len(numbers))
            found[deal[number % len(deal)]].append(record)
        return found
