"""Entity linking: texts with linked mentions and their knowledge base, from files in the format of CCKS 2019 or from
the built-in generator."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import KexueDataModule, Split
from .ccks_linking import read_links, write_answers
from .generators.linked_sentences import linked_entities, linked_sentences
from .knowledge import KnowledgeBase
from .lexicon import MentionLexicon
from .link_batches import LinkCollator
from .records import LinkRecord
from .rows import OnBadRow
from .segmentation import WordKind, segmenter
from .tokenizers import CharTokenizer
from .word_vectors import WordVectors

KNOWLEDGE_FILE = "knowledge.safetensors"
LEXICON_FILE = "lexicon.json"


class LinkDataModule(KexueDataModule):
    """Batches for entity linking: characters, borders of dictionary words, and pairs of a mention and an entity.

    Args:
        batch_size: most texts in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        train_file, dev_file, test_file, knowledge_file: below `root`; `test_file=None` tests on the dev file.
        cache_dir: where the file built from the knowledge base is kept; None: the user's cache folder.
        vocab_file: vocabulary, one token a line; None builds it from the knowledge base and the training texts.
        min_count: a character seen less often there is unknown.
        prune_ratio: see `MentionLexicon.fit`; None keeps all names.
        min_annotations: an entity annotated so often in training rules out others of its name; see
            `MentionLexicon.candidates`.
        max_candidates: most entities that are compared for one mention.
        max_description: characters of an entity's description that the model reads; later ones count in its features.
        words: "characters" or "jieba", see `segmentation.segmenter`.
        word_vectors: file in word2vec's text format; None: characters alone.
        max_length: most characters of a training text; a longer one is a bad row. Others are never cut or left out, but
            read in windows of this size.
        stride: characters from one window to the next; None: three quarters of `max_length`.
        num_generated: training texts made by the generator, and a tenth of it for validation and test each.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        root: str | None = None,
        train_file: str = "entity_linking/train.json.gz",
        dev_file: str = "entity_linking/dev.json",
        test_file: str | None = None,
        knowledge_file: str = "entity_linking/kb_data.gz",
        cache_dir: str | None = None,
        vocab_file: str | None = None,
        min_count: int = 2,
        prune_ratio: float | None = 5.0,
        min_annotations: int = 2,
        max_candidates: int = 64,
        max_description: int = 256,
        words: WordKind = "characters",
        word_vectors: str | None = None,
        max_length: int = 512,
        stride: int | None = None,
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
        for name, value, least in (
            ("max_length", max_length, 1),
            ("max_candidates", max_candidates, 1),
            ("max_description", max_description, 1),
            ("min_annotations", min_annotations, 1),
            ("num_generated", num_generated, 10),
        ):
            if value < least:
                raise InputError(f"data.{name}={value}: use {least} or more")
        if prune_ratio is not None and prune_ratio <= 1:
            raise InputError(f"data.prune_ratio={prune_ratio}: use more than 1, or null to keep all names")
        self.stride = stride if stride is not None else max(1, max_length * 3 // 4)
        if not 1 <= self.stride <= max_length:
            raise InputError(f"data.stride={stride}: use 1 to max_length={max_length}, or null")
        segmenter(words)
        self.root = Path(root).expanduser() if root is not None else None
        self.files = {"train": train_file, "val": dev_file, "test": test_file or dev_file, "knowledge": knowledge_file}
        self.cache_dir = cache_dir
        self.vocab_file = vocab_file
        self.min_count = min_count
        self.prune_ratio = prune_ratio
        self.min_annotations = min_annotations
        self.max_candidates = max_candidates
        self.max_description = max_description
        self.words: WordKind = words
        self.vectors = WordVectors.cached(word_vectors, cache_dir) if word_vectors is not None else None
        self.max_length = max_length
        self.num_generated = num_generated
        self.knowledge: KnowledgeBase | None = None
        self.lexicon: MentionLexicon | None = None
        self.tokenizer: CharTokenizer | None = None

    def prepare(self) -> None:
        """Open the knowledge base and learn names and characters from the training texts, and from no others."""
        if self.lexicon is not None:
            return
        knowledge = self._knowledge()
        records = self.records("train")
        if self.vocab_file is not None:
            self.tokenizer = CharTokenizer.from_vocab(self.vocab_file, lowercase=True)
        else:
            counts = knowledge.character_counts()
            for record in records:
                for character in record.text:
                    counts[character] = counts.get(character, 0) + 1
            self.tokenizer = CharTokenizer.from_counts(counts, min_count=self.min_count, lowercase=True)
        self.lexicon = MentionLexicon.fit(knowledge, records, self.prune_ratio)

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size`, `word_dim` and `types`, the types of the entities."""
        return {
            "vocab_size": len(self._prepared().tokenizer),
            "word_dim": self.vectors.dim if self.vectors is not None else 0,
            "types": self._knowledge().types,
        }

    def read_split(self, split: Split) -> Sequence[LinkRecord]:
        """Read the texts of train, val or test."""
        if self.root is None:
            held_out = self.num_generated // 10
            first = {"train": 0, "val": self.num_generated, "test": self.num_generated + held_out}[split]
            number = self.num_generated if split == "train" else held_out
            return list(islice(linked_sentences(), first, first + number))
        most = self.max_length if split == "train" else None
        type_of = self._knowledge().type_of
        return list(read_links(self._file(split), type_of, max_characters=most, **self.row_options()))

    def collator(self) -> LinkCollator:
        """A `LinkCollator` that pairs what may be a mention with whom it may mean."""
        return self._prepared()

    def training_collator(self) -> LinkCollator:
        """A `LinkCollator` that pairs gold mentions with all that bear their names."""
        return self._prepared(training=True)

    def source_files(self) -> list[Path]:
        """The files of the splits and the knowledge base, and the vocabulary if one is given."""
        given = [Path(self.vocab_file)] if self.vocab_file is not None else []
        return given if self.root is None else [self.root / name for name in self.files.values()] + given

    def length(self, record: LinkRecord) -> int:
        """Characters of the text."""
        return len(record.text)

    def fingerprint(self) -> dict[str, Any]:
        """Vocabulary, and width of the word vectors."""
        return {"vocabulary": self._prepared().tokenizer.fingerprint(), "word_dim": self.model_arguments()["word_dim"]}

    def save_assets(self, folder: Path) -> None:
        """Write the vocabulary, what was learnt of names, and the knowledge base (on one disk, a second name of it)."""
        collator = self._prepared()
        collator.tokenizer.save(folder)
        collator.lexicon.save(Path(folder) / LEXICON_FILE)
        self._knowledge().save(Path(folder) / KNOWLEDGE_FILE)

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        knowledge = KnowledgeBase.open(Path(folder) / KNOWLEDGE_FILE)
        lexicon, tokenizer = MentionLexicon.load(Path(folder) / LEXICON_FILE, knowledge), CharTokenizer.load(folder)
        self.knowledge, self.lexicon, self.tokenizer = knowledge, lexicon, tokenizer

    def read_inputs(self, path: Path) -> None:
        """Read the texts to predict on: rows with `text_id` and `text`; mentions in them are left aside."""
        self.set_records("predict", list(read_links(path, with_links=False, **self.row_options())))

    def write_answers(self, predictions: Iterable[LinkRecord], path: Path) -> int:
        """Write CCKS 2019's format, in the order of the inputs where `read_inputs` has read them."""
        return write_answers(self.in_order_of_inputs(predictions), path)

    def _prepared(self, training: bool = False) -> LinkCollator:
        self.prepare()
        assert self.tokenizer is not None
        assert self.lexicon is not None
        return LinkCollator(
            self.tokenizer,
            self.lexicon,
            self.words,
            self.vectors,
            self.min_annotations,
            self.max_candidates,
            self.max_description,
            self.max_length,
            self.stride,
            training,
        )

    def _knowledge(self) -> KnowledgeBase:
        if self.knowledge is None:
            if self.root is None:
                self.knowledge = KnowledgeBase.build(linked_entities())
            else:
                self.knowledge = KnowledgeBase.cached(self._file("knowledge"), self.cache_dir, **self.row_options())
        return self.knowledge

    def _file(self, name: str) -> Path:
        assert self.root is not None
        if not self.root.is_dir():
            raise InputError(
                f"data.root={self.root}: no such folder; give the folder of the data sets, or data.root=null for "
                "generated sentences"
            )
        return self.root / self.files[name]
