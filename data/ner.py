"""Named entities: texts with typed spans in the formats of CLUENER, Resume, Weibo and Daguan, or generated ones."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..errors import InputError
from .base import Split
from .cluener import read_cluener, write_cluener
from .daguan import read_daguan, write_daguan
from .generators.anonymous_sentences import anonymous_sentences
from .generators.entity_sentences import entity_sentences
from .records import SpanRecord, without_overlaps
from .rows import OnBadRow
from .sentences import SentenceDataModule, encode_texts
from .span_dictionary import PARTS, SpanDictionary, units_of
from .tagged import read_tagged, write_tagged
from .targets import Cell, span_cells, stack_cells
from .tokenizers import CharTokenizer
from .tokenizers.numbers import SEPARATOR, NumberTokenizer
from .tokenizers.vocabulary import hash_of
from .votes import vote_on_spans
from .windows import check_windows, not_whole_in_any, windows_over

log = logging.getLogger(__name__)

Format = Literal["cluener", "resume", "weibo", "daguan"]


@dataclass(frozen=True)
class _Format:
    """What depends on the format."""

    read: Callable[..., Iterable[SpanRecord]]
    write: Callable[[Iterable[SpanRecord], Path], int]
    options: tuple[str, ...] = ()
    """Arguments of the data module that the reader takes besides those of every reader."""
    generate: Callable[[], Iterator[SpanRecord]] = entity_sentences
    tokenizer: type[CharTokenizer] | type[NumberTokenizer] = CharTokenizer
    separator: str = ""
    """What stands between tokens."""


_FORMATS = {
    "cluener": _Format(read_cluener, write_cluener),
    "resume": _Format(
        partial(read_tagged, names="BMES"), partial(write_tagged, names="BMES", separator=" "), ("strict_tags",)
    ),
    "weibo": _Format(
        partial(read_tagged, names="BIO", word_places=True),
        partial(write_tagged, names="BIO", separator="\t"),
        ("strict_tags",),
    ),
    "daguan": _Format(
        read_daguan, write_daguan, generate=anonymous_sentences, tokenizer=NumberTokenizer, separator=SEPARATOR
    ),
}


class NerDataModule(SentenceDataModule[SpanRecord]):
    """Batches for taggers and span scorers: character ids in windows, the spans in them, and the records themselves.

    Args:
        batch_size: most texts in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        format: of the files and of the answers, "cluener", "resume", "weibo" or "daguan" (whose tokens are numbers).
        train_file, dev_file, test_file: below `root`; `test_file=None` tests on the dev file.
        types: allowed types of spans; None takes those of the training rows.
        dictionary: also show the model what `SpanDictionary` finds, as segments: what it lacks without pretraining.
        strict_tags: of tagged files, see `read_tagged`.
        vocab_file, min_count, lowercase, half_width, row_budget, num_generated: see `SentenceDataModule`.
        max_length: most tokens that the encoder sees together, with [CLS] and [SEP]; a longer text is seen in windows.
        stride: tokens from one window to the next, see `windows_over`.
        max_characters: a longer text is a bad row: a whole book on one line.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    LABELS = "types"

    def __init__(
        self,
        batch_size: int = 32,
        *,
        root: str | None = None,
        format: Format = "cluener",
        train_file: str = "ner_cluener/train.json.gz",
        dev_file: str = "ner_cluener/dev.json",
        test_file: str | None = None,
        types: list[str] | None = None,
        dictionary: bool = False,
        strict_tags: bool = False,
        vocab_file: str | None = None,
        min_count: int = 2,
        lowercase: bool = False,
        half_width: bool = False,
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
        check_windows(max_length - 2, stride, "data.max_length - 2, data.stride: windows")
        super().__init__(
            batch_size,
            root=root,
            files={"train": train_file, "val": dev_file, "test": test_file or dev_file},
            vocab_file=vocab_file,
            min_count=min_count,
            lowercase=lowercase,
            half_width=half_width,
            max_length=max_length,
            row_budget=row_budget,
            num_generated=num_generated,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        if format not in _FORMATS:
            raise InputError(f"data.format={format!r}: use one of {', '.join(get_args(Format))}")
        self.format: Format = format
        self.parts = _FORMATS[format]
        self.labels = list(types) if types is not None else []
        self.dictionary: SpanDictionary | None = None
        self.with_dictionary = dictionary
        self.strict_tags = strict_tags
        self.window = max_length - 2, stride
        self.max_characters = max_characters

    @property
    def types(self) -> list[str]:
        """Names of the types: the labels."""
        return self.labels

    @property
    def tokenizer_kind(self) -> type[CharTokenizer] | type[NumberTokenizer]:
        """The one that the format needs."""
        return self.parts.tokenizer

    def prepare(self) -> None:
        """Take types, dictionary and, unless given, the vocabulary from the training rows."""
        if self.tokenizer is None:
            super().prepare()
            if self.with_dictionary:
                self.dictionary = SpanDictionary.fit(self.records("train"), self.parts.separator)

    def read_labels(self) -> list[str]:
        """The types that were given, or those of the training rows.

        Raises:
            InputError: these have no spans.
        """
        found = self.types or sorted({span.type for record in self.records("train") for span in record.spans})
        if not found:
            raise InputError(f"data.train_file={self.files['train']}: not one span in it; give rows with spans")
        return found

    def check_label(self, entry: Any) -> str:
        """A type as it was saved."""
        if not isinstance(entry, str):
            raise TypeError
        return entry

    def generated(self) -> Iterator[SpanRecord]:
        """Sentences of the built-in generator."""
        return self.parts.generate()

    def read_file(self, split: Split) -> Iterable[SpanRecord]:
        """The texts of a file."""
        return self._read(self.file(split))

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size`, `types` and, for what the dictionary says, `num_segments`."""
        num_segments = 1 + len(PARTS) * len(self.types) if self.with_dictionary else 0
        return {"vocab_size": len(self.get_tokenizer()), "types": self.types, "num_segments": num_segments}

    def collator(self) -> "NerCollator":
        """A `NerCollator` for this vocabulary and these types."""
        type_ids = {kind: number for number, kind in enumerate(self.types)}
        return NerCollator(self.get_tokenizer(), type_ids, self.window, self.row_budget, self.dictionary)

    def fingerprint(self) -> dict[str, Any]:
        """Vocabulary, types and dictionary."""
        words = None if self.dictionary is None else hash_of(sorted(self.dictionary.counts))
        return {**super().fingerprint(), "dictionary": words}

    def save_assets(self, folder: Path) -> None:
        """Write the dictionary as well, if there is one."""
        super().save_assets(folder)
        if self.dictionary is not None:
            self.dictionary.save(folder)

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote."""
        super().load_assets(folder)
        self.dictionary = SpanDictionary.load(folder, self.parts.separator) if self.with_dictionary else None

    def read_inputs(self, path: Path) -> None:
        """Read the texts to predict on, in the format of the data; spans in them are left aside."""
        self.set_records("predict", self._read(path, with_spans=False))

    def write_answers(self, predictions: Iterable[SpanRecord], path: Path) -> int:
        """Write answers in the format of the data, in the order of the inputs where `read_inputs` has read them."""
        return self.parts.write(self.in_order_of_inputs(predictions), path)

    def combine(self, predictions: Sequence[Iterable[SpanRecord]]) -> list[SpanRecord]:
        """One answer of those of several models: the tag that most of them give a token, see `vote_on_spans`."""
        return vote_on_spans(predictions, self.parts.separator)

    def not_representable(self, split: Split) -> dict[str, list[tuple[SpanRecord, list[Any]]]]:
        """Gold spans of a split that models are not shown: tags miss those that overlap a longer one, all miss those
        that every window cuts.

        Returns:
            "overlapping" and "cut by windows": records with these spans.
        """
        lost: dict[str, list[tuple[SpanRecord, list[Any]]]] = {"overlapping": [], "cut by windows": []}
        for record in self.records(split):
            flat = without_overlaps(record.spans)
            units = units_of(record.text, self.parts.separator)
            starts = {start: token for token, (start, _) in enumerate(units)}
            ends = {end: token for token, (_, end) in enumerate(units)}
            inside = {span: (starts[span.start], ends[span.end]) for span in record.spans}
            cut = set(not_whole_in_any(windows_over(len(units), *self.window), inside.values()))
            found = {
                "overlapping": [span for span in record.spans if span not in flat],
                "cut by windows": [span for span, tokens in inside.items() if tokens in cut],
            }
            for name, spans in found.items():
                lost[name] += [(record, spans)] if spans else []
        return lost

    def setup(self, stage: str | None = None) -> None:
        """As in `KexueDataModule`; says how many spans of the training rows no model can learn."""
        super().setup(stage)
        if stage == "fit":
            for name, rows in self.not_representable("train").items():
                if rows:
                    count, first = sum(len(spans) for _, spans in rows), rows[0]
                    log.warning("%d training spans %s, the first: %s in row %s", count, name, first[1][0], first[0].id)

    def _read(self, path: Path, with_spans: bool = True) -> list[SpanRecord]:
        options = self.row_options() | {name: getattr(self, name) for name in self.parts.options}
        limits = {"max_characters": self.max_characters, "with_spans": with_spans}
        return list(self.parts.read(path, self.types or None, **limits, **options))


@dataclass(frozen=True)
class NerCollator:
    """Records to a batch, a row for each window of a text.

    The batch holds `ids` (W, T) and `mask` (W, T), True where there is a token; `num_tokens`, the number of these;
    `span_labels` (W, P, 3), rows of (type, first token, last token) filled up with -1, and `flat_labels`, those that
    overlap no longer one; `records`; `owners`, for each row the number of its record; `offsets`, for each row the
    character span of its tokens in the text of the record, (0, 0) for special tokens. With a `row_budget` there are
    also `starts` (W, 2), the place of each window in packed rows; with a `dictionary`, `segments` (W, T), its tags.
    """

    tokenizer: CharTokenizer | NumberTokenizer
    type_ids: dict[str, int]
    window: tuple[int, int]
    row_budget: int | None = None
    dictionary: SpanDictionary | None = None

    def __call__(self, records: list[SpanRecord]) -> dict[str, Any]:
        """Encode, cut into windows, mark and fill up."""
        batch, borders = encode_texts(self.tokenizer, records, self.row_budget, self.window)
        flat = [without_overlaps(record.spans) for record in records]
        cells: dict[str, list[list[Cell]]] = {"span_labels": [], "flat_labels": []}
        for owner, offsets, (starts, ends) in zip(batch["owners"], batch["offsets"], borders, strict=True):
            record, first, last = records[owner], offsets[1][0], offsets[-2][1]
            for group, spans in zip(cells.values(), (record.spans, flat[owner]), strict=True):
                whole = [span for span in spans if first <= span.start and span.end <= last]
                group.append(span_cells(record, whole, starts, ends, self.type_ids))
        batch |= {name: stack_cells(groups) for name, groups in cells.items()}
        if self.dictionary is not None:
            words = [self.dictionary.tags(record.text, self.type_ids) for record in records]
            batch["segments"] = torch.zeros_like(batch["ids"])
            for row, owner, offsets in zip(batch["segments"], batch["owners"], batch["offsets"], strict=True):
                tags = [words[owner][start] for start, _ in offsets[1:-1]]
                row[1 : len(tags) + 1] = torch.tensor(tags, dtype=torch.long)
        return batch
