"""Typed records: what a reader gives, what a model is trained on and what a writer takes.

Positions count characters (Python's, that is Unicode code points) of the original text, from 0; ends are exclusive.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRIGGER_ROLE = "触发词"
"""The role under which an event's trigger stands among its arguments: corpora without triggers need no special case."""
VALUE_SLOT = "@value"
"""The slot of a relation's object that is always there; the others say more of it."""


NIL = "NIL"
"""Stands for the entity of a mention whose entity is not in the knowledge base."""


@dataclass(frozen=True, slots=True)
class Entity:
    """An entry of a knowledge base: its names, what kind of thing it is and what is said of it."""

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """(predicate, object) pairs."""


@dataclass(frozen=True, slots=True)
class Link:
    """One mention in a text and the id of the entity it means, or `NIL`; `type` is the first type of that entity."""

    text: str
    start: int
    entity: str
    type: str | None = None

    @property
    def end(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """A text and its linked mentions: gold from a reader, predicted from a model, none for a text to be read."""

    id: str
    text: str
    links: tuple[Link, ...] = ()

    def judged(self) -> "LinkRecord":
        """The record as it is scored: mentions of no entity do not count."""
        return LinkRecord(self.id, self.text, tuple(link for link in self.links if link.entity != NIL))


@dataclass(frozen=True, slots=True)
class Argument:
    """One span of the text and the role it plays in an event."""

    role: str
    text: str
    start: int

    @property
    def end(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its type and its arguments, the trigger (if any) among them under `TRIGGER_ROLE`."""

    type: str
    arguments: tuple[Argument, ...]

    @property
    def trigger(self) -> Argument | None:
        """The argument that names the event, or None when there is none."""
        return next((argument for argument in self.arguments if argument.role == TRIGGER_ROLE), None)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A text and the events it tells of: gold from a reader, predicted from a model, none for a text to be read."""

    id: str
    text: str
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Mention:
    """One span of the text."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Relation:
    """One statement: subject, predicate and object, which is a span for each of its slots, `VALUE_SLOT` first."""

    predicate: str
    subject: Mention
    object: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class RelationRecord:
    """A text and the relations that it states: gold from a reader, predicted from a model, none for a text to be read.

    Relations are known by their texts; where these lie is one place of several, perhaps.
    """

    id: str
    text: str
    relations: tuple[Relation, ...] = ()


def slot_links(labels: Sequence[Sequence[str]]) -> dict[int, int]:
    """Numbers of the links from an object's `VALUE_SLOT` to its other slots, which tell apart several objects.

    Args:
        labels: [predicate, slot] of each label; links from a subject to an object have the label's own number.

    Returns:
        Label of a slot other than `VALUE_SLOT` -> number of its link, from `len(labels)` on.
    """
    others = [label for label, (_, slot) in enumerate(labels) if slot != VALUE_SLOT]
    return {label: len(labels) + number for number, label in enumerate(others)}


@dataclass(frozen=True, slots=True)
class Span:
    """A typed piece of a text, such as the name of a person."""

    type: str
    text: str
    start: int

    @property
    def end(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A text and its typed spans, in any order; they may overlap. The id is what the data set has: a text or number."""

    id: str | int
    text: str
    spans: tuple[Span, ...] = ()

    def accepts(self, predicted: "SpanRecord") -> bool:
        """Whether a predicted record has these spans at their places, in any order, and no others."""
        return set(self.spans) == set(predicted.spans)


def without_overlaps(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans of which no two share a character, in the order of the text: the longest first, then the earliest.

    What tags of single tokens can say.
    """
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (-len(span.text), span.start)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return tuple(sorted(kept, key=lambda span: span.start))


@dataclass(frozen=True, slots=True)
class Answer:
    """A right answer and one of the places where it stands; `start` is None where it stands in no passage."""

    text: str
    start: int | None
    passage: int = 0

    @property
    def end(self) -> int | None:
        """Position after the last character."""
        return None if self.start is None else self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class ReadingRecord:
    """A question and the passages in which its answer may stand.

    Each of several answers is right, a predicted record has one at most. None at all: the passages do not tell, or the
    question is yet to be read.
    """

    id: str
    question: str
    passages: tuple[str, ...]
    answers: tuple[Answer, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The answers without their places, each once."""
        return tuple(dict.fromkeys(answer.text for answer in self.answers))

    def accepts(self, predicted: "ReadingRecord") -> bool:
        """Whether a predicted record gives one of these answers, or none where there is none."""
        if not self.answers or not predicted.answers:
            return not self.answers and not predicted.answers
        return predicted.answers[0].text in self.texts
