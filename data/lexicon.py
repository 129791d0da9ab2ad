"""Which names of a knowledge base count as mentions in texts, and whom they mean, as annotated texts show.

Source: https://kexue.fm/archives/6919 (pruning of the dictionary, table of candidates).
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .dictionary import lower_case, max_match
from .files import read_text
from .knowledge import KnowledgeBase, lookup_form
from .records import NIL, LinkRecord

TEXTS_AT_ONCE = 1000


class Word(NamedTuple):
    """A name in a text: its characters, the end exclusive, and its number."""

    start: int
    end: int
    name: int


class MentionLexicon:
    """The names of a knowledge base without those that are hardly ever meant, and the entities that each may mean.

    Args:
        knowledge: the knowledge base.
        pruned: names (in their lookup form) that are left out.
        annotated: name -> how often each entity was meant by it.
    """

    def __init__(
        self,
        knowledge: KnowledgeBase,
        pruned: Iterable[str] = (),
        annotated: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.knowledge = knowledge
        self.pruned = sorted(pruned)
        self.annotated = {name: dict(counts) for name, counts in (annotated or {}).items()}
        self._kept = np.ones(len(knowledge.names), dtype=bool)
        left_out = knowledge.names.numbers(self.pruned)
        self._kept[left_out[left_out >= 0]] = False
        numbers = knowledge.names.numbers(list(self.annotated)).tolist()
        self._annotated = {n: c for n, c in zip(numbers, self.annotated.values(), strict=True) if n >= 0}

    @classmethod
    def fit(
        cls, knowledge: KnowledgeBase, records: Iterable[LinkRecord], prune_ratio: float | None = 5.0
    ) -> "MentionLexicon":
        """Learn from annotated texts, which must be those that a model is trained on and no others.

        A name is left out if (f + 1) / (t + 1) >= `prune_ratio`, for the numbers of texts in which it is found but not
        annotated, f, and annotated, t. None keeps all. Mentions without an entity do not count.
        """
        whole = cls(knowledge)
        found: Counter[int] = Counter()
        meant: Counter[str] = Counter()
        annotated: dict[str, Counter[str]] = {}
        stream = iter(records)
        while some := list(islice(stream, TEXTS_AT_ONCE)):
            for record, words in zip(some, whole.words([record.text for record in some]), strict=True):
                links = [(lookup_form(link.text), link.entity) for link in record.links if link.entity != NIL]
                for name, entity in links:
                    annotated.setdefault(name, Counter())[entity] += 1
                names = sorted({name for name, _ in links})
                meant.update(names)
                found.update({word.name for word in words} - set(knowledge.names.numbers(names).tolist()))
        pruned = []
        if prune_ratio is not None:
            numbers = dict(zip(knowledge.names.numbers(list(meant)).tolist(), meant.values(), strict=True))
            wrong = {name for name, f in found.items() if (f + 1) / (numbers.get(name, 0) + 1) >= prune_ratio}
            pruned = [form for form, name in whole.forms(wrong)]
        return cls(knowledge, pruned, annotated)

    def forms(self, names: Iterable[int]) -> list[tuple[str, int]]:
        """The lookup forms of names by their numbers, and these."""
        found = []
        for name in sorted(names):
            entity = self.knowledge.entity(int(self.knowledge.bearers(name)[0]))
            forms = list(dict.fromkeys(map(lookup_form, (entity.name, *entity.aliases))))
            found.append((forms[self.knowledge.names.numbers(forms).tolist().index(name)], name))
        return found

    def words(self, texts: Sequence[str]) -> list[list[Word]]:
        """The names that cover each text best, see `max_match`; their marks 《》 are no part of them."""
        found = self.knowledge.names.find([lower_case(text) for text in texts])
        found = found.where(self._kept[found.name])
        columns = zip(*(part.tolist() for part in (found.text, found.start, found.end, found.name)), strict=True)
        words: list[list[Word]] = [[] for _ in texts]
        for text, group in groupby(columns, key=lambda row: row[0]):
            all_words = [Word(*row[1:]) for row in group]
            chosen = max_match(len(texts[text]), [(word.start, word.end) for word in all_words])
            words[text] = [all_words[number] for number in chosen]
        return words

    def candidates(self, name: int, min_annotations: int = 2) -> list[int]:
        """Numbers of the entities that a name may mean: those annotated so often if there are any, else all its
        bearers."""
        often = [entity for entity, count in self._annotated.get(name, {}).items() if count >= min_annotations]
        known = [number for number in self.knowledge.numbers(often).tolist() if number >= 0] if often else []
        return known or self.knowledge.bearers(name).tolist()

    def most_frequent(self, name: int) -> int:
        """Number of the entity that a name was annotated with most often, else of its first bearer."""
        counts = self._annotated.get(name, {})
        for entity in sorted(counts, key=lambda entity: -counts[entity]):
            number = int(self.knowledge.numbers([entity])[0])
            if number >= 0:
                return number
        return int(self.knowledge.bearers(name)[0])

    def save(self, path: str | Path) -> None:
        """Write what was learnt, without the knowledge base."""
        content = {"pruned": self.pruned, "annotated": self.annotated}
        Path(path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, knowledge: KnowledgeBase) -> "MentionLexicon":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or broken.
        """
        try:
            content = json.loads(read_text(path))
            return cls(knowledge, map(str, content["pruned"]), content["annotated"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not what a lexicon saves ({error}); save the assets again") from error
