"""Plain baselines that a trained model is stated beside."""

import re
from collections import Counter
from collections.abc import Iterable

from .lexicon import MentionLexicon
from .records import (
    TRIGGER_ROLE,
    VALUE_SLOT,
    Answer,
    Argument,
    Event,
    EventRecord,
    Link,
    LinkRecord,
    Mention,
    ReadingRecord,
    Relation,
    RelationRecord,
)

_SENTENCE = re.compile(r"[^。！？!?；;\n]+")


class TriggerDictionary:
    """Predicts an event type when one of the words that named such an event in training occurs in the text."""

    def __init__(self, triggers: dict[str, set[str]]) -> None:
        self.triggers = triggers
        """Event type -> its trigger words."""

    @classmethod
    def fit(cls, records: Iterable[EventRecord]) -> "TriggerDictionary":
        """Collect the triggers of annotated records."""
        triggers: dict[str, set[str]] = {}
        for record in records:
            for event in record.events:
                if event.trigger is not None:
                    triggers.setdefault(event.type, set()).add(event.trigger.text)
        return cls(triggers)

    def predict(self, record: EventRecord) -> EventRecord:
        """Return the record with one event for each type found, its only argument the trigger.

        Of several triggers of one type the longest is taken, at its first place.
        """
        events = []
        for event_type, words in self.triggers.items():
            found = [word for word in words if word in record.text]
            if found:
                word = max(found, key=lambda word: (len(word), -record.text.index(word)))
                events.append(Event(event_type, (Argument(TRIGGER_ROLE, word, record.text.index(word)),)))
        return EventRecord(record.id, record.text, tuple(events))


class ArgumentDictionary:
    """Predicts words that played a role in training, for the event types whose trigger occurs in the text.

    Args:
        triggers: what finds event types.
        words: (event type, role) -> words.
    """

    def __init__(self, triggers: TriggerDictionary, words: dict[tuple[str, str], set[str]]) -> None:
        self.triggers = triggers
        self.words = words

    @classmethod
    def fit(cls, records: Iterable[EventRecord]) -> "ArgumentDictionary":
        """Collect triggers and arguments of annotated records."""
        records = list(records)
        words: dict[tuple[str, str], set[str]] = {}
        for record in records:
            for event in record.events:
                for argument in event.arguments:
                    if argument.role != TRIGGER_ROLE:
                        words.setdefault((event.type, argument.role), set()).add(argument.text)
        return cls(TriggerDictionary.fit(records), words)

    def predict(self, record: EventRecord) -> EventRecord:
        """Return the record with one event for each type found: its trigger, and every known word at its first place.

        Of words of one role that contain each other only the longest counts.
        """
        text = record.text
        events = []
        for event in self.triggers.predict(record).events:
            arguments = list(event.arguments)
            for (kind, role), known in self.words.items():
                found = [word for word in known if word in text] if kind == event.type else []
                longest = sorted(word for word in found if not any(word in other for other in found if other != word))
                arguments += [Argument(role, word, text.index(word)) for word in longest]
            events.append(Event(event.type, tuple(arguments)))
        return EventRecord(record.id, text, tuple(events))


class RelationDictionary:
    """Predicts a relation of training when its subject and all spans of its object occur in the text.

    Args:
        relations: what was stated in training.
    """

    def __init__(self, relations: Iterable[Relation]) -> None:
        self.relations: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], None]] = {}
        """Subject -> (predicate, (slot, span) of each slot) of what is known of it."""
        for relation in relations:
            slots = tuple((slot.role, slot.text) for slot in relation.object)
            self.relations.setdefault(relation.subject.text, {})[relation.predicate, slots] = None

    @classmethod
    def fit(cls, records: Iterable[RelationRecord]) -> "RelationDictionary":
        """Collect the relations of annotated records."""
        return cls(relation for record in records for relation in record.relations)

    def predict(self, record: RelationRecord) -> RelationRecord:
        """Return the record with the known relations whose spans all occur in it, each at its first place."""
        text = record.text
        found = [
            Relation(
                predicate,
                Mention(subject, text.index(subject)),
                tuple(Argument(slot, span, text.index(span)) for slot, span in slots),
            )
            for subject, known in self.relations.items()
            if subject in text
            for predicate, slots in known
            if all(span in text for _, span in slots)
        ]
        return RelationRecord(record.id, text, tuple(found))


class RelationWords:
    """Predicts a predicate between every word that was its subject in training and every word that was its object.

    Bolder than `RelationDictionary`: subject and object need not have been seen together. Only values are predicted.
    """

    def __init__(self, subjects: dict[str, set[str]], objects: dict[str, set[str]]) -> None:
        self.subjects = subjects
        """Predicate -> words that were its subjects."""
        self.objects = objects
        """Predicate -> words that were its values."""

    @classmethod
    def fit(cls, records: Iterable[RelationRecord]) -> "RelationWords":
        """Collect the words of annotated records."""
        subjects: dict[str, set[str]] = {}
        objects: dict[str, set[str]] = {}
        for record in records:
            for relation in record.relations:
                subjects.setdefault(relation.predicate, set()).add(relation.subject.text)
                objects.setdefault(relation.predicate, set()).add(relation.object[0].text)
        return cls(subjects, objects)

    def predict(self, record: RelationRecord) -> RelationRecord:
        """Return the record with a relation for every pair of words found."""
        text = record.text
        found = [
            Relation(
                predicate,
                Mention(subject, text.index(subject)),
                (Argument(VALUE_SLOT, value, text.index(value)),),
            )
            for predicate, words in self.subjects.items()
            for subject in sorted(word for word in words if word in text)
            for value in sorted(word for word in self.objects[predicate] if word in text)
            if subject != value
        ]
        return RelationRecord(record.id, text, tuple(found))


class SentenceOverlap:
    """Answers a question with the sentence of its passages that has most of its characters."""

    def find(self, record: ReadingRecord) -> tuple[Answer | None, float]:
        """The sentence and the share of the question that it has; of equally good ones the shortest, then the first."""
        asked = Counter(record.question)
        best: tuple[int, int] = (0, 0)
        found = None
        for number, passage in enumerate(record.passages):
            for match in _SENTENCE.finditer(passage):
                text = match[0].strip()
                common = sum((asked & Counter(text)).values())
                if text and (found is None or (common, -len(text)) > best):
                    best, found = (common, -len(text)), Answer(text, passage.index(text, match.start()), number)
        return found, best[0] / max(1, len(record.question))


class EntityDictionary:
    """Takes every name that a lexicon finds in the text for a mention of the entity that it meant most often.

    Args:
        lexicon: knows the names and, from annotated texts, their meanings.
    """

    def __init__(self, lexicon: MentionLexicon) -> None:
        self.lexicon = lexicon

    def predict(self, record: LinkRecord) -> LinkRecord:
        """Return the record with a link for each name that covers the text, see `MentionLexicon.words`."""
        links = []
        for start, end, name in self.lexicon.words([record.text])[0]:
            entity = self.lexicon.knowledge.entity(self.lexicon.most_frequent(name))
            links.append(Link(record.text[start:end], start, entity.id, entity.types[0] if entity.types else None))
        return LinkRecord(record.id, record.text, tuple(links))
