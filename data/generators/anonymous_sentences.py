"""Sentences in which every character is a number: the built-in ones, without what anyone knows of the language."""

from collections.abc import Iterator

from ..daguan import record_of
from ..records import SpanRecord
from .entity_sentences import entity_sentences

LABELS = {"name": "a", "company": "b", "address": "c"}
"""Which types are asked for, and under which label."""
_PRIME, _FACTOR = 65537, 40503


def anonymous_sentences(seed: int = 0) -> Iterator[SpanRecord]:
    """Yield sentences without end, no two with the same text; the same seed gives the same sentences."""
    for record in entity_sentences(seed):
        segments, place = [], 0
        for span in [span for span in record.spans if span.type in LABELS]:
            segments += [(record.text[place : span.start], "o"), (span.text, LABELS[span.type])]
            place = span.end
        segments.append((record.text[place:], "o"))
        yield record_of(record.id, [(_numbers(text), label) for text, label in segments if text])


def _numbers(text: str) -> str:
    """Each character's number: no two have the same, as the prime is above all of them (and no emoji is among them)."""
    return "_".join(str(ord(character) * _FACTOR % _PRIME) for character in text)
