"""Texts with mentions, candidates and the descriptions of entities, as the tensors that the linking model reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .base import HostList
from .dictionary import lower_case
from .knowledge import KnowledgeBase, description, lookup_form
from .lexicon import MentionLexicon
from .records import LinkRecord
from .segmentation import WordKind, segmenter, word_of_each_character
from .tokenizers import CharTokenizer
from .windows import windows_over
from .word_vectors import WordVectors

MAX_OBJECT_LENGTH = 10
"""Objects of an entity's facts are looked for in a text up to this length."""
NUM_FEATURES = 3
NO_MENTION = -1
"""Marks the pair that stands in for none."""


@dataclass(frozen=True)
class LinkCollator:
    """Records to a batch.  Shapes: B windows of texts, T characters, P pairs, E entities, D characters of descriptions.

    A text of no more than `max_length` characters is one window.

    The batch holds `ids` (B, T) and `mask` (B, T); `num_tokens`; `borders` and `labels` (B, T, 2), where dictionary
    words and gold mentions start and end (inclusive); `pairs` (P, 4), rows of (window, first character, last character,
    entity), for each mention its entities; `mentions` (P,), the number of the mention, and `judged` and `right` (P,),
    whether it is a gold mention, and of this entity; `features` (P, T, 3), see `match_features`; `entity_ids` and
    `entity_mask` (E, D); `records` as they are; `windows`, (record, first character, exclusive end) of each; and
    `entities`, (id, type) of each. There is always a pair: where there is none, one of mention -1. With vectors of
    words there are `word_vectors` (W, V) and their rows, `words` (B, T) and `entity_words` (E, D).
    """

    tokenizer: CharTokenizer
    lexicon: MentionLexicon
    words: WordKind = "characters"
    vectors: WordVectors | None = None
    min_annotations: int = 2
    max_candidates: int = 64
    max_description: int = 256
    max_length: int = 512
    stride: int = 384
    training: bool = False

    def __call__(self, records: list[LinkRecord]) -> dict[str, Any]:
        """Encode, mark, pair and fill up."""
        windows = [
            (number, *window)
            for number, record in enumerate(records)
            for window in windows_over(len(record.text), self.max_length, self.stride)
        ]
        texts = [lower_case(records[number].text[start:end]) for number, start, end in windows]
        found = self.lexicon.words(texts)
        ids, mask = self._encode(texts)
        borders, labels = (np.zeros((*ids.shape, 2), dtype=bool) for _ in range(2))
        gold: list[dict[tuple[int, int], str]] = []
        for row, (number, begin, end) in enumerate(windows):
            links = [link for link in records[number].judged().links if begin <= link.start and link.end <= end]
            gold.append({(link.start - begin, link.end - begin): link.entity for link in links})
            for start, stop in gold[-1]:
                labels[row, start, 0] = labels[row, stop - 1, 1] = True
            for word in found[row]:
                borders[row, word.start, 0] = borders[row, word.end - 1, 1] = True

        pairs, mentions, judged, right, numbers = [], [], [], [], {}
        mention = 0
        for row, spans in enumerate(self._mentions(texts, found, gold)):
            for (start, end), candidates in spans.items():
                meant = gold[row].get((start, end))
                for number in candidates:
                    pairs.append((row, start, end - 1, numbers.setdefault(number, len(numbers))))
                    mentions.append(mention)
                    judged.append(meant is not None)
                    right.append(meant is not None and meant == self._entry(number).id)
                mention += 1
        if not pairs:
            pairs, mentions, judged, right = [(0, 0, 0, 0)], [NO_MENTION], [False], [False]
            numbers = {0: 0}
        entries = [self._entry(number) for number in numbers]
        own_words = [word_of_each_character(text, segmenter(self.words)) for text in texts]
        features = np.zeros((len(pairs), ids.shape[1], NUM_FEATURES), dtype=bool)
        for place, (row, _, _, number) in enumerate(pairs):
            features[place, : len(texts[row])] = match_features(texts[row], own_words[row], entries[number])
        descriptions = [entry.text[: self.max_description] for entry in entries]
        entity_ids, entity_mask = self._encode(descriptions)
        batch = {
            "ids": ids,
            "mask": mask,
            "borders": borders,
            "labels": labels,
            "pairs": np.array(pairs),
            "mentions": np.array(mentions),
            "judged": np.array(judged),
            "right": np.array(right),
            "features": features,
            "entity_ids": entity_ids,
            "entity_mask": entity_mask,
        }
        if self.vectors is not None:
            entity_words = [entry.words[: self.max_description] for entry in entries]
            rows, table = self.vectors.table(word for words in (*own_words, *entity_words) for word in words)
            for name, group, like in (("words", own_words, ids), ("entity_words", entity_words, entity_ids)):
                batch[name] = np.zeros_like(like)
                for place, words in zip(batch[name], group, strict=True):
                    place[: len(words)] = [rows[word] for word in words]
            batch["word_vectors"] = table
        return {
            **{name: torch.from_numpy(array) for name, array in batch.items()},
            "num_tokens": int(mask.sum()),
            "records": HostList(records),
            "windows": HostList(windows),
            "entities": HostList((entry.id, entry.type) for entry in entries),
        }

    def _mentions(
        self, texts: list[str], found: list[list[Any]], gold: list[dict[tuple[int, int], str]]
    ) -> list[dict[tuple[int, int], list[int]]]:
        """For each text its mentions and the entities that each may mean."""
        lexicon = self.lexicon
        if not self.training:
            return [
                {
                    (word.start, word.end): lexicon.candidates(word.name, self.min_annotations)[: self.max_candidates]
                    for word in words
                }
                for words in found
            ]
        spans = [(row, span, entity) for row, group in enumerate(gold) for span, entity in group.items()]
        names = lexicon.knowledge.names.numbers([lookup_form(texts[row][slice(*span)]) for row, span, _ in spans])
        entities = lexicon.knowledge.numbers([entity for _, _, entity in spans])
        paired: list[dict[tuple[int, int], list[int]]] = [{} for _ in texts]
        for (row, span, _), name, entity in zip(spans, names.tolist(), entities.tolist(), strict=True):
            if name >= 0 and entity >= 0:
                bearers = lexicon.knowledge.bearers(name).tolist()
                paired[row][span] = list(dict.fromkeys([entity, *bearers]))[: self.max_candidates]
        return paired

    def _entry(self, number: int) -> "Entry":
        return entry_of(self.lexicon.knowledge, number, self.words)

    def _encode(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        lengths = np.array([len(text) for text in texts])
        ids = np.full((len(texts), lengths.max()), self.tokenizer.pad_id)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = self.tokenizer.encode(text)[0][1:-1]
        return ids, np.arange(ids.shape[1]) < lengths[:, None]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is needed of an entity to compare it with texts, in lower case.

    Attributes:
        id: of the entity.
        type: its first type.
        text: its description.
        words: the word that each character of it lies in.
        characters, word_set: what occurs in it.
        objects: finds its objects in a text, the longest first; None where it has none that are short enough.
    """

    id: str
    type: str | None
    text: str
    words: tuple[str, ...]
    characters: frozenset[str]
    word_set: frozenset[str]
    objects: re.Pattern[str] | None


@lru_cache(maxsize=100_000)
def entry_of(knowledge: KnowledgeBase, number: int, words: WordKind) -> Entry:
    """The entry of an entity."""
    entity = knowledge.entity(number)
    text = lower_case(description(entity))
    objects = {lower_case(value) for _, value in entity.facts if 0 < len(value) <= MAX_OBJECT_LENGTH}
    pattern = "|".join(map(re.escape, sorted(objects, key=lambda value: (-len(value), value))))
    owners = word_of_each_character(text, segmenter(words))
    return Entry(
        entity.id,
        entity.types[0] if entity.types else None,
        text,
        tuple(owners),
        frozenset(text),
        frozenset(owners),
        re.compile(pattern) if pattern else None,
    )


def match_features(text: str, words: Sequence[str], entry: Entry) -> NDArray[np.bool_]:
    """What each character of a text has in common with an entity, (T, 3): it occurs in its description; its word does;
    it is part of one of its objects.

    Args:
        text: in lower case.
        words: the word that each character lies in.
        entry: the entity.
    """
    features = np.zeros((len(text), NUM_FEATURES), dtype=bool)
    features[:, 0] = [character in entry.characters for character in text]
    features[:, 1] = [word in entry.word_set for word in words]
    for match in entry.objects.finditer(text) if entry.objects is not None else ():
        features[match.start() : match.end(), 2] = True
    return features
